"""`PeftCheckpointCallback`: writes the checkpoints of a run, under `MoETrainer` or a stock Trainer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..checkpoint.probe import probe_outputs
from ..checkpoint.write import save_checkpoint
from ..errors import UsageError, listed
from ..mixture.model import Mixture
from ..skills.library import SkillLibrary
from ..store import run_folder
from . import ranks, training_state


class PeftCheckpointCallback(TrainerCallback, ExportableState):
    """Writes every checkpoint of a run, whole or not at all, and rotates afterwards.

    For `dylora_moe.MoETrainer`, which writes nothing itself and resumes exactly. A stock Trainer would write
    the merged model into every checkpoint; with `save_strategy="no"` it does not, and this callback saves by itself
    every `save_steps` steps and at the end, and keeps `save_total_limit`. Such a run can be resumed with
    --resume-weights-only.

    Args:
        skills: the skill library to save.
        run: the settings of the run, kept in trainer_state.json so that a resumption can be compared with it.
        interrupted: says whether the run is being stopped before its end; otherwise the last save makes the experts
            mature.
        name: of the folder inside `args.output_dir`, with {step}.
    """

    def __init__(
        self,
        skills: SkillLibrary | None = None,
        run: dict | None = None,
        interrupted: Callable[[], bool] = lambda: False,
        name: str = "checkpoint-{step}",
    ):
        self.skills = skills if skills is not None else SkillLibrary()
        self.run = run or {}
        self.interrupted = interrupted
        self.name = name
        self.trainer_saves = True  # MoETrainer says that it does not
        self._due = False

    def state(self) -> dict:
        """What trainer_state.json keeps of this callback."""
        return {"args": {}, "attributes": {"run": self.run}}

    # ---- as the Trainer calls it ----

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Refuse to start where a save would fail or a part of the mixture would stay as it is."""
        with ranks.together():
            if self.trainer_saves and args.save_strategy != "no":
                raise UsageError(
                    "this Trainer would write the merged model into every checkpoint: use "
                    'dylora_moe.MoETrainer, or save_strategy="no", with which this callback saves by itself '
                    "every save_steps steps"
                )
            model.check_optimizer(optimizer)
            if args.should_save:
                run_folder.make_run_dir(args.output_dir)
                run_folder.check_writable(args.output_dir)
        model.mark_immature()

    def on_save(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        """Publish `checkpoint-<step>`: adapters, router, skill library, config, probe and, in training, its state.

        One rank writes. Every rank takes part, since each has its own random generators, and since a failure must stop
        all of them.

        Raises:
            UsageError: on every rank, where the checkpoint could not be written.
        """
        if control.should_training_stop and not self.interrupted():
            model.mark_mature()
        with ranks.together():
            _check_finite(model, state.global_step)
            rng_state, digest = training_state.rng_state(), _digest(model)
        rng_states = _agreed(rng_state, digest)
        outputs = probe_outputs(model) if model.sharded else None  # every rank takes part

        def training_files(folder: Path) -> None:
            training_state.write(
                folder, optimizer=optimizer, scheduler=lr_scheduler, trainer_state=state, rng_states=rng_states
            )

        with ranks.together():
            if ranks.is_first():
                save_checkpoint(
                    Path(args.output_dir, self.name.format(step=state.global_step)),
                    model,
                    step=state.global_step,
                    skills=self.skills,
                    training_files=training_files if optimizer is not None else None,
                    outputs=outputs,
                )
                if getattr(args, "save_total_limit", None):
                    _rotate(args, state)

    # ---- with a stock Trainer ----

    def on_step_begin(self, args, state, control, **kwargs):
        if self._due:
            self._due = False
            self.on_save(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        """Only now is the step evaluated and logged: what is due is saved when the next one begins."""
        self._due = self.trainer_saves and args.save_steps >= 1 and state.global_step % args.save_steps == 0

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.trainer_saves:
            control.should_training_stop = True
            self.on_save(args, state, control, model=model, **kwargs)


def _check_finite(model: Mixture, step: int) -> None:
    extremes = {name: torch.stack(torch.aminmax(p.detach())) for name, p in model.trained_parameters().items()}
    broken = [
        name for name, least_and_most in extremes.items() if not least_and_most.isfinite().all()
    ]  # NaN shows, too
    if broken:
        raise UsageError(
            f"training has diverged at step {step}, nothing was saved: NaN or infinity in\n{listed(broken)}\n"
            "Go on from an earlier checkpoint or start again, with a lower learning rate"
        )


def _agreed(rng_state: dict, digest: str) -> list[dict]:
    """The random generators of every rank; an error where the ranks' experts or routers are not the same."""
    states, digests = zip(*ranks.gather((rng_state, digest)), strict=True)
    if len(set(digests)) > 1:
        found = ", ".join(f"rank {rank}: {digest[:12]}" for rank, digest in enumerate(digests))
        raise UsageError(f"the ranks have drifted apart, nothing was saved: experts or router differ ({found})")
    return list(states)


def _digest(model: Mixture) -> str:
    """A hash of what is trained, to compare ranks with; empty where there is one."""
    if ranks.world()[1] == 1:
        return ""
    digest = hashlib.sha256()
    for parameter in model.trained_parameters().values():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _rotate(args, state) -> None:
    """Keep the newest checkpoints and, of those that were evaluated, the best."""
    steps = [found.step for found in run_folder.checkpoints(args.output_dir)]
    metric = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
    best = training_state.best_step(state.log_history, steps, metric, greater=bool(args.greater_is_better))
    run_folder.rotate(args.output_dir, args.save_total_limit, keep=[] if best is None else [best])
