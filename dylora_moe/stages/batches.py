"""From blocks to batches, and whether a model keeps the documents of a block apart.

transformers (5.20 and 5.23: `masking_utils.find_packed_sequence_indices`) masks documents from each other where the
positions begin again, on two conditions: there is no `attention_mask`, not even one of ones, and no cache. With the
default `use_cache=True` documents see each other without a warning, except under gradient checkpointing. An explicit 4D
mask would be worse: it replaces the sliding windows of Qwen2 and Mistral, eager attention adds a boolean one as a
number, and a float one must have the dtype of the base. Flash attention heeds the positions only in batches of one row.

Some models do not heed the positions at all: state-space models such as Mamba, whose state runs on, and OPT, Bloom or
GPT-OSS, whose masks ignore them. Their documents have a block each, padded on the right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..base.quiet import quiet
from ..data.packing import COLUMNS, PADDED_COLUMNS

LEAK_TOLERANCE = 1e-4
ATTENTIONS = ("sdpa", "eager")  # implementations that keep documents apart, if the model does its part


class BlockCollator:
    """Collates rows into `input_ids`, `labels` and `position_ids`, (B, block_size) int64, and `use_cache=False`.

    Positions that begin anew with each document keep the documents of a block apart, where the cache is off and there
    is no attention mask. The Trainer must not remove them: it needs `remove_unused_columns=False`.

    Rows of one document each have an `attention_mask` instead, and are cut to the longest document of the batch. Rows
    that say which `expert` they train (`PlannedBlocks`) keep that.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        names = PADDED_COLUMNS if PADDED_COLUMNS[-1] in rows[0] else COLUMNS
        missing = sorted(set(names) - set(rows[0]))
        if missing:
            raise ValueError(
                f"rows without {', '.join(missing)}: documents would not be kept apart; train with "
                "remove_unused_columns=False"
            )
        batch: dict[str, Any] = {name: torch.tensor([row[name] for row in rows]) for name in names}
        if names is PADDED_COLUMNS:
            longest = int(batch["attention_mask"].sum(-1).max())
            batch = {name: values[:, :longest] for name, values in batch.items()}
        if "expert" in rows[0]:
            experts = tuple(row["expert"] for row in rows)
            batch["expert"] = experts[0] if len(set(experts)) == 1 else experts
        batch["use_cache"] = False
        return batch


def why_not_packed(model: PreTrainedModel) -> str | None:
    """Return why documents cannot share a block of this model, in a few words; None if they can.

    The model is run on two blocks of two documents that differ in the first document only. The logits of the second
    one must agree. This needs a vocabulary of 8 tokens and 12 positions.
    """
    if _keeps_apart(model):
        return None
    config = model.config
    attention = config._attn_implementation
    name = f"{type(model).__name__} ({config.model_type}, attention {attention})"
    why = f"{name} lets documents of one block see each other"
    try:
        for other in ATTENTIONS:
            if other != attention and _takes(model, other) and _keeps_apart(model):
                return f"{why}, which it does not with attn_implementation={other!r}"
    finally:
        _takes(model, attention)
    return why


def _takes(model: PreTrainedModel, attention: str) -> bool:
    """Set the attention implementation, and return whether the model has it."""
    try:
        with quiet():
            model.set_attn_implementation(attention)
    except (ValueError, ImportError):
        return False
    return model.config._attn_implementation == attention


def _keeps_apart(model: PreTrainedModel) -> bool:
    device = next(model.parameters()).device
    second = [1, 3, 5, 7, 2, 6]
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, *second], [7, 6, 2, 1, 0, 3, *second]], device=device)  # (2, 12)
    positions = torch.arange(6, device=device).repeat(2, 2)  # (2, 12)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 6:].float()  # (2, 6, V)
    except (TypeError, ValueError):  # it takes no positions
        return False
    finally:
        model.train(training)
    leak = (logits[0] - logits[1]).abs().max().item() / max(logits.abs().max().item(), 1e-12)
    return leak <= LEAK_TOLERANCE


def known_tokens(model: PreTrainedModel) -> int | None:
    """Return how many token ids a model has both embeddings and logits for; None if its layers do not tell."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    sizes = getattr(embeddings, "num_embeddings", None), getattr(head, "out_features", None)
    return min((size for size in sizes if size is not None), default=None)
