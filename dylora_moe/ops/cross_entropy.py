"""The cross-entropy of a language model's logits, a few tokens at a time.

    loss = sum_t  log sum_v exp l_t[v] - (1 - s) l_t[y_t] - s mean_v l_t[v]
    d loss / d l_t[v] = softmax(l_t)[v] - (1 - s) (1 where v = y_t) - s / V

for the logits l_t and the label y_t of each token t, and label smoothing s (https://huggingface.co/papers/1512.00567,
section 7). With a vocabulary of 50,000 the logits are the largest tensor of a training step. `F.cross_entropy` and its
backward pass allocate three more tensors of that size, and another one in float32 if the logits have a smaller dtype.
This function allocates one, the gradient, and computes nothing for tokens without a label (padding, prompts).

Shapes: S tokens, n of them labelled, V the vocabulary size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function
from torch.nn import functional as F

from ..constants import IGNORED_LABEL
from ..errors import UsageError

CHUNK_BYTES = {"cpu": 4 << 20}  # of float32 logits: memory that an allocator reuses instead of returning it
OTHER_CHUNK_BYTES = 256 << 20  # on other devices the number of kernels determines the cost


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """Return the sum of the cross-entropies in nats, computed in float32, as `F.cross_entropy` defines it.

    Args:
        logits: (..., V) of any floating-point dtype.
        targets: (...) int64; tokens whose target is IGNORED_LABEL are left out.
        label_smoothing: the share of a target's probability that is spread over the vocabulary.

    Raises:
        UsageError: if the shapes of targets and logits do not match.
    """
    if logits.shape[:-1] != targets.shape:
        shapes = f"targets {tuple(targets.shape)}, logits {tuple(logits.shape)}"
        raise UsageError(f"each label needs the logits of its place, found {shapes}; leave out what shortens either")
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if transformed or type(logits) is not torch.Tensor:  # a DTensor, for example
        return _whole(logits, targets, label_smoothing)
    return _Chunked.apply(logits, targets, label_smoothing)


def _whole(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    rows = logits.flatten(0, -2).float()
    return F.cross_entropy(
        rows, targets.flatten(), ignore_index=IGNORED_LABEL, reduction="sum", label_smoothing=label_smoothing
    )


class _Chunked(Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.label_smoothing = label_smoothing
        rows, targets = logits.flatten(0, -2), targets.flatten()  # (S, V), (S,)
        loss = torch.zeros((), dtype=torch.float32, device=logits.device)
        for chunk in _labelled_chunks(rows, targets):
            loss += _whole(rows[chunk], targets[chunk], label_smoothing)
        return loss

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, targets = ctx.saved_tensors
        smoothing = ctx.label_smoothing
        if torch.is_grad_enabled():  # the gradient itself is to be differentiated
            loss = _whole(logits, targets, smoothing)
            return torch.autograd.grad(loss, logits, scale, create_graph=True)[0], None, None
        rows, targets = logits.flatten(0, -2), targets.flatten()
        gradient = torch.empty_like(rows, memory_format=torch.contiguous_format)
        gradient[targets == IGNORED_LABEL] = 0
        for chunk in _labelled_chunks(rows, targets):
            own = torch.softmax(rows[chunk], -1, dtype=torch.float32)  # (chunk, V)
            own.scatter_add_(1, targets[chunk].unsqueeze(1), own.new_full((len(own), 1), smoothing - 1))
            if smoothing:
                own -= smoothing / rows.shape[1]
            gradient[chunk] = own.mul_(scale).to(gradient.dtype)
        return gradient.view(logits.shape), None, None


def _labelled_chunks(rows: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the indices of the labelled tokens, in chunks whose float32 logits have a bounded size."""
    labelled = (targets != IGNORED_LABEL).nonzero().squeeze(1)  # (n,)
    limit = CHUNK_BYTES.get(rows.device.type, OTHER_CHUNK_BYTES)
    return labelled.split(max(1, limit // (4 * rows.shape[1])))
