"""A training run, from its settings to its last checkpoint. It prints nothing: lines for the user go through `say`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from ..base.tiny import write_tiny_base
from ..data.python_texts import python_help, python_sources
from ..distributed import ranks, sharding
from ..errors import UsageError
from ..stages.batches import BlockCollator
from ..stages.plan import Plan, PlannedBlocks
from ..stages.setup import stage_lines, trained_blocks
from ..store import run_folder
from ..store.claim import Claim, claimed
from ..store.files import remove
from ..store.whole_files import Made, publish_written, same_content
from ..system import interrupts, machine
from . import training_state
from .arguments import training_arguments
from .callbacks import EarlyStopping, StopSignals
from .checkpoint_callback import PeftCheckpointCallback
from .outcome import Outcome, check_folder, read_earlier, set_losses
from .prepare import Prepared, prepare, run_steps
from .resume import Start, choose, choose_growth
from .settings import TrainSettings
from .summary import RunResult, describe_run, held_out_results, resuming_line
from .trainer import MoETrainer


def execute(settings: TrainSettings, say: Callable[[str], None], warn: Callable[[str], None]) -> RunResult:
    """Train until the end or a signal. With several processes, each of them calls this.

    Args:
        say: Takes lines for the user; called on every rank.
        warn: Takes the line that answers a signal; called on every rank, by the signal handler.

    Raises:
        DyLoRAMoEError: For every cause that the user can mend.
    """
    with sharding.requested() as how:
        arguments = training_arguments(settings)
        _ = arguments.world_size  # joins the processes of torchrun
        settings = resuming_after_restart(settings, say)
        run_dir = Path(settings.output_dir)
        with claimed_on_first(run_dir) as claim:
            start = ranks.on_first(lambda: _choose(run_dir, settings))
            ranks.on_first(lambda: check_folder(run_dir))
            for line in start.lines:
                say(line)
            if settings.demo:
                ranks.on_first(lambda: claim.made.extend(write_demo(settings)))
                settings = with_demo(settings)
            say(f"loading {settings.model or start.folder if settings.grow else settings.base_model}")
            # A base that is to be sharded is read into the memory of the CPU first.
            run = prepare(settings, start, torch.device("cpu") if how else arguments.device)
            earlier = ranks.on_first(lambda: read_earlier(run, start, settings.from_))
            described = [*describe_run(run.model, run.blocks), *stage_lines(run.stage, run.blocks)]
            for line in [*earlier.lines, *run.model.notes, *described]:
                say(line)
            if not run.stage.trained:
                return RunResult(start.step, start.folder, nothing_new=True)
            if how is not None:
                say(sharding.shard(run.model, arguments.device, how))
            patience = settings.early_stopping
            early = EarlyStopping(patience, run.stage.branch_step or 0) if patience else None
            stop = StopSignals(warn, early)
            losses: dict[str, float] = {}
            saver = PeftCheckpointCallback(
                run.skills, run.compared, stop.ended_early, at_end=lambda: losses.update(set_losses(trainer, run, stop))
            )
            arguments.eval_on_start = not run.resumes  # the loss that the experts start from
            trainer = make_trainer(settings, arguments, run, [early, saver, stop])
            if run.ended and start.folder:
                state = training_state.read_trainer_state(start.folder)
                trainer.state.global_step = state["global_step"]
                trainer.state.log_history = state.get("log_history") or []
            else:
                for line in ranks.on_first(lambda: save_tokenizer(run.tokenizer, run_dir, start, claim)):
                    say(line)
                if start.folder:
                    say(resuming_line(start))
                train(trainer, str(start.folder) if run.resumes else None, stop, claim)
            newest = run_folder.latest(run_dir)
            saved = newest.path if newest else start.folder
            with measuring(saved, say):
                held_out = [] if stop.received else held_out_results(trainer)
                result = RunResult(trainer.state.global_step, saved, stop.received, run.ended, held_out=held_out)
                Outcome(run_dir, run, trainer, result, earlier, losses).leave()
            return result


def _choose(run_dir: Path, settings: TrainSettings) -> Start:
    if settings.grow:
        return choose_growth(run_dir, settings.from_, settings.resume, settings.data)
    return choose(run_dir, settings.resume, settings.resume_weights_only)


@contextmanager
def measuring(saved: Path | None, say: Callable[[str], None]) -> Iterator[None]:
    """Say what is missing if the block is interrupted: the checkpoint is there already."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"saved {saved}; its results are not complete: the same command with --resume measures them")
        raise


# ---- a restart ----


