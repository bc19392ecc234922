"""The training state is read into a typed structure or refused: optimizer, schedule, generators, trainer state."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerState

from dylora_moe import DyLoRAMoE, MoELoraConfig
from dylora_moe.base.preserve import check_rng_state, rng_state, seeded, set_rng_state
from dylora_moe.errors import CheckpointError, UsageError
from dylora_moe.training import moments, training_state
from dylora_moe.training.trainer import move_scheduler
from dylora_moe.training.training_state import SUMS, Sums

from ..support.faults import full_disk
from ..support.mutations import edit_json
from ..support.tiny import tiny_mixture


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_a_disk_that_is_full_at_one_of_the_files_is_an_error_that_names_it(tmp_path, monkeypatch, name):
    """torch.save itself says `unexpected pos 704 vs 598`."""
    full_disk(monkeypatch, name)
    made = optimizer_of(tiny_mixture(experts=1))
    schedule = schedule_of(made)
    state = {"optimizer": made, "scheduler": schedule, "trainer_state": TrainerState(), "rng_states": [{"cpu": 1}]}
    where = re.escape(str(tmp_path / name))
    with pytest.raises(UsageError, match=rf"cannot write {where}: No space left on device \(ENOSPC\); free space"):
        training_state.write(tmp_path, **state)


# ---- generators ----


def draw() -> tuple:
    return random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn()), float(torch.rand(1))


def test_generators_go_on_where_they_were(tmp_path):
    random.gauss(0, 1)  # each of these generators keeps a second number back
    np.random.randn()
    torch.save(rng_state(), tmp_path / "rng_state.pth")
    expected = draw()
    draw()
    state = training_state.read_tensors(tmp_path, "rng_state.pth")
    check_rng_state(state)
    set_rng_state(state)
    assert draw() == expected


# ---- one checkpoint of three steps ----


class Evil:
    def __reduce__(self):
        return (print, ("unpickled",))


def optimizer_of(model, rate: float = 0.1) -> torch.optim.AdamW:
    return torch.optim.AdamW(list(model.trained_parameters().items()), lr=rate)


def schedule_of(optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 1 / (1 + step))


def train_on(optimizer, schedule, number: int, seed: int) -> None:
    with seeded(seed):
        for _ in range(number):
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.grad = torch.randn(parameter.shape)
            optimizer.step()
            schedule.step()


def write_state(folder: Path, number: int, seed: int = 0) -> Path:
    """What training leaves after so many steps."""
    folder.mkdir()
    optimizer = optimizer_of(mixture()[0])
    schedule = schedule_of(optimizer)
    train_on(optimizer, schedule, number, seed)
    sums = Sums(1.5, 7.0, number - 1, [[1.0, 2.0], [3.0, 4.0]], 0, [number])
    state = TrainerState(global_step=number, train_batch_size=4, max_steps=9, log_history=[{"step": 1, "loss": 2.0}])
    state.stateful_callbacks[SUMS] = {"args": {}, "attributes": {"by_rank": [asdict(sums)]}}
    training_state.write(folder, optimizer, schedule, state, [rng_state()])
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("states")
    return {number: write_state(folder / str(number), number, seed=number) for number in (3, 4)}


@pytest.fixture
def folder(originals, tmp_path) -> Path:
    return shutil.copytree(originals[3], tmp_path / "checkpoint-3")


@functools.cache
def mixture() -> tuple[DyLoRAMoE, dict[str, torch.Tensor]]:
    """A mixture, and the parameters that it begins with."""
    model = tiny_mixture(experts=2, lora=MoELoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.0))
    return model, {name: tensor.detach().clone() for name, tensor in model.trained_parameters().items()}


def after_reading(folder: Path) -> tuple[dict, dict, tuple, float, Sums]:
    """What training would go on with, and what two more steps and draws make of it."""
    model, begin = mixture()
    with torch.no_grad():
        for name, parameter in model.trained_parameters().items():
            parameter.copy_(begin[name])
    optimizer = optimizer_of(model, rate=0.7)
    schedule = schedule_of(optimizer)
    saved = training_state.read(folder, 3, model)
    moments.load_moments(saved.moments, optimizer)
    move_scheduler(schedule, saved.step)
    rate = optimizer.param_groups[0]["lr"]
    before = rng_state()
    try:
        set_rng_state(saved.generators)
        drawn = draw()
    finally:
        set_rng_state(before)
    train_on(optimizer, schedule, 2, seed=9)
    after = {name: parameter.detach().clone() for name, parameter in model.trained_parameters().items()}
    return optimizer.state_dict()["state"], after, drawn, rate, saved.sums


def equal(one: object, other: object) -> bool:
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_training_goes_on_with_what_was_saved_and_with_this_runs_rate(originals, folder):
    moments, parameters, drawn, rate, sums = after_reading(folder)
    assert rate == 0.7 / 4
    assert sums.usage == [[1.0, 2.0], [3.0, 4.0]]
    again = after_reading(originals[3])
    assert all(map(equal, again, (moments, parameters, drawn, rate, sums)))
    with pytest.raises(CheckpointError):
        training_state.read(originals[4], 3, mixture()[0])


# ---- what is refused, whatever the manifest says ----


def edit(name: str, change) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        state = torch.load(folder / name, weights_only=True)
        changed = change(state)
        torch.save(state if changed is None else changed, folder / name)

    return apply


def optimizer(change) -> Callable[[Path], None]:
    return edit("optimizer.pt", change)


def moment(key: str, change, index: int = 5) -> Callable[[Path], None]:
    return edit("optimizer.pt", lambda s: s["state"][index].update({key: change(s["state"][index][key])}))


def group(change) -> Callable[[Path], None]:
    return edit("optimizer.pt", lambda state: change(state["param_groups"][0]))


def trainer(**values) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "trainer_state.json", lambda state: state.update(values))


def sums(**values) -> Callable[[Path], None]:
    def change(state: dict) -> None:
        state["stateful_callbacks"][SUMS]["attributes"]["by_rank"][0].update(values)

    return lambda folder: edit_json(folder / "trainer_state.json", change)


def filled(index: int, value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[index] = value
        return tensor

    return change


def generator(key: str, change) -> Callable[[Path], None]:
    return edit("rng_state.pth", lambda state: state.update({key: change(state[key])}))


def swapped(values: list) -> None:
    values[0], values[1] = values[1], values[0]


def shared(state: dict) -> None:
    state["state"][1]["exp_avg"] = state["state"][0]["exp_avg"] = torch.zeros(state["state"][0]["exp_avg"].shape)


def beyond(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros that are one number, repeated."""
    return torch.zeros(1).expand(tensor.shape)


