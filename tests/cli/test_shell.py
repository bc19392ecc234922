"""generate, route, eval and inspect, on a tiny mixture with random experts."""

from __future__ import annotations

import builtins
import io
import json
import math
import re
import shutil
import signal
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import train
from dylora_moe import DyLoRAMoE, MoELoraConfig, RouterConfig
from dylora_moe.base import load
from dylora_moe.base.find import find_base
from dylora_moe.base.preserve import seeded
from dylora_moe.cli.colours import RoutedText
from dylora_moe.cli.main import main
from dylora_moe.cli.mixtures import Loaded
from dylora_moe.data.blocks import load_blocks
from dylora_moe.data.sources import DataSpec
from dylora_moe.errors import shown
from dylora_moe.reporting.publish import write_results
from dylora_moe.skills.library import Skill, SkillLibrary
from dylora_moe.stages.measure import HELD_OUT, packed, routing_weights
from dylora_moe.store.manifest import MANIFEST
from dylora_moe.training.outcome import HELD_OUT_KIND, serialize

from ..support.results import sample
from ..support.runs import material
from ..support.scripts import copy_of
from ..support.tiny import randomise, tiny_mixture

PROMPT = "the router sends each token"
SKILLS = {"one": 2.5, "two\n::error::x": None}  # by name, which may be foreign text, the held-out loss


@pytest.fixture(scope="module")
def model() -> DyLoRAMoE:
    lora = MoELoraConfig(r=4, lora_alpha=8, lora_dropout=0.0)
    router = RouterConfig(decay=0.5)  # so that the route changes within a few tokens
    model = randomise(DyLoRAMoE.from_base(str(material() / "base"), 3, lora=lora, router=router))
    model.mark_mature()
    return model.eval()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    skills = SkillLibrary()
    for expert, (name, loss) in enumerate(SKILLS.items()):
        skills.add(Skill(name, expert, 100 + expert, loss))
    return model.save_checkpoint(tmp_path_factory.mktemp("run") / "checkpoint-2", step=2, skills=skills)


