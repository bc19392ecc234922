"""The cross-entropy of a language model's logits, without copies of them all.

With a vocabulary of 50,000 the logits are the largest tensor of a training step. `F.cross_entropy` and its backward
pass make three more of that size, and one in float32 where they are not; this makes one, the gradient.

Shapes: S tokens, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.autograd import Function
from torch.nn import functional as F

IGNORED_LABEL = -100
CHUNK_BYTES = {"cpu": 8 << 20}  # of float32 logits at a time: memory that an allocator keeps at hand
OTHER_CHUNK_BYTES = 256 << 20  # elsewhere it is the number of kernels that costs


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0) -> torch.Tensor:
    """The sum of the cross-entropies in nats, computed in float32; as `F.cross_entropy` defines it.

    Args:
        logits: (S, V) of any floating-point dtype.
        targets: (S,) int64; IGNORED_LABEL leaves a token out.
        label_smoothing: the share of a target's probability that is spread over the vocabulary.
    """
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if transformed or type(logits) is not torch.Tensor:  # a DTensor, for one
        return _whole(logits, targets, label_smoothing)
    return _Chunked.apply(logits, targets, label_smoothing)


def _whole(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    options = {"ignore_index": IGNORED_LABEL, "reduction": "sum", "label_smoothing": label_smoothing}
    return F.cross_entropy(logits.float(), targets, **options)


class _Chunked(Function):
    """d loss / d logits = softmax(logits) - (1 - smoothing) * (1 at the target) - smoothing / V."""

    @staticmethod
    def forward(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        total = logits.new_zeros((), dtype=torch.float32)
        for part in _chunks(logits):
            total += _whole(logits[part], targets[part], label_smoothing)
        return total

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
        logits, targets, ctx.label_smoothing = inputs
        ctx.save_for_backward(logits, targets)

    @staticmethod
    def backward(ctx, weight: torch.Tensor) -> tuple:
        logits, targets = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            loss = _whole(logits, targets, ctx.label_smoothing)
            return *torch.autograd.grad(loss, logits, weight, create_graph=True), None, None
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        for part in _chunks(logits):
            # In place where the dtype allows: softmax writes into the gradient itself.
            own = gradient[part] if gradient.dtype == torch.float32 else None
            found = torch.softmax(logits[part].float(), -1, out=own)  # (chunk, V)
            kept = targets[part] != IGNORED_LABEL  # (chunk,)
            rows = torch.arange(len(found), device=found.device)
            found[rows, targets[part].where(kept, 0)] -= 1 - ctx.label_smoothing
            if ctx.label_smoothing:
                found -= ctx.label_smoothing / found.shape[1]
            found *= (weight * kept).unsqueeze(1)
            if own is None:
                gradient[part] = found
        return gradient, None, None


def _chunks(logits: torch.Tensor) -> Iterator[slice]:
    limit = CHUNK_BYTES.get(logits.device.type, OTHER_CHUNK_BYTES)
    rows = max(1, limit // (4 * logits.shape[1]))
    return (slice(begin, begin + rows) for begin in range(0, len(logits), rows))
