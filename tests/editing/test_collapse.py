"""All experts as one plain LoRA, and what that costs."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.numpy import save_file

from dylora_moe import UsageError
from dylora_moe.editing.collapse import collapse
from dylora_moe.stages.measure import HELD_OUT, packed

from ..support.edits import SKILLS, checkpoint, joint, logits, old_model, some_ids, text_of
from ..support.runs import contents


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with held-out text of the skills one and three."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(checkpoint(), folder / "checkpoint-7")
    held_out = {}
    for index in (0, 2):
        ids = text_of(index, seed=5, documents=2)
        positions = [list(range(60))] * 2
        held_out[SKILLS[index]] = Dataset.from_dict({"input_ids": ids, "labels": ids, "position_ids": positions})
    save_file(packed(held_out), folder / HELD_OUT)
    return folder


@torch.no_grad()
def loss_of(model, ids, **options):
    return sum(model(torch.tensor([row]), labels=torch.tensor([row]), **options).loss.item() for row in ids) / len(ids)


def stock(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(old_model().fresh_base(), folder).eval()


def test_the_lora_has_the_loss_that_was_told(run, tmp_path, monkeypatch):
    before = contents(run)
    monkeypatch.chdir(run / "checkpoint-7")
    made = collapse(".", tmp_path / "one")
    assert contents(run) == before
    assert sorted(path.name for path in made.folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert list(made.losses) == ["one", "three"]
    for index in (0, 2):
        ids, loss = text_of(index, seed=5, documents=2), made.losses[SKILLS[index]]
        assert loss.merged == pytest.approx(loss_of(stock(made.folder), ids), rel=1e-5)
        assert loss.mixture == pytest.approx(loss_of(old_model(), ids), rel=1e-5)
        with old_model().disable_experts():
            assert loss.base == pytest.approx(loss_of(old_model(), ids), rel=1e-5)
        assert len({round(each, 4) for each in (loss.mixture, loss.merged, loss.base)}) == 3
    assert sum(made.weights) == pytest.approx(1) and made.weights[1] < 0.2 < min(made.weights[0], made.weights[2])
    assert (made.rank, 0.3 < made.held < 1) == (4, True)


def test_weights_rank_and_text_may_be_given(run, tmp_path):
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "a text of some tokens"}) + "\n")
    options = {"weights": [0, 1, 0], "rank": 50, "data": [str(tmp_path / "text.jsonl")]}
    made = collapse(run / "checkpoint-7", tmp_path / "one", **options)
    assert (made.weights, made.rank, made.held, list(made.losses)) == ([0, 1, 0], 4, pytest.approx(1), ["text"])
    with torch.no_grad():
        assert (stock(made.folder)(some_ids()).logits - logits(old_model(), 1)).abs().max() < 1e-4


def test_without_text_nothing_is_measured(tmp_path):
    made = collapse(joint(), tmp_path / "one")
    assert (made.weights, made.losses) == ([1.0, 0.0], {})  # the second expert was never trained


def test_what_is_refused(run, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "tiny.txt").write_text("")
    for target, options, problem in (
        ("one", {"weights": [1, 2]}, "expected a weight for each of the 3 experts"),
        ("taken", {}, "exists already"),
        ("one", {"data": [str(tmp_path / "tiny.txt")]}, "is empty"),
    ):
        with pytest.raises(UsageError, match=problem):
            collapse(run / "checkpoint-7", tmp_path / target, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken", "tiny.txt"]


def test_tokens_that_the_base_model_does_not_know_are_refused(run, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("a text")
    monkeypatch.setattr("dylora_moe.editing.edit.known_tokens", lambda base: 100)
    with pytest.raises(UsageError, match=r"text\.txt: the tokenizer makes .* the base model does not know"):
        collapse(run / "checkpoint-7", tmp_path / "one", data=[str(tmp_path / "text.txt")])
