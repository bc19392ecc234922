"""The held-out loss of a mixture, over all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from ..base.preserve import untouched
from ..constants import IGNORED_LABEL, NO_EXPERT
from ..distributed import ranks
from ..mixture.model import Mixture
from ..mixture.router import Usage


@dataclass(frozen=True)
class Evaluation:
    """Evaluates rows of a data set. Every rank calls its methods.

    Args:
        collate: makes a batch of rows, with `labels`.
        batch_size: rows per process.
        after_batch: is called after each batch.
    """

    model: Mixture
    collate: Callable[[list[Any]], dict[str, Any]]
    batch_size: int
    after_batch: Callable[[], object] = lambda: None

    def loss(self, rows: Any, expert: int | None = None) -> tuple[float, Usage | None]:
        """Return the mean loss in nats per labelled token, and how the tokens were routed.

        Random generators, training mode and usage are left as they were.

        Args:
            expert: send every token to this expert; NO_EXPERT: the base model alone.
        """
        model = self.model
        total = torch.zeros(2, dtype=torch.float64)  # nats, tokens
        with evaluating(model), _only(model, expert):
            model.reset_usage()
            for batch in self.own_batches(rows):
                batch = {n: v.to(model.device) if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
                tokens = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
                total += torch.tensor([model(**batch).lm_loss.item() * tokens, tokens], dtype=torch.float64)
                self.after_batch()
            usage = over_ranks(model.usage())
        nats, tokens = torch.stack(ranks.gather(total)).sum(0).tolist()
        return nats / max(tokens, 1), usage

    def batches(self, rows: Any) -> int:
        """Return the number of batches of the first rank, which has the most."""
        return math.ceil(math.ceil(len(rows) / ranks.world()[1]) / self.batch_size)

    def own_batches(self, rows: Any) -> Iterator[dict[str, Any]]:
        """Yield the batches of this rank. Batches without labels make up for missing ones: all ranks stay in step."""
        rank, size = ranks.world()
        mine = Subset(rows, range(rank, len(rows), size))
        loader = DataLoader(mine, batch_size=self.batch_size, collate_fn=self.collate)
        yield from loader
        for _ in range(self.batches(rows) - len(loader)):
            blank = self.collate([rows[0]])
            yield blank | {"labels": torch.full_like(blank["labels"], IGNORED_LABEL)}


def _only(model: Mixture, expert: int | None) -> AbstractContextManager:
    if expert is None:
        return nullcontext()
    return model.disable_experts() if expert == NO_EXPERT else model.expert(expert)


@contextmanager
def evaluating(model: Mixture) -> Iterator[None]:
    """Inside is an evaluation; afterwards the model is as it was, its usage included."""
    usage = model._usage
    try:
        with untouched(model):
            yield
    finally:
        model._usage = usage


def over_ranks(usage: Usage | None) -> Usage | None:
    """Return the usage of all ranks together."""
    if usage is None:
        return None
    both = ranks.gather((usage.first.cpu(), usage.total.cpu()))
    return Usage(sum(first for first, _ in both), sum(total for _, total in both))
