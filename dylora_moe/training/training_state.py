"""What training needs to go on as if it had never stopped: optimizer, scheduler, random generators, trainer state.

The moments of the optimizer are bound to the names of the parameters, and every file names the step that it is of. All
of it is read and checked before anything changes, and nothing is unpickled. Nothing here imports the Trainer.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerState

from ..base.preserve import check_rng_state
from ..checkpoint import formats
from ..checkpoint.findings import Rules, get, natural, nothing_or, number, short
from ..checkpoint.safetensors_file import read_json
from ..checkpoint.verify import TRAINER_RULES
from ..distributed import ranks
from ..errors import CheckpointError
from ..mixture.model import Mixture
from ..store.files import FileProblem, explained
from .moments import REMEDY, of_experts, read_moments, refused, seen

MAX_STATE_BYTES = 1 << 28  # trainer_state.json has a line for every log of the run: a million of them
# Keys of trainer_state.json: what our callback and MoETrainer keep, and what the Trainer was about to do.
CALLBACK, SUMS, CONTROL = "PeftCheckpointCallback", "MoETrainer", "TrainerControl"
STEP = "global_step"  # the key of the step in every file but scheduler.pt, whose last_epoch it is


@dataclass(frozen=True)
class Sums:
    """What a rank had summed up for its next logs."""

    loss: float  # since the last log
    total_loss: float  # until the last log
    last_logged: int  # the step of the last log
    usage: list[list[float]] | None  # of each expert since the last log: first choices, and probabilities
    first_step: int  # the step after which `total_loss` begins
    optimizer_steps: list[int]  # how often parameters were updated: each number once


@dataclass(frozen=True)
class SavedState:
    """The training state of a checkpoint for one rank, read and checked."""

    step: int
    moments: dict[str, dict[str, torch.Tensor]]  # of each parameter by its name: step, exp_avg, exp_avg_sq
    generators: dict[str, Any]  # for `set_rng_state`
    sums: Sums | None
    evaluation_due: bool  # whether a signal has cut the evaluation of this step short


# ---- writing ----


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
    step = {STEP: trainer_state.global_step}
    moments = optimizer.state_dict()
    moments["state"] = dict(sorted(moments["state"].items()))  # not in the order in which parameters were first trained
    _save(moments | step, folder / formats.OPTIMIZER)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Please also save or load the state of the optimizer")
        _save(scheduler.state_dict(), folder / formats.SCHEDULER)
    for rank, state in enumerate(rng_states):
        _save(state | step, folder / _rng_name(rank, len(rng_states)))
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


def read(
    folder: Path, step: int, model: Mixture, optimizer: Optimizer | None = None, new: Collection[str] = ()
) -> SavedState:
    """Read the training state of a checkpoint for this rank, and check all of it.

    Args:
        step: The step of the checkpoint.
        model: The mixture that is trained on.
        optimizer: The one that goes on; without it, an AdamW with one group of parameters. Of one that is no Adam,
            whatever moments there are must fit the parameters.
        new: The experts that were never trained, by name. They may have no moments.

    Raises:
        CheckpointError: With every problem of the first file that has any.
    """
    check_complete(folder)
    if (folder / formats.SCALER).is_file():
        raise refused(folder, formats.SCALER, ["expected none, since mixtures are trained without a gradient scaler"])
    state = read_trainer_state(folder)
    sums = _read_sums(folder, state, step, model.num_experts)
    counts = None if sums is None else sums.optimizer_steps

    def read_file(name: str) -> dict[str, Any]:
        found = read_tensors(folder, name)
        _check_step(folder, name, found.get(STEP), step)
        return found

    trained = model.trained_parameters()
    moments = read_moments(folder, read_file(formats.OPTIMIZER), trained, optimizer, of_experts(new, trained))
    found = sorted({int(each["step"]) for each in moments.values() if "step" in each})
    if found != counts if counts is not None else len(found) > 1 or max(found, default=0) > step:
        expected = f"one number until {step}" if counts is None else counts
        raise refused(folder, formats.OPTIMIZER, [f"step: expected {expected}, found {short(found)}"])
    _check_scheduler(folder, step)
    generators = read_file(rng_name := _rng_name(*ranks.world()))
    try:
        check_rng_state(generators)
    except ValueError as error:
        raise refused(folder, rng_name, [f"is not a state of the generators ({error})"]) from None
    return SavedState(step, moments, generators, sums, get(kept(state, CONTROL), "args.should_evaluate") is True)


def check_complete(folder: Path) -> None:
    """Raise CheckpointError if a checkpoint lacks training files; it lists them."""
    names = [name for name in formats.TRAINING_FILES if not (folder / name).is_file()]
    names += [] if rng_files(folder) else ["rng_state.pth"]
    if names:
        raise CheckpointError(folder, [f"{name}: is missing; {REMEDY}" for name in names])


def rng_files(folder: Path) -> list[str]:
    """Return the files of the random generators: one for each process that wrote the checkpoint."""
    return sorted(path.name for path in folder.iterdir() if formats.RNG_STATE.fullmatch(path.name))


def _check_step(folder: Path, name: str, found: object, step: int) -> None:
    if not natural(found) or found != step:
        expected = f"expected step {step}, as in {formats.CONFIG}, found {seen(found)}: it is of another checkpoint"
        raise refused(folder, name, [expected])


# ---- reading: trainer_state.json ----


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """Return what trainer_state.json holds. Raises CheckpointError if the Trainer could not use it."""
    name = formats.TRAINER_STATE
    try:
        state = read_json(folder / name, MAX_STATE_BYTES)
    except FileProblem as error:
        raise refused(folder, name, [str(error)]) from None
    if not isinstance(state, dict):
        raise refused(folder, name, [f"expected an object, found {short(state)}"])
    known = {field.name for field in fields(TrainerState)}
    problems = [f"{short(key)}: is unknown to the Trainer of this version" for key in sorted(set(state) - known)]
    problems += _broken_rules(state, TRAINER_RULES)
    if problems:
        raise refused(folder, name, problems)
    return state


def _broken_rules(found: dict[str, Any], rules: Rules) -> list[str]:
    broken = [rule for rule in rules if not rule[2](found.get(rule[0]))]
    return [f"{key}: expected {expected}, found {short(found.get(key))}" for key, expected, _ in broken]


def kept(state: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the state of a callback, of which `read_trainer_state` has made sure; {} if there is none."""
    found = (state.get("stateful_callbacks") or {}).get(name, {})
    return (found or [{}])[0] if isinstance(found, list) else found


