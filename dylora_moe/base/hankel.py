"""Hankel matrices: matrices of full rank that need a fraction of the memory and time of other matrices.

    W[i, j] = s[i + j]        (W x)[i] = sum_j s[i + j] x[j]        (https://en.wikipedia.org/wiki/Hankel_matrix)

W is a view of s with strides (1, 1), so that it takes the memory of d_out + d_in - 1 numbers. W x is the correlation of
s and x, which the discrete Fourier transform turns into a product: O(n log n) operations per token, n = d_out + d_in,
instead of d_out d_in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

ROWS = 16  # tokens transformed at once; each takes the memory of a few times n float32 numbers


class HankelMatrix(nn.Parameter):
    """A frozen parameter (d_out, d_in), created by `hankel_matrix`.

    It can be the weight of any linear layer or embedding. All other operations give ordinary tensors, of full size if
    need be, and copies of full size are multiplied by as usual.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.linear:
                return _linear(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))


def hankel_matrix(numbers: torch.Tensor, shape: tuple[int, int]) -> HankelMatrix:
    """Return the matrix of `shape` (d_out, d_in) over d_out + d_in - 1 contiguous numbers, whose memory it shares."""
    if numbers.shape != (sum(shape) - 1,) or not numbers.is_contiguous():
        raise ValueError(f"a {shape} Hankel matrix takes {sum(shape) - 1} numbers, found {tuple(numbers.shape)}")
    return HankelMatrix(numbers.as_strided(shape, (1, 1)), requires_grad=False)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply x (..., d_in) by a matrix: (..., d_out) of the same dtype, computed in float32 or float64."""
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
        for part in parts  # one after the other, to save memory
    ]
    result = torch.cat(products).view(*x.shape[:-1], d_out)
    return result if bias is None else result + bias


def fast_length(n: int) -> int:
    """Return the smallest length >= n with a fast transform: a power of two, times 1, 3, 5, 9 or 15."""
    return min(factor << max(0, (-(-n // factor) - 1).bit_length()) for factor in (1, 3, 5, 9, 15))
