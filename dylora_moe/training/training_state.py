"""What training needs to go on as if it had never stopped: optimizer, scheduler, random generators, trainer state.

The moments of the optimizer are bound to the names of the parameters. Nothing here imports the Trainer.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import TrainerState

from ..checkpoint import formats
from ..checkpoint.safetensors_file import read_json
from ..errors import CheckpointError
from ..store.files import FileProblem, explained
from . import ranks

MAX_STATE_BYTES = 1 << 28  # trainer_state.json has a line for every log of the run: a million of them
CALLBACK = "PeftCheckpointCallback"  # the key of the settings of the run in trainer_state.json


# ---- writing ----


def rng_state() -> dict[str, Any]:
    """Return the states of the random generators, in types that `torch.load(weights_only=True)` reads."""
    numpy_state: Any = np.random.get_state()
    version, keys, position, has_gauss, cached = numpy_state
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (version, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Set the random generators of this process, those of CUDA if there are as many GPUs."""
    version, keys, *rest = state["numpy"]
    python_version, python_keys, gauss = state["python"]
    random.setstate((python_version, tuple(python_keys), gauss))
    np.random.set_state((version, keys.numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def write(
    folder: Path,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    trainer_state: TrainerState,
    rng_states: list[dict[str, Any]],
) -> None:
    """Write the training files into the staging folder of a checkpoint.

    Args:
        rng_states: The random generators of each rank.

    Raises:
        UsageError: If a file cannot be written.
    """
    _save(optimizer.state_dict(), folder / formats.OPTIMIZER)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please also save or load the state of the optimizer")
        _save(scheduler.state_dict(), folder / formats.SCHEDULER)
    for rank, state in enumerate(rng_states):
        _save(state, folder / _rng_name(rank, len(rng_states)))
    with explained("write", folder / formats.TRAINER_STATE):
        trainer_state.save_to_json(str(folder / formats.TRAINER_STATE))


def _save(value: object, path: Path) -> None:
    """Call `torch.save`, and name a full disk as the cause, where torch names an unexpected position in the file."""
    with explained("write", path), open(path, "wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # the error of the write itself
                raise error.__context__ from None
            raise


def _rng_name(rank: int, size: int) -> str:
    return "rng_state.pth" if size == 1 else f"rng_state_{rank}.pth"


# ---- reading ----


def missing(folder: Path) -> list[str]:
    """Return the training files that a checkpoint lacks."""
    names = [name for name in formats.TRAINING_FILES if not (folder / name).is_file()]
    return names if rng_files(folder) else [*names, "rng_state.pth"]


def rng_files(folder: Path) -> list[str]:
    """Return the files of the random generators: one for each process that wrote the checkpoint."""
    return sorted(path.name for path in folder.iterdir() if formats.RNG_STATE.fullmatch(path.name))


def read_trainer_state(folder: Path) -> dict[str, Any]:
    try:
        state = read_json(folder / formats.TRAINER_STATE, MAX_STATE_BYTES)
    except FileProblem as error:
        raise CheckpointError(folder, [f"{formats.TRAINER_STATE}: {error}"]) from None
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        raise CheckpointError(folder, [f"{formats.TRAINER_STATE}: expected an object with a global_step"])
    return state


def read_run(folder: Path) -> dict[str, Any]:
    """Return the settings of the run that wrote this checkpoint."""
    callbacks = read_trainer_state(folder).get("stateful_callbacks", {})
    return callbacks.get(CALLBACK, {}).get("attributes", {}).get("run") or {}


def read_tensors(folder: Path, name: str) -> Any:
    """Load one of the training files, as tensors and plain values only.

    Raises:
        CheckpointError: If it is missing, cut off, or holds anything else.
    """
    path = folder / name
    if not path.is_file():
        raise CheckpointError(folder, [f"{name}: is missing; --resume-weights-only goes on with a fresh optimizer"])
    try:
        with torch.serialization.safe_globals([]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises its own errors and those of pickle and zipfile
        reason = str(error).splitlines()[0][:160] if str(error) else ""
        raise CheckpointError(
            folder, [f"{name}: cannot be read as tensors only ({type(error).__name__}: {reason})"]
        ) from None


def load_rng(folder: Path) -> None:
    """Set the random generators of this rank.

    Raises:
        CheckpointError: If its file is missing or broken.
    """
    name = _rng_name(*ranks.world())
    state = read_tensors(folder, name)
    try:
        set_rng_state(state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(folder, [f"{name}: is not a state of the generators ({error})"]) from None


def load_scheduler(folder: Path, scheduler: LambdaLR) -> None:
    """Load the position in the schedule. The learning rate that it scales is that of this run."""
    state = read_tensors(folder, formats.SCHEDULER)
    own = scheduler.state_dict()
    if not isinstance(state, dict) or set(state) != set(own) or not isinstance(state.get("last_epoch"), int):
        raise CheckpointError(folder, [f"{formats.SCHEDULER}: is not the state of a {type(scheduler).__name__}"])
    scheduler.load_state_dict(state | {"base_lrs": own["base_lrs"]})
    move_scheduler(scheduler, state["last_epoch"])


def move_scheduler(scheduler: LambdaLR, step: int) -> None:
    """Set the learning rate to that after `step` steps, which LambdaLR computes in the same way."""
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    rates = [base * scale(step) for base, scale in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates


def load_optimizer(folder: Path, optimizer: Optimizer) -> None:
    """Load the moments by the names of the parameters. Learning rate, weight decay and the like are those of this run.

    Raises:
        CheckpointError: As `read_moments` does, before anything changes.
    """
    parameters = {name: parameter for group in optimizer.param_groups for name, parameter in _named(group)}
    moments = read_moments(folder, parameters, len(optimizer.param_groups))
    own = optimizer.state_dict()
    index_of = {name: index for group in own["param_groups"] for name, index in _named(group)}
    own["state"] = {index_of[name]: found for name, found in moments.items()}
    optimizer.load_state_dict(own)


def read_moments(
    folder: Path, here: Mapping[str, torch.Tensor], groups_here: int | None = None
) -> dict[str, dict[str, Any]]:
    """Return the saved moments of each of these parameters, by name.

    Args:
        here: The parameters that are trained here.
        groups_here: The number of parameter groups, if there is an optimizer already.

    Raises:
        CheckpointError: If parameters are missing, unknown, of another shape or out of order; it lists them.
    """
    saved = read_tensors(folder, formats.OPTIMIZER)
    where = formats.OPTIMIZER
    try:
        there = {name: index for group in saved["param_groups"] for name, index in _named(group)}
        moments, groups = saved["state"], saved["param_groups"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            folder, [f"{where}: is not the state of an optimizer with named parameters ({error})"]
        ) from None
    problems = [f"{where}: has no moments for {n}" for n in sorted(here) if there.get(n) not in moments]
    problems += [
        f"{where}: has moments for {name}, which is not trained here" for name in sorted(set(there) - set(here))
    ]
    if groups_here is not None and len(groups) != groups_here:
        problems.append(f"{where}: has {len(groups)} parameter groups, the optimizer has {groups_here}")
    if not problems:
        problems = [line for group in groups for line in _out_of_order(where, group["param_names"], here)]
    for name in sorted(set(here) & set(there)):
        for key, value in moments.get(there[name], {}).items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != here[name].shape:
                shapes = f"expected shape {tuple(here[name].shape)}, found {tuple(value.shape)}"
                problems.append(f"{where}: {key} of {name}: {shapes}")
    if problems:
        remedy = "build the experts as they were, or use --resume-weights-only"
        raise CheckpointError(folder, [f"{p}; {remedy}" for p in problems])
    return {name: moments[there[name]] for name in here}


def _out_of_order(where: str, there: list[str], here: Mapping[str, torch.Tensor]) -> list[str]:
    """Return a problem if the names of a group are not in the order of the parameters: its moments may be mixed up."""
    in_order = [name for name in here if name in set(there)]
    for place, (expected, found) in enumerate(zip_longest(in_order, there)):  # a name that is there twice is too many
        if expected != found:
            return [f"{where}: another order: expected {expected or 'no more'} as parameter {place}, found {found}"]
    return []


def _named(group: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, parameter) of a group of an optimizer, or (name, index) of a group of its state."""
    return zip(group["param_names"], group["params"], strict=True)


# ---- the best checkpoint ----


def best_step(log_history: list[dict[str, Any]], steps: list[int], metric: str, *, greater: bool = False) -> int | None:
    """Return the step with the best evaluation, or the first such step; None if none of these steps was evaluated."""
    values = {entry["step"]: entry[metric] for entry in log_history if metric in entry and entry.get("step") in steps}
    return min(sorted(values), key=lambda step: -values[step] if greater else values[step], default=None)
