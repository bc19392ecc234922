"""Blocks to batches, and the proof that the documents of a block do not see each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..data.packing import COLUMNS
from ..errors import UsageError

LEAK_TOLERANCE = 1e-4


class BlockCollator:
    """Rows to `input_ids`, `labels` and `position_ids`, (B, block_size) int64, and `use_cache=False`; no attention
    mask.

    The last two are what keeps the documents of a block apart; see the head of this module. The Trainer must not
    remove the positions: `remove_unused_columns=False`.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        missing = sorted(set(COLUMNS) - set(rows[0]))
        if missing:
            raise ValueError(
                f"rows without {', '.join(missing)}: documents would not be kept apart; train with "
                "remove_unused_columns=False"
            )
        batch: dict[str, Any] = {name: torch.tensor([row[name] for row in rows]) for name in COLUMNS}
        batch["use_cache"] = False
        return batch


def check_documents_apart(model: torch.nn.Module) -> None:
    """Raises `UsageError` where this model, with its attention, lets a document of a block see the one before it.

    Two blocks of two documents, of which only the first differ, go through the model: the second documents' logits
    must agree. Needs a vocabulary of 8 tokens, 12 positions, and nothing of the data.
    """
    device = next(model.parameters()).device
    second = [1, 3, 5, 7, 2, 6]
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, *second], [7, 6, 2, 1, 0, 3, *second]], device=device)  # (2, 12)
    positions = torch.arange(6, device=device).repeat(2, 2)  # (2, 12)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 6:].float()  # (2, 6, V)
    finally:
        model.train(training)
    leak = (logits[0] - logits[1]).abs().max().item() / max(logits.abs().max().item(), 1e-12)
    if not leak <= LEAK_TOLERANCE:
        config = getattr(model, "config", None)
        raise UsageError(
            f"{type(model).__name__} ({getattr(config, 'model_type', 'unknown architecture')}, attention "
            f"{getattr(config, '_attn_implementation', 'unknown')}): documents packed into one block see each other "
            "(the logits of "
            f"the second change by {leak:.1e} with the first, expected at most {LEAK_TOLERANCE:.0e}); "
            "use the attention implementation sdpa or eager, or a base model that takes position_ids"
        )
