"""From blocks to batches, and a check that the documents of a block do not see each other.

transformers (5.20 and 5.23: `masking_utils.find_packed_sequence_indices`) masks documents from each other where the
positions begin again, on two conditions: there is no `attention_mask`, not even one of ones, and no cache. With the
default `use_cache=True` documents see each other without a warning, except under gradient checkpointing. An explicit 4D
mask would be worse: it replaces the sliding windows of Qwen2 and Mistral, eager attention adds a boolean one as a
number, and a float one must have the dtype of the base. Flash attention heeds the positions only in batches of one row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..data.packing import COLUMNS
from ..errors import UsageError

LEAK_TOLERANCE = 1e-4


class BlockCollator:
    """Collates rows into `input_ids`, `labels` and `position_ids`, (B, block_size) int64, and `use_cache=False`.

    Positions that begin anew with each document keep the documents of a block apart, where the cache is off and there
    is no attention mask. The Trainer must not remove them: it needs `remove_unused_columns=False`.
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
    """Check that a document of a block does not see the one before it.

    The model is run on two blocks of two documents that differ in the first document only. The logits of the second
    one must agree. This needs a vocabulary of 8 tokens and 12 positions.

    Raises:
        UsageError: If they do not agree, with this model and its attention.
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
