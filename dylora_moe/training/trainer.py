"""The Trainer for a mixture: what Transformers' own does, without its checkpoints.

The stock Trainer writes into the final folder, writes the whole state dict of a model that it does not know, rotates by
file times, and does not find nested adapters when it resumes. Here `_save_checkpoint` keeps the books and writes
nothing; a callback's `on_save` writes everything, and what is loaded goes through checkpoint.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.utils.data import DataLoader, Subset
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback

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

SHOWN_EXPERTS = 16  # more of them are not logged one by one
SUMS = "MoETrainer"  # under this name trainer_state.json keeps what was summed up for the next log


class MoETrainer(Trainer):
    """A Trainer whose checkpoints are this project's.

    Give it a `PeftCheckpointCallback`, which writes them, and `save_strategy="steps"`. The learning-rate schedule must
    be one of LambdaLR (all of Transformers' that depend on the step alone). For FSDP2 give it a model that
    `sharding.shard` has sharded; Accelerate's own sharding would take the experts too.

    Args:
        eval_dataset: a dict of data sets; each gets its loss, `eval_<name>_loss`, and their mean is `eval_loss`.
        start_step: with fresh training state, the step at which schedule and data begin.

    Raises:
        UsageError: where Accelerate is to shard the model.
    """

    def __init__(self, *args, start_step: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled or sharding.is_requested():
            raise UsageError(
                "Accelerate would shard the experts with the base: leave TrainingArguments(fsdp=...) and "
                f"{sharding.WANTED} out, and shard the mixture with dylora_moe.sharding.shard before"
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

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "trainer_saves"):
                callback.trainer_saves = False
        self.mixture.reset_usage()
        if not self.start_step:
            return super().train(resume_from_checkpoint, **kwargs)
        with TemporaryDirectory(prefix="dylora_start_") as folder:  # the Trainer asks a folder for the step
            state = TrainerState(global_step=self.start_step, train_batch_size=self._train_batch_size)
            state.save_to_json(f"{folder}/{formats.TRAINER_STATE}")
            return super().train(folder, **kwargs)

    # ---- several processes ----

    def _move_model_to_device(self, model, device) -> None:
        if not model.sharded:  # otherwise it is there, and torch cannot move every DTensor
            super()._move_model_to_device(model, device)

    def _wrap_model(self, model, training: bool = True, dataloader=None):
        """DDP around a sharded base, too: Accelerate refuses every model that holds DTensors."""
        model = super()._wrap_model(model, training=training, dataloader=dataloader)
        if not training or model is not self.mixture or not model.sharded:
            return model
        model = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)  # autocast only
        return sharding.replicated(model, self.args.device, **self.accelerator.ddp_handler.to_kwargs())

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
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        sums = {"args": {}, "attributes": {"by_rank": ranks.gather(self._sums())}}
        self.state.stateful_callbacks[SUMS] = sums

    def _sums(self) -> dict:
        usage = self.mixture.usage()
        return {
            "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar,
            "last_logged": self._globalstep_last_logged,
            "usage": None if usage is None else [usage.first.tolist(), usage.total.tolist()],
        }

    def restore_sums(self) -> None:
        """Go on summing up loss and usage for the next log where the checkpoint's run was."""
        by_rank = self.state.stateful_callbacks.get(SUMS, {}).get("attributes", {}).get("by_rank", [])
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
        """Publish experts and router as a checkpoint without training state; never a merged model."""
        target = Path(output_dir or Path(self.args.output_dir) / "checkpoint")
        outputs = probe_outputs(self.mixture) if self.mixture.sharded else None
        with ranks.together():
            if self.args.should_save:
                save_checkpoint(target, self.mixture, step=self.state.global_step, outputs=outputs)

    def _init_training_state(self, max_steps, *args, **kwargs):
        position = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)  # the stock Trainer would go on with those of the checkpoint
        if self.state.global_step >= max_steps:  # the stock Trainer would train one step more
            raise UsageError(
                f"there is nothing left to train: step {self.state.global_step} of {max_steps} is reached; ask for "
                "more with --max-steps or --epochs, and --accept-changes"
            )
        return position

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        def check() -> None:
            """The optimizer is filled later, when there is one; whether its moments fit is to be known now."""
            training_state.read_moments(Path(resume_from_checkpoint), self.mixture.trained_parameters())

        if not self.start_step:
            load_into(open_checkpoint(resume_from_checkpoint), self.mixture, check=check)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        if self.start_step:
            training_state.move_scheduler(self.lr_scheduler, self.start_step)
        elif folder is not None:
            training_state.load_optimizer(Path(folder), self.optimizer)
            training_state.load_scheduler(Path(folder), self.lr_scheduler)

    def _load_rng_state(self, folder: str | None) -> None:
        if folder is not None and not self.start_step:
            training_state.load_rng(Path(folder))

    def _load_callback_state(self) -> None:
        """How many evaluations went by without a better one."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                saved = self.state.stateful_callbacks.get(type(callback).__name__, {})
                for name, value in saved.get("attributes", {}).items():
                    setattr(callback, name, value)

    def _finalize_training(self, *args, **kwargs):
        """The stock one knows of no best model, or it would delete the last checkpoint where the limit is 1."""
        if self.args.load_best_model_at_end and self.state.best_global_step:
            best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
            load_into(open_checkpoint(best), self.mixture)
        return super()._finalize_training(*args, **kwargs)

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
        if metric_key_prefix == "eval":
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate_one(self, rows) -> tuple[float, Usage | None]:
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

    def _own_batches(self, rows) -> Iterator[dict]:
        """This rank's share of the rows. Of a sharded base each rank gets as many batches, some without a label."""
        rank, size = ranks.world()
        mine = Subset(rows, range(rank, len(rows), size))
        loader = DataLoader(mine, batch_size=self.args.per_device_eval_batch_size, collate_fn=self.data_collator)
        self.callback_handler.eval_dataloader = loader
        yield from loader
        if self.mixture.sharded:
            most = math.ceil(math.ceil(len(rows) / size) / self.args.per_device_eval_batch_size)  # of rank 0
            for _ in range(most - len(loader)):
                blank = self.data_collator([rows[0]])
                yield blank | {"labels": torch.full_like(blank["labels"], IGNORED_LABEL)}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With the training loss, how the tokens since the last log were routed.

        Raises:
            UsageError: where a number is not finite; nothing that follows would be worth saving.
        """
        if "loss" in logs:
            usage = _over_ranks(self.mixture.usage())
            if usage is not None:
                logs["balance"] = round(usage.balance(), 4)
                if self.mixture.num_experts <= SHOWN_EXPERTS:
                    logs |= {f"usage/expert_{i}": round(share, 4) for i, share in enumerate(usage.shares())}
                self.mixture.reset_usage()
        if "train_loss" in logs:
            steps = self.state.global_step - self.start_step  # of a resumed run, too
            logs["train_loss"] = self._total_loss_scalar / max(steps, 1)
        broken = [f"{name} is {v}" for name, v in logs.items() if isinstance(v, float) and not math.isfinite(v)]
        if broken:
            raise UsageError(
                f"training has diverged at step {self.state.global_step}: {', '.join(broken)}; go on from an earlier "
                "checkpoint or start again, with a lower --learning-rate, or --dtype bfloat16 or float32"
            )
        super().log(logs, start_time)


class _Sums(TrainerCallback):
    """The Trainer sets its sums to zero just before this event."""

    def __init__(self, trainer: MoETrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
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
