"""The processes of a run: which one this is, and how all of them agree. With one process, all of it is nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from ..errors import UsageError


def world() -> tuple[int, int]:
    """(rank, number of processes) of this run."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return world()[0] == 0


def gather(value: object) -> list:
    """Every rank's value, on every rank, by rank."""
    size = world()[1]
    if size == 1:
        return [value]
    values: list = [None] * size
    dist.all_gather_object(values, value)
    return values


def largest(value: int, device: torch.device | str = "cpu") -> int:
    """The largest of the ranks' values, on every rank; cheap enough for every step."""
    if world()[1] == 1:
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


@contextmanager
def together() -> Iterator[None]:
    """Where the block fails on one rank, it fails on all: none is left to wait for another.

    Raises:
        UsageError: with the message of the first rank that failed, on those that did not.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    failures = gather(None if failure is None else f"{failure}" or type(failure).__name__)
    if failure is not None:
        raise failure
    for rank, message in enumerate(failures):
        if message is not None:
            raise UsageError(f"rank {rank}: {message}")
