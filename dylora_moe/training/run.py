"""A training run, from its settings to its last checkpoint. It prints nothing: lines for the user go through `say`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from ..base.find import find_base
from ..base.load import load_base, load_tokenizer
from ..base.preserve import seeded
from ..base.tiny import write_tiny_base
from ..checkpoint.read import load_into, read_skills
from ..data.blocks import TokenBlocks, load_blocks
from ..data.python_texts import python_help, python_sources
from ..data.sources import DataSpec
from ..errors import UsageError
from ..mixture.config import MoELoraConfig, RouterConfig
from ..mixture.model import Mixture
from ..skills.features import collect
from ..skills.library import Skill, SkillLibrary
from ..skills.sizes import NAME_BYTES, SampleSizes
from ..store import run_folder
from ..store.claim import Claim
from ..store.claim import claimed as claimed_by_one
from ..store.files import remove
from ..store.whole_files import Made, publish_written, same_content
from ..system import interrupts, machine
from . import ranks, sharding, training_state
from .arguments import training_arguments
from .batches import BlockCollator, known_tokens, why_not_packed
from .callbacks import EarlyStopping, StopSignals
from .checkpoint_callback import PeftCheckpointCallback
from .resume import Start, check, choose, compared_settings
from .settings import TrainSettings
from .summary import RunResult, check_results, describe_run, held_out_results, resuming_line, save_results
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
        with claimed(run_dir) as claim:
            start = ranks.on_first(lambda: choose(run_dir, settings.resume, settings.resume_weights_only))
            ranks.on_first(lambda: check_results(run_dir))
            for line in start.lines:
                say(line)
            if settings.demo:
                ranks.on_first(lambda: claim.made.extend(write_demo(settings)))
                settings = with_demo(settings)
            say(f"loading {settings.base_model}")
            with ranks.together():
                # A base that is to be sharded is read into the memory of the CPU first.
                model, tokenizer = load_model(settings, torch.device("cpu") if how else arguments.device)
                blocks = load_data(settings, model, tokenizer)
            for line in [*model.notes, *describe_run(model, blocks)]:
                say(line)
            compared = compared_settings(settings, model, blocks)
            skills, ended = take_over(start, compared, model, settings.accept_changes)
            if how is not None:
                say(sharding.shard(model, arguments.device, how))
            add_skills(skills, model, blocks)
            early = EarlyStopping(early_stopping_patience=settings.early_stopping) if settings.early_stopping else None
            stop = StopSignals(warn, early)
            saver = PeftCheckpointCallback(skills, compared, interrupted=stop.ended_early)
            arguments.eval_on_start = not start.folder or start.weights_only  # the loss that the experts start from
            trainer = make_trainer(model, arguments, blocks, [early, saver, stop], start.step)
            if start.folder and ended:
                state = training_state.read_trainer_state(start.folder)
                trainer.state.global_step = state["global_step"]
                trainer.state.log_history = state.get("log_history") or []
            else:
                for line in ranks.on_first(lambda: save_tokenizer(tokenizer, run_dir, start, claim)):
                    say(line)
                if start.folder:
                    say(resuming_line(start))
                train(trainer, start, stop, claim)
            newest = run_folder.latest(run_dir)
            saved = newest.path if newest else start.folder
            held_out = [] if stop.received else held_out_results(trainer)
            result = RunResult(trainer.state.global_step, saved, stop.received, ended, held_out)
            ranks.on_first(lambda: save_results(run_dir, result, model, blocks))
            return result


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
    return replace(settings, resume="auto")


# ---- the run folder ----


@contextmanager
def claimed(run_dir: Path) -> Iterator[Claim]:
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
                claim = stack.enter_context(claimed_by_one(run_dir))
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


# ---- what is trained, on what ----


def load_model(settings: TrainSettings, device: torch.device) -> tuple[Mixture, PreTrainedTokenizerBase]:
    """Return the mixture with fresh experts, and the tokenizer of its base model."""
    source, weights = find_base(settings.base_model, weights=settings.weights, token=settings.hf_token)
    tokenizer = load_tokenizer(source, token=settings.hf_token)
    base = load_base(source, weights, dtype=settings.dtype, device=str(device), seed=settings.seed)
    targets = None if settings.targets is None else list(settings.targets)
    lora = MoELoraConfig(
        r=settings.lora_r,
        lora_alpha=cast(int, settings.lora_alpha),  # PEFT computes with a float as well
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )
    router = RouterConfig(settings.temperature, settings.top_k, settings.balance_coefficient)
    with seeded(settings.seed):
        model = Mixture(base, settings.experts, lora=lora, router=router, label_smoothing=settings.label_smoothing)
    model.base_revision = source.revision
    if source.note:
        model.notes.append(source.note)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    counts = model.parameter_counts()
    # Each parameter has its value and two moments, in float32.
    machine.need_disk(12 * (counts["experts"] + counts["router"]), settings.output_dir, "one checkpoint")
    return model, tokenizer


def load_data(settings: TrainSettings, model: Mixture, tokenizer: PreTrainedTokenizerBase) -> TokenBlocks:
    """Return the token blocks of --data. If they are not packed, the model gets a note that says why.

    Raises:
        UsageError: If the data cannot be read, or the model does not take it.
    """
    most = getattr(model.base.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and settings.block_size > most:
        raise UsageError(
            f"--block-size {settings.block_size}: the base model has {most} positions; use at most that many"
        )
    why_not = why_not_packed(model.base)
    blocks = load_blocks(
        [DataSpec.parse(text) for text in settings.data],
        tokenizer,
        block_size=settings.block_size,
        seed=settings.seed,
        packed=why_not is None,
        vocabulary=known_tokens(model.base),
        mixing=settings.mixing,
        eval_specs=[DataSpec.parse(text) for text in settings.eval_data],
        eval_fraction=settings.eval_fraction,
        max_eval_blocks=settings.eval_blocks,
        token=settings.hf_token,
    )
    if why_not is not None:
        model.notes.append(
            f"{why_not}: each document has a block of its own, and {100 * blocks.padding_share:.0f} % of the blocks is "
            "padding"
        )
    return blocks


def add_skills(skills: SkillLibrary, model: Mixture, blocks: TokenBlocks) -> None:
    """Add a skill for each data set that has none yet."""
    for name, rows in blocks.examples.items():
        short = name.encode()[:NAME_BYTES].decode(errors="ignore")
        if short not in skills:
            found = collect(model, rows.select(range(min(4, len(rows)))), SampleSizes(64, 16))
            skills.add(Skill(short, tokens=found.tokens, features=found.features, states=found.states))


# ---- training ----


def make_trainer(
    model: Mixture,
    arguments: TrainingArguments,
    blocks: TokenBlocks,
    callbacks: Sequence[TrainerCallback | None],
    start_step: int,
) -> MoETrainer:
    return MoETrainer(
        model=model,
        args=arguments,
        train_dataset=blocks.train,
        eval_dataset=blocks.evaluation,
        data_collator=BlockCollator(),
        callbacks=[callback for callback in callbacks if callback is not None],
        start_step=start_step,
    )


def take_over(
    start: Start, compared: dict[str, Any], model: Mixture, accept_changes: bool
) -> tuple[SkillLibrary, bool]:
    """Check the checkpoint to go on from, and read from it what the Trainer does not read.

    Returns:
        Its skill library, and whether the run that wrote it came to its end, so that nothing is left to train.
    """
    with ranks.together():
        if start.folder is None:
            return SkillLibrary(), False
        checkpoint, ended = check(start.folder, compared, model, start.weights_only, accept_changes=accept_changes)
        if start.weights_only or ended:
            load_into(checkpoint, model)
        return read_skills(checkpoint), ended


def train(trainer: MoETrainer, start: Start, stop: StopSignals, claim: Claim) -> None:
    """Train, and keep the run folder from then on if there is a checkpoint in it."""
    resumed = None if start.folder is None or start.weights_only else str(start.folder)
    interrupts.check()  # a library may have swallowed a signal while it was reading
    try:
        with stop:
            trainer.train(resumed)
    finally:
        if run_folder.checkpoints(str(trainer.args.output_dir)):
            claim.keep()
