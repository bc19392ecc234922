"""Which checkpoint a run resumes from, and whether that continues the run that wrote it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import TrainerState

from ..base.fingerprint import same_weights, weights_fingerprint
from ..checkpoint import formats
from ..checkpoint.verify import SoundCheckpoint, checkpoint_folder, open_checkpoint
from ..constants import IMMATURE, MATURE
from ..data.blocks import TokenBlocks, data_fingerprint
from ..errors import CheckpointError, UsageError, listed
from ..mixture.model import Mixture
from ..store import run_folder
from . import ranks, training_state
from .settings import TrainSettings

# These may differ between a run and its resumption: they change what is shown and kept, not what is learned.
FREE_SETTINGS = (
    "accept_changes", "config", "demo", "device", "eval_steps", "gradient_checkpointing", "hf_token", "logging_steps",
    "output_dir", "report_to", "resume", "resume_weights_only", "save_steps", "save_total_limit",
)  # fmt: skip
# What these settings name is compared by its content, so that a file or a folder may have been renamed.
BY_CONTENT = {"data": "data_fingerprint", "model": "base_weights", "weights": "base_weights"}
WEIGHTS_REMEDY = "--resume-weights-only goes on with a fresh optimizer"


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    folder: Path | None = None  # the checkpoint to go on from; None for fresh experts
    weights_only: bool = False  # whether only experts, router and skill library are taken from it
    step: int = 0  # with weights_only, the step to go on at
    lines: list[str] = field(default_factory=list)  # what to tell the user about the choice


def choose(run_dir: Path, resume: str | None, weights_only: bool) -> Start:
    """Return the checkpoint that --resume asks for.

    Raises:
        UsageError: If the run folder and the flags do not go together.
    """
    complete = run_folder.checkpoints(run_dir) if run_dir.is_dir() else []
    broken = run_folder.incomplete(run_dir) if run_dir.is_dir() else []
    if resume is None:
        if complete or broken:
            newest = complete[-1].path if complete else broken[-1][0]
            raise UsageError(
                f"{run_dir} already holds checkpoints (newest: {newest.name}); go on with --resume, or start another "
                "run with another --output-dir"
            )
        return Start()
    if resume == "auto":
        return _newest(run_dir, complete, broken, weights_only)
    return _named(run_dir, Path(resume), complete, weights_only)


def _newest(
    run_dir: Path, complete: list[run_folder.Checkpoint], broken: list[tuple[Path, str]], weights_only: bool
) -> Start:
    if complete:
        lines = [f"passed over {path}: {reason}" for path, reason in broken]
        return Start(complete[-1].path, weights_only, complete[-1].step if weights_only else 0, lines)
    if broken:
        lines = [f"{path.name}: {reason}" for path, reason in broken]
        raise UsageError(
            f"{run_dir} holds only incomplete checkpoints:\n{listed(lines)}\nMove them away to start from the beginning"
        )
    return Start(lines=[f"no checkpoint in {run_dir} yet: starting from the beginning"])


def _named(run_dir: Path, chosen: Path, complete: list[run_folder.Checkpoint], weights_only: bool) -> Start:
    try:
        chosen = checkpoint_folder(chosen)
    except UsageError as error:
        raise UsageError(f"--resume {error}\n--resume alone takes the newest checkpoint of the run folder") from None
    own = chosen.resolve().parent == run_dir.resolve()
    step = _step(chosen)
    newer = [c.path.name for c in complete if not own or step is None or c.step > step]
    if newer:
        whose = "newer checkpoints" if own else "checkpoints of its own"
        raise UsageError(
            f"--resume {chosen}: {run_dir} holds {whose} ({', '.join(newer[-10:])}), which this run would meet; use "
            "another --output-dir, or move them away"
        )
    return Start(chosen, weights_only, (step or 0) if weights_only and own else 0)


def _step(folder: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", folder.resolve().name)
    return int(match.group(1)) if match else None


# ---- the settings of a run ----


def compared_settings(settings: TrainSettings, model: Mixture, blocks: TokenBlocks) -> dict[str, Any]:
    """Return what must be the same for a resumed run to continue the run that was stopped. Every rank calls this.

    Raises:
        UsageError: If the ranks differ in it.
    """
    with ranks.together():
        values = {name: value for name, value in vars(settings).items() if name not in FREE_SETTINGS}
        compared = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        compared |= {
            "model": settings.base_model,
            "base_weights": weights_fingerprint(model.base),
            "data_fingerprint": data_fingerprint(blocks),
            "held_out": {n: data_fingerprint(replace(blocks, train=rows)) for n, rows in blocks.evaluation.items()},
            "processes": ranks.world()[1],
        }
        if settings.early_stopping:
            compared["eval_steps"] = settings.eval_steps
    if any(other != compared for other in ranks.gather(compared)):
        raise UsageError("the ranks have read different data or weights; give all of them the same files")
    return compared


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Return a line for each setting in which two runs differ."""
    lines = []
    if same_weights(str(there.get("base_weights")), str(here.get("base_weights"))):
        there = there | {"base_weights": here.get("base_weights")}
    for name in sorted(set(there) | set(here)):
        content = BY_CONTENT.get(name, name)
        if there.get(name) == here.get(name) or there.get(content) == here.get(content):
            continue
        if name == "held_out" and sorted(there.get(name, {}).values()) == sorted(here[name].values()):
            continue  # the data sets may have been renamed
        if name in BY_CONTENT.values():
            names = [key for key, by in BY_CONTENT.items() if by == name]
            if all(there.get(key) == here.get(key) for key in names):
                lines.append(f"{names[0]}: what {here.get(names[0])} holds has changed")
        elif name == "held_out":
            lines.append("data: other documents are held out")
        else:
            lines.append(f"{name}: {there.get(name)!r} there, {here.get(name)!r} here")
    return lines


