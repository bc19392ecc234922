"""Write tiny random checkpoints, and what DyLoRA-MoE itself computes with them. Runs in the project's own environment.

PYTHONPATH=. python serving/dylora_moe_vllm/tests/make_models.py FOLDER [KIND ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig

from dylora_moe import DyLoRAMoE, MoELoraConfig, RouterConfig
from dylora_moe.base.preserve import seeded
from dylora_moe.base.tiny import byte_tokenizer

GREEDY_TOKENS = 8
LENGTHS = (1, 5, 33, 70, 100, 400)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "max_position_embeddings": 512}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
WINDOW, TIED, SCALED = {"sliding_window": 32}, {"tie_word_embeddings": True}, {"query_pre_attn_scalar": 16}
SHARED = {"num_attention_heads": 2, "num_key_value_heads": 1}
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "max_position_embeddings": 2048}
SMOLLM2 |= {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]

# The type of the base model and more of its config, the targets and ranks of the experts, the router, their state, and
# the expert that is new.
KINDS: dict[str, tuple[str, dict[str, Any], Any, tuple[int, ...], dict[str, Any], str, int | None]] = {
    "llama": ("llama", {}, "all-linear", (4, 4, 2, 4, 4), {"top_k": 2}, "mature", 4),
    "one_expert": ("llama", {}, QKVO, (4, 4), {}, "mature", 0),
    "mistral": ("mistral", WINDOW, QKVO, (4, 4), {"decay": 0.5}, "mature", None),
    "qwen2": ("qwen2", SHARED, [*QKVO, "up_proj"], (4, 4, 4), {}, "immature", None),
    "qwen3": ("qwen3", TIED, QKVO, (4, 4, 4), {"top_k": 1, "decay": 0.9}, "mature", None),
    "gemma": ("gemma", TIED, QKVO, (4, 4), {"decay": 1.0}, "mature", None),
    "gemma2": ("gemma2", TIED | WINDOW | SCALED, QKVO, (4, 4, 4), {"temperature": 0.5}, "immature", None),
    "gemma3": (
        "gemma3_text",
        TIED | WINDOW | SCALED | {"layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
        ["q_proj", "v_proj", "down_proj"],
        (4, 4, 4),
        {"prior_tokens": 1.0},
        "mature",
        None,
    ),
    "benchmark": ("llama", SMOLLM2, QKVO, (16,) * 4, {}, "mature", None),  # made only if it is named
}


def main(folder: Path, kinds: list[str]) -> None:
    torch.set_num_threads(1)
    for kind in kinds or KINDS.keys() - {"benchmark"}:
        model = build(kind, folder / kind)
        model.save_checkpoint(folder / kind / "checkpoint")
        if kind != "benchmark":
            (folder / kind / "reference.json").write_text(json.dumps(reference(model)))


def build(kind: str, folder: Path) -> DyLoRAMoE:
    """Write a tokenizer and a base model into a run folder, and return a mixture on it."""
    model_type, settings, targets, ranks, router, state, new = KINDS[kind]
    tokenizer = byte_tokenizer()
    ids = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    ids |= {"pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": False}
    config = CONFIG_MAPPING[model_type](**SIZES | HEADS | ids | settings)
    tokenizer.save_pretrained(folder)
    with seeded(0):
        random_base(config).save_pretrained(folder / "base")
    loras = [MoELoraConfig(r=r, lora_alpha=2 * r, target_modules=targets, lora_dropout=0.0) for r in ranks]
    with seeded(1):
        model = DyLoRAMoE.from_base(folder / "base", experts=loras, router=RouterConfig(**router), dtype="float32")
        randomise(model, new)
    if state == "mature":
        model.mark_mature()
    return model.eval()


def random_base(config: PretrainedConfig) -> torch.nn.Module:
    """Return a model whose random weights are large enough for attention and experts to matter."""
    base = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.1)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    return base


def randomise(model: DyLoRAMoE, new: int | None) -> None:
    """Fill experts and router with noise, but not the B of the expert `new`."""
    with torch.no_grad():
        for name, parameter in model.trained_parameters().items():
            if f"lora_B.expert_{new}." not in name:
                parameter.normal_(std=0.3)
        for parameter in model.router.parameters():
            parameter.normal_(std=0.5)


@torch.no_grad()
def reference(model: DyLoRAMoE) -> dict[str, Any]:
    """Return what a server should answer, and what a wrong one would."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in LENGTHS]
    prompts.append(prompts[4][:96] + prompts[1])  # begins as another one does
    routed = [answer(model, prompt) for prompt in prompts]
    found: dict[str, Any] = {"prompts": prompts, "routed": [logprobs(model, p) for p in prompts]}
    found["greedy"] = [ids for ids, _ in routed]
    found["greedy_logprobs"] = [values for _, values in routed]
    weights = [model(torch.tensor([p]), output_router_logits=True).router_logits[0].exp() for p in prompts]
    found["probabilities"] = [each.tolist() for each in weights]
    found["expert_0"] = [logprobs(model, p, expert=0) for p in prompts]
    if model.expert_states.count("new") < model.num_experts - 1:
        for parameter in model.router.parameters():
            parameter.zero_()
        found["uniform"] = [logprobs(model, p) for p in prompts]
    return found


def logprobs(model: Callable[..., Any], ids: list[int], **options: Any) -> list[float]:
    """Return the log-probability of each token but the first."""
    scores = model(torch.tensor([ids]), **options).logits[0].log_softmax(-1)
    return [scores[i, token].item() for i, token in enumerate(ids[1:])]


def answer(model: Callable[..., Any], prompt: list[int]) -> tuple[list[int], list[float]]:
    """Return the greedy tokens after a prompt, and their log-probabilities."""
    ids, values = list(prompt), []
    for _ in range(GREEDY_TOKENS):
        value, token = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1).max(-1)
        ids.append(token.item())
        values.append(value.item())
    return ids[len(prompt) :], values


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
