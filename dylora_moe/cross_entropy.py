"""The cross-entropy of a language model's logits, without copies of them all.

    loss = sum_t  log sum_v exp l_t[v] - (1 - s) l_t[y_t] - s mean_v l_t[v]
    d loss / d l_t[v] = softmax(l_t)[v] - (1 - s) (1 where v = y_t) - s / V

for the logits l_t and the target y_t of each token t, and label smoothing s (https://huggingface.co/papers/1512.00567,
section 7). With a vocabulary of 50,000 the logits are the largest tensor of a training step. `F.cross_entropy` and its
backward pass make three more of that size, and one in float32 where they are not; this makes one, the gradient. Where
the layer that has made the logits is known, it makes none: the gradient goes on to that layer's input a few columns at
a time.

Shapes: S tokens, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd import Function
from torch.nn import functional as F

from .layers import is_plain_linear

IGNORED_LABEL = -100
CHUNK_BYTES = {"cpu": 4 << 20}  # of float32 logits at a time: memory that an allocator keeps at hand
OTHER_CHUNK_BYTES = 256 << 20  # elsewhere it is the number of kernels that costs


class Head:
    """What the linear layer that makes the logits was given and has returned, in one forward pass."""

    def __init__(self, layer: nn.Linear):
        self._layer = layer
        self._calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        """A forward hook."""
        self._calls.append((args[0], output))

    def factors(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        """The input (S, d), the weight (V, d) and the bias (V,) that have made these logits (..., V).

        None where they were made otherwise. Of a sharded base every rank must ask.
        """
        if len(self._calls) != 1 or self._calls[0][1] is not logits:
            return None
        hidden = self._calls[0][0]
        weight, bias = (p if p is None else _whole_tensor(p.detach()) for p in (self._layer.weight, self._layer.bias))
        same = hidden.dtype == logits.dtype == weight.dtype and hidden.device == logits.device == weight.device
        if not same or not hidden.requires_grad or type(weight) is not torch.Tensor:
            return None
        return hidden.flatten(0, -2), weight, bias


def _whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a DTensor, of a sharded base


@contextmanager
def watched_head(layer: nn.Module | None) -> Iterator[Head | None]:
    """Inside, what the layer that makes the logits is given is noted; None where a gradient may not pass it by."""
    plain = layer is not None and is_plain_linear(layer) and not (layer._backward_hooks or layer._backward_pre_hooks)
    if not plain or any(parameter.requires_grad for parameter in layer.parameters()):
        yield None
        return
    head = Head(layer)
    handle = layer.register_forward_hook(head.note)
    try:
        yield head
    finally:
        handle.remove()


def summed_cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float = 0.0, head: Head | None = None
) -> torch.Tensor:
    """The sum of the cross-entropies in nats, computed in float32; as `F.cross_entropy` defines it.

    Args:
        logits: (..., V) of any floating-point dtype.
        targets: (...) int64; IGNORED_LABEL leaves a token out.
        label_smoothing: the share of a target's probability that is spread over the vocabulary.
        head: what has made the logits; the gradient goes to its input then, and the logits have none.
    """
    rows, targets = logits.flatten(0, -2), targets.flatten()
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if transformed or type(logits) is not torch.Tensor:  # a DTensor, for one
        return _whole(rows, targets, label_smoothing)
    factors = head.factors(logits) if head is not None and torch.is_grad_enabled() else None
    if factors is None:
        return _ToLogits.apply(rows, targets, label_smoothing)
    return _ToHidden.apply(*factors, rows, targets, label_smoothing)


def _whole(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    options = {"ignore_index": IGNORED_LABEL, "reduction": "sum", "label_smoothing": label_smoothing}
    return F.cross_entropy(logits.float(), targets, **options)


class _ToLogits(Function):
    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        loss, *scale = _loss(logits, targets, label_smoothing)
        ctx.save_for_backward(logits, targets, *scale)
        ctx.label_smoothing = label_smoothing
        return loss

    @staticmethod
    def backward(ctx, weight: torch.Tensor) -> tuple:
        logits, targets, largest, total = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            loss = _whole(logits, targets, ctx.label_smoothing)
            return *torch.autograd.grad(loss, logits, weight, create_graph=True), None, None
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        kept = targets != IGNORED_LABEL  # (S,)
        weights, places = weight * kept.unsqueeze(1), targets.where(kept, 0).unsqueeze(1)  # (S, 1) each
        smoothing, share = ctx.label_smoothing, ctx.label_smoothing / logits.shape[1]
        for part in _chunks(logits, 0):
            own = gradient[part] if gradient.dtype == torch.float32 else None
            found = torch.sub(logits[part].float(), largest[part], out=own).exp_()  # (chunk, V)
            found *= weights[part] / total[part]
            found.scatter_add_(1, places[part], (smoothing - 1) * weights[part])
            if smoothing:
                found -= share * weights[part]
            if own is None:
                gradient[part] = found
        return gradient, None, None


class _ToHidden(Function):
    """The gradient is worked out beside the loss, while the logits are at hand: backward has to scale it only.

    The logits are an input without a gradient: the hooks of what has returned them run, as FSDP2 needs.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        logits: torch.Tensor,
        targets: torch.Tensor,
        label_smoothing: float,
    ) -> torch.Tensor:
        loss, largest, total = _loss(logits, targets, label_smoothing)
        kept = targets != IGNORED_LABEL  # (S,)
        gradient = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)  # (S, d)
        share = label_smoothing / logits.shape[1]
        buffer = _buffer(logits)
        for part in _chunks(logits, 1):
            found = _exponentials(logits[:, part], largest, buffer)  # (S, chunk)
            if label_smoothing:
                found -= share * total
            if weight.dtype == torch.float32:
                gradient.addmm_(found, weight[part])
            else:
                gradient += found.div_(total).to(weight.dtype) @ weight[part]
        if weight.dtype == torch.float32:
            gradient /= total
        gradient -= (1 - label_smoothing) * weight[targets.where(kept, 0)]
        gradient *= kept.unsqueeze(1)
        ctx.save_for_backward(gradient.to(hidden.dtype), hidden, weight, bias, targets)
        ctx.label_smoothing = label_smoothing
        return loss

    @staticmethod
    def backward(ctx, scale: torch.Tensor) -> tuple:
        gradient, hidden, weight, bias, targets = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated again
            loss = _whole(F.linear(hidden, weight, bias), targets, ctx.label_smoothing)
            (gradient,) = torch.autograd.grad(loss, hidden, scale, create_graph=True)
        else:
            gradient = gradient * scale.to(gradient.dtype)
        return gradient, None, None, None, None, None


