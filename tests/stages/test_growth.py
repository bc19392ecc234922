"""A mixture grows: what is new gets an expert, what is known does not, and nothing that was there changes."""

from __future__ import annotations

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import TrainingArguments

import train
from dylora_moe import DyLoRAMoE, MoETrainer, PeftCheckpointCallback
from dylora_moe.errors import UsageError
from dylora_moe.reporting.results import KIND, read_results
from dylora_moe.skills.library import SkillLibrary
from dylora_moe.stages.measure import read_held_out
from dylora_moe.training.outcome import HELD_OUT_KIND

from ..support.runs import arguments, assert_same, contents, material, newest, signal_at, states, steps

KINDS = {
    "words": ["the", "router", "sends", "each", "token", "of", "a", "text", "to", "experts"],
    "digits": [f"{i:05}" for i in range(99)],
    "SIGNS": ["<<=>>", "[{}]", "##!!", "$$%%", "(@)", "~~^^", "||&&"],
    "UPPER": ["ROUTER", "SENDS", "EACH", "TOKEN", "TEXT", "EXPERTS"],
}
NEW_ONES = [("one", "SIGNS", 2), ("other", "UPPER", 3), ("more", "SIGNS", 4)]


def write(path: Path, kind: str, seed: int, documents: int = 10) -> Path:
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(KINDS[kind], k=60)) for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def flags(run_dir: Path, *data: Path, steps: int = 4) -> list[str]:
    words = [word for path in data for word in ("--data", str(path))]
    fixed = f"--block-size 64 --batch-size 4 --max-steps {steps} --save-steps 2 --device cpu --learning-rate 5e-3"
    return [*words, *fixed.split(), "--output-dir", str(run_dir)]


def grow(run_dir: Path, *data: Path, more: tuple[str, ...] = (), **options) -> int:
    return train.main(["--grow", *flags(run_dir, *data, **options), *more])


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """A run folder with two skills, learned in 4 steps, and the data sets beside it."""
    folder = tmp_path_factory.mktemp("growth")
    data = [write(folder / f"{kind}.jsonl", kind, 1) for kind in ("words", "digits")]
    model = ["--model", str(material() / "base"), "--lora-r", "4", "--lora-dropout", "0"]
    assert train.main([*model, *flags(folder / "run", *data)]) == 0
    return folder


@pytest.fixture
def run(first, tmp_path) -> Path:
    return Path(shutil.copytree(first / "run", tmp_path / "run"))


def experts_in(checkpoint: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(checkpoint).items() if name.endswith("adapter_model.safetensors")}


def test_what_is_new_gets_an_expert_and_the_others_keep_their_bytes(run, tmp_path, capsys):
    before = experts_in(newest(run))
    assert grow(run, write(tmp_path / "SIGNS.jsonl", "SIGNS", 2)) == 0
    out = capsys.readouterr().out
    assert "skill: SIGNS: new (" in out and "trains expert_2" in out
    assert steps(run) == [2, 4, 6, 8] and states(newest(run)) == ["mature"] * 3
    after = experts_in(newest(run))
    assert len(after) == 3 and before.items() <= after.items()
    library = SkillLibrary.load(newest(run) / "skill_library.safetensors")
    assert [(skill.name, skill.expert) for skill in library] == [("words", 0), ("digits", 1), ("SIGNS", 2)]
    assert all(skill.loss is not None for skill in library)
    found = read_results(run)
    assert [(stage.kind, stage.skills, stage.first_step, stage.last_step) for stage in found.stages] == [
        ("train", ["words", "digits"], 0, 4), ("grow", ["SIGNS"], 4, 8),
    ]  # fmt: skip
    assert set(found.stages[1].evaluation) == {"words", "digits", "SIGNS"}  # measured on what was held out then
    for name in ("words", "digits"):
        assert found.stages[1].evaluation[name].own == found.stages[0].evaluation[name].own


