"""Training in bfloat16 and float16 on CPUs that multiply matrices of these dtypes slowly.

Without instructions for bfloat16, torch multiplies such matrices several times more slowly than in float32, and far
more slowly where the second one is not transposed, as in the gradient of a linear layer's input. Where a loss is to be
computed, `Float32Products` computes them in float32 and rounds the results: the products of frozen linear layers,
whether experts are on them or not, and those of attention. Weights are converted a few rows at a time, so that nothing
of their size is allocated. Where only logits are asked for, the bits are those of the base model.

Shapes: S tokens, W (d_out, d_in).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch.autograd import Function
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

SLOW_DTYPES = (torch.bfloat16, torch.float16)
# Of attention, by which a base multiplies what it has computed. `@` arrives as one of these.
PRODUCTS = (F.scaled_dot_product_attention, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
CHUNK = 1 << 20  # numbers of W that are converted at a time
# The ratio is at most about 1, or 20 and more. The margin keeps noise from changing the decision, and with it the bits
# of a run that is resumed in another process.
MARGIN = 5.0


def float32_products(weight: torch.Tensor) -> AbstractContextManager:
    """Return a context in which the loss of a base with weights of this dtype is computed with products in float32.

    The context does nothing if that would not be faster, which is measured once per process.
    """
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if transformed or not _is_low(weight) or not is_slow(weight.dtype):
        return nullcontext()
    return Float32Products()


class Float32Products(TorchFunctionMode):
    """Computes linear layers with frozen weights, and the products of attention, in float32."""

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and len(args) >= 2 and not kwargs and _are_frozen(*args[1:]):
            return _FrozenLinear.apply(*args)
        is_conv1d = func is torch.addmm and len(args) == 3 and not kwargs and args[0].dim() == 1
        if is_conv1d and _are_frozen(args[2], args[0]):  # bias, x, W transposed
            return _FrozenLinear.apply(args[1], args[2].t(), args[0])
        if func in PRODUCTS and _is_low(args[0]):
            converted = func(*map(_in_float32, args), **{key: _in_float32(value) for key, value in kwargs.items()})
            return converted.to(args[0].dtype)
        return func(*args, **kwargs)


def _is_low(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in SLOW_DTYPES and value.device.type == "cpu"


def _in_float32(value: Any) -> Any:
    return value.float() if _is_low(value) else value


def _are_frozen(weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    return frozen and type(weight) in (torch.Tensor, torch.nn.Parameter) and _is_low(weight)


class _FrozenLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        rows = x.flatten(0, -2).float()  # (S, d_in)
        out = x.new_empty(rows.shape[0], weight.shape[0])  # (S, d_out)
        for part in _parts(weight):
            out[:, part] = F.linear(rows, weight[part].float(), None if bias is None else bias[part].float())
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        rows = grad.flatten(0, -2)  # (S, d_out)
        found = rows.new_zeros(rows.shape[0], weight.shape[1], dtype=torch.float32)  # (S, d_in)
        for part in _parts(weight):
            found = found.addmm_(rows[:, part].float(), weight[part].float())
        return found.view(*grad.shape[:-1], -1).to(grad.dtype), None, None


def _parts(weight: torch.Tensor) -> list[slice]:
    """Return the rows of W that are converted at a time."""
    size = max(1, CHUNK // weight.shape[1])
    return [slice(start, start + size) for start in range(0, weight.shape[0], size)]


@cache
def is_slow(dtype: torch.dtype) -> bool:
    """Return whether this CPU multiplies matrices of this dtype far more slowly than after a conversion to float32."""
    with torch.no_grad(), torch.inference_mode(False):
        grad, weight = torch.ones(16, 256, dtype=dtype), torch.ones(256, 256, dtype=dtype)
        direct = _shortest(lambda: grad @ weight, times=3)
        return direct > MARGIN * _shortest(lambda: grad.float() @ weight.float(), times=20)


def _shortest(run: Callable[[], object], times: int) -> float:
    run()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
