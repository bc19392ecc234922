"""The hub, played by a server on this machine: what is asked of it, and what it says when it refuses."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file

from dylora_moe.base.find import find_base
from dylora_moe.base.load import load_base, load_tokenizer

from ..support.base_folders import LLAMA, config_only, error_of, folder_of, isolate, tiny_folder, use_hub
from ..support.hub import COMMIT, serving


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    isolate(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture
def hub(tiny, monkeypatch):
    with serving(monkeypatch, {"tiny/llama": tiny}) as server:
        yield server


def test_public_model_needs_no_token_and_keeps_its_revision(hub, monkeypatch, capfd):
    base, weights = find_base("tiny/llama")
    assert (base.kind, base.revision, weights, base.has_weights) == ("hub", COMMIT, "pretrained", True)
    assert not any("model.safetensors" in path for path in hub.downloads())
    model = load_base(base, weights)
    assert torch.equal(
        model.lm_head.weight, load_file(hub.folders["tiny/llama"] / "model.safetensors")["lm_head.weight"]
    )
    assert model.config._name_or_path == "tiny/llama"
    assert capfd.readouterr() == ("", "")
    # From now on the cache has them: unreachable, or forbidden to ask, they are used.
    hub.status = 503
    again, weights = find_base("tiny/llama")
    assert (again.revision, weights) == (COMMIT, "pretrained")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    load_base(*find_base("tiny/llama", weights="pretrained"))
    assert len(hub.asked) == asked
    assert "HF_HUB_OFFLINE" in error_of(find_base, "tiny/llama", offline_ok=False)


def test_none_and_random_fetch_the_config_alone(hub):
    for weights in ("none", "random"):
        base, used = find_base("tiny/llama", weights=weights)
        load_base(base, used)
        assert (base.revision, used) == (COMMIT, weights)
    assert {path.rsplit("/", 1)[1] for path in hub.downloads()} == {"config.json"}


def test_a_preset_with_none_or_random_asks_nothing(hub):
    for weights in ("none", "random"):
        assert find_base("google/codegemma-2b", weights=weights)[1] == weights
    assert hub.asked == []


def test_gated_missing_unreachable_and_refused_differ_in_their_first_sentence(hub, monkeypatch):
    hub.gated = True
    gated = error_of(find_base, "tiny/llama")
    missing = error_of(find_base, "tiny/absent")
    refused = error_of(find_base, "tiny/llama", token="hf_wrong")
    revision = error_of(find_base, "tiny/llama", revision="absent")
    hub.status = 503
    broken = error_of(find_base, "tiny/llama")
    use_hub(monkeypatch, "http://127.0.0.1:9")
    unreachable = error_of(find_base, "tiny/llama")
    named = ["is gated", "There is no model", "refuses the token", "no revision", "HTTP 503", "cannot be reached"]
    messages = [gated, missing, refused, revision, broken, unreachable]
    for part, message in zip(named, messages, strict=True):
        assert part in message.split(". ")[0]
        assert message.endswith("\n    export HF_TOKEN=your_token")
    assert "hf_wrong" not in refused


def test_a_hub_that_knows_the_model_but_gives_no_file_is_not_said_to_lack_it(hub):
    hub.files_status = 400
    assert "no config.json" not in error_of(find_base, "tiny/llama", weights="none")
    assert find_base("google/codegemma-2b")[1] == "random"
    hub.files_status = None
    base, weights = find_base("tiny/llama")
    hub.files_status = 400
    message = error_of(load_base, base, weights)
    assert "no config.json" not in message and message.endswith("\n    export HF_TOKEN=your_token")


def test_gated_default_falls_back_only_for_auto(hub):
    hub.gated, hub.folders["google/codegemma-2b"] = True, hub.folders["tiny/llama"]
    base, weights = find_base("google/codegemma-2b")
    assert weights == "random" and "is gated" in base.note and "\n" not in base.note
    assert "is gated" in error_of(find_base, "google/codegemma-2b", weights="pretrained")
    assert find_base("google/codegemma-2b", token=hub.token)[1] == "pretrained"


@pytest.mark.parametrize("where", ["argument", "environment", "login"])
def test_token_is_taken_from(where, hub, tmp_path, monkeypatch):
    hub.gated = True
    if where == "environment":
        monkeypatch.setenv("HF_TOKEN", hub.token)
    if where == "login":
        (tmp_path / "token").write_text(hub.token)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    base, weights = find_base("tiny/llama", token=hub.token if where == "argument" else None)
    assert weights == "pretrained" and hub.token not in repr(base)
    load_base(base, weights)


def test_cached_config_does_not_hide_that_weights_are_gated(hub):
    find_base("tiny/llama", weights="none")
    hub.gated = True
    assert "is gated" in error_of(find_base, "tiny/llama", weights="pretrained")


def test_model_without_usable_weights(hub, tmp_path):
    hub.folders["tiny/llama"] = folder_of("llama", tmp_path)
    assert "holds no weights" in error_of(find_base, "tiny/llama", weights="pretrained")
    assert find_base("tiny/llama")[1] == "random"


def test_hub_config_with_code_is_used_without_it(hub, tmp_path):
    config = {**LLAMA, "auto_map": {"AutoModelForCausalLM": "evil.Evil"}}
    hub.folders["tiny/llama"] = config_only(tmp_path / "coded", config)
    (tmp_path / "coded" / "evil.py").write_text("raise SystemExit('code was run')")
    load_base(*find_base("tiny/llama", weights="none"))
    assert not any("evil.py" in path for _, path in hub.asked)


def test_no_tokenizer_on_the_hub(hub):
    assert "no tokenizer" in error_of(load_tokenizer, find_base("tiny/llama", weights="none")[0])
    assert not any("model.safetensors" in path for path in hub.downloads())


def test_tokenizer_from_the_hub_brings_no_weights(hub, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    folder = folder_of("llama", tmp_path)
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"never to be fetched")
    hub.folders["tiny/llama"] = folder
    tokenizer = load_tokenizer(find_base("tiny/llama", weights="none")[0])
    assert tokenizer("a")["input_ids"] == [0]
    assert not any("model.safetensors" in path for path in hub.downloads())


def test_a_hub_that_never_answers_is_known_within_three_seconds(monkeypatch):
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as silent:
        use_hub(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.perf_counter()
        base, weights = find_base("google/codegemma-2b")
        assert time.perf_counter() - start < 3
    assert weights == "random" and "cannot be reached" in base.note


@pytest.mark.slow
def test_hf_endpoint_of_the_environment_is_respected(hub, tmp_path):
    code = (
        "from dylora_moe.base.find import find_base; b, w = find_base('tiny/llama', weights='none'); print(b.revision)"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home")}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr, done.returncode) == (COMMIT, "", 0)
