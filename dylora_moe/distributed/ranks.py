"""The processes of a run: which one this is, and how all of them agree. With one process, nothing is exchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..errors import UsageError

T = TypeVar("T")


def world() -> tuple[int, int]:
    """Return the rank of this process, and the number of processes of the run."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_first() -> bool:
    """Return whether this is the process that writes files and prints."""
    return world()[0] == 0


def gather(value: Any) -> list[Any]:
    """Return the values of all ranks, in their order, on every rank."""
    size = world()[1]
    if size == 1:
        return [value]
    values = [None] * size
    dist.all_gather_object(values, value)
    return values


def largest(value: int, device: torch.device | str = "cpu") -> int:
    """Return the largest of the values of all ranks, on every rank. This is cheap enough for every step."""
    if world()[1] == 1:
        return value
    tensor = torch.tensor(value, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


@contextmanager
def together() -> Iterator[None]:
    """Make a block that fails on one rank fail on all of them, so that none waits for another for ever.

    Raises:
        UsageError: With the message of the first rank that failed, on the ranks that did not.
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


def on_first(make: Callable[[], T]) -> T:
    """Call a function on the first rank, and return its result on every rank.

    Raises:
        UsageError: On the other ranks, if it fails on the first.
    """
    with together():
        value = make() if is_first() else None
    return gather(value)[0]
