"""Which block trains which expert, step by step.

A run of specialised training has two parts. First every block trains one expert, the trunk: what a LoRA learns first
is common to all skills. Then each expert begins as a copy of the trunk, and each micro-batch has blocks of one skill,
which train the expert of that skill alone. A step therefore costs what it costs to train one LoRA, however many experts
there are. A run that trains one expert, or adds experts to those that are there, has no trunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainerState

from ..constants import expert_name
from ..errors import UsageError
from ..mixture.model import Mixture

TRUNK = 0  # the expert that is trained on all skills first
TRUNK_SHARE = 0.5  # of the steps, see docs/learning.md


@dataclass(frozen=True)
class Plan:
    """What each step of a run trains.

    Attributes:
        first_step: the number of steps that were made before the run.
        branch_step: the step after which each expert begins as a copy of the trunk; None if there is no trunk.
        last_step: the step at which the run ends.
        experts: the expert of each data set, by the index that a row has in `source`; -1 for one that has no rows.
    """

    first_step: int
    branch_step: int | None
    last_step: int
    experts: tuple[int, ...]

    @property
    def trained(self) -> list[int]:
        """The experts that the run trains."""
        return sorted(set(self.experts) - {-1})


def branch_after(experts: int, steps: int) -> int | None:
    """Return the number of steps for which fresh experts train their trunk; None if there is one expert only."""
    branch = round(TRUNK_SHARE * steps)
    return branch if experts > 1 and 0 < branch < steps else None


class PlannedBlocks(Dataset):
    """The blocks of a run in the order in which they are trained on, each with its expert.

    Row i of the data set is row i % batch_size of the micro-batch i // batch_size; all rows of a micro-batch have one
    expert. Blocks of steps before the run are there, so that a step always has the same place, and are never read.

    Args:
        blocks: rows with a column `source`.
        plan: what each step trains.
        rows: blocks per micro-batch.
        micro_batches: per step, over all processes.
        seed: of the order of the blocks, which is another one in each pass.
    """

    def __init__(self, blocks: Any, plan: Plan, rows: int, micro_batches: int, seed: int):
        self.blocks = blocks
        self.plan = plan
        sources = source_of_rows(blocks)
        before = plan.first_step * micro_batches * rows
        branch = plan.first_step if plan.branch_step is None else min(plan.branch_step, plan.last_step)
        trunk = (branch - plan.first_step) * micro_batches * rows
        batches = (plan.last_step - plan.first_step) * micro_batches - trunk // rows
        stream = _passes(len(sources), seed)
        order = [0] * before + [next(stream) for _ in range(trunk)]
        order += _by_expert(stream, np.asarray(plan.experts)[sources], rows, batches)
        self.order = np.asarray(order)
        self.experts = np.asarray(plan.experts)[sources[self.order]]
        self.experts[before : before + trunk] = TRUNK

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.blocks[int(self.order[index])] | {"expert": int(self.experts[index])}


def source_of_rows(blocks: Any) -> np.ndarray:
    """Return the index of the data set of each row, (rows,), without making Python numbers of them."""
    return blocks.with_format("numpy", columns=["source"])[:]["source"]


def _passes(count: int, seed: int) -> Iterator[int]:
    """Yield the indices of all blocks again and again, each time in another order."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).tolist()


def _by_expert(stream: Iterator[int], experts: np.ndarray, rows: int, batches: int) -> list[int]:
    """Put blocks together into micro-batches of one expert each, in the order in which they become full."""
    waiting: dict[int, list[int]] = {}
    order: list[int] = []
    while len(order) < rows * batches:
        index = next(stream)
        batch = waiting.setdefault(int(experts[index]), [])
        batch.append(index)
        if len(batch) == rows:
            order += waiting.pop(int(experts[index]))
    return order


def steps_of(blocks: int, epochs: float, rows: int, micro_batches: int) -> int:
    """Return the number of steps of so many passes over the blocks; at least 1."""
    return max(1, math.ceil(epochs * blocks / (rows * micro_batches)))


class Branch(TrainerCallback):
    """Makes each expert a copy of the trunk, once the plan says so."""

    def __init__(self, plan: Plan):
        self.plan = plan

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.plan.branch_step:
            for expert in self.plan.trained:
                if expert != TRUNK:
                    copy_expert(kwargs["model"], TRUNK, expert, kwargs["optimizer"])


@torch.no_grad()
def copy_expert(model: Mixture, source: int, target: int, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Make an expert a copy of another one, on the same layers and of the same rank, with its state in the optimizer.

    Raises:
        UsageError: if their tensors differ in names or shapes.
    """
    there, here = model.expert_tensors(source), model.expert_tensors(target)
    if {name: tensor.shape for name, tensor in there.items()} != {name: tensor.shape for name, tensor in here.items()}:
        raise UsageError(
            f"{expert_name(target)} cannot begin as a copy of {expert_name(source)}: expected the same rank and the "
            "same layers, found others"
        )
    for name, parameter in here.items():
        parameter.copy_(there[name])
        if optimizer is not None and there[name] in optimizer.state:
            state = optimizer.state[there[name]]
            optimizer.state[parameter] = {key: deepcopy(value) for key, value in state.items()}