def run_settings(state: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the run that wrote a state, as `read_trainer_state` has read it."""
    run = get(kept(state, CALLBACK), "attributes.run")
    return run if isinstance(run, dict) else {}


def _read_sums(folder: Path, state: dict[str, Any], step: int, num_experts: int) -> Sums | None:
    _check_step(folder, formats.TRAINER_STATE, state[STEP], step)
    by_rank = get(kept(state, SUMS), "attributes.by_rank")
    if by_rank is None:
        return None
    rank, size = ranks.world()
    found = by_rank[rank] if isinstance(by_rank, list) and len(by_rank) == size else None
    if not isinstance(found, dict):
        raise refused(folder, formats.TRAINER_STATE, [f"{SUMS}: expected sums of {size} process(es)"])
    problems = _broken_rules(found, _sums_rules(step, num_experts))
    problems += [f"{short(key)}: is unknown" for key in found if key not in {field.name for field in fields(Sums)}]
    if problems:
        raise refused(folder, formats.TRAINER_STATE, [f"{SUMS}: {problem}" for problem in problems])
    values: dict[str, Any] = {"usage": None} | found
    return Sums(**values)


def _sums_rules(step: int, num_experts: int) -> Rules:
    def is_step(value: Any) -> bool:
        return natural(value, most=step)

    def is_usage(value: Any) -> bool:
        lists = value if isinstance(value, list) and all(isinstance(shares, list) for shares in value) else []
        return [len(x) for x in lists] == [num_experts] * 2 and all(number(v) and v >= 0 for x in lists for v in x)

    def is_counts(value: Any) -> bool:
        return isinstance(value, list) and all(natural(v, 1) for v in value)

    return (
        ("loss", "a number", number),
        ("total_loss", "a number", number),
        ("last_logged", f"a step until {step}", is_step),
        ("usage", f"two lists of {num_experts} numbers from 0, or null", nothing_or(is_usage)),
        ("first_step", f"a step until {step}", is_step),
        ("optimizer_steps", "a list of whole numbers from 1", is_counts),
    )


# ---- reading: files of torch.save ----


def read_tensors(folder: Path, name: str) -> dict[str, Any]:
    """Load one of the training files: a dict of plain values and of dense tensors on the CPU.

    Raises:
        CheckpointError: If it is missing, cut off, or holds anything else.
    """
    path = folder / name
    if not path.is_file():
        raise refused(folder, name, ["is missing"])
    try:
        with torch.serialization.safe_globals([]):
            found = torch.load(path, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(path) as archive:
            stored = sum(member.file_size for member in archive.infolist() if "/data/" in member.filename)
    except Exception as error:  # torch raises its own errors and those of pickle and zipfile
        reason = (str(error).splitlines() or [""])[0][:160]
        what = f"cannot be read as tensors only ({type(error).__name__}: {reason})"
        raise refused(folder, name, [what]) from None
    tensors = list(_tensors_in(found))
    if not isinstance(found, dict) or not all(map(_is_plain, tensors)):
        raise refused(folder, name, ["expected values by name, and dense tensors only"])
    # Tensors that share bytes would change together; of a tensor beyond its bytes, torch makes up the rest.
    filled = [tensor for tensor in tensors if tensor.numel()]
    if len({tensor.data_ptr() for tensor in filled}) < len(filled) or sum(t.nbytes for t in filled) != stored:
        raise refused(folder, name, [f"expected tensors with bytes of their own, {stored} in all"])
    return found


def _tensors_in(value: object) -> Iterator[torch.Tensor]:
    pending, seen = [value], set[int]()
    while pending:
        value = pending.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:  # a list may be in itself
            seen.add(id(value))
            pending += value.values() if isinstance(value, dict) else value


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) is torch.Tensor
        and tensor.layout is torch.strided
        and tensor.device.type == "cpu"
        and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
        and tensor.is_contiguous()
        and tensor.untyped_storage().nbytes() == tensor.nbytes
    )


def _check_scheduler(folder: Path, step: int) -> None:
    state = read_tensors(folder, formats.SCHEDULER)
    if not isinstance(state.get("base_lrs"), list) or not natural(state.get("_step_count"), 1):
        raise refused(folder, formats.SCHEDULER, ["is not the state of a LambdaLR"])
    for found in (state.get("last_epoch"), state["_step_count"] - 1):
        _check_step(folder, formats.SCHEDULER, found, step)