def test_what_is_known_is_not_trained_on_unless_asked_for(run, tmp_path, capsys):
    again = write(tmp_path / "more.jsonl", "digits", 3)
    before = contents(newest(run))
    assert grow(run, again) == 0
    out = capsys.readouterr().out
    assert "skill: more: known (" in out and "nothing was trained: all of it is known already" in out
    assert steps(run) == [2, 4] and contents(newest(run)) == before
    assert grow(run, again, more=("--update",)) == 0
    assert "trains expert_1 as skill digits" in capsys.readouterr().out
    assert steps(run) == [2, 4, 6, 8] and len(states(newest(run))) == 2
    here, there = (experts_in(run / f"checkpoint-{step}") for step in (4, 8))
    assert [name for name in here if here[name] != there[name]] == [
        "peft_adapters/expert_1/expert_1/adapter_model.safetensors"
    ]
    assert read_results(run).skills[1].data[1:] == [str(again)]
    skills = [SkillLibrary.load(run / f"checkpoint-{step}" / "skill_library.safetensors") for step in (4, 8)]
    assert skills[1]["digits"].tokens > skills[0]["digits"].tokens and skills[1].names == ["words", "digits"]


def test_what_is_known_does_not_make_the_epochs_longer(run, tmp_path, capsys):
    new, known = write(tmp_path / "UPPER.jsonl", "UPPER", 2), write(tmp_path / "more.jsonl", "digits", 3, 60)
    few = [word for word in flags(run, new, known) if word not in ("--max-steps", "4")]
    few[few.index("--batch-size") : few.index("--batch-size") + 1] = ["--batch-size", "4"]
    words = ["--grow", *few, "--epochs", "1"]
    assert train.main(words) == 0
    out = capsys.readouterr().out
    assert "data: more: 60 documents" in out and " 0 drawn per epoch; held out:" in out and "times each" not in out
    blocks = int(out.partition("data: UPPER: ")[2].partition(" blocks")[0].rpartition(" ")[2])
    assert read_results(run).step == 4 + -(-blocks // 4)
    assert {"router", "experts"} & set(read_results(run).skills[-1].words)  # against the held-out text of the others
    (run / f"checkpoint-{read_results(run).step}" / "manifest.json").unlink()
    (run / "results.json").unlink()
    assert train.main([*words, "--resume"]) == 0
    assert read_results(run).step == 4 + -(-blocks // 4)


def test_two_new_data_sets_of_one_kind_share_an_expert(run, tmp_path, capsys):
    data = [write(tmp_path / f"{name}.jsonl", kind, seed, 30) for name, kind, seed in NEW_ONES]
    assert grow(run, *data) == 0
    out = capsys.readouterr().out
    assert "skill: one: new (" in out and "trains expert_2\n" in out
    assert "skill: other: new (" in out and "trains expert_3\n" in out
    words = {skill.name: skill.words for skill in read_results(run).skills}
    assert {"router", "experts"} & set(words["other"])
    assert "from one, known up to" in out and "trains expert_2 as skill one\n" in out
    library = SkillLibrary.load(newest(run) / "skill_library.safetensors")
    assert library.names == ["words", "digits", "one", "other"]
    (stage,) = read_results(run).stages[1:]
    assert [(decision.skill, decision.known) for decision in stage.novelty] == [
        ("one", False), ("other", False), ("more", True),
    ]  # fmt: skip
    assert stage.novelty[2].nearest == "one" and stage.skills == ["one", "other"]
    alone, both = (library[name].tokens for name in ("other", "one"))
    assert both > 1.5 * alone
    held_out = read_held_out(run, None)
    assert len(held_out["one"]) > 1.5 * len(held_out["other"])  # the held-out text of both data sets
    model = DyLoRAMoE.from_checkpoint(newest(run)).eval()
    rows = [torch.tensor([row["input_ids"]]) for row in held_out["one"]]
    with torch.no_grad():
        losses = [model(ids, labels=ids, expert=2).loss.item() for ids in rows]
    assert library["one"].loss == pytest.approx(sum(losses) / len(losses), rel=0.02)
    assert grow(run, *data, more=("--resume",)) == 0 and steps(run)[-1] == 8


def test_too_little_new_text_is_no_measure_for_the_next(run, tmp_path, capsys):
    data = [write(tmp_path / f"{name}.jsonl", "SIGNS", seed, 2) for seed, name in enumerate(["one", "more"])]
    assert grow(run, *data) == 0
    out = capsys.readouterr().out
    assert f"too little text of {data[0]} is known to compare new data with" in out
    assert "trains expert_2\n" in out and "trains expert_3\n" in out


def test_a_mixed_data_set_is_divided(run, tmp_path, capsys):
    lines = [write(tmp_path / "x", kind, 4, 8).read_text() for kind in ("words", "SIGNS")]
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text("".join(lines))
    assert grow(run, mixed) == 0
    out = capsys.readouterr().out
    assert "skill: mixed-1: known (" in out and "skill: mixed-2: new (" in out and "trains expert_2" in out


@pytest.mark.parametrize("event", ["on_step_begin", "on_step_end"])
def test_growth_that_was_stopped_goes_on_to_the_same_bytes(run, tmp_path, monkeypatch, event):
    data = write(tmp_path / "SIGNS.jsonl", "SIGNS", 2)
    shutil.copytree(run, tmp_path / "through")
    assert grow(tmp_path / "through", data) == 0
    with monkeypatch.context() as patch:
        signal_at(patch, event, 5, signal.SIGTERM)
        assert grow(run, data) == 143
    assert states(newest(run)) == ["mature", "mature", "immature"]
    assert grow(run, data, more=("--resume",)) == 0
    assert_same(tmp_path / "through" / "checkpoint-8", run / "checkpoint-8")
    assert read_results(run) == read_results(tmp_path / "through")
    assert grow(run, data, more=("--resume",)) == 0 and steps(run)[-1] == 8  # nothing is left to train


def test_a_checkpoint_grows_in_another_folder(run, tmp_path):
    data = write(tmp_path / "SIGNS.jsonl", "SIGNS", 2)
    assert grow(tmp_path / "other", data, more=("--from", str(newest(run)))) == 0
    assert steps(tmp_path / "other") == [2, 4] and steps(run) == [2, 4]
    model = DyLoRAMoE.from_checkpoint(tmp_path / "other" / "checkpoint-4")
    assert model.num_experts == 3
    found = read_results(tmp_path / "other")
    assert [stage.kind for stage in found.stages] == ["train", "grow"]
    assert set(found.stages[1].evaluation) == {"words", "digits", "SIGNS"}
    (tmp_path / "other/results.json").unlink()  # as if it had been killed
    assert grow(tmp_path / "other", data, more=("--from", str(newest(run)), "--resume")) == 0
    assert read_results(tmp_path / "other") == found


def test_the_newest_checkpoint_may_be_named(run, tmp_path):
    data = write(tmp_path / "SIGNS.jsonl", "SIGNS", 2)
    assert grow(run, data, more=("--from", str(newest(run)))) == 0
    assert steps(run) == [2, 4, 6, 8]
    assert grow(run, data, more=("--from", str(run / "checkpoint-4"))) == 2  # there are newer ones


def test_skills_keep_their_experts_where_only_the_weights_are_taken(run, first, tmp_path):
    data = [first / f"{kind}.jsonl" for kind in ("digits", "words")]  # the other way round
    more = ["--model", str(material() / "base"), "--lora-r", "4", "--lora-dropout", "0"]
    more += ["--resume", str(newest(run)), "--resume-weights-only"]
    assert train.main([*more, *flags(tmp_path / "new", *data)]) == 0
    library = SkillLibrary.load(newest(tmp_path / "new") / "skill_library.safetensors")
    assert {skill.name: skill.expert for skill in library} == {"words": 0, "digits": 1}
    found = read_results(tmp_path / "new")
    assert {entry.name: entry.expert for entry in found.skills} == {"words": 0, "digits": 1}
    before, after = (read_results(folder).stages[-1].evaluation["digits"].own for folder in (run, tmp_path / "new"))
    assert after < before  # its own expert was trained further, not that of the words


def test_what_earlier_stages_have_left_may_be_damaged(run, tmp_path, capsys):
    (run / "results.json").write_text(json.dumps({"kind": KIND, "format_version": 1}))
    rows = load_file(run / "held_out.safetensors")
    rows["words/input_ids"] += 1000
    save_file(rows, run / "held_out.safetensors", metadata=HELD_OUT_KIND)
    assert grow(run, write(tmp_path / "SIGNS.jsonl", "SIGNS", 2)) == 0
    out = capsys.readouterr().out
    assert f"{run / 'results.json'}: it is not sound: what it says of earlier stages is left out\n" in out
    assert "held_out.safetensors: cannot be read (words: expected rows of tokens that the model knows" in out
    found = read_results(run)
    assert [(stage.kind, list(stage.evaluation)) for stage in found.stages] == [("grow", ["SIGNS"])]


def test_other_base_weights_are_refused(run, tmp_path, capsys):
    base = shutil.copytree(material() / "base", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"][7] *= -3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    data = write(tmp_path / "SIGNS.jsonl", "SIGNS", 2)
    assert grow(run, data, more=("--model", str(base))) == 2
    assert f"{base}: expected the weights on which {newest(run)} was saved, found others" in capsys.readouterr().err
    assert grow(run, data, more=("--model", str(base), "--accept-changes"), steps=1) == 0


def test_random_base_weights_are_those_of_the_seed(tmp_path, capsys):
    flagged = ["--weights", "random", "--seed", "5"]
    words = ["--model", str(material() / "base"), "--lora-r", "4", *flags(tmp_path / "run", steps=1), *flagged]
    assert train.main([*words, "--data", str(write(tmp_path / "words.jsonl", "words", 1))]) == 0
    data = write(tmp_path / "SIGNS.jsonl", "SIGNS", 2)
    assert grow(tmp_path / "run", data, more=("--weights", "random"), steps=1) == 2
    assert "found others" in capsys.readouterr().err
    assert grow(tmp_path / "run", data, more=tuple(flagged), steps=1) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--lora-r", "8"), "--lora-r: --grow takes it from the checkpoint that grows"),
        (("--experts", "3"), "--experts: --grow takes it from the checkpoint that grows"),
        (("--from", "nowhere"), "nowhere"),
    ],
)
def test_what_growth_refuses(run, tmp_path, capsys, more, message):
    assert grow(tmp_path / "other" if "--from" in more else run, tmp_path / "x", more=more) == 2
    assert message in capsys.readouterr().err


def test_jointly_trained_experts_cannot_grow(tmp_path, capsys):
    assert train.main(arguments(tmp_path / "run", "--route", "joint", steps=2)) == 0
    assert grow(tmp_path / "run", write(tmp_path / "x.jsonl", "SIGNS", 1)) == 2
    assert "cannot be grown: no skill is known of 2 of its 2 experts" in capsys.readouterr().err
    assert grow(tmp_path / "none", tmp_path / "x.jsonl") == 2
    assert "there is no complete checkpoint" in capsys.readouterr().err


def test_from_python(run, tmp_path):
    model = DyLoRAMoE.from_checkpoint(newest(run))
    library = SkillLibrary.load(newest(run) / "skill_library.safetensors")
    draw = random.Random(5)

    def documents(kind: str) -> list[list[int]]:
        return [list(" ".join(draw.choices(KINDS[kind], k=60)).encode()) for _ in range(8)]

    verdict, expert = model.grow(library, "more digits", documents("digits"))
    assert verdict.known and expert == 1 and model.num_experts == 2
    verdict, expert = model.grow(library, "signs", [[], *documents("SIGNS")])
    assert not verdict.known and expert == 2 and library["signs"].expert == 2
    assert all(".expert_2." in name for name in model.trained_parameters())
    ids = torch.tensor([documents("SIGNS")[0][:60]])
    with model.watch_usage(), torch.no_grad():
        model.eval()(input_ids=ids, labels=ids)
        shares = model.usage().shares()
    assert shares[2] == max(shares)
    with pytest.raises(UsageError, match="too little text"):
        model.grow(library, "short", [[1]])
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    rows = [{"input_ids": ids[0].tolist(), "labels": ids[0].tolist()}] * 4
    settings = TrainingArguments(str(tmp_path / "grown"), max_steps=1, use_cpu=True, remove_unused_columns=False)
    MoETrainer(model, settings, train_dataset=rows, callbacks=[PeftCheckpointCallback(library)]).train()
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(before[name], parameter)]
    assert changed and all(".expert_2." in name for name in changed)
