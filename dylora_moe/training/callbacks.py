"""Callbacks of a run: its progress, early stopping, and stopping by a signal."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from tqdm.auto import tqdm
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from ..distributed import ranks
from ..errors import printable
from ..system.command_line import say
from ..system.interrupts import Interrupted

# Within this time, a second Ctrl-C of several processes is the first one, which torchrun hands on to its workers.
ECHO_SECONDS = 3.0


class ProgressLines(TrainerCallback):
    """Prints one line for each log, in fixed columns."""

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        line = log_line(logs or {}, state.global_step, state.max_steps)
        if line is not None and state.is_world_process_zero:
            self.show(line)

    def show(self, line: str) -> None:
        say(line)


class ProgressBar(ProgressLines, ProgressCallback):
    """Prints the lines of `ProgressLines` above a progress bar, below which an evaluation has one of its own."""

    def show(self, line: str) -> None:
        tqdm.write(printable(line))

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            bar: Any = self.prediction_bar or tqdm(total=len(eval_dataloader), leave=False, dynamic_ncols=True)
            bar.update(1)
            self.prediction_bar = bar

    def end_evaluation(self) -> None:
        """Take the bar of an evaluation away, however that has ended."""
        if self.prediction_bar is not None:
            self.prediction_bar.close()
        self.prediction_bar = None


def log_line(logs: dict[str, float], step: int, max_steps: int) -> str | None:
    """Return a log entry as one line; None for an entry that is shown elsewhere."""
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
        speed = f"{logs['train_steps_per_second']:.3g} steps/s without evaluations"
        return f"{at}  mean training loss {logs['train_loss']:.4f}, {logs['train_runtime']:.1f} s, {speed}"
    return None


class EarlyStopping(EarlyStoppingCallback):
    """The callback of Transformers, which here also saves the checkpoint at which it stops.

    Args:
        patience: evaluations without improvement after which the run stops.
        after: the step from which on evaluations count: that at which the experts branch off their trunk.
    """

    stopped = False

    def __init__(self, patience: int, after: int = 0):
        super().__init__(early_stopping_patience=patience)
        self.after = after

    @property
    def may_stop_next(self) -> bool:
        """Whether the next evaluation stops the run unless it is better than the best one."""
        return self.early_stopping_patience_counter + 1 >= self.early_stopping_patience

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.stopped = False

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        if state.global_step < self.after:
            return
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            self.stopped = control.should_save = True


class EvaluationStopped(Exception):
    """A signal has cut short the evaluation of a step that is complete. A resumed run makes it again."""


class StopSignals(TrainerCallback):
    """Stops a run by a signal: the first SIGTERM or Ctrl-C saves at the end of the step, a second one stops at once.

    During an evaluation the step is complete, so that it is saved at once. Only an evaluation that may stop the run
    early is waited for: whether the experts are mature depends on it. Before the first step there is nothing to save:
    then `Interrupted` is raised.

    As a context manager, it handles the signals inside the block only. Where torchrun hands a Ctrl-C on to processes
    that have received it already, the two count as one. Give it to the Trainer after the callback that saves.

    Args:
        warn: Takes a line for the user when the first signal arrives; called on every rank.
        early: What else may stop the run.
    """

    def __init__(self, warn: Callable[[str], None], early: EarlyStopping | None = None):
        self.warn = warn
        self.early = early
        self.received: signal.Signals | None = None  # the signal that has stopped the run, on every rank
        self._heard = 0
        self._heard_at = 0.0
        self._began = 0
        self._before: dict[int, Any] = {}

    def ended_early(self) -> bool:
        """Return whether the run was stopped before it has come to its end by itself, as far as that is known."""
        return self.received is not None and not (self.early is not None and self.early.stopped)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._heard:
            self._heard, self._heard_at = number, time.monotonic()
            self.warn(f"{signal.Signals(number).name}: saving at the end of this step; once more stops at once")
        elif ranks.world()[1] == 1 or time.monotonic() - self._heard_at > ECHO_SECONDS:
            self.__exit__()
            signal.raise_signal(number)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._began = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop here if any rank has received a signal."""
        if self._stops(args, state, control):
            control.should_save = True

    on_evaluate = on_step_end

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop here: this step has just been saved."""
        self._stops(args, state, control)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop in the middle of an evaluation.

        Raises:
            EvaluationStopped: After a step, which `MoETrainer` then saves.
            Interrupted: Before the first step.
        """
        if not self._before:  # this evaluation is no part of training
            return
        is_waited_for = self.early is not None and self.early.may_stop_next and state.global_step > self._began
        if not is_waited_for and (self._stops(args, state, control) or self.received is not None):
            raise EvaluationStopped
        heard = ranks.largest(self._heard, args.device)
        if heard and state.global_step <= self._began:
            raise Interrupted(heard)

    def leave_evaluation(self, args: TrainingArguments) -> None:
        """Stop in the middle of an evaluation on which nothing else depends, so that the last save need not wait.

        Raises:
            EvaluationStopped: If a rank has received a signal.
        """
        if ranks.largest(self._heard, args.device):
            raise EvaluationStopped

    def _stops(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> bool:
        """Return whether the run is to stop now, at a step that is complete, since a rank has received a signal."""
        heard = ranks.largest(self._heard, args.device)
        if not heard or self.received is not None or state.global_step <= self._began:
            return False
        self.received = signal.Signals(heard)
        control.should_training_stop = True
        return True
