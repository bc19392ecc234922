"""Optimizer by name, schedule by step, generators of four libraries, the best checkpoint."""

from __future__ import annotations

import json
import random
import re

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState

from dylora_moe.errors import CheckpointError, UsageError
from dylora_moe.training import training_state

from ..support.faults import full_disk


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_disk_that_is_full_at_one_of_the_files_is_an_error_that_names_it(tmp_path, monkeypatch, name):
    """torch.save itself says `unexpected pos 704 vs 598`."""
    full_disk(monkeypatch, name)
    made = stepped()
    schedule = LambdaLR(made, lambda step: 1.0)
    state = {"optimizer": made, "scheduler": schedule, "trainer_state": TrainerState(), "rng_states": [{"cpu": 1}]}
    where = re.escape(str(tmp_path / name))
    with pytest.raises(UsageError, match=rf"cannot write {where}: No space left on device \(ENOSPC\); free space"):
        training_state.write(tmp_path, **state)


def draw() -> tuple:
    return random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()), float(torch.rand(1))


def test_generators_go_on_where_they_were(tmp_path):
    random.gauss(0, 1)  # each of these generators keeps a second number back
    np.random.randn()
    torch.save(training_state.rng_state(), tmp_path / "rng_state.pth")
    expected = draw()
    draw()
    training_state.load_rng(tmp_path)
    assert draw() == expected


@pytest.mark.parametrize("state", [{}, {"python": (3, (1,), None), "numpy": 1, "cpu": 2}, [1]])
def test_what_is_no_state_of_generators(tmp_path, state):
    torch.save(state, tmp_path / "rng_state.pth")
    with pytest.raises(CheckpointError, match=r"rng_state\.pth: is not a state of the generators"):
        training_state.load_rng(tmp_path)


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def test_nothing_is_unpickled(tmp_path, capsys):
    torch.save(Evil(), tmp_path / "rng_state.pth")
    with pytest.raises(CheckpointError, match=r"rng_state\.pth: cannot be read as tensors only"):
        training_state.load_rng(tmp_path)
    assert capsys.readouterr().out == ""


def optimizer(names: str = "ab", rate: float = 0.1) -> torch.optim.AdamW:
    tensors = {name: torch.nn.Parameter(torch.full((2, 3), float(ord(name)))) for name in names}
    return torch.optim.AdamW(tensors.items(), lr=rate)


def stepped(names: str = "ab") -> torch.optim.AdamW:
    made = optimizer(names)
    for group in made.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            parameter.grad = torch.full((2, 3), float(ord(name)))
    made.step()
    return made


def moments(made: torch.optim.AdamW) -> dict[str, float]:
    group = made.param_groups[0]
    pairs = zip(group["param_names"], group["params"], strict=True)
    return {name: float(made.state[parameter]["exp_avg"][0, 0]) for name, parameter in pairs}


def test_an_optimizer_goes_on_with_this_runs_rate(tmp_path):
    torch.save(stepped().state_dict(), tmp_path / "optimizer.pt")
    other = optimizer(rate=0.7)
    training_state.load_optimizer(tmp_path, other)
    assert moments(other) == moments(stepped())
    assert other.param_groups[0]["lr"] == 0.7


def named_twice(group: dict, name: str) -> None:
    group["param_names"].append(name)
    group["params"].append(group["params"][-1])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state["param_groups"][0]["param_names"].__setitem__(0, "c"), "has no moments for a"),
        (lambda state: state["param_groups"][0]["param_names"].__setitem__(0, "c"), "has moments for c, which is not"),
        (lambda state: state["state"].pop(1), "has no moments for b"),
        (lambda state: state["param_groups"][0]["param_names"].reverse(), "expected a as parameter 0, found b"),
        (lambda state: named_twice(state["param_groups"][0], "b"), "expected no more as parameter 2, found b"),
        (lambda state: state["state"][0].update(exp_avg=torch.zeros(3, 2)), r"exp_avg of a: expected shape \(2, 3\)"),
        (lambda state: state["param_groups"].append({"params": [], "param_names": []}), "has 2 parameter groups"),
        (lambda state: state["param_groups"][0].pop("param_names"), "optimizer with named parameters"),
        (lambda state: state.pop("state"), "optimizer with named parameters"),
    ],
)
def test_an_optimizer_that_does_not_fit(tmp_path, change, text):
    state = stepped().state_dict()
    change(state)
    torch.save(state, tmp_path / "optimizer.pt")
    here = stepped()
    before = moments(here)
    with pytest.raises(CheckpointError, match=text):
        training_state.load_optimizer(tmp_path, here)
    assert moments(here) == before


def test_a_schedule_goes_on_with_this_runs_rate(tmp_path):
    def schedule(rate: float) -> LambdaLR:
        return LambdaLR(optimizer(rate=rate), lambda step: 1 / (1 + step))

    old = schedule(0.1)
    for _ in range(3):
        old.optimizer.step()
        old.step()
    torch.save(old.state_dict(), tmp_path / "scheduler.pt")
    same, other = schedule(0.1), schedule(0.8)
    for new in (same, other):
        training_state.load_scheduler(tmp_path, new)
    assert same.state_dict() == old.state_dict()
    assert same.optimizer.param_groups[0]["lr"] == old.optimizer.param_groups[0]["lr"]
    assert other.get_last_lr() == [0.2]
    torch.save({"last_epoch": 3}, tmp_path / "scheduler.pt")
    with pytest.raises(CheckpointError, match=r"scheduler\.pt: is not the state of a LambdaLR"):
        training_state.load_scheduler(tmp_path, schedule(0.1))


@pytest.mark.parametrize("text", ["", "[]", '{"global_step": "3"}', "{"])
def test_what_is_no_trainer_state(tmp_path, text):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"trainer_state\.json: "):
        training_state.read_trainer_state(tmp_path)


def test_the_log_of_a_long_run_is_read(tmp_path):
    entries = [{"step": step, "note": "x" * 1000} for step in range(20_000)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 7, "log_history": entries}))
    assert training_state.read_trainer_state(tmp_path)["log_history"] == entries


HISTORY = [{"step": s, "eval_loss": v} for s, v in ((2, 3.0), (4, 1.0), (6, 2.0), (8, 2.0))] + [
    {"step": 8, "loss": 0.1}
]


@pytest.mark.parametrize(
    ("steps", "greater", "best"),
    [([2, 4, 6], False, 4), ([2, 6, 8], False, 6), ([2, 6, 8], True, 2), ([3, 5], False, None), ([], False, None)],
)
def test_best_step(steps, greater, best):
    assert training_state.best_step(HISTORY, steps, "eval_loss", greater=greater) == best
