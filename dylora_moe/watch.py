"""Whether parameters have changed since they were last looked at."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0


def _count_step(*_) -> None:
    global _steps
    _steps += 1


# A fused optimizer (torch._fused_adamw_) writes without a new version.
register_optimizer_step_post_hook(_count_step)

_version_of = operator.attrgetter("_version")
_address_of = torch.Tensor.data_ptr


def marks(tensors: Sequence[torch.Tensor]) -> tuple | None:
    """What changes with the tensors: version counters and addresses. None where that cannot be told."""
    try:
        return list(map(_version_of, tensors)), list(map(_address_of, tensors))
    except RuntimeError:  # inference tensors have no version
        return None


class Watch:
    """Looks at the weights of modules once per forward pass; looking costs as much as a few small operations.

    Args:
        modules: those whose `weight` is watched.
        scalings: of experts, watched as well.
    """

    def __init__(self, modules: Sequence[nn.Module], scalings: Sequence[dict[str, float]] = ()):
        self._scalings = scalings
        self._parameters = [module._parameters for module in modules]  # nn.Module's __getattr__ takes ten times as long
        self._weights: list[torch.Tensor] = []  # held, so that no other tensor can have their address
        self._marks: tuple | None = None
        self._token: object | None = None

    def look(self) -> object | None:
        """The same object as the last time if all is what it was then, otherwise another.

        None where weights may change between now and the end of the forward pass, or it cannot be told.
        """
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            self._marks = None
            return None
        weights = [parameters["weight"] for parameters in self._parameters]
        found = marks(weights)
        now = None if found is None else (*found, _steps, [list(scaling.values()) for scaling in self._scalings])
        if now is None or now != self._marks:
            self._weights, self._marks, self._token = weights, now, None if now is None else object()
        return self._token

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_weights": [], "_marks": None, "_token": None}
