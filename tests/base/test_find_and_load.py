"""Base models: where each name leads, what each kind of weights costs, and that nothing is made up or downloaded."""

import importlib.util
import json
import shutil
import time

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    GemmaConfig,
)

from dylora_moe import DyLoRAMoE
from dylora_moe.base import load
from dylora_moe.base.find import DEFAULT_MODEL, PRESETS, find_base
from dylora_moe.base.fingerprint import architecture
from dylora_moe.base.load import (
    compact_random_bytes,
    load_base,
    load_embeddings,
    load_tokenizer,
    parameter_bytes,
    resolve_device,
    resolve_dtype,
)
from dylora_moe.checkpoint.config import ArchitectureEntry

from ..support.base_folders import LLAMA, config_only, error_of, folder_of, isolate, tiny_folder
from ..support.tiny import ARCHITECTURES, tiny_base

# Of the Gemma 2B architecture. A change here makes every checkpoint written before look like another model's.
CODEGEMMA_FINGERPRINT = "cf49df94314f13a7f7c0df89cfa9ba8ff004d52b8a385ee384c36712eae979a6"


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    isolate(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of it, to be damaged."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in tiny.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize("name", ["google/codegemma-2b", "codegemma-2b", "Google/CodeGemma-2B"])
def test_preset_with_no_weights_is_a_meta_model_with_real_buffers(name):
    base, weights = find_base(name, weights="none")
    assert (base.kind, base.name, weights, base.has_weights) == ("preset", "google/codegemma-2b", "none", False)
    model = load_base(base, weights)
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert not model.training and model.dtype == torch.bfloat16
    assert model.config._name_or_path == "google/codegemma-2b"
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_codegemma_architecture_and_sizes():
    base, _ = find_base(DEFAULT_MODEL, weights="none")
    facts = architecture(base.config)
    assert facts["fingerprint"] == CODEGEMMA_FINGERPRINT
    assert (facts["hidden_size"], facts["num_hidden_layers"], facts["vocab_size"]) == (2048, 18, 256000)
    assert parameter_bytes(base.config, "bfloat16") == 2 * 2_506_172_416
    assert compact_random_bytes(base.config, "bfloat16") == 664_560


def test_no_hub_means_random_weights_and_one_line_that_says_so():
    base, weights = find_base(DEFAULT_MODEL)
    assert weights == "random" and base.kind == "preset"
    assert "\n" not in base.note and "random weights" in base.note and "HF_TOKEN" in base.note
    assert "is a preset: it has an architecture but no weights" in error_of(load_base, base, "pretrained")


@pytest.mark.parametrize("path", sorted(PRESETS.glob("*.json")), ids=lambda path: path.stem)
def test_every_preset_states_its_source_and_can_be_built(path):
    preset = json.loads(path.read_text())
    assert preset["source"]
    base, weights = find_base(preset["id"], weights="none")
    assert architecture(load_base(base, weights)) == architecture(base.config)


# ---------------------------------------------------------------- folders


def test_folder_gives_its_own_weights_silently(tiny, capfd):
    base, weights = find_base(tiny)
    assert (base.kind, weights, base.name, base.note) == ("folder", "pretrained", str(tiny), None)
    model = load_base(base, weights)
    kept = load_file(tiny / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())
    assert model.config._name_or_path == str(tiny) and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert load_base(base, weights, dtype="bf16").dtype == torch.bfloat16
    assert capfd.readouterr() == ("", "")


def test_a_relative_folder_is_known_by_its_absolute_path(tiny, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    base, weights = find_base(tiny.name)
    model = load_base(base, weights)
    assert model.config._name_or_path == str(tiny.resolve())


def test_silence_is_lifted_afterwards(tiny):
    transformers.logging.set_verbosity_warning()
    before = (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled())
    load_base(*find_base(tiny))
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == before
    assert not huggingface_hub.utils.are_progress_bars_disabled()


def test_config_alone_is_enough_but_not_for_pretrained(tmp_path):
    folder = folder_of("llama", tmp_path)
    assert find_base(folder, weights="none")[1] == "none"
    assert "holds no weights" in error_of(find_base, folder, weights="pretrained")


def spoil_missing(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def spoil_shape(tensors):
    tensors["model.norm.weight"] = torch.zeros(5)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_missing, "missing: model.layers.1.mlp.up_proj.weight"),
        (spoil_shape, "of another shape: model.norm.weight: expected [32], found [5]"),
    ],
)
def test_weights_that_are_not_the_configs_are_never_made_up(copy, spoil, named, capfd):
    tensors = load_file(copy / "model.safetensors")
    spoil(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert named in error_of(load_base, *find_base(copy))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("surplus", "named"),
    [
        (("model.layers.0.self_attn.masked_bias",), "not used: model.layers.0.self_attn.masked_bias"),
        (("v_head.summary.bias", "v_head.summary.weight"), "not used: v_head.summary.bias, v_head.summary.weight"),
        (
            tuple(f"vision_tower.{i}" for i in range(5)),
            "not used: vision_tower.0, vision_tower.1, vision_tower.2 and 2 more",
        ),
        ((), None),
    ],
)
def test_tensors_that_the_model_does_not_have_are_one_line(copy, surplus, named, capfd):
    tensors = load_file(copy / "model.safetensors")
    save_file(
        tensors | {name: torch.zeros(2) for name in surplus}, copy / "model.safetensors", metadata={"format": "pt"}
    )
    notes = DyLoRAMoE(load_base(*find_base(copy)), 2).notes
    assert [note.endswith(named) for note in notes] == ([True] if named else [])
    assert capfd.readouterr() == ("", "")


