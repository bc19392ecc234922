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

from ..constants import IGNORED_LABEL
from ..errors import UsageError
from .routed_linear import is_plain_linear

CHUNK_BYTES = {"cpu": 4 << 20}  # of float32 logits at a time: memory that an allocator keeps at hand
OTHER_CHUNK_BYTES = 256 << 20  # elsewhere it is the number of kernels that costs


class Head:
    """What the linear layer that makes the logits was given and has returned, in one forward pass."""

    def __init__(self, layer: nn.Linear):
        self._layer = layer
        self._calls: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def note(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        """A forward hook."""
        self._calls.append((args[0], output, output._version))

    def factors(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The input (..., d) and the weight (V, d) that have made these logits (..., V); the weight without a gradient.

        None where they were made otherwise. Of a sharded base every rank must ask.
        """
        if len(self._calls) != 1:
            return None
        (hidden, output, version), weight = self._calls[0], self._layer.weight
        if output is not logits or logits._version != version or not (logits.requires_grad and hidden.requires_grad):
            return None
        if not hidden.dtype == logits.dtype == weight.dtype or not hidden.device == logits.device == weight.device:
            return None
        weight = weight.detach()
        return hidden, weight.full_tensor() if self.is_sharded else weight

    @property
    def is_sharded(self) -> bool:
        """Whether this process holds a part of the weight: it is a DTensor."""
        return hasattr(self._layer.weight, "full_tensor")


@contextmanager
def watched_head(layer: nn.Module | None) -> Iterator[Head | None]:
    """Inside, what the layer that makes the logits is given is noted; None where a gradient may not pass it by."""
    plain = layer is not None and is_plain_linear(layer) and not (layer._backward_hooks or layer._backward_pre_hooks)
    if not plain or any(tensor is not None and tensor.requires_grad for tensor in (layer.weight, layer.bias)):
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
        head: what has made the logits; the gradient goes to its input then, and the logits have none, unless somebody
            wants it: by a hook, `retain_grad` or `torch.autograd.grad`.

    Raises:
        UsageError: where there are not as many targets as logits.
    """
    if logits.shape[:-1] != targets.shape:
        shapes = f"targets {tuple(targets.shape)}, logits {tuple(logits.shape)}"
        raise UsageError(f"each label needs the logits of its place, found {shapes}; leave out what shortens either")
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if transformed or type(logits) is not torch.Tensor:  # a DTensor, for one
        return _whole(logits.flatten(0, -2), targets.flatten(), label_smoothing)
    factors = head.factors(logits) if head is not None and torch.is_grad_enabled() else None
    if factors is None:
        return _ToLogits.apply(logits, targets, label_smoothing)
    return _ToHidden.apply(*factors, logits, targets, label_smoothing, head.is_sharded)


def _whole(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    options = {"ignore_index": IGNORED_LABEL, "reduction": "sum", "label_smoothing": label_smoothing}
    return F.cross_entropy(logits.float(), targets, **options)


class _ToLogits(Function):
    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
        rows, targets = logits.flatten(0, -2), targets.flatten()
        loss, *normaliser = _loss(rows, targets, label_smoothing)
        ctx.save_for_backward(logits, targets, *normaliser)
        ctx.label_smoothing = label_smoothing
        return loss

    @staticmethod
    def backward(ctx, scale: torch.Tensor) -> tuple:
        return _gradient(scale, *ctx.saved_tensors, ctx.label_smoothing), None, None


class _ToHidden(Function):
    """The gradient is worked out beside the loss, while the logits are at hand: backward has to scale it only.

    The logits are an input, too, mostly without a gradient. So those who want one get it; and the hooks of whoever has
    returned them run in any case, as FSDP2 needs.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        logits: torch.Tensor,
        targets: torch.Tensor,
        label_smoothing: float,
        is_sharded: bool,
    ) -> torch.Tensor:
        rows, targets = logits.flatten(0, -2), targets.flatten()
        loss, largest, total = _loss(rows, targets, label_smoothing)
        kept = targets != IGNORED_LABEL  # (S,)
        gradient = torch.zeros(len(rows), hidden.shape[-1], dtype=torch.float32, device=hidden.device)  # (S, d)
        share, buffer = label_smoothing / rows.shape[1], _buffer(rows)
        # Divided by at the end, which is less work, only where a sum over the whole vocabulary cannot overflow.
        in_float32 = weight.dtype == torch.float32
        for part in _chunks(rows, 1):
            found = _exponentials(rows[:, part], largest, buffer)  # (S, chunk)
            if label_smoothing:
                found -= share * total
            if in_float32:
                gradient.addmm_(found, weight[part])
            else:
                gradient += found.div_(total).to(weight.dtype) @ weight[part]
        if in_float32:
            gradient /= total
        gradient -= (1 - label_smoothing) * weight[targets.where(kept, 0)]
        gradient *= kept.unsqueeze(1)
        ctx.save_for_backward(gradient.view(hidden.shape), logits, targets, largest, total)
        ctx.made_by, ctx.dtype = hidden.grad_fn, hidden.dtype
        ctx.label_smoothing, ctx.is_sharded = label_smoothing, is_sharded
        return loss

    @staticmethod
    def backward(ctx, scale: torch.Tensor) -> tuple:
        gradient, logits, *others = ctx.saved_tensors
        wanted = not ctx.is_sharded and (logits._backward_hooks or logits.retains_grad)
        past = ctx.made_by is None or torch._C._will_engine_execute_node(ctx.made_by)
        if torch.is_grad_enabled() or wanted or not past:
            return None, None, _gradient(scale, logits, *others, ctx.label_smoothing), None, None, None
        return (gradient * scale).to(ctx.dtype), None, None, None, None, None


def _gradient(
    scale: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    largest: torch.Tensor,
    total: torch.Tensor,
    label_smoothing: float,
) -> torch.Tensor:
    """Of the loss, times scale, by the logits (..., V)."""
    if torch.is_grad_enabled():  # the gradient is to be differentiated again
        loss = _whole(logits.flatten(0, -2), targets, label_smoothing)
        return torch.autograd.grad(loss, logits, scale, create_graph=True)[0]
    rows = logits.flatten(0, -2)
    gradient = torch.empty_like(rows, memory_format=torch.contiguous_format)
    kept = targets != IGNORED_LABEL  # (S,)
    scales, places = scale * kept.unsqueeze(1), targets.where(kept, 0).unsqueeze(1)  # (S, 1) each
    share = label_smoothing / rows.shape[1]
    for part in _chunks(rows, 0):
        own = gradient[part] if gradient.dtype == torch.float32 else None
        found = torch.sub(rows[part].float(), largest[part], out=own).exp_()  # (chunk, V)
        found *= scales[part] / total[part]
        found.scatter_add_(1, places[part], (label_smoothing - 1) * scales[part])
        if label_smoothing:
            found -= share * scales[part]
        if own is None:
            gradient[part] = found
    return gradient.view(logits.shape)


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
    size = min(max(_limit(logits), *logits.shape), logits.numel())
    return torch.empty(size, dtype=torch.float32, device=logits.device)


def _chunks(logits: torch.Tensor, dim: int) -> Iterator[slice]:
    """Parts of the rows (dim 0) or of the columns (1)."""
    size = max(1, _limit(logits) // max(1, logits.shape[1 - dim]))
    return (slice(begin, begin + size) for begin in range(0, logits.shape[dim], size))


def _limit(logits: torch.Tensor) -> int:
    """Logits of a chunk."""
    return CHUNK_BYTES.get(logits.device.type, OTHER_CHUNK_BYTES) // 4
