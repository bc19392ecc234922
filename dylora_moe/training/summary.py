"""What a run says of itself: what it trains on what, and how it ended."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..checkpoint.probe import dtype_name
from ..data.blocks import SourceStats, TokenBlocks
from ..mixture.model import Mixture
from ..mixture.targets import comma_separated
from ..system import command_line
from . import ranks, resume
from .trainer import MoETrainer

SHOWN_EXPERTS = 8  # columns of the table


def describe_run(model: Mixture, blocks: TokenBlocks) -> list[str]:
    """What is about to be trained, on what."""
    counts = model.parameter_counts()
    trained = counts["experts"] + counts["router"]
    targets = sorted(model.expert_configs[0].target_modules)
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
    """What of a data set is not learned, though it could be thought so."""
    if source.unused_columns:
        yield f"columns that are not used: {comma_separated(list(source.unused_columns))}"
    if source.unlabelled_turns:
        yield (
            f"{source.unlabelled_turns:,} answers are not learned: the chat template writes them otherwise once the "
            "chat goes on"
        )
    if source.dropped_tokens:
        yield (
            f"{source.dropped_tokens:,} of {source.tokens:,} tokens lie in blocks without an answer, and are left out; "
            "a larger --block-size cuts fewer prompts from their answers"
        )
    if source.withheld_documents:
        yield f"{source.withheld_documents:,} documents are not trained on: another data set holds them out"


def resuming_line(start: resume.Start) -> str:
    if not start.weights_only:
        return f"resuming from {start.folder}"
    return f"experts and router from {start.folder}; all else fresh, from step {start.step}"


# ---- the end ----


def interrupted_lines(received: signal.Signals, step: int, saved: Path, say: Callable[[str], None]) -> int:
    say(f"stopped by {received.name} at step {step}; saved {saved}")
    say(f"go on with: {resume_command()}")
    return command_line.INTERRUPTED if received is signal.SIGINT else command_line.TERMINATED


def closing_lines(args, trainer: MoETrainer, saved: Path, say: Callable[[str], None]) -> None:
    """The closing lines of a run that has come to its end."""
    metrics = trainer.evaluate(metric_key_prefix="final")
    for line in ["", *final_table(trainer, metrics), ""]:
        say(line)
    say(f"saved {saved}")
    say(f"validate it: python test_checkpoint_save_load.py --checkpoint {saved}")
    longer = f"--max-steps {2 * args.max_steps}" if args.max_steps else f"--epochs {2 * (args.epochs or 1):g}"
    say(f"train on: {resume_command()} {longer} --accept-changes")


def resume_command(argv: list[str] | None = None) -> str:
    """The command line that goes on with this run: the same, with --resume. What launches several processes, torchrun
    or accelerate, cannot be told from inside."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("--resume=")]
    if "--resume" in words:
        at = words.index("--resume")
        has_value = at + 1 < len(words) and not words[at + 1].startswith("--")
        del words[at : at + 1 + has_value]
    words = [word for word in words if word.replace("_", "-") != "--resume-weights-only"]
    launcher = "python" if ranks.world()[1] == 1 else "<launcher>"
    return f"{launcher} {shlex.join(['train.py', *words, '--resume'])}"


def final_table(trainer: MoETrainer, metrics: dict) -> list[str]:
    """Loss per data set, before and after, and how its tokens were routed."""
    experts = trainer.mixture.num_experts
    before = trainer.state.log_history[0] if trainer.state.log_history else {}  # see eval_on_start
    columns = min(experts, SHOWN_EXPERTS)
    width = max([len("data set"), *(len(name) for name in trainer.eval_dataset)])
    titles = "  ".join(f"{f'expert_{i}':>9}" for i in range(columns))
    lines = [f"{'data set':<{width}}  {'at the start':>12}  {'held-out loss':>13}  {titles}"]
    for name in trainer.eval_dataset:
        usage = trainer.usage_by_data.get(name)
        shares = usage.shares() if usage else [1.0]
        cells = "  ".join(f"{100 * share:>7.1f} %" for share in shares[:columns])
        start = f"{before[key]:.4f}" if (key := f"eval_{name}_loss") in before else "-"
        lines.append(f"{name:<{width}}  {start:>12}  {metrics[f'final_{name}_loss']:>13.4f}  {cells}")
    if experts > columns:
        lines.append(f"... and {experts - columns} more experts")
    return lines