def test_corrupt_weights_name_the_file(copy):
    whole = (copy / "model.safetensors").read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], b"\xff" * 64):
        (copy / "model.safetensors").write_bytes(damaged)
        assert "model.safetensors: not a sound safetensors file" in error_of(load_base, *find_base(copy))


def test_missing_shard_and_escaping_index(copy):
    (copy / "model.safetensors").unlink()
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}))
    assert "model-00001-of-00002.safetensors: missing" in error_of(load_base, *find_base(copy))
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../secret.safetensors"}}))
    assert "damaged" in error_of(load_base, *find_base(copy))


def test_an_adapter_is_not_a_base(copy):
    (copy / "adapter_config.json").write_text("{}")
    assert "adapter_config.json" in error_of(load_base, *find_base(copy))
    (copy / "config.json").unlink()
    assert "LoRA adapter" in error_of(find_base, copy)


def test_what_is_named_like_a_size_and_is_none_is_accepted(tmp_path):
    others = {"block_auto_adjust_ff_dim": True, "inner": {"mscale_all_dim": 1.0, "conv_dim": 8, "rotary_dim": None}}
    assert find_base(config_only(tmp_path / "base", {**LLAMA, **others}))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("{not json", "cannot be read as JSON"),
        ("[1]", "expected an object"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("{}", "model_type None"),
        ({"model_type": "nonesuch"}, "model_type 'nonesuch'"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": "dylora-moe"}, "checkpoint of a mixture"),
        (BertConfig().to_dict(), "not a causal language model"),
        ({"model_type": "t5"}, "not a causal language model"),
        ({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({**LLAMA, "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}, "auto_map"),
        ({**LLAMA, "num_hidden_layers": 1_000_000}, "num_hidden_layers"),
        ({**LLAMA, "num_hidden_layers": 10**400}, "num_hidden_layers"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers"),
        ({**LLAMA, "hidden_size": -32}, "hidden_size"),
        ({**LLAMA, "vocab_size": "64"}, "vocab_size"),
        ({**LLAMA, "head_dim": 8.0}, "head_dim"),
        ({**LLAMA, "conv_dim": 1 << 30}, "conv_dim"),
        ({**LLAMA, "conv_dim": [8, -1]}, "conv_dim"),
        ({**LLAMA, "quantization_config": {"quant_method": "fp8"}}, "quantized"),
    ],
)
def test_config_that_cannot_be_is_refused_quickly(tmp_path, config, named):
    folder = config_only(tmp_path / "base", config)
    (folder / "evil.py").write_text("raise SystemExit('code was run')")
    start = time.perf_counter()
    assert named in error_of(find_base, folder)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("change", [{"num_attention_heads": 5}, {"hidden_act": "nonesuch"}])
def test_config_that_cannot_be_built_is_one_error(tmp_path, change):
    folder = config_only(tmp_path / "base", {**LLAMA, **change})
    message = error_of(lambda: load_base(*find_base(folder)))
    assert "Traceback" not in message and len(message) < 800


def test_folder_without_config_and_names_that_are_paths(tmp_path, monkeypatch):
    monkeypatch.setattr("dylora_moe.base.hub.ask", lambda *_, **__: pytest.fail("the hub was asked for a path"))
    assert "no config.json" in error_of(find_base, tmp_path)
    for name in ("./absent", "/absent", "~/absent", "a/b/c", "absent.gguf", "absent/", "a\\b"):
        assert "no file or folder" in error_of(find_base, name), name
    for name in ("", "a b", "-a", "a--b", "é/x", "x" * 200):
        assert "hub id" in error_of(find_base, name), name
    (tmp_path / "file.bin").write_bytes(b"x")
    assert "not a .gguf" in error_of(find_base, tmp_path / "file.bin")
    (tmp_path / "file.gguf").write_bytes(b"xxxxyyyy")
    assert "not a GGUF file" in error_of(find_base, tmp_path / "file.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
    assert "cannot be read" in error_of(find_base, tmp_path / "cut.gguf")


def test_missing_gguf_package_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\0\0\0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install gguf" in error_of(find_base, tmp_path / "model.gguf")


def test_dtypes_and_devices(tiny, monkeypatch):
    assert resolve_dtype("bf16") is torch.bfloat16 and resolve_dtype("float16") is torch.float16
    assert resolve_dtype(torch.float32) is torch.float32
    assert resolve_dtype(None, GemmaConfig(dtype="bfloat16")) is torch.bfloat16
    assert "int8" in error_of(resolve_dtype, "int8")
    assert resolve_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device(None).type == resolve_device("auto").type == "cpu"
    for device in ("cuda", "cuda:0", "mps", "meta"):
        assert "not available" in error_of(resolve_device, device), device
    assert "Unknown device" in error_of(resolve_device, "toaster")
    assert "Unknown weights" in error_of(find_base, tiny, weights="some")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_embeddings_are_loaded_alone(kind, tmp_path, monkeypatch):
    """From one file or several, with and without the prefix of the model; otherwise with the whole model."""
    tiny_base(kind).save_pretrained(tmp_path / "one")
    tiny_base(kind).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 1
    wanted = tiny_base(kind).get_input_embeddings().weight
    tensors, alone = load_file(tmp_path / "one/model.safetensors"), {"one": True, "shards": True}
    name = next(name for name, tensor in tensors.items() if tensor.equal(wanted))
    cut = {key.partition(".")[2] if key == name else key: value for key, value in tensors.items()}
    copies = {"cut": cut, "longer": {f"text.{key}": value for key, value in tensors.items()}}
    for folder, changed in (copies | {"twice": tensors | {f"text.{name}": wanted.detach().clone()}}).items():
        shutil.copytree(tmp_path / "one", tmp_path / folder)
        save_file(changed, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
        alone[folder] = folder in copies
    for folder, is_alone in alone.items():
        source = find_base(str(tmp_path / folder))[0]
        with monkeypatch.context() as patch:
            if is_alone:
                patch.setattr(load, "_pretrained", lambda *_: pytest.fail("the whole model was loaded"))
            model = load_embeddings(source)
        assert model.get_input_embeddings().weight.equal(wanted), folder
        assert any(parameter.is_meta for parameter in model.parameters()) == is_alone


def test_no_tokenizer_is_an_error_not_an_empty_one(tiny):
    assert "no tokenizer" in error_of(load_tokenizer, find_base(tiny)[0])


# ---------------------------------------------------------------- real weights


@pytest.mark.slow
@pytest.mark.real
def test_gguf_of_smollm(smollm_gguf, capfd):
    base, weights = find_base(smollm_gguf)
    assert (base.kind, weights, base.location) == ("gguf", "pretrained", str(smollm_gguf))
    preset, _ = find_base("HuggingFaceTB/SmolLM2-135M-Instruct", weights="none")
    assert ArchitectureEntry(**architecture(preset.config)).differences(architecture(base.config)) == []
    for fact in ("rope_parameters", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(preset.config, fact) == getattr(base.config, fact), fact
    assert preset.config.rms_norm_eps == pytest.approx(base.config.rms_norm_eps)
    model = load_base(base, weights)
    assert load_embeddings(base).get_input_embeddings().weight.equal(model.get_input_embeddings().weight)
    tokenizer = load_tokenizer(base)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    assert capfd.readouterr() == ("", "")