def resuming_after_restart(settings: TrainSettings, say: Callable[[str], None]) -> TrainSettings:
    """Return the settings, with --resume if torchrun has restarted the processes because one of them had failed.

    What the first start was to resume from is left alone until the run has saved a checkpoint of its own.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    run_dir = Path(settings.output_dir)
    if restarts == "0" or (settings.resume is not None and not run_folder.checkpoints(str(run_dir))):
        return settings
    say(f"restarted by torchrun (restart {restarts}): resuming from the newest checkpoint of {run_dir}")
    weights_only = settings.resume_weights_only and not _has_saved(run_dir, str(settings.resume))
    return replace(settings, resume="auto", resume_weights_only=weights_only)


def _has_saved(run_dir: Path, resumed: str) -> bool:
    """Tell whether a run that took only the weights of a checkpoint has saved one of its own."""
    newest = run_folder.latest(run_dir)
    if newest is None:
        return False
    if resumed != "auto":
        return newest.path.resolve() != Path(resumed).resolve()
    stage = training_state.run_settings(training_state.read_trainer_state(newest.path)).get("stage")
    return isinstance(stage, dict) and stage.get("first_step") not in (None, 0)


# ---- the run folder ----


@contextmanager
def claimed_on_first(run_dir: Path) -> Iterator[Claim]:
    """Make the run folder, and hold the lock of its only writer. Every rank enters this; the first one does it.

    At the end, what was made is removed again unless the claim is kept, because there is a checkpoint.

    Raises:
        UsageError: If the folder cannot be made or written to, or another process writes there.
    """
    with ExitStack() as stack:
        claim = Claim()
        with ranks.together():
            if ranks.is_first():
                if run_dir.exists() and not run_dir.is_dir():
                    raise UsageError(f"--output-dir {run_dir}: expected a folder, found a file")
                claim = stack.enter_context(claimed(run_dir))
                run_folder.check_writable(run_dir)
        yield claim


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, run_dir: Path, start: Start, claim: Claim) -> list[str]:
    """Save the tokenizer into the run folder. A run that goes on there keeps the files that it finds.

    Returns:
        A line for the user if one of those differs from what would have been saved.
    """
    goes_on = start.folder is not None and start.folder.resolve().parent == run_dir.resolve()
    kept: list[str] = []

    def write(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        for path in sorted(folder.iterdir()) if goes_on else ():
            there = run_dir / path.name
            if os.path.lexists(there) and not same_content(path, there):
                kept.append(path.name)
                remove(path)

    claim.made += publish_written(run_dir, write)
    return [f"kept in {run_dir}, which differ from the base model's: {', '.join(kept)}"] if kept else []


# ---- the demo ----

DEMO_BASE = "base"
DEMO_TEXTS: dict[str, Callable[[], list[str]]] = {
    "code.jsonl": lambda: python_sources(max_bytes=400_000),
    "prose.jsonl": python_help,
}


def with_demo(settings: TrainSettings) -> TrainSettings:
    """Return the settings with the base model and the texts of the demo, where none are given."""
    folder = Path(settings.output_dir)
    if settings.model is None:
        settings = replace(settings, model=str(folder / DEMO_BASE), weights="pretrained")
    return replace(settings, data=settings.data or tuple(str(folder / name) for name in DEMO_TEXTS))


def write_demo(settings: TrainSettings) -> list[Made]:
    """Write the base model and the texts of the demo, except for what is given or in the run folder already."""
    run_dir = Path(settings.output_dir)

    def write(folder: Path) -> None:
        if settings.model is None and not (run_dir / DEMO_BASE).is_dir():
            write_tiny_base(folder / DEMO_BASE)
        for name, texts in () if settings.data else DEMO_TEXTS.items():
            if not (run_dir / name).exists():
                lines = [json.dumps({"text": text}) + "\n" for text in texts()]
                (folder / name).write_text("".join(lines), encoding="utf-8")

    return publish_written(run_dir, write)


# ---- training ----

ORDER_BYTES = 60  # for each block that a run draws, most of them while the order is made


def make_trainer(
    settings: TrainSettings,
    arguments: TrainingArguments,
    run: Prepared,
    callbacks: Sequence[TrainerCallback | None],
) -> MoETrainer:
    train: Any = run.blocks.train
    if settings.route == "specialised":
        train, experts = trained_blocks(run.blocks, run.stage)
        last_step = run_steps(settings, len(train)) + (run.stage.first_step if run.stage.grows else 0)
        plan = Plan(run.stage.first_step, run.stage.branch_step, last_step, experts)
        micro_batches = settings.grad_accum * ranks.world()[1]
        blocks = last_step * settings.batch_size * micro_batches
        machine.need_memory(ORDER_BYTES * blocks, f"the order of the blocks in {last_step:,} steps (--max-steps)")
        train = PlannedBlocks(train, plan, settings.batch_size, micro_batches, settings.seed)
        arguments.max_steps = last_step
    return MoETrainer(
        model=run.model,
        args=arguments,
        train_dataset=train,
        eval_dataset=run.blocks.evaluation,
        data_collator=BlockCollator(),
        callbacks=[callback for callback in callbacks if callback is not None],
        start_step=0 if run.resumes else run.stage.first_step,
    )


def train(trainer: MoETrainer, resumed: str | None, stop: StopSignals, claim: Claim) -> None:
    """Train, and keep the run folder from then on if there is a checkpoint in it."""
    interrupts.check()  # a library may have swallowed a signal while it was reading
    try:
        with stop:
            trainer.train(resumed)
    finally:
        if run_folder.checkpoints(str(trainer.args.output_dir)):
            claim.keep()
