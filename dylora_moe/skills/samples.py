"""Bottom-k samples: rows of numbers of which those with the smallest keys are kept.

The key of a row is a hash of the tokens that it was computed from. What is kept of two parts is therefore the same as
what is kept of the whole, in whatever order the parts come (https://doi.org/10.1145/1281100.1281133).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

LEVELS = 127  # the largest absolute value of int8


def _no(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape or (0,), dtype=dtype)


@dataclass(frozen=True, eq=False)
class Sample:
    """Rows of numbers in int8, sorted by their keys, no key twice.

    Attributes:
        keys: (K,) int64, not negative.
        values: (K, W) int8; a row is its values times its scale.
        scales: (K,) float32.
        counts: (K,) float32, how many tokens a row sums up.
    """

    keys: torch.Tensor = field(default_factory=lambda: _no(torch.int64))
    values: torch.Tensor = field(default_factory=lambda: _no(torch.int8, 0, 0))
    scales: torch.Tensor = field(default_factory=lambda: _no(torch.float32))
    counts: torch.Tensor = field(default_factory=lambda: _no(torch.float32))

    @classmethod
    def of(cls, keys: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor) -> Sample:
        """Quantise rows (K, W) of finite numbers in float32, each by its own largest value."""
        if not len(keys):
            return cls()
        largest = rows.abs().amax(1)  # (K,)
        scales = torch.where(largest > 0, largest / LEVELS, torch.ones_like(largest))
        values = (rows / scales.unsqueeze(1)).round().clamp(-LEVELS, LEVELS).to(torch.int8)
        return cls(keys, values, scales, counts).smallest(len(keys))

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def width(self) -> int:
        return self.values.shape[1]

    def rows(self) -> torch.Tensor:
        """Return the rows (K, W) in float32."""
        return self.values.to(torch.float32) * self.scales.unsqueeze(1)

    def merged(self, other: Sample, most: int) -> Sample:
        """Return the rows of both with the smallest keys, at most `most`."""
        if not len(self) or not len(other):
            return (self if len(self) else other).smallest(most)
        pairs = zip(self.tensors(), other.tensors(), strict=True)
        return Sample(*(torch.cat(pair) for pair in pairs)).smallest(most)

    def smallest(self, most: int) -> Sample:
        keys, order = self.keys.sort(stable=True)
        first = torch.ones_like(keys, dtype=torch.bool)
        first[1:] = keys[1:] != keys[:-1]
        chosen = order[first][:most]
        return Sample(*(tensor[chosen] for tensor in self.tensors()))

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.keys, self.values, self.scales, self.counts
