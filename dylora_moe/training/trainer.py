"""The Trainer of Transformers, with the checkpoints of this package.

The stock Trainer writes into the final folder, writes the whole state dict of a model that it does not know, rotates by
file times, and does not find nested adapters when it resumes. Here `_save_checkpoint` only updates the trainer state;
`PeftCheckpointCallback.on_save` writes the files, and `checkpoint.read` loads them.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler, SequentialSampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from ..base.preserve import set_rng_state
from ..checkpoint import formats
from ..checkpoint.probe import probe_outputs
from ..checkpoint.read import load_into
from ..checkpoint.verify import open_checkpoint
from ..checkpoint.write import save_checkpoint
from ..constants import NEW
from ..distributed import ranks, sharding
from ..errors import UsageError
from ..mixture.model import Mixture
from ..mixture.router import Usage
from ..stages.evaluate import Evaluation, over_ranks
from ..stages.plan import Branch, PlannedBlocks
from ..stages.schedule import begin_later, move_scheduler
from . import moments, training_state
from .arguments import check_trainer
from .callbacks import EvaluationStopped, ProgressBar, ProgressLines
from .checkpoint_callback import best_step
from .resume import ARGUMENTS, choose
from .training_state import SavedState, Sums

LOGGED_EXPERTS = 16  # the share of each expert is logged for at most that many


class MoETrainer(Trainer):
    """A Trainer for a mixture, which resumes exactly.

    Give it a `PeftCheckpointCallback`, which writes the checkpoints, and `save_strategy="steps"`. With
    `resume_from_checkpoint=True` a run goes on from the newest complete checkpoint of its folder. The learning-rate
    schedule must be a LambdaLR, as are all of Transformers that depend on the step alone. For FSDP2, pass a model that
    `sharding.shard` has sharded: Accelerate would shard the experts as well.

    Where the training data are `PlannedBlocks`, each block trains the expert that the plan names, alone, and the router
    is left as it is. Otherwise all experts and the router are trained together.

    Args:
        eval_dataset: A dict of data sets. The loss of each is `eval_<name>_loss`, their mean is `eval_loss`.
        start_step: The step at which schedule and data begin, where optimizer and generators are fresh.

    """

    def __init__(self, *args: Any, start_step: int = 0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.plan = self.train_dataset.plan if isinstance(self.train_dataset, PlannedBlocks) else None
        if self.plan is not None:
            self.add_callback(Branch(self.plan))
            if self.args.ddp_find_unused_parameters is None:  # a block trains one expert
                self.accelerator.ddp_handler.find_unused_parameters = True
        self.start_step = start_step
        self.usage_by_data: dict[str, Usage] = {}
        self._resumed: SavedState | None = None  # what goes on in this run
        self._first_step = start_step  # the step after which the sum of the losses begins
        self._evaluation_seconds = 0.0
        progress = [c for c in self.callback_handler.callbacks if isinstance(c, (PrinterCallback, ProgressCallback))]
        for callback in progress:
            self.remove_callback(callback)
        if progress:
            self.add_callback(ProgressLines() if self.args.disable_tqdm else ProgressBar())

    @property
    def mixture(self) -> Mixture:
        return self.accelerator.unwrap_model(self.model)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: A checkpoint, or True for the newest complete one of the run folder.

        Raises:
            UsageError: If the run folder holds checkpoints that this run would meet, or none to go on from; or for
                settings that cannot be honoured.
            CheckpointError: If the checkpoint is not sound. Nothing of the model has changed then.
        """
        check_trainer(self)
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "trainer_saves"):
                callback.trainer_saves = False
        self.remove_callback(_Resumption)
        self.add_callback(_Resumption(self))  # the last one: all others have begun before
        if self.plan is None:
            self.mixture.reset_usage()
        else:
            self.mixture.train_only(self.plan.trained)
        self._resumed, self._first_step, self._evaluation_seconds = None, self.start_step, 0.0
        if not self.start_step:
            return super().train(self._chosen(resume_from_checkpoint), *args, **kwargs)
        with TemporaryDirectory(prefix="dylora_start_") as folder:  # the Trainer reads the step from a folder
            state = TrainerState(global_step=self.start_step, train_batch_size=self._train_batch_size)
            state.save_to_json(f"{folder}/{formats.TRAINER_STATE}")
            return super().train(folder, *args, **kwargs)

    def _chosen(self, resume: str | bool | None) -> str | None:
        """Return the checkpoint to go on from. The stock Trainer takes the newest folder, complete or not."""
        if not resume:
            return None  # `PeftCheckpointCallback` looks at the run folder
        run_dir = Path(str(self.args.output_dir))
        start = ranks.on_first(lambda: choose(run_dir, "auto" if resume is True else str(resume), False, ARGUMENTS))
        if start.folder is None:
            raise UsageError(f"resume_from_checkpoint=True: there is no checkpoint in {run_dir} to go on from")
        for line in start.lines:
            warnings.warn(line, stacklevel=3)
        return str(start.folder)

    # ---- several processes ----

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        if not model.sharded:  # a sharded one is there already, and torch cannot move every DTensor
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
        """Wrap a model with a sharded base in DDP, which Accelerate refuses for every model that holds DTensors."""
        model = super()._wrap_model(model, training=training, dataloader=dataloader)
        if not training or model is not self.mixture or not model.sharded:
            return model
        model = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)  # autocast only
        return sharding.replicated(model, self.args.device, **self.accelerator.ddp_handler.to_kwargs())

    # ---- optimizer ----

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make an AdamW over what is trained, with the names of the parameters in its state."""
        if self.optimizer is None:
            self.mixture.unfreeze()
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

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Make the learning-rate schedule of the steps from the plan's first one on."""
        if self.plan is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        first = self.plan.first_step
        return begin_later(cast(LambdaLR, super().create_scheduler(num_training_steps - first, optimizer)), first)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if self.plan is not None:
            return SequentialSampler(cast(Any, self.train_dataset))
        return super()._get_train_sampler(train_dataset)

    # ---- checkpoints ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Update the trainer state. The Trainer calls `on_save` of the callbacks next, which write the files."""
        self.store_flos()
        kept: Any = self.state.stateful_callbacks  # by the name of a class
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                kept[type(callback).__name__] = callback.state()
        kept[training_state.SUMS] = {"args": {}, "attributes": {"by_rank": ranks.gather(asdict(self._sums()))}}

    def _sums(self) -> Sums:
        usage = self.mixture.usage()
        updates = cast(torch.optim.Optimizer, self.optimizer).state.values()
        return Sums(
            loss=self._tr_loss.item(),
            total_loss=self._total_loss_scalar,
            last_logged=self._globalstep_last_logged,
            usage=None if usage is None else [usage.first.tolist(), usage.total.tolist()],
            first_step=self._first_step,
            optimizer_steps=sorted({int(state["step"]) for state in updates if "step" in state}),
        )

    def restore_sums(self) -> None:
        """Go on summing up loss and usage for the next log where the run of the checkpoint was."""
        sums = self._resumed.sums if self._resumed else None
        if sums is None:
            return
        self._tr_loss += sums.loss
        self._total_loss_scalar, self._globalstep_last_logged = sums.total_loss, sums.last_logged
        self._first_step = sums.first_step
        if sums.usage is not None:
            self.mixture._usage = [torch.tensor(values, device=self.mixture.device) for values in sums.usage]

    def evaluate_again(self) -> None:
        """Make the evaluation that a signal has cut short in the run of the checkpoint."""
        if self._resumed is None or not self._resumed.evaluation_due or self.args.eval_strategy == "no":
            return
        metrics = self._evaluate(None, None)
        self._determine_best_metric(metrics, None)
        if self.control.should_training_stop:
            raise UsageError(f"there is nothing left to train: the run stops early at step {self.state.global_step}")

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Save at once if a signal cuts an evaluation short. The saved `TrainerControl` says that it is due."""
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except EvaluationStopped:
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            self.control.should_evaluate = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Publish experts and router as a checkpoint without training state, never a merged model."""
        target = Path(output_dir or Path(str(self.args.output_dir), "checkpoint"))
        outputs = probe_outputs(self.mixture) if self.mixture.sharded else None
        with ranks.together():
            if self.args.should_save:
                save_checkpoint(target, self.mixture, step=self.state.global_step, outputs=outputs)

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        position = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # the stock Trainer takes those of the checkpoint
        if self.state.global_step >= max_steps:  # the stock Trainer trains one more step
            raise UsageError(
                f"there is nothing left to train: step {self.state.global_step} of {max_steps} is reached; ask for "
                "more with --max-steps or --epochs, and --accept-changes"
            )
        return position

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Read all of a checkpoint, and load the weights once nothing is wrong with any of it."""
        if self.start_step:
            return

        def read_training_state() -> None:
            folder, step = checkpoint.folder, checkpoint.config.step
            new = [expert.name for expert in checkpoint.config.experts if expert.state == NEW]
            self._resumed = training_state.read(folder, step, self.mixture, self.optimizer, new)

        with ranks.together():
            checkpoint = open_checkpoint(resume_from_checkpoint)
            load_into(checkpoint, self.mixture, check=read_training_state)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        schedule = cast(LambdaLR, self.lr_scheduler)
        if self.start_step:
            move_scheduler(schedule, self.start_step)
        elif self._resumed is not None:
            moments.load_moments(self._resumed.moments, cast(torch.optim.Optimizer, self.optimizer))
            move_scheduler(schedule, self._resumed.step)

    def _load_rng_state(self, folder: str | None) -> None:
        if self._resumed is not None:
            set_rng_state(self._resumed.generators)

    def _load_callback_state(self) -> None:
        """Restore the number of evaluations without a better one."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                saved = training_state.kept(vars(self.state), type(callback).__name__).get("attributes", {})
                callback.early_stopping_patience_counter = saved.get("early_stopping_patience_counter", 0)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Load the best model here, of those in the run folder: the stock Trainer would take any that a file names.

        It would delete the other checkpoints, too, where the limit is 1.
        """
        self.state.best_model_checkpoint = None
        if self.args.load_best_model_at_end:
            best = ranks.on_first(lambda: best_step(self.args, self.state))
            if best != self.state.best_global_step:
                wanted, found = self.state.best_global_step, f"that of step {best}" if best else "none"
                text = f"the best model, of step {wanted}, is not in {self.args.output_dir}; {found} is loaded"
                warnings.warn(text, stacklevel=2)
            if best is not None:
                load_into(open_checkpoint(Path(str(self.args.output_dir), f"checkpoint-{best}")), self.mixture)
        return super()._finalize_training(*args, **kwargs)

    # ---- evaluation and logs ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the loss of each data set over all ranks, the mean in nats per labelled token.

        Random generators, training mode and usage are left as they were.
        """
        data = eval_dataset or self.eval_dataset
        if not data:
            raise UsageError("there is nothing to evaluate: pass eval_dataset")
        data = data if isinstance(data, dict) else {"data": data}
        data = {name: self._as_trained_on(rows) for name, rows in data.items()}
        self.callback_handler.eval_dataloader = range(
            sum(map(self.evaluation().batches, data.values()))
        )  # as long as all of them
        metrics, began = {}, time.perf_counter()
        try:
            for name, rows in data.items():
                metrics[f"{metric_key_prefix}_{name}_loss"], usage = self._evaluate_one(rows)
                if usage is not None:
                    self.usage_by_data[name] = usage
        finally:
            self._evaluation_seconds += time.perf_counter() - began
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ProgressBar):
                    callback.end_evaluation()
        losses = list(metrics.values())
        metrics[f"{metric_key_prefix}_loss"] = sum(losses) / len(losses)
        self.log(metrics)
        if metric_key_prefix == "eval":
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _as_trained_on(self, rows: Any) -> Any:
        """Return rows without the columns that training leaves out as well."""
        return self._remove_unused_columns(rows, "evaluation") if isinstance(rows, Dataset) else rows

    def _evaluate_one(self, rows: Any) -> tuple[float, Usage | None]:
        return self.evaluation(self._after_batch).loss(rows)

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: what Transformers counts depends on how the base is sharded, and would be saved."""
        return 0

    def _after_batch(self) -> None:
        self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)

    def evaluation(self, after_batch: Callable[[], object] = lambda: None) -> Evaluation:
        """Return what evaluates rows as `evaluate` does."""
        size = self.args.per_device_eval_batch_size
        return Evaluation(self.mixture, cast(Any, self.data_collator), size, after_batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to the training loss how the tokens since the last log were routed.

        Raises:
            UsageError: If a number is not finite; nothing that follows would be worth saving.
        """
        if "loss" in logs:
            usage = over_ranks(self.mixture.usage())
            if usage is not None:
                logs["balance"] = round(usage.balance(), 4)
                if self.mixture.num_experts <= LOGGED_EXPERTS:
                    logs |= {f"usage/expert_{i}": round(share, 4) for i, share in enumerate(usage.shares())}
                self.mixture.reset_usage()
        if "train_loss" in logs:
            steps = self.state.global_step - self._first_step  # those before the run was resumed count, too
            logs["train_loss"] = self._total_loss_scalar / max(steps, 1)
            without = max(logs["train_runtime"] - self._evaluation_seconds, 1e-3)
            for rate in {"train_steps_per_second", "train_samples_per_second"} & logs.keys():
                logs[rate] *= logs["train_runtime"] / without
        broken = [f"{name} is {v}" for name, v in logs.items() if isinstance(v, float) and not math.isfinite(v)]
        if broken:
            raise UsageError(
                f"training has diverged at step {self.state.global_step}: {', '.join(broken)}; go on from an earlier "
                "checkpoint or start again, with a lower --learning-rate, or --dtype bfloat16 or float32"
            )
        super().log(logs, start_time)


class _Resumption(TrainerCallback):
    """Restores the sums of the Trainer, which it sets to zero just before this event."""

    def __init__(self, trainer: MoETrainer):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.restore_sums()
        self.trainer.evaluate_again()
