"""The moments of the optimizer in a checkpoint, bound to the names of the parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch.optim import Adam, Optimizer

from ..checkpoint import formats
from ..checkpoint.findings import get, natural, number, short, text
from ..errors import CheckpointError
from ..mixture.experts import EXPERT_PARAMETER

REMEDY = "--resume-weights-only goes on with a fresh optimizer"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW

NOT_TRAINED = ", which the run did not train: choose what it did with train_only before it is resumed"


def refused(folder: Path, name: str, problems: list[str]) -> CheckpointError:
    return CheckpointError(folder, [f"{name}: {problem}; {REMEDY}" for problem in problems])


def seen(value: object) -> str:
    return f"shape {tuple(value.shape)} {value.dtype}" if isinstance(value, torch.Tensor) else short(value)


def read_moments(
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
        raise refused(folder, formats.OPTIMIZER, ["is not the state of an optimizer with named parameters"])
    there = {name: index for index, name in enumerate(name for group in groups for name in group)}
    missing = [n for n in sorted(here) if n not in there or there[n] not in moments]
    untrained = set().union(*(names for names in new if names <= set(missing) & there.keys()))
    missing = [n for n in missing if n not in untrained]
    problems = [f"has no moments for {n}{NOT_TRAINED * (n not in there)}" for n in missing]
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
        raise refused(folder, formats.OPTIMIZER, [f"{problem}; build the experts as they were" for problem in problems])
    return {name: moments[there[name]] for name in here if name not in untrained}


def of_experts(experts: Collection[str], parameters: Iterable[str]) -> list[set[str]]:
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
                yield f"{short(key)} of {name}: expected finite numbers, found {seen(value)}"
        return
    keys = keys or MOMENTS
    if not isinstance(found, dict) or set(found) != {"step", *keys}:
        names = ", ".join(map(seen, found)) if isinstance(found, dict) else seen(found)
        yield f"expected step and {', '.join(keys)} of {name}, found {names}"
        return
    shapes = {"step": (torch.Size(), torch.float32)} | dict.fromkeys(keys, (parameter.shape, parameter.dtype))
    for key, (shape, dtype) in shapes.items():
        value = found[key]
        if not isinstance(value, torch.Tensor) or value.shape != shape or value.dtype != dtype:
            yield f"{key} of {name}: expected shape {tuple(shape)} {dtype}, found {seen(value)}"
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