def _loss(
    logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss; of each token the largest logit and the sum of exp(logit - largest), (S, 1) in float32."""
    kept = targets != IGNORED_LABEL
    largest = logits.amax(-1, keepdim=True).float()
    total, buffer = torch.empty_like(largest), _buffer(logits)
    for part in _chunks(logits, 0):
        torch.sum(_exponentials(logits[part], largest[part], buffer), -1, keepdim=True, out=total[part])
    chosen = logits.gather(1, targets.where(kept, 0).unsqueeze(1)).float()
    each = total.log() + (largest - (1 - label_smoothing) * chosen)
    if label_smoothing:
        each -= label_smoothing * logits.mean(-1, keepdim=True, dtype=torch.float32)
    return each.squeeze(1).where(kept, 0).sum(), largest, total


def _exponentials(logits: torch.Tensor, largest: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """exp(logits - largest) in float32, in the buffer."""
    return torch.sub(logits, largest, out=buffer[: logits.numel()].view(logits.shape)).exp_()


def _buffer(logits: torch.Tensor) -> torch.Tensor:
    """For a chunk of float32 logits: fresh pages would take longer to get than to fill."""
    return torch.empty(max(_limit(logits), *logits.shape), device=logits.device)


def _chunks(logits: torch.Tensor, dim: int) -> Iterator[slice]:
    """Parts of the rows (dim 0) or of the columns (1)."""
    size = max(1, _limit(logits) // max(1, logits.shape[1 - dim]))
    return (slice(begin, begin + size) for begin in range(0, logits.shape[dim], size))


def _limit(logits: torch.Tensor) -> int:
    """Logits of a chunk."""
    return CHUNK_BYTES.get(logits.device.type, OTHER_CHUNK_BYTES) // 4