PATIENCE = "early_stopping_patience_counter"
WRONG = {
    # types, shapes, dtypes
    "a 0-dim moment": (moment("exp_avg", lambda t: torch.tensor(1.0)), r"exp_avg of .*: expected shape \(2"),
    "a transposed moment": (moment("exp_avg_sq", lambda t: t.T.contiguous()), "exp_avg_sq of .*: expected shape"),
    "float64": (moment("exp_avg", lambda t: t.double()), "exp_avg of .*float32, found .*float64"),
    "complex": (moment("exp_avg", lambda t: t.to(torch.complex64)), "exp_avg of .*float32, found .*complex64"),
    "integers": (moment("exp_avg_sq", lambda t: t.long()), "exp_avg_sq of .*found .*int64"),
    "sparse": (moment("exp_avg", lambda t: t.to_sparse()), "dense tensors only"),
    "meta": (moment("exp_avg", lambda t: t.to("meta")), "dense tensors only"),
    "a view": (moment("exp_avg", lambda t: t.T), "dense tensors only"),
    "repeated": (moment("exp_avg", beyond), "dense tensors only"),
    "a gradient": (moment("exp_avg", lambda t: t.requires_grad_()), "dense tensors only"),
    "a parameter": (moment("exp_avg", torch.nn.Parameter), "dense tensors only"),
    "shared": (optimizer(shared), "bytes of their own"),
    "half of a tensor": (optimizer(lambda s: s.update(more=torch.ones(3)[:2])), "dense tensors only"),
    "a text": (moment("exp_avg", lambda t: "x"), "exp_avg of .*found 'x'"),
    "a list": (optimizer(lambda s: [s]), "values by name"),
    "no moments": (optimizer(lambda s: s["state"][5].clear()), "expected step and exp_avg"),
    "a moment of SGD": (optimizer(lambda s: s["state"][5].update(momentum_buffer=None)), "expected step and"),
    "all of it a list": (optimizer(lambda s: s.update(state=[])), "named parameters"),
    "moments of nobody": (optimizer(lambda s: s["state"].update({99: {}})), "without a name"),
    # ranges
    "NaN": (moment("exp_avg", filled(3, float("nan"))), "exp_avg of .*finite"),
    "infinity": (moment("exp_avg_sq", filled(3, float("inf"))), "exp_avg_sq of .*finite"),
    "a negative square": (moment("exp_avg_sq", filled(3, -1e-9)), "exp_avg_sq of .*from 0"),
    "half a step": (moment("step", lambda t: t - 0.5), "step of .*whole number"),
    "no step": (moment("step", lambda t: t * 0), "step of .*from 1"),
    "an infinite step": (moment("step", lambda t: t / 0), "step of .*finite"),
    "another number of steps": (moment("step", lambda t: t - 1), r"step: expected \[3\], found \[2, 3\]"),
    # names
    "an unknown name": (group(lambda g: g["param_names"].__setitem__(0, "c")), "has moments for c, which is not"),
    "a missing name": (group(lambda g: g["param_names"].__setitem__(0, "c")), "has no moments for "),
    "a missing moment": (optimizer(lambda s: s["state"].pop(1) and None), "has no moments for "),
    "names in another order": (group(lambda g: swapped(g["param_names"])), "another order: expected .* as parameter 0"),
    "indices in another order": (group(lambda g: swapped(g["params"])), "named parameters"),
    "a name twice": (group(lambda g: g["param_names"].append("x") or g["params"].append(g["params"][-1])), "named"),
    "two groups": (optimizer(lambda s: s["param_groups"].append({"params": [], "param_names": []})),
                   "has 2 parameter groups"),
    "no names": (group(lambda g: g.pop("param_names") and None), "optimizer with named parameters"),
    # scheduler
    "no schedule": (edit("scheduler.pt", lambda s: {"last_epoch": 3}), "not the state of a LambdaLR"),
    "another epoch": (edit("scheduler.pt", lambda s: s.update(last_epoch=2)), "scheduler.pt: expected step 3.*found 2"),
    "a true epoch": (edit("scheduler.pt", lambda s: s.update(last_epoch=True)), "expected step 3.*found True"),
    "another count": (edit("scheduler.pt", lambda s: s.update(_step_count=7)), "expected step 3.*found 6"),
    # generators
    "no generators": (edit("rng_state.pth", lambda s: {"global_step": 3}), "not a state of the generators"),
    "beyond the words": (generator("numpy", lambda s: (*s[:2], 10**9, *s[3:])), "numpy: expected"),
    "a negative position": (generator("numpy", lambda s: (*s[:2], -1, *s[3:])), "numpy: expected"),
    "another generator": (generator("numpy", lambda s: ("PCG64", *s[1:])), "numpy: expected"),
    "too few words": (generator("numpy", lambda s: (s[0], s[1][:9].clone(), *s[2:])), "numpy: expected"),
    "words of 64 bits": (generator("numpy", lambda s: (s[0], s[1] + (1 << 40), *s[2:])), "32 bits"),
    "a text as Gauss": (generator("python", lambda s: (*s[:2], "x")), "python: expected"),
    "a short state": (generator("cpu", lambda t: t[:100].clone()), "not a state of the generators"),
    "floats as a state": (generator("cpu", lambda t: t.float()), "not a state of the generators"),
    "no state of CUDA": (edit("rng_state.pth", lambda s: s.update(cuda=[torch.ones(16)])), "cuda: expected bytes"),
    # trainer_state.json
    "a text as history": (trainer(log_history="x"), "log_history: expected"),
    "a text as loss": (trainer(log_history=[{"step": 1, "eval_loss": "x"}]), "log_history: expected"),
    "a log without step": (trainer(log_history=[{"loss": 1.0}]), "log_history: expected"),
    "a text as best": (trainer(best_metric="x"), "best_metric: expected"),
    "a folder that is best": (trainer(best_model_checkpoint="/etc"), "best_model_checkpoint: expected null, since no"),
    "callbacks in a list": (trainer(stateful_callbacks=[1]), "stateful_callbacks: expected"),
    "an unknown field": (trainer(surprise=1), "'surprise': is unknown to the Trainer"),
    "no batch size": (trainer(train_batch_size=None), "train_batch_size: expected"),
    "negative patience": (trainer(stateful_callbacks={"E": {"attributes": {PATIENCE: -1}}}), "stateful_callbacks"),
    "a text as sum": (sums(loss="x"), "MoETrainer: loss: expected a number"),
    "a log to come": (sums(last_logged=4), "last_logged: expected a step until 3"),
    "usage of three": (sums(usage=[[1.0] * 3] * 2), "usage: expected two lists of 2 numbers"),
    "negative usage": (sums(usage=[[1.0, -1.0]] * 2), "usage: expected"),
    "steps of none": (sums(optimizer_steps=[]), r"optimizer.pt: step: expected \[\], found \[3\]"),
    "steps of others": (sums(optimizer_steps=[2]), r"optimizer.pt: step: expected \[2\], found \[3\]"),
    "no first step": (sums(first_step=None), "first_step: expected a step until 3"),
    "no steps": (sums(optimizer_steps=None), "optimizer_steps: expected a list of whole numbers"),
    "optimizer without a step": (edit("optimizer.pt", lambda s: s.pop("global_step") and None), "expected step 3"),
    "an unknown sum": (sums(extra=1), "MoETrainer: 'extra': is unknown"),
    "sums of two": (lambda f: edit_json(f / "trainer_state.json", lambda s: s["stateful_callbacks"][SUMS]["attributes"]
                                        ["by_rank"].append({})), "expected sums of 1 process"),
    # others
    "a scaler": (lambda folder: torch.save({}, folder / "scaler.pt"), "scaler.pt: expected none"),
    "a pickle": (lambda folder: torch.save(Evil(), folder / "rng_state.pth"), "cannot be read as tensors only"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(folder, capsys, case):
    spoil, text = WRONG[case]
    spoil(folder)
    with pytest.raises(CheckpointError, match=text) as refused:
        after_reading(folder)
    assert all("--resume-weights-only" in problem for problem in refused.value.problems)
    assert capsys.readouterr().out == ""  # nothing was unpickled


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_row_22_a_file_of_another_step(originals, folder, name):
    shutil.copy(originals[4] / name, folder / name)
    with pytest.raises(CheckpointError, match=rf"{name}: expected step 3, as in config.json, found 4"):
        after_reading(folder)


def test_the_moments_of_amsgrad_go_on_where_it_is_used(folder):
    edit(
        "optimizer.pt",
        lambda s: [m.update(max_exp_avg_sq=m["exp_avg_sq"].clone()) for m in s["state"].values()] and None,
    )(folder)
    model, _ = mixture()
    with pytest.raises(CheckpointError, match="expected step and exp_avg, exp_avg_sq of"):
        training_state.read(folder, 3, model)
    optimizer = torch.optim.AdamW(list(model.trained_parameters().items()), amsgrad=True)
    assert training_state.read(folder, 3, model, optimizer).step == 3


def test_another_optimizer_goes_on_if_its_moments_fit(folder):
    model, _ = mixture()
    made = torch.optim.SGD(list(model.trained_parameters().items()), momentum=0.9)
    optimizer(
        lambda s: [(m.clear(), m.update(momentum_buffer=torch.ones(2, 3))) for m in s["state"].values()] and None
    )(folder)
    with pytest.raises(CheckpointError, match=r"momentum_buffer.*expected finite numbers, found shape \(2, 3\)"):
        training_state.read(folder, 3, model, made)
    names = torch.load(folder / "optimizer.pt", weights_only=True)["param_groups"][0]["param_names"]
    shapes = {index: model.trained_parameters()[name].shape for index, name in enumerate(names)}
    optimizer(lambda s: [m.update(momentum_buffer=torch.ones(shapes[i])) for i, m in s["state"].items()] and None)(
        folder
    )
    sums(optimizer_steps=[])(folder)
    moments.load_moments(training_state.read(folder, 3, model, made).moments, made)
    assert all(bool((state["momentum_buffer"] == 1).all()) for state in made.state.values())


# ---- drawn at random ----

MUTATIONS = int(os.environ.get("DYLORA_MUTATIONS", 300))
VALUES = (
    None, True, 0, -1, 3, 4, 10**12, 0.5, float("nan"), float("inf"), "", "x", b"x", [], {}, (), [[]], {"a": 1},
    torch.tensor(1.0), torch.zeros(0), torch.ones(3, dtype=torch.complex64), torch.ones(2, 2).to_sparse(),
    torch.ones(4, 32, device="meta"), torch.tensor([True]),
)  # fmt: skip


def mutate(folder: Path, draw: random.Random) -> str:
    """Change one value anywhere in one of the files. Returns what was done."""
    name = draw.choice(["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
    is_json = name.endswith(".json")
    tree = json.loads((folder / name).read_text()) if is_json else torch.load(folder / name, weights_only=True)
    places = []

    def visit(node) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            visit(node[key])

    visit(tree)
    node, key = draw.choice(places)
    value = draw.choice([v for v in VALUES if not is_json or not isinstance(v, (torch.Tensor, bytes, tuple))])
    if draw.random() < 0.2:
        node.pop(key)
        what = f"without {key!r}"
    else:
        node[key] = value
        what = f"{key!r} = {value!r:.60}"
    if is_json:
        (folder / name).write_text(json.dumps(tree))
    else:
        torch.save(tree, folder / name)
    return f"{name}: {what}"


def test_a_mutated_training_state_is_refused_or_makes_no_difference(originals, tmp_path):
    """Never a traceback, a crash, or other weights without an error."""
    expected = after_reading(originals[3])
    refused, same = 0, 0
    for seed in range(MUTATIONS):
        folder = shutil.copytree(originals[3], tmp_path / str(seed))
        what = mutate(folder, random.Random(seed))
        try:
            found = after_reading(folder)
        except CheckpointError:
            refused += 1
        else:
            same += 1
            assert all(map(equal, found[:4], expected[:4])), (seed, what)
        shutil.rmtree(folder)
    assert refused > MUTATIONS / 2
    assert same > MUTATIONS / 20


# ---- trainer_state.json alone ----


@pytest.mark.parametrize("text", ["", "[]", '{"global_step": "3"}', "{"])
def test_what_is_no_trainer_state(tmp_path, text):
    (tmp_path / "trainer_state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"trainer_state\.json: "):
        training_state.read_trainer_state(tmp_path)


def test_the_log_of_a_long_run_is_read(tmp_path):
    entries = [{"step": step, "note": "x" * 1000} for step in range(20_000)]
    state = {"global_step": 7, "train_batch_size": 4, "log_history": entries}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert training_state.read_trainer_state(tmp_path)["log_history"] == entries
