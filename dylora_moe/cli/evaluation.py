"""What `eval` measures: losses, routed, by each expert alone, and of the base model. Imports torch."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from ..constants import IGNORED_LABEL
from ..data.blocks import load_evaluation
from ..data.sources import DataSpec
from ..errors import UsageError
from ..stages.batches import BlockCollator, known_tokens, why_not_packed
from ..stages.evaluate import Evaluation
from ..stages.measure import HELD_OUT, Measured, measure, read_held_out
from ..stages.setup import skill_names
from .mixtures import Loaded

BLOCK_SIZE = 512


@dataclass(frozen=True)
class Evaluated:
    """What was measured on one data set."""

    name: str
    tokens: int  # that are predicted
    own: int | None  # the expert of the skill of its name
    measured: Measured


def rows_of(loaded: Loaded, args: Namespace) -> dict[str, Dataset]:
    """Return the blocks of each data set of --data, or else of the held-out text beside the checkpoint, by skill.

    Raises:
        UsageError: if there are none, or the base model does not take them.
    """
    if not args.data:
        run_dir = Path(args.checkpoint).resolve().parent
        found = read_held_out(run_dir, known_tokens(loaded.model.base))
        if not found:
            raise UsageError(f"there is no {HELD_OUT} in {run_dir}: name data sets with --data")
        return found
    base = loaded.model.base
    most = getattr(base.config.get_text_config(), "max_position_embeddings", None) or math.inf
    if args.block_size is not None and args.block_size > most:
        raise UsageError(f"--block-size {args.block_size}: the base model has {most} positions; use at most that many")
    return load_evaluation(
        [DataSpec.parse(text) for text in args.data],
        loaded.tokenizer,
        block_size=args.block_size or int(min(BLOCK_SIZE, most)),
        most=args.eval_blocks,
        packed=why_not_packed(base) is None,
        vocabulary=known_tokens(base),
    )


def evaluate(loaded: Loaded, data: dict[str, Dataset], batch_size: int) -> Iterator[Evaluated]:
    """Measure one data set after the other."""
    evaluation = Evaluation(loaded.model, BlockCollator(), batch_size)
    for name, rows in data.items():
        (skill,) = skill_names([name])
        own = loaded.library[skill].expert if skill in loaded.library else None
        tokens = int((np.asarray(rows["labels"])[:, 1:] != IGNORED_LABEL).sum())
        yield Evaluated(name, tokens, own, measure(evaluation, rows, own, every_expert=True))
