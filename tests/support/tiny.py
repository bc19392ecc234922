"""Tiny random models of six architectures, built in milliseconds."""

from __future__ import annotations

import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dylora_moe import DyLoRAMoE, MoELoraConfig
from dylora_moe.base.preserve import seeded

ARCHITECTURES = ("gemma", "llama", "qwen2", "gpt2", "gpt_neox")
FAMILIES = (*ARCHITECTURES, "opt")  # which the README's table has
VOCABULARY = 97
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_SIZES = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, **_IDS}
_HEADS = {"num_attention_heads": 4, "max_position_embeddings": 64}


def tiny_base(
    kind: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, vocabulary: int = VOCABULARY
) -> PreTrainedModel:
    """A random causal LM of about 30,000 parameters, in evaluation mode."""
    sizes = _SIZES | {"vocab_size": vocabulary}
    with seeded(seed):
        if kind == "gemma":
            model = GemmaForCausalLM(GemmaConfig(**sizes, **_HEADS, num_key_value_heads=2, head_dim=8))
        elif kind == "llama":
            model = LlamaForCausalLM(LlamaConfig(**sizes, **_HEADS, num_key_value_heads=2))
        elif kind == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(**sizes, **_HEADS, num_key_value_heads=2))
        elif kind == "gpt_neox":
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **_HEADS))
        elif kind == "opt":  # beside the five
            sizes = {"vocab_size": vocabulary, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48}
            model = OPTForCausalLM(OPTConfig(**sizes, num_hidden_layers=3, **_HEADS, dropout=0.0, **_IDS))
        elif kind == "gpt2":
            sizes = {"vocab_size": vocabulary, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
            drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            model = GPT2LMHeadModel(GPT2Config(**sizes, **drop, **_IDS))
        else:
            raise ValueError(kind)
    return model.to(dtype).eval()


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def tiny_mixture(kind: str = "llama", experts: int | list[MoELoraConfig] = 3, seed: int = 1, **options) -> DyLoRAMoE:
    """A mixture on `tiny_base` whose experts and router are random (none is new), in evaluation mode."""
    dtype = options.pop("dtype", torch.float32)
    if isinstance(experts, int):
        options.setdefault("lora", MoELoraConfig(r=4, lora_alpha=8, lora_dropout=0.0))
    with seeded(seed):
        model = DyLoRAMoE(tiny_base(kind, dtype=dtype), experts, **options)
    return randomise(model, seed)


def randomise(model: DyLoRAMoE, seed: int = 1, spread: float = 0.3) -> DyLoRAMoE:
    """Fill every expert and the router with normal noise: a B of zeros would hide what is wrong."""
    with seeded(seed), torch.no_grad():
        for parameter in (*model.trained_parameters().values(), *model.router.parameters()):
            parameter.normal_(std=spread)
    return model
