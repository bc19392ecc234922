"""The Trainer of Transformers, with the checkpoints of this package.

The stock Trainer writes into the final folder, writes the whole state dict of a model that it does not know, rotates by
file times, and does not find nested adapters when it resumes. Here `_save_checkpoint` only updates the trainer state;
`PeftCheckpointCallback.on_save` writes the files, and `checkpoint.read` loads them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Subset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput

from ..base.preserve import untouched
from ..checkpoint import formats
from ..checkpoint.probe import probe_outputs
from ..checkpoint.read import load_into
from ..checkpoint.verify import open_checkpoint
from ..checkpoint.write import save_checkpoint
from ..constants import IGNORED_LABEL
from ..errors import UsageError
from ..mixture.model import Mixture
from ..mixture.router import Usage
from . import ranks, sharding, training_state
from .callbacks import ProgressBar, ProgressLines

LOGGED_EXPERTS = 16  # the share of each expert is logged for at most that many
SUMS = "MoETrainer"  # the key, in trainer_state.json, of what was summed up for the next log


class MoETrainer(Trainer):
    """A Trainer for a mixture, which resumes exactly.

    Give it a `PeftCheckpointCallback`, which writes the checkpoints, and `save_strategy="steps"`. The learning-rate
    schedule must be a LambdaLR, as are all of Transformers that depend on the step alone. For FSDP2, pass a model that
    `sharding.shard` has sharded: Accelerate would shard the experts as well.

    Args:
        eval_dataset: A dict of data sets. The loss of each is `eval_<name>_loss`, their mean is `eval_loss`.
        start_step: The step at which schedule and data begin, where optimizer and generators are fresh.

    Raises:
        UsageError: If Accelerate is to shard the model.
    """

    def __init__(self, *args: Any, start_step: int = 0, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or sharding.is_requested():
            raise UsageError(
                "Accelerate would shard the experts with the base: leave TrainingArguments(fsdp=...) and "
                f"{sharding.WANTED} out, and shard the mixture with dylora_moe.training.sharding.shard before"
            )
        self.start_step = start_step
        self.usage_by_data: dict[str, Usage] = {}
        self.add_callback(_Sums(self))
        progress = [c for c in self.callback_handler.callbacks if isinstance(c, (PrinterCallback, ProgressCallback))]
        for callback in progress:
            self.remove_callback(callback)
        if progress:
            self.add_callback(ProgressLines() if self.args.disable_tqdm else ProgressBar())

    @property
    def mixture(self) -> Mixture:
        return self.accelerator.unwrap_model(self.model)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "trainer_saves"):
                callback.trainer_saves = False
        self.mixture.reset_usage()
        if not self.start_step:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        with TemporaryDirectory(prefix="dylora_start_") as folder:  # the Trainer reads the step from a folder
            state = TrainerState(global_step=self.start_step, train_batch_size=self._train_batch_size)
            state.save_to_json(f"{folder}/{formats.TRAINER_STATE}")
            return super().train(folder, *args, **kwargs)

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
        """Make an AdamW over all experts and the router, with the names of the parameters in its state."""
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

    # ---- checkpoints ----

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Update the trainer state. The Trainer calls `on_save` of the callbacks next, which write the files."""
        self.store_flos()
        kept: Any = self.state.stateful_callbacks  # by the name of a class
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                kept[type(callback).__name__] = callback.state()
        kept[SUMS] = {"args": {}, "attributes": {"by_rank": ranks.gather(self._sums())}}

    def _sums(self) -> dict[str, Any]:
        usage = self.mixture.usage()
        return {
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "usage": None if usage is None else [usage.first.tolist(), usage.total.tolist()],
        }

    def restore_sums(self) -> None:
        """Go on summing up loss and usage for the next log where the run of the checkpoint was."""
        kept: Any = self.state.stateful_callbacks
        by_rank = kept.get(SUMS, {}).get("attributes", {}).get("by_rank", [])
        rank, size = ranks.world()
        if len(by_rank) != size:
            return
        sums = by_rank[rank]
        self._tr_loss += sums["loss"]
        self._total_loss_scalar = sums["total_loss"]
        self._globalstep_last_logged = sums["last_logged"]
        if sums["usage"] is not None and len(sums["usage"][0]) == self.mixture.num_experts:
            self.mixture._usage = [torch.tensor(values, device=self.mixture.device) for values in sums["usage"]]

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
        def check() -> None:
            """Refuse moments that do not fit before the weights are loaded; there is no optimizer to load them yet."""
            training_state.read_moments(Path(resume_from_checkpoint), self.mixture.trained_parameters())

        if not self.start_step:
            load_into(open_checkpoint(resume_from_checkpoint), self.mixture, check=check)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        schedule = cast(LambdaLR, self.lr_scheduler)
        if self.start_step:
            training_state.move_scheduler(schedule, self.start_step)
        elif folder is not None:
            training_state.load_optimizer(Path(folder), cast(torch.optim.Optimizer, self.optimizer))
            training_state.load_scheduler(Path(folder), schedule)

    def _load_rng_state(self, folder: str | None) -> None:
        if folder is not None and not self.start_step:
            training_state.load_rng(Path(folder))

    def _load_callback_state(self) -> None:
        """Restore the number of evaluations without a better one."""
        kept: Any = self.state.stateful_callbacks
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                saved = kept.get(type(callback).__name__, {})
                for name, value in saved.get("attributes", {}).items():
                    setattr(callback, name, value)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Load the best model here: told of one, the stock Trainer deletes the last checkpoint if the limit is 1."""
        if self.args.load_best_model_at_end and self.state.best_global_step:
            best = Path(str(self.args.output_dir), f"checkpoint-{self.state.best_global_step}")
            load_into(open_checkpoint(best), self.mixture)
        return super()._finalize_training(*args, **kwargs)

    # ---- evaluation and logs ----

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the loss of each data set over all ranks, the mean in nats per labelled token.

        Random generators, training mode and usage are left as they were.
        """
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
        if metric_key_prefix == "eval":
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_one(self, rows: Any) -> tuple[float, Usage | None]:
        mixture = self.mixture
        mixture.reset_usage()
        total = torch.zeros(2, dtype=torch.float64)  # nats, tokens
        for batch in self._own_batches(rows):
            batch = self._prepare_inputs(batch)
            tokens = int((batch["labels"][:, 1:] != IGNORED_LABEL).sum())
            total += torch.tensor([mixture(**batch).lm_loss.item() * tokens, tokens], dtype=torch.float64)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        nats, tokens = torch.stack(ranks.gather(total)).sum(0).tolist()
        return nats / max(tokens, 1), _over_ranks(mixture.usage())

    def _own_batches(self, rows: Any) -> Iterator[dict[str, Any]]:
        """Yield the batches of this rank. With a sharded base, batches without labels make up for missing ones."""
        rank, size = ranks.world()
        mine = Subset(rows, range(rank, len(rows), size))
        loader = DataLoader(mine, batch_size=self.args.per_device_eval_batch_size, collate_fn=self.data_collator)
        self.callback_handler.eval_dataloader = loader
        yield from loader
        if self.mixture.sharded:
            most = math.ceil(math.ceil(len(rows) / size) / self.args.per_device_eval_batch_size)  # as rank 0 has
            for _ in range(most - len(loader)):
                blank = self.data_collator([rows[0]])
                yield blank | {"labels": torch.full_like(blank["labels"], IGNORED_LABEL)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add to the training loss how the tokens since the last log were routed.

        Raises:
            UsageError: If a number is not finite; nothing that follows would be worth saving.
        """
        if "loss" in logs:
            usage = _over_ranks(self.mixture.usage())
            if usage is not None:
                logs["balance"] = round(usage.balance(), 4)
                if self.mixture.num_experts <= LOGGED_EXPERTS:
                    logs |= {f"usage/expert_{i}": round(share, 4) for i, share in enumerate(usage.shares())}
                self.mixture.reset_usage()
        if "train_loss" in logs:
            steps = self.state.global_step - self.start_step  # those before the run was resumed count, too
            logs["train_loss"] = self._total_loss_scalar / max(steps, 1)
        broken = [f"{name} is {v}" for name, v in logs.items() if isinstance(v, float) and not math.isfinite(v)]
        if broken:
            raise UsageError(
                f"training has diverged at step {self.state.global_step}: {', '.join(broken)}; go on from an earlier "
                "checkpoint or start again, with a lower --learning-rate, or --dtype bfloat16 or float32"
            )
        super().log(logs, start_time)


class _Sums(TrainerCallback):
    """Restores the sums of the Trainer, which it sets to zero just before this event."""

    def __init__(self, trainer: MoETrainer):
        self.trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.restore_sums()


def _over_ranks(usage: Usage | None) -> Usage | None:
    if usage is None:
        return None
    both = ranks.gather((usage.first.cpu(), usage.total.cpu()))
    return Usage(sum(first for first, _ in both), sum(total for _, total in both))


@contextmanager
def _evaluating(mixture: Mixture) -> Iterator[None]:
    usage = mixture._usage
    try:
        with untouched(mixture):
            yield
    finally:
        mixture._usage = usage
