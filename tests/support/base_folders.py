"""Folders with tiny base models, and a machine without token, cache and network."""

import json

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen2Config

from dylora_moe.errors import UsageError

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 64}
FAMILIES = {
    "gemma": GemmaConfig(**SIZES, **SPECIAL, num_key_value_heads=1, head_dim=8),
    "llama": LlamaConfig(**SIZES, **SPECIAL, num_key_value_heads=2, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**SIZES, **SPECIAL, num_key_value_heads=2),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2),
    "gpt_neox": GPTNeoXConfig(**SIZES, **SPECIAL),
}
LLAMA = FAMILIES["llama"].to_dict()


def isolate(monkeypatch, tmp_path):
    """No token, an empty cache, and a hub that refuses every connection at once."""
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    use_hub(monkeypatch, "http://127.0.0.1:9")


def use_hub(monkeypatch, address):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


def tiny_folder(folder):
    """A folder with a tiny Llama as save_pretrained writes it."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES["llama"]).save_pretrained(folder)
    return folder


def config_only(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def error_of(call, *arguments, **settings):
    with pytest.raises(UsageError) as error:
        call(*arguments, **settings)
    return str(error.value)


def folder_of(family, tmp_path):
    return config_only(tmp_path / family, FAMILIES[family].to_dict())
