"""What training needs to go on as if it had never stopped: optimizer, scheduler, random generators, trainer state.

The moments of the optimizer are bound to the names of the parameters, and every file names the step that it is of. All
of it is read and checked before anything changes, and nothing is unpickled. Nothing here imports the Trainer.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerState

from ..base.preserve import check_rng_state
from ..checkpoint import formats
from ..checkpoint.findings import Rules, get, natural, nothing_or, number, short, text
from ..checkpoint.safetensors_file import read_json
from ..checkpoint.verify import TRAINER_RULES
from ..distributed import ranks
from ..errors import CheckpointError
from ..mixture.experts import EXPERT_PARAMETER
from ..mixture.model import Mixture
from ..store.files import FileProblem, explained

MAX_STATE_BYTES = 1 << 28  # trainer_state.json has a line for every log of the run: a million of them
REMEDY = "--resume-weights-only goes on with a fresh optimizer"
# Keys of trainer_state.json: what our callback and MoETrainer keep, and what the Trainer was about to do.
CALLBACK, SUMS, CONTROL = "PeftCheckpointCallback", "MoETrainer", "TrainerControl"
STEP = "global_step"  # the key of the step in every file but scheduler.pt, whose last_epoch it is
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


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
        raise _refused(folder, formats.SCALER, ["expected none, since mixtures are trained without a gradient scaler"])
    state = read_trainer_state(folder)
    sums = _read_sums(folder, state, step, model.num_experts)
    counts = None if sums is None else sums.optimizer_steps

    def read_file(name: str) -> dict[str, Any]:
        found = read_tensors(folder, name)
        _check_step(folder, name, found.get(STEP), step)
        return found

    trained = model.trained_parameters()
    moments = _read_moments(folder, read_file(formats.OPTIMIZER), trained, optimizer, _of_experts(new, trained))
    found = sorted({int(each["step"]) for each in moments.values() if "step" in each})
    if found != counts if counts is not None else len(found) > 1 or max(found, default=0) > step:
        expected = f"one number until {step}" if counts is None else counts
        raise _refused(folder, formats.OPTIMIZER, [f"step: expected {expected}, found {short(found)}"])
    _check_scheduler(folder, step)
    generators = read_file(rng_name := _rng_name(*ranks.world()))
    try:
        check_rng_state(generators)
    except ValueError as error:
        raise _refused(folder, rng_name, [f"is not a state of the generators ({error})"]) from None
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


def _refused(folder: Path, name: str, problems: list[str]) -> CheckpointError:
    return CheckpointError(folder, [f"{name}: {problem}; {REMEDY}" for problem in problems])


def _seen(value: object) -> str:
    return f"shape {tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else short(value)


def _check_step(folder: Path, name: str, found: object, step: int) -> None:
    if not natural(found) or found != step:
        expected = f"expected step {step}, as in {formats.CONFIG}, found {_seen(found)}: it is of another checkpoint"
        raise _refused(folder, name, [expected])


# ---- reading: trainer_state.json ----


def read_trainer_state(folder: Path) -> dict[str, Any]:
    """Return what trainer_state.json holds. Raises CheckpointError if the Trainer could not use it."""
    name = formats.TRAINER_STATE
    try:
        state = read_json(folder / name, MAX_STATE_BYTES)
    except FileProblem as error:
        raise _refused(folder, name, [str(error)]) from None
    if not isinstance(state, dict):
        raise _refused(folder, name, [f"expected an object, found {short(state)}"])
    known = {field.name for field in fields(TrainerState)}
    problems = [f"{short(key)}: is unknown to the Trainer of this version" for key in sorted(set(state) - known)]
    problems += _broken_rules(state, TRAINER_RULES)
    if problems:
        raise _refused(folder, name, problems)
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
        raise _refused(folder, formats.TRAINER_STATE, [f"{SUMS}: expected sums of {size} process(es)"])
    problems = _broken_rules(found, _sums_rules(step, num_experts))
    problems += [f"{short(key)}: is unknown" for key in found if key not in {field.name for field in fields(Sums)}]
    if problems:
        raise _refused(folder, formats.TRAINER_STATE, [f"{SUMS}: {problem}" for problem in problems])
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
        raise _refused(folder, name, ["is missing"])
    try:
        with torch.serialization.safe_globals([]):
            found = torch.load(path, map_location="cpu", weights_only=True)
        with zipfile.ZipFile(path) as archive:
            stored = sum(member.file_size for member in archive.infolist() if "/data/" in member.filename)
    except Exception as error:  # torch raises its own errors and those of pickle and zipfile
        reason = (str(error).splitlines() or [""])[0][:160]
        what = f"cannot be read as tensors only ({type(error).__name__}: {reason})"
        raise _refused(folder, name, [what]) from None
    tensors = list(_tensors_in(found))
    if not isinstance(found, dict) or not all(map(_is_plain, tensors)):
        raise _refused(folder, name, ["expected values by name, and dense tensors only"])
    # Tensors that share bytes would change together; of a tensor beyond its bytes, torch makes up the rest.
    filled = [tensor for tensor in tensors if tensor.numel()]
    if len({tensor.data_ptr() for tensor in filled}) < len(filled) or sum(t.nbytes for t in filled) != stored:
        raise _refused(folder, name, [f"expected tensors with bytes of their own, {stored} in all"])
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
        raise _refused(folder, formats.SCHEDULER, ["is not the state of a LambdaLR"])
    for found in (state.get("last_epoch"), state["_step_count"] - 1):
        _check_step(folder, formats.SCHEDULER, found, step)


# ---- reading: the optimizer ----


def _read_moments(
    folder: Path,
    saved: dict[str, Any],
    here: Mapping[str, torch.Tensor],
    optimizer: Optimizer | None,
    new: Sequence[set[str]],
) -> dict[str, dict[str, torch.Tensor]]:
    """Return the saved moments of each of these parameters, by name. The parameters of a new expert may have none.

    Raises:
        CheckpointError: If parameters are missing, unknown or out of order, or moments are not theirs; it lists them.
    """
    groups, moments = _names_by_group(saved.get("param_groups")), saved.get("state")
    if groups is None or not isinstance(moments, dict):
        raise _refused(folder, formats.OPTIMIZER, ["is not the state of an optimizer with named parameters"])
    there = {name: index for index, name in enumerate(name for group in groups for name in group)}
    missing = [n for n in sorted(here) if n not in there or there[n] not in moments]
    untrained = set().union(*(names for names in new if names <= set(missing) & there.keys()))
    problems = [f"has no moments for {n}" for n in missing if n not in untrained]
    problems += [f"has moments for {n}, which is not trained here" for n in sorted(set(there) - set(here))]
    groups_here = 1 if optimizer is None else len(optimizer.param_groups)
    if len(groups) != groups_here:
        problems.append(f"has {len(groups)} parameter groups, the optimizer has {groups_here}")
    if not problems:
        problems = [line for group in groups for line in _out_of_order(group, here)]
    if not problems and len(moments) != len(here) - len(untrained):
        problems = ["has moments for parameters without a name"]
    keys: tuple[str, ...] | None = MOMENTS
    if optimizer is not None:
        amsgrad = any(group.get("amsgrad") for group in optimizer.param_groups)
        keys = None if not isinstance(optimizer, Adam) else (*MOMENTS, "max_exp_avg_sq") if amsgrad else MOMENTS
    for name in sorted(set(here) & set(there)):
        if there[name] in moments:
            problems += _wrong_moments(name, moments[there[name]], here[name], keys)
    if problems:
        raise _refused(
            folder, formats.OPTIMIZER, [f"{problem}; build the experts as they were" for problem in problems]
        )
    return {name: moments[there[name]] for name in here if name not in untrained}


def _of_experts(experts: Collection[str], parameters: Iterable[str]) -> list[set[str]]:
    """Return the names of the parameters of each of these experts."""
    owners = {name: found[1] for name in parameters if (found := EXPERT_PARAMETER.search(name))}
    return [{name for name, owner in owners.items() if owner == expert} for expert in experts]


def _names_by_group(groups: Any) -> list[list[str]] | None:
    """Return the names of the parameters of each group; None unless torch has numbered all of them in their order."""
    names, indices = [], list[object]()
    for group in groups if isinstance(groups, list) else [None]:
        here, there = get(group, "param_names"), get(group, "params")
        if not isinstance(here, list) or not isinstance(there, list) or not all(map(text, here)):
            return None
        names.append(here)
        indices += there
    are_right = all(map(natural, indices)) and indices == list(range(sum(map(len, names))))
    return names if are_right else None


def _out_of_order(there: list[str], here: Mapping[str, torch.Tensor]) -> list[str]:
    """Return a problem if the names of a group are not in the order of the parameters: its moments may be mixed up."""
    in_order = [name for name in here if name in set(there)]
    for place, (expected, found) in enumerate(zip_longest(in_order, there)):  # a name that is there twice is too many
        if expected != found:
            return [f"another order: expected {expected or 'no more'} as parameter {place}, found {found}"]
    return []


def _wrong_moments(name: str, found: Any, parameter: torch.Tensor, keys: tuple[str, ...] | None) -> Iterator[str]:
    """Yield what is wrong with the moments of a parameter: those of Adam, or with None of any optimizer."""
    if keys is None and isinstance(found, dict):
        for key, value in found.items():
            fits = isinstance(value, torch.Tensor) and value.shape in (torch.Size(), parameter.shape)
            if not (value.isfinite().all() if fits else value is None or number(value)):
                yield f"{short(key)} of {name}: expected finite numbers, found {_seen(value)}"
        return
    keys = keys or MOMENTS
    if not isinstance(found, dict) or set(found) != {"step", *keys}:
        names = ", ".join(map(_seen, found)) if isinstance(found, dict) else _seen(found)
        yield f"expected step and {', '.join(keys)} of {name}, found {names}"
        return
    shapes = {"step": (torch.Size(), torch.float32)} | dict.fromkeys(keys, (parameter.shape, parameter.dtype))
    for key, (shape, dtype) in shapes.items():
        value = found[key]
        if not isinstance(value, torch.Tensor) or value.shape != shape or value.dtype != dtype:
            yield f"{key} of {name}: expected shape {tuple(shape)} {dtype}, found {_seen(value)}"
        elif not value.isfinite().all() or (key != "exp_avg" and bool((value < 0).any())):
            yield f"{key} of {name}: expected finite numbers{'' if key == 'exp_avg' else ' from 0'}, found others"
        elif key == "step" and (value < 1 or value != value.round()):
            yield f"{key} of {name}: expected a whole number from 1, found {value.item()}"


def load_moments(moments: Mapping[str, dict[str, torch.Tensor]], optimizer: Optimizer) -> None:
    """Load moments by the names of the parameters. Learning rate, weight decay and the like are those of this run."""
    own = optimizer.state_dict()
    names = [name for group in own["param_groups"] for name in group["param_names"]]  # torch numbers them in this order
    state = {index: moments[name] for index, name in enumerate(names) if name in moments}
    optimizer.load_state_dict(own | {"state": state})
