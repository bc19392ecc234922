"""Which checkpoint a run resumes from, and whether that continues the run that wrote it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..base.fingerprint import same_weights, weights_fingerprint
from ..checkpoint import formats
from ..checkpoint.verify import SoundCheckpoint, checkpoint_folder, open_checkpoint
from ..checkpoint.write import describe_mixture
from ..constants import IMMATURE, MATURE
from ..distributed import ranks
from ..errors import CheckpointError, UsageError, listed
from ..mixture.model import Mixture
from ..store import run_folder
from . import moments, training_state
from .settings import TrainSettings

if TYPE_CHECKING:
    from ..data.blocks import TokenBlocks

# These may differ between a run and its resumption: they change what is shown and kept, not what is learned.
FREE_SETTINGS = (
    "accept_changes", "config", "demo", "device", "eval_steps", "from_", "gradient_checkpointing", "hf_token",
    "logging_steps", "output_dir", "report_to", "resume", "resume_weights_only", "save_steps", "save_total_limit",
)  # fmt: skip
# These a checkpoint fixes, besides the number of experts: the key of each in the entry of an expert in config.json.
FIXED_BY_CHECKPOINT = {"lora_r": "r", "lora_alpha": "lora_alpha", "targets": "target_modules"}
# What these settings name is compared by its content, so that a file or a folder may have been renamed.
BY_CONTENT = {
    "data": "data_fingerprint", "eval_blocks": "data_fingerprint", "eval_data": "data_fingerprint",
    "eval_fraction": "data_fingerprint", "mixing": "data_fingerprint",
    "model": "base_weights", "weights": "base_weights",
}  # fmt: skip


@dataclass(frozen=True)
class Start:
    """Where a run begins."""

    folder: Path | None = None  # the checkpoint to go on from; None for fresh experts
    weights_only: bool = False  # whether only experts, router and skill library are taken from it
    step: int = 0  # with weights_only or grows, the step to go on at
    grows: bool = False  # whether the mixture of the checkpoint is to grow, rather than its run to go on
    lines: list[str] = field(default_factory=list)  # what to tell the user about the choice


class Words(NamedTuple):
    """What the user calls the choices of a run."""

    newest: str  # go on from the newest checkpoint
    named: str  # go on from the checkpoint whose path follows
    folder: str  # the run folder


FLAGS = Words("--resume", "--resume ", "--output-dir")
ARGUMENTS = Words("resume_from_checkpoint=True", "resume_from_checkpoint=", "output_dir")
STOCK_TRAINER = ARGUMENTS._replace(newest="dylora_moe.MoETrainer, which resumes runs")


def choose(run_dir: Path, resume: str | None, weights_only: bool, words: Words = FLAGS) -> Start:
    """Return the checkpoint to go on from.

    Args:
        resume: The path of a checkpoint, "auto" for the newest complete one of the run folder, None for none.

    Raises:
        UsageError: If the run folder holds checkpoints that do not go together with the choice, or none that can be
            chosen.
    """
    if resume is None:
        check_unused(run_dir, words=words)
        return Start()
    if resume == "auto":
        return _newest(run_dir, weights_only)
    return _named(run_dir, Path(resume), weights_only, words)


def choose_growth(run_dir: Path, named: str | None, resume: str | None, data: Sequence[str]) -> Start:
    """Return the checkpoint whose mixture is to grow, or with `resume` the one whose growth goes on.

    Args:
        named: The path of a checkpoint, which grows in another run folder; None for the newest one of this folder.
        resume: See `choose`.
        data: The data sets, which tell whether the newest checkpoint has grown with them already.

    Raises:
        UsageError: If there is none, or the run folder holds checkpoints that do not go together with the choice.
    """
    if resume is not None and (run_folder.checkpoints(run_dir) or named is None):
        start = choose(run_dir, resume, False)
        if start.folder is None:
            raise UsageError(f"--grow: there is no checkpoint in {run_dir} to go on from")
        there = training_state.run_settings(training_state.read_trainer_state(start.folder))
        if there.get("grow") and there.get("data") == list(data):
            return start
        return replace(start, step=_step(start.folder) or 0, grows=True)
    if named is not None:
        # Like a run that takes only the weights, it goes on at the step of the checkpoint if that is in this folder.
        start = _named(run_dir, Path(named), True, FLAGS._replace(named="--from "))
        return replace(start, weights_only=False, grows=True)
    newest = run_folder.latest(run_dir)
    if newest is None:
        raise UsageError(
            f"--grow: there is no complete checkpoint in {run_dir}; train there first, or name one with --from "
            "CHECKPOINT"
        )
    return Start(newest.path, step=newest.step, grows=True)


def check_unused(run_dir: Path, step: int = 0, words: Words = ARGUMENTS) -> None:
    """Check that a run which begins at a step meets no checkpoint of another run in its folder.

    A run from the beginning is to find no checkpoint, complete or not; a later one none of a later step.

    Raises:
        UsageError: If there is one; it names the newest.
    """
    found = [c.path for c in run_folder.checkpoints(run_dir) if not step or c.step > step]
    if not step:
        found = [path for path, _ in run_folder.incomplete(run_dir)] + found
    if found:
        raise UsageError(
            f"{run_dir} already holds checkpoints (newest: {found[-1].name}); go on with {words.newest}, or start "
            f"another run with another {words.folder}"
        )


def _newest(run_dir: Path, weights_only: bool) -> Start:
    complete, broken = run_folder.checkpoints(run_dir), run_folder.incomplete(run_dir)
    if complete:
        lines = [f"passed over {path}: {reason}" for path, reason in broken]
        return Start(complete[-1].path, weights_only, complete[-1].step if weights_only else 0, lines=lines)
    if broken:
        lines = [f"{path.name}: {reason}" for path, reason in broken]
        raise UsageError(
            f"{run_dir} holds only incomplete checkpoints:\n{listed(lines)}\nMove them away to start from the beginning"
        )
    return Start(lines=[f"no checkpoint in {run_dir} yet: starting from the beginning"])


def _named(run_dir: Path, chosen: Path, weights_only: bool, words: Words) -> Start:
    try:
        chosen = checkpoint_folder(chosen)
    except UsageError as error:
        remedy = f"{words.newest} alone takes the newest checkpoint of the run folder"
        raise UsageError(f"{words.named}{error}\n{remedy}") from None
    own = chosen.resolve().parent == run_dir.resolve()
    step = _step(chosen)
    newer = [c.path.name for c in run_folder.checkpoints(run_dir) if not own or step is None or c.step > step]
    if newer:
        whose = "newer checkpoints" if own else "checkpoints of its own"
        raise UsageError(
            f"{words.named}{chosen}: {run_dir} holds {whose} ({', '.join(newer[-10:])}), which this run would meet; "
            f"use another {words.folder}, or move them away"
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
    from ..data.blocks import data_fingerprint  # here: the callback, which needs `choose`, loads no data sets

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


def differences(there: dict[str, Any], here: dict[str, Any]) -> dict[str, str]:
    """Return a line for each setting in which two runs differ, by its name.

    A run of an earlier version had the default of a setting that it did not know.
    """
    if there:
        defaults = {each.name: each.default for each in fields(TrainSettings) if each.name in here}
        there = {name: list(value) if isinstance(value, tuple) else value for name, value in defaults.items()} | there
    lines = {}
    if same_weights(str(there.get("base_weights")), str(here.get("base_weights"))):
        there = there | {"base_weights": here.get("base_weights")}
    for name in sorted(set(there) | set(here)):
        content = BY_CONTENT.get(name, name)
        if name == "stage" or there.get(name) == here.get(name) or there.get(content) == here.get(content):
            continue
        if name == "held_out":
            if _contents(there.get(name)) != _contents(here.get(name)):  # the data sets may have been renamed
                lines[name] = "data: other documents are held out or evaluated"
        elif name in BY_CONTENT.values():
            names = [key for key, by in BY_CONTENT.items() if by == name]
            if all(there.get(key) == here.get(key) for key in names):
                lines[name] = f"{names[0]}: what {here.get(names[0])} holds has changed"
        else:
            lines[name] = f"{name}: {there.get(name)!r} there, {here.get(name)!r} here"
    return lines


def _contents(held_out: Any) -> list[str] | None:
    return sorted(map(str, held_out.values())) if isinstance(held_out, dict) else None


# ---- whether it may be resumed ----


def check(
    folder: Path, run: dict[str, Any], model: Mixture, weights_only: bool, *, accept_changes: bool
) -> tuple[SoundCheckpoint, bool]:
    """Open a checkpoint, and refuse it if it would not continue the run that wrote it.

    Args:
        run: What `compared_settings` returns for this run.
        model: The mixture that this run has built.

    Returns:
        The checkpoint, and whether the run that wrote it has come to its end.

    Raises:
        CheckpointError: If the checkpoint is not sound or lacks its training state; it lists every problem.
        UsageError: If settings differ; it lists them.
    """
    checkpoint = _open(folder, weights_only)
    fixed = fixed_differences(checkpoint, model)
    if weights_only:
        _refuse(folder, {}, fixed, accept_changes)
        return checkpoint, False
    training_state.check_complete(folder)
    state = training_state.read_trainer_state(folder)
    processes = len(training_state.rng_files(folder))
    if processes != run["processes"]:
        raise UsageError(
            f"{folder} was written by {processes} process(es), this run has {run['processes']}; start as many, or "
            f"{moments.REMEDY}"
        )
    changed = differences(training_state.run_settings(state), run)
    _refuse(folder, changed, fixed, accept_changes)
    states = checkpoint.config.states
    ended = MATURE in states and IMMATURE not in states
    return checkpoint, ended and not changed and state["global_step"] > 0


def fixed_differences(checkpoint: SoundCheckpoint, model: Mixture) -> dict[str, str]:
    """Return a line for each setting in which a mixture has other experts than a checkpoint, by name."""
    there, here = checkpoint.config.experts, describe_mixture(model).experts
    lines = {}
    if len(there) != len(here):
        lines["experts"] = f"experts: {len(there)} there, {len(here)} here"
    for name, key in FIXED_BY_CHECKPOINT.items():
        pairs = [(getattr(a, key), getattr(b, key)) for a, b in zip(there, here, strict=False)]
        for a, b in [pair for pair in pairs if pair[0] != pair[1]][:1]:
            lines[name] = f"{name}: {a!r} there, {b!r} here"
    return lines


def _refuse(folder: Path, changed: dict[str, str], fixed: dict[str, str], accept_changes: bool) -> None:
    """Raise UsageError if a run has changes that were not accepted, or that cannot be."""
    shown = fixed if accept_changes else changed | fixed
    if not shown:
        return
    remedy = "start it with that run's settings and data"
    if fixed:
        remedy += (
            f", or start another run in another folder: {', '.join(sorted(fixed))} cannot change, since the experts "
            "of a checkpoint keep their number and their shapes. --grow adds experts for new data"
        )
    else:
        remedy += ", or accept the changes with --accept-changes"
    lines = listed([shown[name] for name in sorted(shown)])
    raise UsageError(f"this would not be the run that wrote {folder}:\n{lines}\n{remedy[0].upper()}{remedy[1:]}")


def _open(folder: Path, weights_only: bool) -> SoundCheckpoint:
    try:
        return open_checkpoint(folder, weights_only=weights_only)
    except CheckpointError as error:
        if not all(formats.is_training_file(problem.partition(": ")[0]) for problem in error.problems):
            raise
        raise CheckpointError(folder, [f"{problem}; {moments.REMEDY}" for problem in error.problems]) from None
