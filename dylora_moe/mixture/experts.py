"""How far each expert is: new, immature or mature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..constants import IMMATURE, MATURE, NEW, STATES
from ..errors import UsageError
from .expert_matrices import marks


class ExpertStates:
    """The states of a mixture's experts.

    - new: created, never trained. This shows in the tensors: its B is still all zero.
    - immature: trained, but the run that does it has not finished.
    - mature: marked so.
    """

    def __init__(self):
        self._mature: list[bool] = []
        self._b: list[list[nn.Module]] = []  # the linear layers that hold an expert's B
        self._untrained: dict[int, tuple | None] = {}  # what was not trained when last looked at, and its marks then

    def __len__(self) -> int:
        return len(self._mature)

    def add(self, b: list[nn.Module]) -> None:
        """One more expert, whose B matrices (d_out, r) are the weights of these modules."""
        self._untrained[len(self)] = None
        self._mature.append(False)
        self._b.append(b)

    def states(self) -> list[str]:
        new = self.new()
        return [NEW if i in new else MATURE if mature else IMMATURE for i, mature in enumerate(self._mature)]

    def set(self, states: Sequence[str]) -> None:
        """Take over the states that a checkpoint has; whether an expert is new shows in its tensors."""
        unknown = sorted({str(state) for state in states} - set(STATES))
        if unknown or len(states) != len(self):
            raise UsageError(f"expected {len(self)} states of {', '.join(STATES)}, got {list(states)}")
        self._mature = [state == MATURE for state in states]
        self.forget(reset=True)

    def mark_mature(self, experts: Sequence[int]) -> None:
        """Those that are new are not matured by a run that left them as they were."""
        outside = [index for index in experts if not 0 <= index < len(self)]
        if outside:
            raise UsageError(f"there is no expert {outside[0]}, only 0 to {len(self) - 1}")
        new = self.new()
        for index in experts:
            self._mature[index] = index not in new

    def mark_immature(self) -> None:
        self._mature = [False] * len(self)

    def all_mature(self, experts: Sequence[int]) -> bool:
        return all(self._mature[index] for index in experts)

    def forget(self, reset: bool = False) -> None:
        """Look at the tensors again the next time; with `reset` also at those of experts that have been trained."""
        self._untrained = {index: None for index in (range(len(self)) if reset else self._untrained)}

    def new(self) -> tuple[int, ...]:
        """The experts whose B is still all zero.

        In evaluation a tensor is read again only when it shows a change. An expert that has been seen to be trained
        is not looked at any more, until one may have been reset.
        """
        for index, before in list(self._untrained.items()):
            weights = [module.weight for module in self._b[index]]
            now = None if torch.is_grad_enabled() else marks(weights)
            if now is not None and now == before:
                continue
            if any(bool(weight.any()) for weight in weights if not weight.is_meta):
                del self._untrained[index]
            else:
                self._untrained[index] = now
        return tuple(self._untrained)
