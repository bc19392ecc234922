"""The backward pass of frozen bfloat16 and float16 linear layers on CPUs that multiply such matrices slowly.

The gradient of a linear layer's input is grad_output W. Without fast bfloat16 instructions, torch computes this product
far more slowly in bfloat16 or float16 than in float32. `Float32Backward` computes it in float32, a few rows of W at a
time, for every frozen linear layer that is called inside, whether experts are on it or not. The forward pass keeps its
bits, and nothing of W's size is allocated.

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
CHUNK = 1 << 20  # numbers of W that are converted at a time
# The ratio is at most about 1, or 20 and more. The margin keeps noise from changing the decision, and with it the bits
# of a run that is resumed in another process.
MARGIN = 5.0


def float32_backward(weight: torch.Tensor) -> AbstractContextManager:
    """Return a context in which frozen linear layers of this weight's dtype have their backward pass in float32.

    The context does nothing if there will be no backward pass, or if it would not be faster in float32, which is
    measured once per process.
    """
    transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if transformed or not torch.is_grad_enabled() or weight.device.type != "cpu" or weight.dtype not in SLOW_DTYPES:
        return nullcontext()
    return Float32Backward() if is_slow(weight.dtype) else nullcontext()


class Float32Backward(TorchFunctionMode):
    """Replaces `F.linear` for frozen weights."""

    def __torch_function__(
        self, func: Callable, types: Iterable[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear and len(args) >= 2 and not kwargs and _applies(*args):
            return _FrozenLinear.apply(*args)
        return func(*args, **(kwargs or {}))


def _applies(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter) and weight.device.type == "cpu"
    return torch.is_grad_enabled() and x.requires_grad and frozen and plain and weight.dtype in SLOW_DTYPES


class _FrozenLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = x.dtype
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        rows = grad.flatten(0, -2)  # (S, d_out)
        found = rows.new_zeros(rows.shape[0], weight.shape[1], dtype=torch.float32)  # (S, d_in)
        size = max(1, CHUNK // weight.shape[1])
        for start in range(0, weight.shape[0], size):
            part = slice(start, start + size)
            found = found.addmm_(rows[:, part].float(), weight[part].float())
        return found.view(*grad.shape[:-1], -1).to(ctx.dtype), None, None


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
