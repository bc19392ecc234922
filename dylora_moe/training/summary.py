"""How a run ended, and the lines that tell the user what it trains and how it ended."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import torch

from ..checkpoint.tensors import dtype_name
from ..data.blocks import SourceStats, TokenBlocks
from ..distributed import ranks
from ..errors import counted
from ..mixture.model import Mixture
from ..mixture.targets import comma_separated
from ..system.settings import spelled
from .resume import Start
from .settings import TrainSettings
from .trainer import MoETrainer

SHOWN_EXPERTS = 8  # columns of the table
# What a command that goes on with a run does not take over: how this one began.
LEFT_OUT = ("accept_changes", "resume", "resume_weights_only")


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
    nothing_new: bool = False  # whether all data were known already, so that nothing was trained
    held_out: list[HeldOut] = field(default_factory=list)  # empty for a run that a signal stopped


# ---- the beginning ----


def describe_run(model: Mixture, blocks: TokenBlocks) -> list[str]:
    """Return the lines that say what is about to be trained, and on what."""
    counts = model.parameter_counts()
    trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
    targets = sorted(model.expert_configs[0].target_modules or ())
    lines = [
        f"base: {model.base.config._name_or_path} ({counts['base']:,} parameters, {dtype_name(model)}, frozen)",
        f"experts: {model.num_experts} on {', '.join(targets)} "
        f"({trained:,} parameters trained, {100 * trained / counts['base']:.2f} % of the base)",
    ]
    for source in blocks.sources:
        lines.append(_data_line(source, blocks.block_size))
        lines += [f"data: {source.name}: {note}" for note in _not_learned(source)]
    if blocks.evaluation.keys() != {source.name for source in blocks.sources if source.eval_blocks}:
        lines += [f"evaluation: {name}: {counted(len(rows), 'block')}" for name, rows in blocks.evaluation.items()]
    if model.base.dtype == torch.float16:
        lines.append("float16: small gradients become zero; with bfloat16 or float32 they do not")
    return lines


def _data_line(source: SourceStats, block_size: int) -> str:
    left_out = [(source.skipped_rows, "row", "skipped"), (source.skipped_files, "file", "left out")]
    notes = [source.schema, *(f"{counted(number, what)} {how}" for number, what, how in left_out if number)]
    drawn = f"{source.sampled_blocks:,} drawn per epoch"
    if source.sampled_blocks > source.blocks:
        drawn += f" ({source.sampled_blocks / source.blocks:.1f} times each)"
    held_out = "nothing"
    if source.eval_blocks:
        held_out = counted(source.held_out_documents, "document") if source.held_out_documents else "its last tokens"
        held_out += f" ({counted(source.eval_blocks, 'block')})"
    return (
        f"data: {source.name}: {counted(source.documents, 'document')} ({', '.join(notes)}), "
        f"{counted(source.blocks, 'block')} of {block_size} tokens, {drawn}; held out: {held_out}"
    )


def _not_learned(source: SourceStats) -> Iterator[str]:
    """Say which parts of a data set are not learned, where a user could think that they are."""
    if source.unused_columns:
        yield f"columns that are not used: {comma_separated(list(source.unused_columns))}"
    if source.unread:
        yield f"in its chats, nothing reads: {comma_separated(list(source.unread))}"
    if source.unlabelled_turns:
        yield (
            f"{counted(source.unlabelled_turns, 'answer')} not learned: the chat template writes answers otherwise "
            "once the chat goes on"
        )
    if source.dropped_tokens and source.schema == "text":
        yield f"{source.dropped_tokens:,} of {source.tokens:,} tokens are left out: each is alone in its block"
    elif source.dropped_tokens:
        yield (
            f"{source.dropped_tokens:,} of {source.tokens:,} tokens lie in blocks without an answer, and are left out; "
            "a larger --block-size cuts fewer prompts from their answers"
        )
    if source.withheld_documents:
        yield f"{counted(source.withheld_documents, 'document')} not trained on: held out or evaluated elsewhere"


def resuming_line(start: Start) -> str:
    if start.grows:
        return f"growing from {start.folder}"
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
    if result.nothing_new:
        return [
            "nothing was trained: all of it is known already",
            f"train the experts that have it further: {resume_command(argv, '--update', resume=False)}",
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
        f"read about it: {result.saved.parent / 'report.html' if result.saved else ''}",
        f"validate it: {shlex.join(['python', 'test_checkpoint_save_load.py', '--checkpoint', str(result.saved)])}",
        f"train on: {resume_command(argv, longer, '--accept-changes')}",
    ]


def resume_command(argv: Sequence[str], *more: str, resume: bool = True) -> str:
    """Return the command line that resumes a run: its own, with --resume and `more`, each flag once, no secret.

    What launched several processes, torchrun or accelerate, cannot be told from inside them.
    """
    settings = {spelled(each.name): each for each in fields(TrainSettings)}
    repeatable = {name for name, each in settings.items() if each.metadata["options"].get("action") == "append"}
    replaced = {name for name, each in settings.items() if each.name in LEFT_OUT or each.metadata["secret"]}
    replaced |= {word.split(" ")[0] for word in more}
    flags = _by_flag(argv)
    kept = [
        words
        for place, (name, words) in enumerate(flags)
        if name not in replaced and (name in repeatable or name not in [later for later, _ in flags[place + 1 :]])
    ]
    launcher = "python" if ranks.world()[1] == 1 else "<launcher>"
    words = [word for group in kept for word in group]
    return " ".join([launcher, shlex.join(["train.py", *words, *(["--resume"] if resume else [])]), *more])


def _by_flag(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Divide a command line into flags, as they are spelled in --help, each with its words."""
    groups: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--"):
            groups.append((word.partition("=")[0].replace("_", "-"), [word]))
        elif groups:
            groups[-1][1].append(word)
    return groups


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
