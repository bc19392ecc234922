"""The learning-rate schedule of a run that begins or goes on at a later step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch.optim.lr_scheduler import LambdaLR


def begin_later(scheduler: LambdaLR, first_step: int) -> LambdaLR:
    """Make a schedule begin after `first_step` steps; before, the learning rate is that of its beginning."""
    scheduler.lr_lambdas = [partial(_later, scale, first_step) for scale in scheduler.lr_lambdas]
    return scheduler


def _later(scale: Callable[[int], float], first_step: int, step: int) -> float:
    return scale(max(step - first_step, 0))


def move_scheduler(scheduler: LambdaLR, step: int) -> None:
    """Set the learning rate to that after `step` steps, which LambdaLR computes in the same way."""
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    rates = [base * scale(step) for base, scale in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
