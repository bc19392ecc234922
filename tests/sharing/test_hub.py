"""Pushing a checkpoint to the Hub and pulling it, against a server on this machine."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from transformers import AutoModelForCausalLM, AutoTokenizer

from dylora_moe import CheckpointError, DyLoRAMoE, UsageError
from dylora_moe.checkpoint.verify import find_problems, open_checkpoint
from dylora_moe.reporting.publish import write_results
from dylora_moe.sharing.pull import pull
from dylora_moe.sharing.push import package, push

from ..support.base_folders import isolate
from ..support.data import chat_tokenizer
from ..support.hub import serving
from ..support.results import sample
from ..support.tiny import random_ids, tiny_base, tiny_mixture

IDS = random_ids(2, 12)
RIGHT = "hf_right"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_base().save_pretrained(folder)
    chat_tokenizer("base").save_pretrained(folder)
    return folder


@pytest.fixture
def hub(base, tmp_path, monkeypatch):
    """A hub that has the base model as org/base."""
    isolate(monkeypatch, tmp_path)
    (tmp_path / "hub").mkdir()
    with serving(monkeypatch, {"org/base": base}, tmp_path / "hub") as server:
        yield server


def mixture(name: str = "org/base", experts: int = 2) -> DyLoRAMoE:
    model = tiny_mixture(experts=experts)
    model.base.config._name_or_path = name
    return model


def repository(hub, name="me/mine"):
    return {path.relative_to(hub.folders[name]).as_posix() for path in hub.folders[name].rglob("*") if path.is_file()}


def test_what_is_pushed_is_loaded_from_the_hub(hub):
    model = mixture()
    url = model.push_to_hub("me/mine", token=RIGHT, private=True)
    assert url.startswith(f"{hub.address}/me/mine/commit/")
    hub.private = True
    loaded = AutoModelForCausalLM.from_pretrained("me/mine", token=RIGHT)
    assert isinstance(loaded, DyLoRAMoE)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert "tokenizer.json" not in repository(hub)
    assert AutoTokenizer.from_pretrained("me/mine", token=RIGHT).chat_template == "base"
    with pytest.raises(UsageError, match=r"There is no model me/mine on .* that may be seen without a token"):
        pull("me/mine", revision="main", cache_dir=hub.created / "other cache")


def test_the_cache_serves_where_the_hub_cannot(hub, monkeypatch):
    mixture().push_to_hub("me/mine", token=RIGHT)
    DyLoRAMoE.from_pretrained("me/mine")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    DyLoRAMoE.from_pretrained("me/mine")
    assert len(hub.asked) == asked
    with pytest.raises(UsageError, match="cannot be reached"):
        DyLoRAMoE.from_pretrained("me/others")


def test_a_cache_of_ones_own_is_for_the_base_model_too(hub, tmp_path):
    mixture().push_to_hub("me/mine", token=RIGHT)
    options = {"cache_dir": tmp_path / "mine"}
    with pytest.raises(UsageError, match=r"cannot be reached .*me/mine"):
        DyLoRAMoE.from_pretrained("me/mine", local_files_only=True, **options)
    pull("me/mine", **options)
    with pytest.raises(UsageError, match=r"org/base was not asked of the hub, because local_files_only is set"):
        DyLoRAMoE.from_pretrained("me/mine", local_files_only=True, **options)
    AutoTokenizer.from_pretrained("me/mine", **options)
    DyLoRAMoE.from_pretrained("me/mine", **options)
    assert not list(Path(constants.HF_HUB_CACHE).glob("models--*"))
    asked = len(hub.asked)
    DyLoRAMoE.from_pretrained("me/mine", local_files_only=True, **options)
    AutoTokenizer.from_pretrained("me/mine", local_files_only=True, **options)
    assert len(hub.asked) == asked


def test_only_files_of_the_format_are_pulled_and_they_are_verified(hub):
    mixture().push_to_hub("me/mine", token=RIGHT)
    (hub.folders["me/mine"] / "huge.bin").write_bytes(b"x")
    hub.asked.clear()
    folder = pull("me/mine")
    assert not (folder / "huge.bin").exists() and (folder / "README.md").exists()
    router = hub.folders["me/mine"] / "router.safetensors"
    router.write_bytes(router.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"router\.safetensors"):
        pull("me/mine", cache_dir=hub.created / "other cache")


def test_gated_repository(hub):
    mixture().push_to_hub("me/mine", token=RIGHT)
    hub.gated = True
    with pytest.raises(UsageError, match="me/mine is gated"):
        pull("me/mine")
    assert find_problems(pull("me/mine", token=RIGHT)) == []


def test_a_checkpoint_is_pushed_with_the_tokenizer_and_results_of_its_run_but_no_texts(hub, tmp_path, monkeypatch):
    run = tmp_path / "run"
    mixture().save_checkpoint(run / "checkpoint-3", step=3)
    mixture().save_checkpoint(run / "checkpoint-4", step=4)
    chat_tokenizer().save_pretrained(run)
    results = replace(sample(), checkpoint="checkpoint-4")
    write_results(run, results)
    (run / "LICENSE").write_text("of the code beside it")
    monkeypatch.chdir(run / "checkpoint-4")
    push(".", "me/mine", token=RIGHT)
    names = repository(hub)
    assert {"tokenizer.json", "README.md", "config.json"} <= names
    assert not {"results.json", "report.html", "LICENSE"} & names
    assert open_checkpoint(hub.folders["me/mine"]).config.step == 4
    card = ModelCard.load(hub.folders["me/mine"] / "README.md")
    assert card.data.base_model == "org/base"
    assert {result.dataset_name for result in card.data.eval_results} == {skill.name for skill in results.skills}
    assert "from_pretrained('me/mine')" in card.text and "To be filled in by the owner" in card.text


def test_results_of_another_checkpoint_are_not_in_the_card(hub, tmp_path):
    run = tmp_path / "run"
    for step in (3, 4):
        mixture().save_checkpoint(run / f"checkpoint-{step}", step=step)
    write_results(run, replace(sample(), checkpoint="checkpoint-3"))
    push(run, "me/mine", token=RIGHT)
    assert open_checkpoint(hub.folders["me/mine"]).config.step == 4
    card = ModelCard.load(hub.folders["me/mine"] / "README.md")
    assert card.data.eval_results is None and "## Skills" not in card.text


def test_a_folder_beside_others_is_pushed_alone(hub, tmp_path):
    mixture().save_checkpoint(tmp_path / "mine")
    for name in ("mine/training_args.bin", "LICENSE", "tokenizer.json", "vocab.json"):
        (tmp_path / name).write_text("{}")
    push(tmp_path / "mine", "me/mine", token=RIGHT)
    assert not {"training_args.bin", "LICENSE", "tokenizer.json", "vocab.json"} & repository(hub)


def test_a_pull_request_needs_no_right_to_make_a_branch(hub):
    hub.revisions |= {"refs/pr/7", "theirs"}
    mixture().push_to_hub("me/mine", token=RIGHT, revision="refs/pr/7")
    mixture(experts=3).push_to_hub("me/mine", token=RIGHT, revision="theirs", create_pr=True)
    assert any("expert_2" in name for name in repository(hub))
    with pytest.raises(UsageError, match="HTTP 403, the token may not write there"):
        mixture().push_to_hub("me/mine", token=RIGHT, revision="theirs")


def test_a_second_push_removes_what_is_stale_and_keeps_the_card(hub, tmp_path):
    first = mixture(experts=3)
    first.generation_config.repetition_penalty = 1.25
    first.push_to_hub("me/mine", token=RIGHT)
    assert DyLoRAMoE.from_pretrained("me/mine").generation_config.repetition_penalty == 1.25
    (hub.folders["me/mine"] / "README.md").write_text("---\nlicense: mit\n---\nmine")
    mixture(experts=2).push_to_hub("me/mine", token=RIGHT)
    assert not any("expert_2" in name or name == "generation_config.json" for name in repository(hub))
    assert (hub.folders["me/mine"] / "README.md").read_text().endswith("mine")
    assert find_problems(hub.folders["me/mine"]) == []


def test_a_base_on_this_machine_is_named_on_the_hub(hub, base, tmp_path):
    model = mixture(str(base))
    with pytest.raises(UsageError, match="say which model on the Hub it is, with base_model="):
        model.push_to_hub("me/mine", token=RIGHT)
    assert "me/mine" not in hub.folders
    model.push_to_hub("me/mine", token=RIGHT, base_model="org/base")
    texts = [path.read_text() for path in hub.folders["me/mine"].rglob("*") if path.suffix in (".json", ".md")]
    assert not any(str(base.parent) in text for text in texts)
    assert torch.equal(DyLoRAMoE.from_pretrained("me/mine")(IDS).logits, model(IDS).logits)


def test_training_state_is_pushed_on_request(tmp_path):
    mixture().save_checkpoint(tmp_path / "sound")
    folder = Path(shutil.copytree(tmp_path / "sound", tmp_path / "trained"))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "scaler.pt").touch()
    manifest["files"]["scaler.pt"] = {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    checkpoint = replace(open_checkpoint(tmp_path / "sound"), folder=folder)
    assert "scaler.pt" in package(checkpoint, checkpoint.config, training_state=True)
    packed = package(checkpoint, checkpoint.config, training_state=False)
    assert "scaler.pt" not in packed and "scaler.pt" not in json.loads(packed["manifest.json"])["files"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"token": "hf_wrong"}, "HTTP 401, it does not accept the token"),
        ({"token": None}, "HTTP 401"),
        ({"repo_id": "a/b/c"}, "'a/b/c' is no id of a repository"),
        ({"subfolder": "x"}, "has no option subfolder"),
    ],
)
def test_refusals_say_what_to_do(change, words, hub):
    arguments = {"repo_id": "me/mine", "token": RIGHT, **change}
    with pytest.raises(UsageError, match=words) as error:
        mixture().push_to_hub(**arguments)
    assert "hf_" not in str(error.value)


def test_a_hub_that_is_not_there(hub, monkeypatch):
    hub.status = 503
    with pytest.raises(UsageError, match="nothing was pushed to me/mine"):
        mixture().push_to_hub("me/mine", token=RIGHT)


def test_a_repository_without_a_checkpoint(hub):
    with pytest.raises(UsageError, match="org/base on the Hub holds no checkpoint of DyLoRA-MoE"):
        DyLoRAMoE.from_pretrained("org/base")
    with pytest.raises(UsageError, match="has no revision 'v2'"):
        DyLoRAMoE.from_pretrained("org/base", revision="v2")
    for name in ("./nothing", "/no/where", ""):
        with pytest.raises(UsageError, match="expected a checkpoint folder or a repository's id, found nothing"):
            DyLoRAMoE.from_pretrained(name)
