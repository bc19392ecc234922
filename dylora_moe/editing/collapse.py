"""The whole mixture of a checkpoint as one plain LoRA for stock PEFT, and what that costs in held-out loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..api import DyLoRAMoE
from ..checkpoint.verify import SoundCheckpoint
from ..constants import NO_EXPERT
from ..data.sources import DataSpec
from ..errors import UsageError
from ..stages.batches import BlockCollator, known_tokens
from ..stages.evaluate import Evaluation
from ..stages.measure import read_held_out
from ..stages.merging import checked_weights, combined, rebuilt, rows_of
from ..stages.setup import skill_names
from .checked import sound
from .edit import NAMED_BASE, BaseChoice, documents_of, load, tokenizer_of

BATCH_SIZE = 1  # rows of --data have different lengths


@dataclass(frozen=True)
class Losses:
    """The held-out loss of one skill in nats per token: of the mixture, the one LoRA, and the base model alone."""

    mixture: float
    merged: float
    base: float


@dataclass(frozen=True)
class Collapsed:
    """What was written.

    Attributes:
        weights: of the experts in the sum.
        rank: of the LoRA.
        held: the share of the sum's squared Frobenius norm that it holds.
        losses: by skill, or by data set; empty if there was no text to measure them on.
    """

    folder: Path
    weights: list[float]
    rank: int
    held: float
    losses: dict[str, Losses]


def collapse(
    old: str | Path,
    target: str | Path,
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    data: Sequence[str] = (),
    base: BaseChoice = NAMED_BASE,
) -> Collapsed:
    """Write the weighted sum of all experts to a new folder as one plain LoRA.

    Args:
        weights: one for each expert. By default, each has the share that the router gives it on the held-out text, all
            skills alike; without such text, all that were trained have the same.
        rank: the most that the LoRA may have; by default the largest of the experts. The sum of theirs makes it exact.
        data: text on which the loss is measured; by default the held-out text of the run folder, if there is any.

    Raises:
        UsageError: if weights or text do not fit, or the folder exists already or cannot be written.
        CheckpointError: if the checkpoint is not sound.
    """
    checkpoint = sound(old, target)
    model = load(checkpoint, base)
    if weights is not None:
        checked_weights(model, weights)
    texts = _texts(checkpoint, model, data, base)
    evaluation = Evaluation(model, BlockCollator(), BATCH_SIZE)
    routed = {name: evaluation.loss(rows) for name, rows in texts.items()}
    if weights is None and routed and model.num_experts > 1:
        shares = [usage.shares() for _, usage in routed.values() if usage is not None]
        weights = [sum(each) / len(shares) for each in zip(*shares, strict=True)]
    used = checked_weights(model, weights)
    one, held = combined(model, used, rank)
    merged = rebuilt(model, [one])
    measured = Evaluation(merged, BlockCollator(), BATCH_SIZE)
    losses = {
        name: Losses(routed[name][0], measured.loss(rows, 0)[0], evaluation.loss(rows, NO_EXPERT)[0])
        for name, rows in texts.items()
    }
    merged.export_expert(0, target)
    shown = [used.get(index, 0.0) for index in range(model.num_experts)]
    return Collapsed(Path(target), shown, one.config.r, held, losses)


def _texts(checkpoint: SoundCheckpoint, model: DyLoRAMoE, data: Sequence[str], base: BaseChoice) -> Mapping[str, Any]:
    """Return the rows on which the loss is measured, by skill or data set."""
    if not data:
        kept = read_held_out(checkpoint.folder.resolve().parent, known_tokens(model.base))
        return {name: rows for name, rows in kept.items() if len(rows)}
    tokenizer, found = tokenizer_of(checkpoint, base), {}
    specs = [DataSpec.parse(text) for text in data]
    for name, spec in zip(skill_names(spec.name for spec in specs), specs, strict=True):
        rows = rows_of(documents_of(spec, tokenizer, model), model)
        if not rows:
            raise UsageError(f"{spec.source}: has nothing to be predicted; give documents of two tokens or more")
        found[name] = rows
    return found
