"""What cannot be served is refused by name. No model is loaded here."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dylora_moe_vllm.checkpoint import BASE_VARIABLE, Files
from dylora_moe_vllm.experts import add_experts
from dylora_moe_vllm.route import BASE, MAX_POSITIONS, Route, position_key, position_query
from dylora_moe_vllm.supported import SupportedConfig

from .conftest import Run, on_the_hub

SPECULATIVE = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
WEIGHTS = "peft_adapters/expert_1/expert_1/adapter_model.safetensors"


def configured(checkpoint: str, **options: Any) -> Any:
    """What vLLM makes of its arguments before it loads anything."""
    from vllm import EngineArgs

    args = {"dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True}
    return EngineArgs(checkpoint, **args | options).create_engine_config()


def test_settings_that_are_supported(runs: dict[str, Run]) -> None:
    config = configured(runs["llama"].checkpoint, enable_prefix_caching=True, enable_chunked_prefill=True)
    assert config.model_config.hf_config.model_type == "llama"
    assert config.model_config.architecture == "DyLoRAMoEForCausalLM"
    assert "dylora_moe" not in sys.modules  # it may need another version of Transformers


@pytest.mark.parametrize(
    "options, named",
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size 2"),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size 2"),
        ({"enable_lora": True}, "--enable-lora"),
        ({"speculative_config": SPECULATIVE}, "--speculative-config"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"runner": "pooling"}, "pooling"),
        ({"quantization": "fp8"}, "--quantization fp8"),
        ({"enable_prompt_embeds": True}, "--enable-prompt-embeds"),
        ({"load_format": "dummy"}, "--load-format dummy"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_are_not(runs: dict[str, Run], options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        configured(runs["llama"].checkpoint, **options)


@pytest.fixture
def copy(runs: dict[str, Run], tmp_path: Path) -> Path:
    """A run folder of its own."""
    shutil.copytree(runs["llama"].folder, tmp_path / "run")
    return tmp_path / "run"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    "spoil, named",
    [
        (lambda run: change(run / "checkpoint/config.json", format_version=1), "dylora-moe convert"),
        (lambda run: change(run / "checkpoint/config.json", experts=[{}]), "dylora-moe verify"),
        (lambda run: change(run / "base/config.json", hidden_size=32), "hidden_size: 64 there, 32 here"),
        (lambda run: change(run / "base/config.json", model_type="mistral"), "model_type: llama there, mistral here"),
        (lambda run: (run / "base").rename(run / "moved"), BASE_VARIABLE),
    ],
    ids=["version", "experts", "sizes", "type", "moved"],
)
def test_configs_that_do_not_fit(copy: Path, spoil: Callable[[Path], Any], named: str) -> None:
    spoil(copy)
    with pytest.raises(ValueError, match=named):
        configured(str(copy / "checkpoint"))


def test_a_base_model_that_has_moved(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / "base").rename(copy / "moved")
    monkeypatch.setenv(BASE_VARIABLE, str(copy / "moved"))
    config = configured(str(copy / "checkpoint"))
    assert config.model_config.hf_config.dylora_moe["base"] == str(copy / "moved")


def test_the_tokenizer_is_found(copy: Path) -> None:
    checkpoint, given = copy / "checkpoint", copy / "base"
    assert configured(str(checkpoint), tokenizer=str(given)).model_config.tokenizer == str(given)
    assert configured(str(checkpoint)).model_config.tokenizer == str(copy)
    (copy / "tokenizer.json").rename(checkpoint / "tokenizer.json")
    assert configured(str(checkpoint)).model_config.tokenizer == str(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    assert configured(str(checkpoint)).model_config.tokenizer == str(given)


def test_the_tokenizer_of_a_checkpoint_on_the_hub(copy: Path) -> None:
    """Where the Hub can be asked, vLLM keeps its id; otherwise the model is a folder of the cache."""
    found = configured(str(copy / "checkpoint")).model_config.hf_config

    def tokenizer(name: str) -> str:
        settings = {"hf_config": found, "revision": None, "tokenizer_revision": None, "generation_config": "auto"}
        config = SimpleNamespace(model=name, tokenizer=name, **settings)
        SupportedConfig.verify_and_update_model_config(config)
        return config.tokenizer

    on_the_hub(copy, "without")
    assert tokenizer("user/without") == str(copy / "base")
    shutil.copy(copy / "tokenizer.json", on_the_hub(copy, "with") / "tokenizer.json")
    assert tokenizer("user/with") == "user/with"


def test_sampling_is_that_of_the_base_model(copy: Path) -> None:
    checkpoint = str(copy / "checkpoint")
    change(copy / "base/generation_config.json", repetition_penalty=1.25, do_sample=True, top_p=0.75)
    found = configured(checkpoint).model_config.get_diff_sampling_param()
    assert found["repetition_penalty"] == 1.25 and found["top_p"] == 0.75
    assert configured(checkpoint, generation_config="vllm").model_config.get_diff_sampling_param() == {}
    (copy / "checkpoint/generation_config.json").write_text('{"top_p": 0.5}')
    assert configured(checkpoint).model_config.get_diff_sampling_param() == {"top_p": 0.5}


def test_a_config_that_has_changed(copy: Path) -> None:
    change(copy / "checkpoint/config.json", step=7)
    with pytest.raises(ValueError, match=r"config\.json: expected .* SHA-256"):
        Files(str(copy / "checkpoint"))


@pytest.mark.parametrize("name", ["router.safetensors", WEIGHTS])
def test_files_that_have_changed(copy: Path, name: str) -> None:
    path = copy / "checkpoint" / name
    files = Files(str(copy / "checkpoint"))
    assert files.router() and files.adapter("expert_1")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: expected .* SHA-256"):
        _ = files.router(), files.adapter("expert_1")
    path.unlink()
    with pytest.raises(ValueError, match=f"{name}: expected it in the checkpoint"):
        _ = files.router(), files.adapter("expert_1")


def test_a_checkpoint_without_manifest(copy: Path) -> None:
    (copy / "checkpoint/manifest.json").unlink()
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        Files(str(copy / "checkpoint"))


def test_experts_on_a_layer_that_is_not_there() -> None:
    adapter = {"layers.0.q_proj": {"A": torch.zeros(2, 4), "B": torch.zeros(4, 2)}}
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj"):
        add_experts(torch.nn.Module(), [adapter], [1.0], torch.ones(1, 1), {"qkv_proj": ["q_proj", "k_proj", "v_proj"]})


def test_experts_on_rows_that_vllm_orders_otherwise() -> None:
    adapter = {"layers.0.attention.query_key_value": {"A": torch.zeros(2, 4), "B": torch.zeros(12, 2)}}
    with pytest.raises(ValueError, match=r"query_key_value, whose rows vLLM has in another order"):
        add_experts(torch.nn.Module(), [adapter], [1.0], torch.ones(1, 1), {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decay", [0.5, 0.95, 0.9999, 1.0])
@pytest.mark.parametrize("scale", [0.0625, 0.125, 1.0])
def test_scores_are_those_of_the_positions(dtype: torch.dtype, decay: float, scale: float) -> None:
    """What the parts of keys and queries make in each dtype, up to the last position there can be."""
    positions = torch.tensor([1, 2, 127, 128, BASE**2 - 1, BASE**2, 100_000, MAX_POSITIONS - 1])
    query = position_query(decay, scale, 32, dtype)
    keys = position_key(positions, 32).to(dtype)
    assert query.isfinite().all()
    score = keys.double() @ query.double() * scale
    expected = positions.double() * -torch.tensor(decay, dtype=torch.float64).log()
    rtol = 2e-6 if dtype != torch.float16 else 1e-3  # a slow decay is a small number, of which a float16 has few bits
    assert torch.allclose(score, expected, rtol=rtol)
    first = position_key(torch.tensor([0]), 32).to(dtype).double() @ query.double() * scale
    assert first.item() < -99


def test_room_for_experts_and_tokens() -> None:
    route = Route.__new__(Route)
    torch.nn.Module.__init__(route)
    route.experts, route.kv_heads, route.head_size = 64, 1, 64
    route.attn, route.mixture = torch.nn.Module(), torch.nn.Module()
    route.attn.sliding_window, route.mixture.router = None, torch.nn.Module()
    route.mixture.router.decay = 0.999
    route._check(MAX_POSITIONS)
    with pytest.raises(ValueError, match="--max-model-len"):
        route._check(MAX_POSITIONS + 1)
    route.attn.sliding_window = 4096
    route._check(4096)
    with pytest.raises(ValueError, match="sliding window"):
        route._check(4097)
    route.experts = 65
    with pytest.raises(ValueError, match="room for 64"):
        route._check(128)
