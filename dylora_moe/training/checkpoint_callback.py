"""`PeftCheckpointCallback` writes the checkpoints of a run, with `MoETrainer` or with a stock Trainer."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..base.preserve import rng_state
from ..checkpoint.probe import probe_outputs
from ..checkpoint.write import save_checkpoint
from ..distributed import ranks
from ..errors import UsageError, listed
from ..mixture.model import Mixture
from ..skills.library import SkillLibrary
from ..store import run_folder
from . import training_state
from .arguments import check_arguments
from .resume import ARGUMENTS, STOCK_TRAINER, check_unused


class PeftCheckpointCallback(TrainerCallback, ExportableState):
    """Writes every checkpoint of a run, whole or not at all, and deletes old ones afterwards.

    Use it with `dylora_moe.MoETrainer`, which writes nothing itself and resumes exactly. A stock Trainer would add
    files to every checkpoint, which is refused then. With `save_strategy="no"` it does not: then this callback saves by
    itself every `save_steps` steps and at the end, and keeps `save_total_limit` checkpoints. Such a run can be resumed
    with --resume-weights-only.

    A run begins in a folder without checkpoints, or goes on from the newest one that is there. What is deleted depends
    on the checkpoints that are there and on their evaluations alone.

    Args:
        skills: The skill library to save.
        run: The settings of the run. trainer_state.json keeps them, to be compared with those of a resumed run.
        interrupted: Returns whether the run is being stopped before its end. Unless it is, the last save makes the
            experts mature.
        at_end: Called before the last save, unless the run is stopped before its end.
        name: The name of each checkpoint in `args.output_dir`, with {step} for the step.
    """

    def __init__(
        self,
        skills: SkillLibrary | None = None,
        run: dict[str, Any] | None = None,
        interrupted: Callable[[], bool] = lambda: False,
        name: str = "checkpoint-{step}",
        at_end: Callable[[], None] = lambda: None,
    ):
        self.skills = skills if skills is not None else SkillLibrary()
        self.run = run or {}
        self.interrupted = interrupted
        self.name = name
        self.at_end = at_end
        self.trainer_saves = True  # MoETrainer sets it to False
        self._due = False
        self._saved: int | None = None  # the step of the last checkpoint of this run

    def state(self) -> dict[str, Any]:
        """Return what trainer_state.json keeps of this callback."""
        return {"args": {}, "attributes": {"run": self.run}}

    # ---- called by the Trainer ----

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refuse to start where a save would fail or meet other checkpoints, or where the optimizer lacks a part."""
        model: Mixture = kwargs["model"]
        with ranks.together():
            if self.trainer_saves:
                check_arguments(args, stock=True)
            if not isinstance(model, Mixture):
                raise UsageError(f"PeftCheckpointCallback saves a DyLoRAMoE, the Trainer has a {type(model).__name__}")
            model.check_optimizer(kwargs["optimizer"])
            if args.should_save:
                words = STOCK_TRAINER if self.trainer_saves else ARGUMENTS
                check_unused(Path(str(args.output_dir)), state.global_step, words)
                run_folder.make_run_dir(str(args.output_dir))
                run_folder.check_writable(str(args.output_dir))
        state.best_model_checkpoint = None  # if the file of a checkpoint names one, the Trainer deletes all others
        self._saved = None
        model.mark_immature()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Publish `checkpoint-<step>`: adapters, router, skill library, config, probe and, in training, its state.

        The first rank writes. Every rank takes part, since each has its own random generators, and since a failure
        must stop all of them.

        Raises:
            UsageError: If the checkpoint cannot be written; on every rank.
        """
        model: Mixture = kwargs["model"]
        target = Path(str(args.output_dir), self.name.format(step=state.global_step))
        if state.global_step == self._saved:
            warnings.warn(f"{target} has been saved at this step already, and is left as it is", stacklevel=2)
            return
        state.best_model_checkpoint = None
        with ranks.together():
            _check_finite(model, state.global_step)
        if control.should_training_stop and (not self.interrupted() or state.global_step >= state.max_steps):
            model.mark_mature()
            self.at_end()
        with ranks.together():
            generators, digest = rng_state(), _digest(model)
        rng_states = _agreed(generators, digest)
        outputs = probe_outputs(model) if model.sharded else None  # every rank takes part

        def training_files(folder: Path) -> None:
            training_state.write(folder, kwargs["optimizer"], kwargs["lr_scheduler"], state, rng_states)

        def save() -> None:
            save_checkpoint(
                target,
                model,
                step=state.global_step,
                skills=self.skills,
                training_files=None if kwargs.get("optimizer") is None or args.save_only_model else training_files,
                outputs=outputs,
            )
            if args.save_total_limit:
                _rotate(args, state, args.save_total_limit)

        ranks.on_first(save)
        self._saved = state.global_step

    # ---- with a stock Trainer ----

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._due:
            self._due = False
            self.on_save(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave a save that is due to the beginning of the next step: this one is yet to be evaluated and logged."""
        self._due = self.trainer_saves and state.save_steps >= 1 and state.global_step % state.save_steps == 0

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.trainer_saves:
            control.should_training_stop = True
            self.on_save(args, state, control, **kwargs)


def _check_finite(model: Mixture, step: int) -> None:
    extremes = {name: torch.stack(torch.aminmax(p.detach())) for name, p in _saved(model).items()}
    broken = [name for name, both in extremes.items() if not both.isfinite().all()]  # aminmax hands a NaN on
    if broken:
        raise UsageError(
            f"training has diverged at step {step}, nothing was saved: NaN or infinity in\n{listed(broken)}\n"
            "Go on from an earlier checkpoint or start again, with a lower learning rate"
        )


def _agreed(generators: dict[str, Any], digest: str) -> list[dict[str, Any]]:
    """Return the generators of every rank. Raises `UsageError` if the experts or routers of the ranks differ."""
    states, digests = zip(*ranks.gather((generators, digest)), strict=True)
    if len(set(digests)) > 1:
        found = ", ".join(f"rank {rank}: {digest[:12]}" for rank, digest in enumerate(digests))
        raise UsageError(f"the ranks have drifted apart, nothing was saved: experts or router differ ({found})")
    return list(states)


def _saved(model: Mixture) -> dict[str, torch.nn.Parameter]:
    """Return what may differ from checkpoint to checkpoint: the trained parameters, and the router's."""
    return model.trained_parameters() | dict(model.router.named_parameters(prefix="router"))


def _digest(model: Mixture) -> str:
    """Return a hash of what is saved, by which ranks are compared; an empty one if there is one rank."""
    if ranks.world()[1] == 1:
        return ""
    digest = hashlib.sha256()
    for parameter in _saved(model).values():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _rotate(args: TrainingArguments, state: TrainerState, limit: int) -> None:
    """Keep the newest checkpoints, the one that was just written and, of those that were evaluated, the best."""
    best = best_step(args, state)
    keep = [state.global_step] if best is None else [state.global_step, best]
    run_folder.rotate(str(args.output_dir), limit, keep=keep)


def best_step(args: TrainingArguments, state: TrainerState) -> int | None:
    """Return the step of the checkpoint in the run folder with the best evaluation, the first of equals, if any."""
    metric = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
    steps = {found.step for found in run_folder.checkpoints(str(args.output_dir))}
    log: list[dict[str, Any]] = state.log_history
    values = {entry["step"]: entry[metric] for entry in log if metric in entry and entry.get("step") in steps}
    sign = -1 if args.greater_is_better else 1
    return min(sorted(values), key=lambda step: sign * values[step], default=None)