# ---- whether it may be resumed ----


def check(
    folder: Path, run: dict[str, Any], weights_only: bool, *, accept_changes: bool
) -> tuple[SoundCheckpoint, bool]:
    """Open a checkpoint, and refuse it if it would not continue the run that wrote it.

    Args:
        run: What `compared_settings` returns for this run.

    Returns:
        The checkpoint, and whether the run that wrote it has come to its end.

    Raises:
        CheckpointError: If the checkpoint is not sound or lacks its training state; it lists every problem.
        UsageError: If settings differ; it lists them.
    """
    checkpoint = _open(folder, weights_only)
    if weights_only:
        return checkpoint, False
    lacking = training_state.missing(folder)
    if lacking:
        raise CheckpointError(folder, [f"{name}: is missing; {WEIGHTS_REMEDY}" for name in lacking])
    state = _trainer_state(folder)
    processes = len(training_state.rng_files(folder))
    if processes != run["processes"]:
        raise UsageError(
            f"{folder} was written by {processes} process(es), this run has {run['processes']}; start as many, or "
            f"{WEIGHTS_REMEDY}"
        )
    changed = differences(training_state.read_run(folder), run)
    if changed and not accept_changes:
        raise UsageError(
            f"this would not be the run that wrote {folder}:\n{listed(changed)}\n"
            "Start it with that run's settings and data, or accept the changes with --accept-changes"
        )
    states = checkpoint.config.states
    ended = MATURE in states and IMMATURE not in states
    return checkpoint, ended and not changed and state["global_step"] > 0


def _open(folder: Path, weights_only: bool) -> SoundCheckpoint:
    try:
        return open_checkpoint(folder, weights_only=weights_only)
    except CheckpointError as error:
        if not all(formats.is_training_file(problem.partition(": ")[0]) for problem in error.problems):
            raise
        raise CheckpointError(folder, [f"{problem}; {WEIGHTS_REMEDY}" for problem in error.problems]) from None


def _trainer_state(folder: Path) -> dict[str, Any]:
    state = training_state.read_trainer_state(folder)
    try:
        TrainerState(**state)
    except TypeError as error:
        raise CheckpointError(
            folder, [f"{formats.TRAINER_STATE}: is not the state of a Trainer of this version ({error})"]
        ) from None
    return state
