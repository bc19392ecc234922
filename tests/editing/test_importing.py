"""A LoRA that stock PEFT has saved becomes an expert that computes the same, or is refused by name."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from dylora_moe import DyLoRAMoE, UsageError
from dylora_moe.base.preserve import seeded
from dylora_moe.checkpoint.verify import find_problems
from dylora_moe.editing.foreign import find_lora, read_lora
from dylora_moe.editing.importing import Source, add, import_expert
from dylora_moe.stages.measure import routing_weights
from dylora_moe.stages.merging import experts_of, rebuilt

from ..support.edits import checkpoint, joint, logits, old_model, skills, some_ids, text_of
from ..support.runs import contents
from ..support.tiny import tiny_base

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def stock_lora(folder: Path, model=None, **settings) -> torch.Tensor:
    """Let stock PEFT make a LoRA with random B, and save it. Returns what it computes."""
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
    with seeded(0), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = get_peft_model(model or old_model().fresh_base(), LoraConfig(**options | settings)).eval()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder)
        return model(some_ids() % model.config.vocab_size).logits


@pytest.fixture(scope="module")
def lora(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "plain"
    stock_lora(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """Text of the byte tokenizer, of letters that no other skill has."""
    path = tmp_path_factory.mktemp("text") / "capitals.jsonl"
    path.write_text("".join(json.dumps({"text": f"{letter} {letter * 3} " * 14}) + "\n" for letter in "ÄÖÜÉ"))
    return path


@pytest.fixture(scope="module")
def imported(lora, text, tmp_path_factory):
    """What the import of a LoRA, which says that it was trained on another base model, has made."""
    folder = Path(shutil.copytree(lora, tmp_path_factory.mktemp("imported") / "lora"))
    spoiled(folder, base_model_name_or_path="someone/chat")
    before = contents(checkpoint())
    made = import_expert(checkpoint(), folder.parent / "new", Source(str(folder), [str(text)]))
    assert contents(checkpoint()) == before
    return made


def test_it_computes_what_stock_peft_computes(lora, imported):
    assert find_problems(imported.folder) == []
    assert (imported.numbering, imported.states) == ({0: 0, 1: 1, 2: 2}, ["mature"] * 4)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        stock = PeftModel.from_pretrained(old_model().fresh_base(), lora).eval()
        expected = stock(some_ids()).logits
    new = DyLoRAMoE.from_checkpoint(imported.folder)
    assert torch.equal(logits(new, 3), expected)
    assert not torch.equal(logits(new, 3), logits(new, 2))
    for expert in range(3):
        assert torch.equal(logits(new, expert), logits(old_model(), expert))
    assert skills(imported.folder) == {"one": (0, 1.0), "two": (1, 2.0), "three": (2, 3.0), "capitals": (3, None)}
    assert imported.notes[0].startswith("expert_3 has the skill capitals, read from ")
    assert imported.notes[1].startswith("it was trained on 'someone/chat', and is now an expert on")


def test_its_text_goes_to_it_and_that_of_the_others_does_not(imported):
    new = DyLoRAMoE.from_checkpoint(imported.folder)
    own = list("Ü ÜÉÜ ÜÜÄ ÜÜÉ ÜÜ".encode())
    assert routing_weights(new, {"input_ids": own})[-1].argmax() == 3
    for skill in range(3):
        weights = routing_weights(new, {"input_ids": text_of(skill, seed=1)[0]})
        assert weights[-20:].mean(0).argmax() == skill


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"layers_to_transform": [1]},
        {"target_modules": "all-linear", "lora_dropout": 0.5},
        {"task_type": None},
    ],
)
def test_what_an_expert_can_be(settings, tmp_path):
    expected = stock_lora(tmp_path / "lora", **settings)
    model = rebuilt(old_model(), experts_of(old_model())[:1])
    index = add(model, read_lora(tmp_path / "lora", model), tmp_path)
    assert torch.equal(logits(model, index), expected)
    assert not torch.equal(logits(model, 0), expected)


def test_a_lora_in_bfloat16_keeps_its_values(lora, tmp_path):
    folder = Path(shutil.copytree(lora, tmp_path / "lora"))
    with_tensors(folder, every(torch.Tensor.bfloat16))
    found = read_lora(folder, old_model()).tensors
    assert all(tensor.dtype == torch.float32 for tensor in found.values())
    assert all(torch.equal(tensor, found[name].bfloat16()) for name, tensor in load_file(folder / WEIGHTS).items())


def spoiled(folder: Path, **changes) -> None:
    found = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(found | changes))


def with_tensors(folder: Path, change) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def every(function):
    return lambda tensors: {name: function(tensor) for name, tensor in tensors.items()}


REFUSED = {
    "dora": (lambda f: spoiled(f, use_dora=True), "not supported: use_dora=True"),
    "bias": (lambda f: spoiled(f, bias="all"), "not supported: bias='all'"),
    "modules": (lambda f: spoiled(f, modules_to_save=["lm_head"]), r"not supported: modules_to_save=\['lm_head'\]"),
    "ranks": (lambda f: spoiled(f, rank_pattern={"q_proj": 2}), "not supported: rank_pattern="),
    "alphas": (lambda f: spoiled(f, alpha_pattern={"q_proj": 2}), "not supported: alpha_pattern="),
    "pissa": (lambda f: spoiled(f, init_lora_weights="pissa"), "not supported: init_lora_weights='pissa'"),
    "another kind": (lambda f: spoiled(f, peft_type="LOHA"), "peft_type: expected LORA, found 'LOHA'"),
    "another task": (lambda f: spoiled(f, task_type="SEQ_CLS"), "task_type: expected CAUSAL_LM, found 'SEQ_CLS'"),
    "of a later PEFT": (lambda f: spoiled(f, use_magic=1), "use_magic=1: unknown to the installed version of PEFT"),
    "rank": (lambda f: spoiled(f, r=4), r"expected the shape \(4, 32\), found \(3, 32\)"),
    "rank of text": (lambda f: spoiled(f, r="x"), "lora r must be a whole number"),
    "no json": (lambda f: (f / CONFIG).write_text("{"), "expected JSON, found something else"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "expected the config of a LoRA"),
    "no config": (lambda f: (f / CONFIG).unlink(), "found no adapter_config.json; save_pretrained of PEFT writes both"),
    "nested": (lambda f: (f / "a").mkdir() or (f / CONFIG).rename(f / "a" / CONFIG), "name the folder of one LoRA"),
    "a pickle": (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "is a pickle, which is not read"),
    "cut off": (lambda f: (f / WEIGHTS).write_bytes(b"\0" * 20), "adapter_model.safetensors: expected"),
    "nan": (lambda f: with_tensors(f, every(lambda t: t * float("nan"))), "expected finite numbers"),
    "zeros": (lambda f: with_tensors(f, every(torch.zeros_like)), "every lora_B zero or none: it has no effect"),
    "whole numbers": (lambda f: with_tensors(f, every(lambda t: t.int())), "tensors of floating-point numbers"),
    "one of a pair": (
        lambda f: with_tensors(f, lambda t: {n: v for n, v in t.items() if "1.mlp.up_proj.lora_A" not in n}),
        "up_proj.lora_A.weight beside it, found nothing",
    ),
    "a foreign tensor": (
        lambda f: with_tensors(f, lambda t: t | {"base_model.model.lm_head.weight": torch.ones(2)}),
        "lm_head.weight: expected A and B of linear layers of the base model",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_an_expert_cannot_be(what, lora, tmp_path):
    change, problem = REFUSED[what]
    folder = Path(shutil.copytree(lora, tmp_path / "lora"))
    change(folder)
    with pytest.raises(UsageError, match=problem):
        read_lora(find_lora(str(folder)), old_model())


def test_a_lora_of_another_base_is_refused(text, tmp_path):
    folder = tmp_path / "lora"
    stock_lora(folder, tiny_base("gpt2"), target_modules=["c_attn"])
    with pytest.raises(UsageError, match=r"this LoRA, .* does not fit .*\n.*c_attn"):
        import_expert(checkpoint(), tmp_path / "new", Source(str(folder), [str(text)]))
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_a_lora_outside_of_the_decoder_layers_is_refused(tmp_path):
    folder = tmp_path / "lora"
    stock_lora(folder, target_modules=["q_proj", "lm_head"])
    with_tensors(folder, lambda tensors: {n: t for n, t in tensors.items() if "lora_" in n})  # PEFT saves the head, too
    model = rebuilt(old_model(), experts_of(old_model())[:1])
    with pytest.raises(UsageError, match=r"lm_head.* is outside of the decoder layers"):
        add(model, read_lora(folder, model), folder)


@pytest.mark.parametrize(
    ("old", "source", "problem"),
    [
        (checkpoint, {"name": "two"}, "has a skill 'two' already"),
        (checkpoint, {"name": "x" * 33}, "1 to 32 bytes"),
        (checkpoint, {"revision": "v2"}, "--revision v2 is of a repository on the Hub, but .* is on this machine"),
        (checkpoint, {"data": ["nowhere.txt"]}, "no such file or folder"),
        (checkpoint, {"lora": "./nowhere"}, "expected a folder with a LoRA, or a Hub id like user/name, found nothing"),
        (joint, {}, "cannot be grown: no skill is known of 2 of its 2 experts"),
    ],
)
def test_what_else_is_refused(old, source, problem, lora, text, tmp_path):
    with pytest.raises(UsageError, match=problem):
        import_expert(old(), tmp_path / "new", Source(**{"lora": str(lora), "data": [str(text)]} | source))
    assert list(tmp_path.iterdir()) == []


def test_too_little_text(lora, tmp_path):
    (tmp_path / "short.txt").write_text("only a few words")
    with pytest.raises(UsageError, match=r"short\.txt: has \d+ tokens, too little text to tell a skill by"):
        import_expert(checkpoint(), tmp_path / "new", Source(str(lora), [str(tmp_path / "short.txt")]))


def test_a_lora_of_the_hub_is_downloaded(lora, monkeypatch):
    asked = []

    def download(*args):
        asked.append(args)
        return lora

    monkeypatch.setattr("dylora_moe.base.hub.download", download)
    assert find_lora("someone/lora", "v2") == lora
    assert asked == [("someone/lora", "v2", [CONFIG, WEIGHTS], None)]
