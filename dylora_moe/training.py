"""The Trainer for a mixture: what Transformers' own does, without its checkpoints.

The stock Trainer writes into the final folder, writes the whole state dict of a model that it does not know, rotates by
file times, and does not find nested adapters when it resumes. Here `_save_checkpoint` keeps the books and writes
nothing; a callback's `on_save` writes everything, and what is loaded goes through checkpoint.py.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Subset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from . import checkpoint, training_state
from .errors import CheckpointError
from .model import DyLoRAMoE, Usage
from .skills import SkillLibrary

SHOWN_EXPERTS = 16  # more of them are not logged one by one


class MoETrainer(Trainer):
    """A Trainer whose checkpoints are this project's.

    Args:
        eval_dataset: a dict of data sets; each gets its loss, `eval_<name>_loss`, and their mean is `eval_loss`.
        resume_weights_only: take experts and router from a checkpoint, and start everything else afresh.
    """

    def __init__(self, *args, resume_weights_only: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        self.resume_weights_only = resume_weights_only
        self.skills = SkillLibrary()
        self.usage_by_data: dict[str, Usage] = {}
        self.model.reset_usage()

    @property
    def mixture(self) -> DyLoRAMoE:
        return self.accelerator.unwrap_model(self.model)

    # ---- optimizer ----

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """AdamW over all experts and the router, with the parameters' names in its state."""
        if self.optimizer is None:
            self.mixture.train_all_experts()
            args = self.args
            self.optimizer = torch.optim.AdamW(
                list(self.mixture.trained_parameters().items()),
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                weight_decay=args.weight_decay,
                fused=self.mixture.device.type in ("cpu", "cuda"),
            )
        return self.optimizer

    # ---- checkpoints: books here, files in the callback's on_save ----

    def _save_checkpoint(self, model, trial) -> None:
        self.store_flos()
        if self.state.best_global_step:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            if best.is_dir() or self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(best)
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Publish experts and router as a checkpoint without training state; never a merged model."""
        target = Path(output_dir or Path(self.args.output_dir) / "checkpoint")
        if self.args.should_save:
            checkpoint.save(target, self.mixture, step=self.state.global_step, skills=self.skills)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        self.skills = checkpoint.load_into(resume_from_checkpoint, self.mixture)

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if folder is not None:
            training_state.load_optimizer(Path(folder), self.optimizer)
            training_state.load_scheduler(Path(folder), self.lr_scheduler)

    def _load_rng_state(self, folder: str | None) -> None:
        if folder is not None:
            training_state.load_rng(Path(folder))

    def _load_callback_state(self) -> None:
        """How many evaluations went by without a better one."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                saved = self.state.stateful_callbacks.get(type(callback).__name__, {})
                for name, value in saved.get("attributes", {}).items():
                    setattr(callback, name, value)

    # ---- evaluation and logs ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean loss in nats per labelled token of each data set, over all ranks; RNG, mode and usage stay as found."""
        data = eval_dataset or self.eval_dataset
        data = data if isinstance(data, dict) else {"data": data}
        metrics = {}
        with _evaluating(self.mixture):
            for name, rows in data.items():
                loss, usage = self._evaluate_one(rows)
                metrics[f"{metric_key_prefix}_{name}_loss"] = loss
                if usage is not None:
                    self.usage_by_data[name] = usage
        losses = list(metrics.values())
        metrics[f"{metric_key_prefix}_loss"] = sum(losses) / len(losses)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_one(self, rows) -> tuple[float, Usage | None]:
        rank, size = training_state.world()
        mixture = self.mixture
        mixture.reset_usage()
        mine = Subset(rows, range(rank, len(rows), size))
        loader = DataLoader(mine, batch_size=self.args.per_device_eval_batch_size, collate_fn=self.data_collator)
        self.callback_handler.eval_dataloader = loader
        total = torch.zeros(2, dtype=torch.float64)  # nats, tokens
        for batch in loader:
            batch = self._prepare_inputs(batch)
            tokens = int((batch["labels"][:, 1:] != -100).sum())
            total += torch.tensor([mixture(**batch).lm_loss.item() * tokens, tokens], dtype=torch.float64)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        nats, tokens = torch.stack(training_state.gather(total)).sum(0).tolist()
        return nats / max(tokens, 1), _over_ranks(mixture.usage())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the training loss, how the tokens since the last log were routed."""
        if "loss" in logs:
            usage = _over_ranks(self.mixture.usage())
            if usage is not None:
                logs["balance"] = round(usage.balance(), 4)
                if self.mixture.num_experts <= SHOWN_EXPERTS:
                    logs |= {f"usage/expert_{i}": round(share, 4) for i, share in enumerate(usage.shares())}
                self.mixture.reset_usage()
        super().log(logs, start_time)


def _over_ranks(usage: Usage | None) -> Usage | None:
    if usage is None:
        return None
    both = training_state.gather((usage.first.cpu(), usage.total.cpu()))
    return Usage(sum(first for first, _ in both), sum(total for _, total in both))


@contextmanager
def _evaluating(mixture: DyLoRAMoE) -> Iterator[None]:
    usage = mixture._usage
    try:
        with checkpoint.untouched(mixture):
            yield
    finally:
        mixture._usage = usage


class StopSignals(TrainerCallback):
    """The first SIGTERM or Ctrl-C saves at the end of the step and stops; a second one stops at once.

    A context manager: the handlers are there inside only. `received` is the signal that stopped the run, on every rank.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        self._own: signal.Signals | None = None
        self._before: dict = {}

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._own = signal.Signals(number)
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def on_step_end(self, args, state, control, **kwargs):
        heard = [number for number in training_state.gather(self._own) if number is not None]
        if heard and self.received is None:
            self.received = max(heard)
            control.should_save = control.should_training_stop = True
        return control


def check_resumable(folder: Path, run: dict, *, weights_only: bool, accept_changes: bool) -> None:
    """Refuse to resume from what would not give the run that was stopped.

    Raises:
        CheckpointError: with every problem of the checkpoint, or for a missing training state.
    """
    checkpoint.sound_config(folder)
    if weights_only:
        return
    lacking = training_state.missing(folder)
    if lacking:
        remedy = "--resume-weights-only goes on with a fresh optimizer"
        raise CheckpointError(folder, [f"{name}: is missing; {remedy}" for name in lacking])
    changed = training_state.differences(training_state.read_run(folder), run)
    if changed and not accept_changes:
        remedy = "start with the settings of that run, or accept the change with --accept-changes"
        raise CheckpointError(folder, [f"{text}; {remedy}" for text in changed])