@pytest.fixture(scope="module")
def tokenizer():
    return load.load_tokenizer(find_base(str(material() / "base"))[0])


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def as_json(capsys, *argv: object) -> dict:
    capsys.readouterr()
    code = main([*map(str, argv), "--json", "-"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def lines_of(capsys, *argv: object) -> list[str]:
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 0
    return capsys.readouterr().out.splitlines()


def asking(saved: Path, *more: object) -> tuple[object, ...]:
    return ("generate", saved, "--prompt", PROMPT, "--temperature", 0, "--max-new-tokens", 12, *more)


# ---- generate ----


@pytest.mark.parametrize("expert", [None, 1])
def test_generate_says_what_the_mixture_says(expert, saved, model, tokenizer, capsys):
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    said = model.generate(ids, expert=expert, max_new_tokens=12)[0, ids.shape[1] :]
    other = model.generate(ids, expert=2, max_new_tokens=12)[0, ids.shape[1] :]
    assert said.tolist() != other.tolist()
    flags = [] if expert is None else ["--expert", expert]
    (found,) = as_json(capsys, *asking(saved, *flags))["answers"]
    assert found["text"] == tokenizer.decode(said, skip_special_tokens=True)
    assert (found["prompt"], found["tokens"], found["ended"]) == (PROMPT, 12, "length")
    assert lines_of(capsys, *asking(saved, *flags)) != []


def test_sampling_is_seeded(saved, capsys):
    def text(seed: int) -> str:
        words = ("generate", saved, "--prompt", PROMPT, "--temperature", 2, "--top-p", 0.9, "--seed", seed)
        return as_json(capsys, *words, "--max-new-tokens", 12)["answers"][0]["text"]

    assert text(1) == text(1) != text(2)


def test_routing_is_that_of_the_router_and_shown_by_marks(saved, model, tokenizer, capsys):
    words = ("generate", saved, "--prompt", PROMPT, "--temperature", 2, "--seed", 3, "--max-new-tokens", 12)
    (found,) = as_json(capsys, *words)["answers"]
    experts = [each["expert"] for each in found["routing"]]
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with seeded(3):
        everything = model.generate(ids, do_sample=True, temperature=2.0, max_new_tokens=12)[0].tolist()
    weights = routing_weights(model, {"input_ids": everything})[ids.shape[1] :]
    assert experts == weights.argmax(1).tolist() and len(set(experts)) > 1
    assert found["usage"] == pytest.approx(weights.mean(0).tolist(), abs=1e-5)
    legend, marked = "\n".join(lines_of(capsys, *words, "--show-routing")).split("\n", 1)
    assert legend == r"[0] expert_0 (one)  [1] expert_1 (two\n::error::x)  [2] expert_2"
    marks = re.findall(r"\[(\d)\]", marked)
    assert all(a != b for a, b in pairwise(marks)) and {int(mark) for mark in marks} <= set(experts)
    # Fewer than the experts change where a character has several tokens.
    assert 1 < len(marks) <= 1 + sum(a != b for a, b in pairwise(experts))
    as_printed = "".join(c if c in "\n\t" else shown(c) for c in found["text"])
    assert re.sub(r"\[\d\]", "", marked) == as_printed.rstrip("\n")


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    def printed(stream: io.StringIO) -> str:
        screen = RoutedText(stream)
        for text, expert in (("a", 0), ("b", 0), ("c\x1b[1m", 7)):
            screen.write(text, expert)
        return stream.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert printed(Terminal()) == "\x1b[36ma\x1b[0m\x1b[36mb\x1b[0m\x1b[4;33mc\\x1b[1m\x1b[0m"
    plain = "[0]ab[7]c\\x1b[1m"
    assert printed(io.StringIO()) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed(Terminal()) == plain


def test_prompts_of_standard_input_are_answered_in_turn(saved, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO('{"prompt": "one"}\n{"text": "two"}\n'))
    found = as_json(capsys, "generate", saved, "--max-new-tokens", 2)["answers"]
    assert [answer["prompt"] for answer in found] == ["one", "two"]


# ---- a chat ----


@pytest.fixture
def terminal(monkeypatch):
    """Lines that are typed; an exception among them is raised instead."""

    def type_in(*lines: object) -> None:
        left = iter([*lines, EOFError()])

        def read(prompt: str = "") -> str:
            print(prompt, end="")
            line = next(left)
            if isinstance(line, BaseException):
                raise line
            return str(line)

        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr(builtins, "input", read)

    return type_in


def interrupt_at(monkeypatch, token: int, times: int = 1) -> None:
    """Press Ctrl-C while a token is shown."""
    shown, write = [], RoutedText.write

    def written(self, text, expert):
        write(self, text, expert)
        shown.append(text)
        for _ in range(times if len(shown) == token else 0):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(RoutedText, "write", written)


def test_a_chat_goes_on_from_what_was_said(saved, terminal, capsys):
    terminal("a", "", "a")
    one, two = as_json(capsys, "generate", saved, "--max-new-tokens", 1, "--temperature", 0)["answers"]
    assert two["prompt_tokens"] > one["prompt_tokens"]
    terminal("a", "a")
    one, two = as_json(capsys, "generate", saved, "--max-new-tokens", 2, "--temperature", 0, "--raw")["answers"]
    assert (one["prompt_tokens"], one["text"]) == (two["prompt_tokens"], two["text"]) == (1, one["text"])


def test_a_chat_that_is_written_as_json_asks_on_standard_error(saved, terminal, capsys):
    terminal("a")
    assert main(["generate", str(saved), "--max-new-tokens", "1", "--json", "-"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["answers"]) == 1 and err.count("> ") == 2


def test_a_chat_forgets_its_beginning_where_it_is_too_long(saved, terminal, capsys):
    terminal("a" * 10, "b" * 10, "c" * 60, "d")  # the base model has 64 positions
    capsys.readouterr()
    assert main(["generate", str(saved), "--max-new-tokens", "4", "--json", str(saved.parent / "chat.json")]) == 0
    err = capsys.readouterr().err
    assert "the chat is too long for the base model: its first 2 messages are left out" in err
    assert "positions for it and its answer; give a shorter prompt" in err
    answers = json.loads((saved.parent / "chat.json").read_text())["answers"]
    assert [answer["prompt"][0] for answer in answers] == ["a", "b", "d"]


def test_ctrl_c_ends_the_answer(saved, terminal, monkeypatch, capsys):
    terminal("a", "b")
    interrupt_at(monkeypatch, 3)
    before = signal.getsignal(signal.SIGINT)
    one, two = as_json(capsys, "generate", saved, "--max-new-tokens", 12, "--temperature", 0)["answers"]
    assert (one["ended"], two["ended"], two["tokens"]) == ("interrupted", "length", 12)
    assert 3 <= one["tokens"] < 12
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_ends_the_chat(saved, terminal, monkeypatch, capsys):
    terminal("a", "b")
    interrupt_at(monkeypatch, 3, times=2)  # before the answer has ended
    assert as_json(capsys, "generate", saved, "--max-new-tokens", 12, "--temperature", 0)["answers"] == []


def test_ctrl_c_where_a_line_is_expected_ends_the_chat(saved, terminal, capsys):
    terminal("a", KeyboardInterrupt(), "b")
    assert len(as_json(capsys, "generate", saved, "--max-new-tokens", 2)["answers"]) == 1


def test_ctrl_c_ends_an_answer_to_a_prompt(saved, monkeypatch, capsys):
    interrupt_at(monkeypatch, 2)
    assert main([str(word) for word in asking(saved)]) == 130
    assert capsys.readouterr().err.endswith("interrupted\n")


# ---- route ----


def test_route_gives_its_reasons(saved, model, tokenizer, capsys):
    (found,) = as_json(capsys, "route", saved, PROMPT)["texts"]
    weights = routing_weights(model, {"input_ids": tokenizer(PROMPT)["input_ids"]})
    assert found["weights"] == pytest.approx(weights[-1].tolist(), abs=1e-6)
    assert found["mean_weights"] == pytest.approx(weights.mean(0).tolist(), abs=1e-6)
    best, second = weights[-1].argsort(descending=True)[:2].tolist()
    assert (found["expert"], found["runner_up"]) == (best, second)
    reasons = [reason["difference"] for reason in found["reasons"]]
    expected = math.log(weights[-1, best] / weights[-1, second])
    assert sum(reasons) + found["prior"] == pytest.approx(expected, abs=1e-4)
    assert sum(reasons[1:]) + found["prior"] != pytest.approx(expected, abs=1e-2)  # each of them counts
    assert "".join(reason["token"] for reason in sorted(found["reasons"], key=lambda one: one["position"])) == PROMPT


def test_route_is_told_in_lines(saved, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    lines = lines_of(capsys, "route", saved)
    assert lines == lines_of(capsys, "route", saved, PROMPT)
    assert lines[0].endswith(f" %  <- {PROMPT} (27 tokens)") and lines[0].startswith("expert_")
    assert any(line.startswith("    for it: '") for line in lines)
    assert len(lines_of(capsys, "route", saved, "a", "b\nc", "--reasons", 0)) == 2


def test_route_reads_the_input_embeddings_alone(saved, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(load, "_pretrained", lambda *_: pytest.fail("the base model was loaded"))
        assert as_json(capsys, "route", saved, "a")["texts"]
        with pytest.raises(pytest.fail.Exception):
            main([str(word) for word in asking(saved)])


def test_experts_that_were_never_trained_have_no_weight():
    model, weights = tiny_mixture(experts=3), torch.tensor([[0.2, 0.3, 0.5]])
    loaded = Loaded(model, None, SkillLibrary())
    assert loaded.of_trained(weights).tolist() == weights.tolist()
    for name, tensor in model.expert_tensors(2).items():
        tensor.data.mul_(0 if "lora_B" in name else 1)
    model.eval()
    assert loaded.of_trained(weights)[0].tolist() == pytest.approx([0.4, 0.6, 0])


# ---- eval ----


def test_eval_measures_every_expert_on_every_data_set(saved, model, tokenizer, capsys, tmp_path):
    texts = [json.loads(line)["text"] for line in (material() / "one.jsonl").read_text().splitlines()[1:3]]
    for name in ("one", "three"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["eval", saved, "--data", tmp_path / "one.jsonl", "--data", tmp_path / "three.jsonl", "--block-size", 32]
    one, three = as_json(capsys, *words)["data"]
    assert (one["name"], one["own_expert"], one["own"]) == ("one", 0, one["experts"][0])
    assert (three["name"], three["own_expert"], three["own"]) == ("three", None, None)
    assert one["routed"] == three["routed"]
    found = [one["base"], one["routed"], *one["experts"]]
    expected = [nats(model, tokenizer, texts, options) for options in ({}, *({"expert": i} for i in range(3)))]
    with model.disable_experts():
        expected.insert(0, nats(model, tokenizer, texts, {}))
    assert found == pytest.approx(expected, abs=1e-4)
    assert len({round(value, 3) for value in found}) == len(found)
    assert one["best"] == min(one["experts"]) == one["experts"][one["best_expert"]]
    assert sum(one["usage"]) == pytest.approx(1, abs=1e-4)


def test_eval_prints_a_table(saved, capsys):
    lines = lines_of(capsys, "eval", saved, "--data", material() / "one.jsonl", "--eval-blocks", 1)
    assert lines[0].split("  ")[0] == "data set" and lines[0].endswith("best alone  expert_0  expert_1  expert_2")
    assert lines[1].split()[:2] == ["one", "63"]  # a block has as many tokens as the base model has positions
    assert lines[3].split() == ["goes", "to", "expert_0", "expert_1", "expert_2"]


def nats(model: DyLoRAMoE, tokenizer, texts: list[str], options: dict) -> float:
    """The loss of some texts, one after the other; longer ones are cut into pieces of 32 tokens."""
    total = tokens = 0.0
    for text in texts:
        ids = torch.tensor([*tokenizer(text)["input_ids"], tokenizer.eos_token_id])
        for row in (piece.unsqueeze(0) for piece in ids.split(32) if len(piece) > 1):
            with torch.no_grad():
                total += model(row, labels=row, **options).lm_loss.item() * (row.shape[1] - 1)
            tokens += row.shape[1] - 1
    return total / tokens


def test_eval_without_data_takes_the_held_out_text_of_the_run(saved, tokenizer, capsys, tmp_path):
    checkpoint = copy_of(saved, tmp_path)
    assert main(["eval", str(checkpoint), "--base", str(material() / "base")]) == 2
    assert f"there is no {HELD_OUT} in {tmp_path}: name data sets with --data" in capsys.readouterr().err
    specs = [DataSpec(str(material() / "one.jsonl"))]
    rows = load_blocks(specs, tokenizer, block_size=32, seed=0, eval_specs=specs[:0]).evaluation
    (tmp_path / HELD_OUT).write_bytes(serialize(packed(rows), metadata=HELD_OUT_KIND))
    (found,) = as_json(capsys, "eval", checkpoint, "--base", material() / "base")["data"]
    assert (found["name"], found["own_expert"], found["own"]) == ("one", 0, found["experts"][0])
    lines = lines_of(capsys, "eval", checkpoint)
    assert train.main(["--eval-only", "--output-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == lines and lines[1].startswith("one ")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--eval_only"], "train.py --eval-only: error: --output-dir is needed"),
        (["--eval-only", "--output-dir", "nowhere"], "nowhere: expected a run folder with a complete checkpoint"),
        (["--eval-only", "--output-dir", "x", "--data", "y"], "unrecognized arguments: --data (did you mean"),
    ],
)
def test_an_evaluation_alone_that_cannot_be_made_is_one_message(words, problem, capsys):
    assert train.main(words) == 2
    out, err = capsys.readouterr()
    assert problem in err and "Traceback" not in err and out == ""


# ---- inspect ----


def test_inspect_a_checkpoint(saved, capsys):
    found = as_json(capsys, "inspect", saved)
    assert [(skill["name"], skill["loss"]) for skill in found["skills"]] == list(SKILLS.items())
    assert [skill["expert"] for skill in found["skills"]] == [0, 1]
    assert [expert["state"] for expert in found["experts"]] == ["mature"] * 3
    assert (found["complete"], found["step"], found["results"], found["run"]) == (True, 2, None, None)
    lines = lines_of(capsys, "inspect", saved)
    assert lines[0].startswith(f"{saved}: step 2, complete, ")
    assert lines[1] == f"base model: {material() / 'base'} (llama, float32)"
    assert r"two\n::error::x" in lines[7]


def test_inspect_a_run(saved, capsys, tmp_path):
    checkpoint = copy_of(saved, tmp_path)
    results = sample(2)
    write_results(tmp_path, results)
    found = as_json(capsys, "inspect", tmp_path)
    assert (found["run"], found["checkpoint"]) == (str(tmp_path), str(checkpoint))
    losses = results.stages[-1].evaluation["python"]
    assert found["results"]["evaluation"]["python"]["routed"] == pytest.approx(losses.routed)
    lines = lines_of(capsys, "inspect", tmp_path)
    assert any(line.startswith("python: from data/python.jsonl") for line in lines)
    assert any("stayed frozen, and 2 experts on it learned 2 skills: python and prose" in line for line in lines)
    assert as_json(capsys, "inspect", checkpoint)["results"] is None  # they are of another checkpoint
    (tmp_path / "checkpoint-9").mkdir()
    shutil.copytree(checkpoint, tmp_path / "checkpoint-480")
    assert results.checkpoint == "checkpoint-480"
    assert as_json(capsys, "inspect", tmp_path / "checkpoint-480")["results"] is not None


def test_inspect_what_is_not_complete(saved, capsys, tmp_path):
    checkpoint = copy_of(saved, tmp_path)
    (checkpoint / MANIFEST).unlink()
    assert "incomplete: manifest.json" in lines_of(capsys, "inspect", checkpoint)[0]
    (checkpoint / "config.json").write_text("{}")
    assert main(["inspect", str(checkpoint)]) == 2
    assert "config.json: format_version" in capsys.readouterr().err


# ---- bad input ----

BAD = [
    (["generate", "{saved}", "--show-routing", "--expert", "1", "--prompt", "a"], "contradict each other"),
    (["generate", "{saved}", "--temperature", "0", "--top-p", "0.5", "--prompt", "a"], "contradict each other"),
    (["generate", "{saved}", "--top-p", "1.5"], "expected a number above 0 to 1, got 1.5"),
    (["generate", "{saved}", "--prompt", " \n"], "--prompt: expected a text, found nothing"),
    (["generate", "{saved}", "--expert", "3", "--prompt", "a"], "expert must be None or 0 to 2, got 3"),
    (["generate", "{saved}", "--prompt", "a" * 65], "the prompt has 65 tokens, and the base model has 64 positions"),
    (["generate", "{saved}", "--prompt", "a", "--base", "./nothing"], "There is no file or folder './nothing'"),
    (["generate", "{saved}", "--prompt", "a", "--base", "a\nb"], "argument --base: expected a name without control"),
    (
        ["generate", "{saved}", "--prompt", "a", "--json", "/nowhere/x"],
        "expected a file in a folder that can be written",
    ),
    (["generate", "{saved}", "--prompt", "a", "--device", "abacus"], "Unknown device 'abacus'"),
    (["generate", "{run}", "--prompt", "a"], "is a run folder: name its newest checkpoint"),
    (["generate", "{broken}", "--prompt", "a"], "is not a sound checkpoint:\n  - router.safetensors: "),
    (["route", "{broken}", "a"], "is not a sound checkpoint:\n  - router.safetensors: "),
    (["route", "{saved}", "a", ""], "TEXT: expected a text, found nothing"),
    (["route", "{saved}"], "standard input: expected a text, found nothing"),
    (["eval", "{saved}", "--data", "./nothing"], "./nothing: no such file or folder"),
    (["eval", "{saved}", "--data", "{one}", "--block-size", "65"], "the base model has 64 positions"),
    (["inspect", "{run}/nothing"], "expected a checkpoint folder, found nothing"),
]


@pytest.mark.parametrize(("argv", "problem"), BAD, ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_bad_input_is_one_message(argv, problem, saved, tmp_path, capsys, monkeypatch):
    broken = copy_of(saved, tmp_path)
    (broken / "router.safetensors").unlink()
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    places = {"{saved}": saved, "{run}": saved.parent, "{broken}": broken, "{one}": material() / "one.jsonl"}
    for name, place in places.items():
        argv = [word.replace(name, str(place)) for word in argv]
    capsys.readouterr()
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert problem in err and "Traceback" not in err and out == ""
