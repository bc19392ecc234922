"""Hankel matrices: full rank, all rows distinct, held and multiplied by in a fraction of a matrix's memory and time.

    W[i, j] = s[i + j]        (W x)[i] = sum_j s[i + j] x[j]

As a tensor of strides (1, 1), W takes the memory of its d_out + d_in - 1 numbers. W x is the correlation of s and x,
which the discrete Fourier transform turns into a product (https://en.wikipedia.org/wiki/Hankel_matrix, the correlation
theorem): O(n log n) per token for n = d_out + d_in, instead of d_out d_in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

ROWS = 16  # tokens transformed at once: what is in between, a few times n float32 per token, stays small


class HankelMatrix(nn.Parameter):
    """A frozen parameter W (d_out, d_in), as `hankel_matrix` makes it.

    A linear layer and an embedding take it as any other weight. What else is done with it gives plain tensors, if need
    be of full size; a copy of full size is multiplied by as usual.
    """

    @classmethod
    def __torch_function__(cls, func, types, args: tuple = (), kwargs: dict[str, Any] | None = None):
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear:
                return _linear(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))


def hankel_matrix(numbers: torch.Tensor, shape: tuple[int, int]) -> HankelMatrix:
    """The matrix (d_out, d_in) of d_out + d_in - 1 numbers, which it shares."""
    if numbers.shape != (sum(shape) - 1,) or not numbers.is_contiguous():
        raise ValueError(f"a {shape} Hankel matrix takes {sum(shape) - 1} numbers, found {tuple(numbers.shape)}")
    return HankelMatrix(numbers.as_strided(shape, (1, 1)), requires_grad=False)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., d_in) -> (..., d_out) of the same dtype; computed in float32 at least."""
    d_out, d_in = weight.shape
    if weight.stride() != (1, 1):
        return F.linear(x, weight, bias)
    if x.numel() == 0:
        return x.new_empty(*x.shape[:-1], d_out)
    n = fast_length(d_out + d_in - 1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    numbers = torch.fft.rfft(weight.as_strided((d_out + d_in - 1,), (1,)).to(dtype), n=n)  # (n // 2 + 1,)
    parts = x.reshape(-1, d_in).split(ROWS)  # (<= ROWS, d_in) each
    products = [
        torch.fft.irfft(torch.fft.rfft(part.to(dtype), n=n).conj() * numbers, n=n)[:, :d_out].to(x.dtype)
        for part in parts  # so that one part at a time is held in float32
    ]
    result = torch.cat(products).view(*x.shape[:-1], d_out)
    return result if bias is None else result + bias


def fast_length(n: int) -> int:
    """The smallest length >= n that is a power of two, or that times 3, 5, 9 or 15: such are transformed fast."""
    return min(factor << max(0, (-(-n // factor) - 1).bit_length()) for factor in (1, 3, 5, 9, 15))
