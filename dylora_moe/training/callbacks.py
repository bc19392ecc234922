"""Callbacks of a run: progress, early stopping, and stopping by a signal."""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from types import FrameType

from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from . import ranks

# torchrun hands the terminal's Ctrl-C, which its workers have had already, on to them.
ECHO_SECONDS = 3.0


class ProgressLines(ProgressCallback):
    """A progress bar on a terminal; one line per log, in fixed columns.

    Args:
        bar: whether to show the bar.
    """

    def __init__(self, bar: bool):
        super().__init__()
        self.bar = bar

    def on_train_begin(self, args, state, control, **kwargs):
        if self.bar:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self.bar:
            super().on_prediction_step(args, state, control, eval_dataloader=eval_dataloader, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        line = log_line(logs or {}, state.global_step, state.max_steps)
        if line is None or not state.is_world_process_zero:
            return
        if self.training_bar is not None:
            self.training_bar.write(line)
        else:
            print(line, flush=True)


def log_line(logs: dict, step: int, max_steps: int) -> str | None:
    """What a log entry says, on one line; None for what is shown elsewhere."""
    at = f"step {step:>{len(str(max_steps))}}/{max_steps}"
    if "loss" in logs:
        parts = [f"loss {logs['loss']:.4f}", f"lr {logs['learning_rate']:.2e}"]
        if "grad_norm" in logs:
            parts.append(f"grad {logs['grad_norm']:.3g}")
        if "balance" in logs:
            parts.append(f"balance {logs['balance']:.3f}")
        shares = [f"{100 * value:.0f}" for name, value in logs.items() if name.startswith("usage/")]
        if shares:
            parts.append(f"usage {'/'.join(shares)} %")
        return "  ".join([at, *parts])
    if "eval_loss" in logs:
        losses = [f"{name[5:-5]} {loss:.4f}" for name, loss in logs.items() if re.fullmatch("eval_.+_loss", name)]
        return f"{at}  held out: {', '.join(losses)}, mean {logs['eval_loss']:.4f}"
    if "train_loss" in logs:
        speed = f"{logs['train_steps_per_second']:.3g} steps/s"
        return f"{at}  mean training loss {logs['train_loss']:.4f}, {logs['train_runtime']:.1f} s, {speed}"
    return None


class EarlyStopping(EarlyStoppingCallback):
    """As Transformers' own, and the checkpoint at which it stops is saved."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stopped = False

    def on_train_begin(self, args, state, control, **kwargs):
        self.stopped = False

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            self.stopped = control.should_save = True


class StopSignals(TrainerCallback):
    """The first SIGTERM or Ctrl-C saves at the end of the step and stops; a second one stops at once.

    A context manager: the handlers are there inside only. Of several processes, each hears a Ctrl-C twice where
    torchrun hands it on; that counts as one.

    Args:
        early: what else may stop the run; a run that has ended by itself was not interrupted.
    """

    def __init__(self, early: EarlyStopping | None = None):
        self.early = early
        self._received: signal.Signals | None = None
        self._heard = 0
        self._heard_at = 0.0
        self._began = 0
        self._before: dict = {}

    @property
    def received(self) -> signal.Signals | None:
        """The signal that stopped the run before its end, on every rank."""
        return None if self.early is not None and self.early.stopped else self._received

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._heard:
            self._heard, self._heard_at = number, time.monotonic()
            if ranks.is_first():
                name = signal.Signals(number).name
                print(f"{name}: saving at the end of this step; once more stops at once", file=sys.stderr, flush=True)
        elif ranks.world()[1] == 1 or time.monotonic() - self._heard_at > ECHO_SECONDS:
            self.__exit__()
            signal.raise_signal(number)

    def on_train_begin(self, args, state, control, **kwargs):
        self._began = state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        self._stop(args, state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        """An evaluation may take long; the step that it belongs to is whole. That before the first belongs to none."""
        self._stop(args, state, control)

    def _stop(self, args, state, control) -> None:
        heard = ranks.largest(self._heard, args.device)
        if heard and self._received is None and self._began < state.global_step < state.max_steps:
            self._received = signal.Signals(heard)
            control.should_save = control.should_training_stop = True
