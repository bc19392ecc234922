"""How a run ended, and the lines that tell the user what it trains and how it ended."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch

from ..checkpoint.tensors import dtype_name
from ..data.blocks import SourceStats, TokenBlocks
from ..mixture.model import Mixture
from ..mixture.targets import comma_separated
from . import ranks
from .resume import Start
from .settings import TrainSettings
from .trainer import MoETrainer

SHOWN_EXPERTS = 8  # columns of the table


@dataclass(frozen=True)
class HeldOut:
    """What a run has made of the held-out blocks of one data set. Losses are in nats per token."""

    name: str
    before: float | None  # loss at the start of the run, where it is known
    after: float  # loss at the end
    shares: list[float]  # of the tokens, by expert, at the end


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    step: int
    saved: Path | None  # the newest checkpoint
    stopped_by: signal.Signals | None = None  # what stopped it before its end
    nothing_left: bool = False  # whether the run that was to be resumed had come to its end already
    held_out: list[HeldOut] = field(default_factory=list)  # empty for a run that a signal stopped


# ---- the beginning ----


def describe_run(model: Mixture, blocks: TokenBlocks) -> list[str]:
    """Return the lines that say what is about to be trained, and on what."""
    counts = model.parameter_counts()
    trained = counts["experts"] + counts["router"]
    targets = sorted(model.expert_configs[0].target_modules or ())
    lines = [
        f"base: {model.base.config._name_or_path} ({counts['base']:,} parameters, {dtype_name(model)}, frozen)",
        f"experts: {model.num_experts} on {', '.join(targets)} "
        f"({trained:,} parameters trained, {100 * trained / counts['base']:.2f} % of the base)",
    ]
    for source in blocks.sources:
        held_out = f"{source.held_out_documents:,} documents" if source.held_out_documents else "its last tokens"
        held_out += f" ({source.eval_blocks:,} blocks)"
        skipped = f", {source.skipped_rows:,} rows skipped" if source.skipped_rows else ""
        skipped += f", {source.skipped_files:,} files left out" if source.skipped_files else ""
        lines.append(
            f"data: {source.name}: {source.documents:,} documents ({source.schema}{skipped}), {source.blocks:,} blocks "
            f"of {blocks.block_size} tokens, {source.sampled_blocks:,} drawn per epoch; held out: {held_out}"
        )
        lines += [f"data: {source.name}: {note}" for note in _not_learned(source)]
    if model.base.dtype == torch.float16:
        lines.append("float16: small gradients become zero; with bfloat16 or float32 they do not")
    return lines


def _not_learned(source: SourceStats) -> Iterator[str]:
    """Say which parts of a data set are not learned, where a user could think that they are."""
    if source.unused_columns:
        yield f"columns that are not used: {comma_separated(list(source.unused_columns))}"
    if source.unread:
        yield f"in its chats, nothing reads: {comma_separated(list(source.unread))}"
    if source.unlabelled_turns:
        yield (
            f"{source.unlabelled_turns:,} answers are not learned: the chat template writes them otherwise once the "
            "chat goes on"
        )
    if source.dropped_tokens and source.schema == "text":
        yield f"{source.dropped_tokens:,} of {source.tokens:,} tokens are left out: each is alone in its block"
    elif source.dropped_tokens:
        yield (
            f"{source.dropped_tokens:,} of {source.tokens:,} tokens lie in blocks without an answer, and are left out; "
            "a larger --block-size cuts fewer prompts from their answers"
        )
    if source.withheld_documents:
        yield f"{source.withheld_documents:,} documents are not trained on: another data set holds them out"


def resuming_line(start: Start) -> str:
    if not start.weights_only:
        return f"resuming from {start.folder}"
    return f"experts and router from {start.folder}; all else fresh, from step {start.step}"


# ---- the end ----


def held_out_results(trainer: MoETrainer) -> list[HeldOut]:
    """Evaluate every data set. Every rank calls this."""
    metrics = trainer.evaluate(metric_key_prefix="final")
    before = trainer.state.log_history[0] if trainer.state.log_history else {}  # see eval_on_start
    found = []
    for name in cast(dict[str, Any], trainer.eval_dataset):
        usage = trainer.usage_by_data.get(name)
        shares = usage.shares() if usage else [1.0]
        found.append(HeldOut(name, before.get(f"eval_{name}_loss"), metrics[f"final_{name}_loss"], shares))
    return found


def closing_lines(settings: TrainSettings, result: RunResult, argv: Sequence[str]) -> list[str]:
    """Return the last lines of a run that was started by the command line `argv`."""
    if result.stopped_by is not None:
        return [
            f"stopped by {result.stopped_by.name} at step {result.step}; saved {result.saved}",
            f"go on with: {resume_command(argv)}",
        ]
    ended = f"{result.saved} is the last checkpoint of a run that has ended: there is nothing left to train"
    steps, epochs = settings.max_steps, settings.epochs or 1
    longer = f"--max-steps {2 * steps}" if steps else f"--epochs {2 * epochs:g}"
    return [
        *([ended] if result.nothing_left else []),
        "",
        *held_out_table(result.held_out),
        "",
        f"saved {result.saved}",
        f"validate it: python test_checkpoint_save_load.py --checkpoint {result.saved}",
        f"train on: {resume_command(argv)} {longer} --accept-changes",
    ]


def resume_command(argv: Sequence[str]) -> str:
    """Return the command line that resumes a run: its own, with --resume.

    What launched several processes, torchrun or accelerate, cannot be told from inside them.
    """
    words = [word for word in argv if not word.startswith("--resume=")]
    if "--resume" in words:
        at = words.index("--resume")
        has_value = at + 1 < len(words) and not words[at + 1].startswith("--")
        del words[at : at + 1 + has_value]
    words = [word for word in words if word.replace("_", "-") != "--resume-weights-only"]
    launcher = "python" if ranks.world()[1] == 1 else "<launcher>"
    return f"{launcher} {shlex.join(['train.py', *words, '--resume'])}"


def held_out_table(results: list[HeldOut]) -> list[str]:
    """Return a row for each data set: the loss before and after, and the share of its tokens that each expert got."""
    experts = max(len(result.shares) for result in results)
    columns = min(experts, SHOWN_EXPERTS)
    width = max(len(name) for name in ("data set", *(result.name for result in results)))
    titles = "  ".join(f"{f'expert_{i}':>9}" for i in range(columns))
    lines = [f"{'data set':<{width}}  {'at the start':>12}  {'held-out loss':>13}  {titles}"]
    for result in results:
        cells = "  ".join(f"{100 * share:>7.1f} %" for share in result.shares[:columns])
        before = "-" if result.before is None else f"{result.before:.4f}"
        lines.append(f"{result.name:<{width}}  {before:>12}  {result.after:>13.4f}  {cells}")
    if experts > columns:
        lines.append(f"... and {experts - columns} more experts")
    return lines
