"""A training run, from its settings to its last checkpoint. It prints nothing: lines for the user go through `say`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments

from ..base.find import find_base
from ..base.load import load_base, load_tokenizer, resolve_device
from ..base.preserve import seeded
from ..checkpoint.read import load_into, read_skills
from ..data.blocks import TokenBlocks, load_blocks
from ..data.sources import DataSpec
from ..errors import UsageError
from ..mixture.config import MoELoraConfig, RouterConfig
from ..mixture.model import Mixture
from ..skills.library import NAME_BYTES, SkillLibrary
from ..skills.novelty import NoveltyDetector
from ..store import run_folder
from ..store.lock import LOCK, writer_lock
from ..system import machine
from . import demo, ranks, sharding, training_state
from .batches import BlockCollator, check_documents_apart
from .callbacks import EarlyStopping, StopSignals
from .checkpoint_callback import PeftCheckpointCallback
from .resume import Start, check, choose, compared_settings
from .settings import TrainSettings
from .summary import RunResult, describe_run, held_out_results, resuming_line
from .trainer import MoETrainer


@dataclass(frozen=True)
class Material:
    """What is trained, and on what."""

    model: Mixture
    tokenizer: PreTrainedTokenizerBase
    blocks: TokenBlocks


@dataclass(frozen=True)
class Beginning:
    """Where training begins, once the checkpoint to go on from has been read.

    Args:
        start: The checkpoint, and what is taken from it.
        ended: Whether the run that wrote it came to its end, so that there is nothing left to train.
        compared: What a resumed run must have in common with this one; trainer_state.json keeps it.
        skills: The skill library of the checkpoint, or an empty one.
    """

    start: Start
    ended: bool
    compared: dict[str, Any]
    skills: SkillLibrary


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
        run_dir = Path(settings.output_dir)
        with claimed(run_dir) as claim:
            start = choose_start(settings)
            for line in start.lines:
                say(line)
            if settings.demo:
                settings = write_demo(settings)
            material = load(settings, torch.device("cpu") if how else arguments.device)  # a part of it moves later
            for line in [*material.model.notes, *describe_run(material.model, material.blocks)]:
                say(line)
            beginning = begin(settings, material, start)
            if how is not None:
                say(sharding.shard(material.model, arguments.device, how))
            early = EarlyStopping(early_stopping_patience=settings.early_stopping) if settings.early_stopping else None
            stop = StopSignals(warn, early)
            trainer = make_trainer(arguments, material, beginning, stop)
            if not beginning.ended:
                if ranks.is_first():
                    claim.callback(_remove_files, _save_tokenizer(material.tokenizer, run_dir))
                if start.folder:
                    say(resuming_line(start))
                train(trainer, start, stop, claim)
            return result_of(trainer, beginning, stop)


# ---- the run folder ----


@contextmanager
def claimed(run_dir: Path) -> Iterator[ExitStack]:
    """Make the run folder, and hold the lock of its only writer. Every rank enters this; the first one does it.

    At the end, what was made is removed again, unless `pop_all()` of the yielded stack was called because there is a
    checkpoint.

    Raises:
        UsageError: If the folder cannot be made or written to, or another process writes there.
    """
    with ExitStack() as lock, ExitStack() as undo:
        with ranks.together():
            if ranks.is_first():
                if run_dir.exists() and not run_dir.is_dir():
                    raise UsageError(f"--output-dir {run_dir}: expected a folder, found a file")
                found = _own_entries(run_dir)
                undo.callback(_remove_new, run_dir, found, run_folder.make_run_dir(run_dir))
                lock.enter_context(writer_lock(run_dir))
                run_folder.check_writable(run_dir)
        yield undo


def _own_entries(run_dir: Path) -> set[str]:
    """Return which of the files that a run writes before its first checkpoint are in the folder."""
    return {name for name in (LOCK, *demo.FILES) if (run_dir / name).exists()}


def _remove_new(run_dir: Path, found: set[str], made: list[Path]) -> None:
    with suppress(OSError):
        for name in _own_entries(run_dir) - found - (set() if made else {LOCK}):
            path = run_dir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for folder in made:  # those inside first
            folder.rmdir()


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, run_dir: Path) -> list[Path]:
    """Save the tokenizer, and return the files that were not there before."""
    before = set(run_dir.iterdir())
    tokenizer.save_pretrained(run_dir)
    return [path for path in run_dir.iterdir() if path not in before]


def _remove_files(paths: list[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


# ---- what is trained, on what ----


def choose_start(settings: TrainSettings) -> Start:
    """Return the checkpoint to go on from; the first rank looks, and all of them get the same."""
    start = None
    with ranks.together():
        if ranks.is_first():
            start = choose(Path(settings.output_dir), settings.resume, settings.resume_weights_only)
    return ranks.gather(start)[0]


def write_demo(settings: TrainSettings) -> TrainSettings:
    """Write the model and the data of --demo, and return the settings that name them."""
    with ranks.together():
        if ranks.is_first():
            demo.write(settings)
    return demo.filled_in(settings)


def load(settings: TrainSettings, device: torch.device) -> Material:
    with ranks.together():
        model, tokenizer = load_model(settings, device)
        return Material(model, tokenizer, load_data(settings, model, tokenizer))


def load_model(settings: TrainSettings, device: torch.device) -> tuple[Mixture, PreTrainedTokenizerBase]:
    """Return the mixture with fresh experts, and the tokenizer of its base model."""
    source, weights = find_base(settings.base_model, weights=settings.weights, token=settings.hf_token)
    tokenizer = load_tokenizer(source, token=settings.hf_token)
    base = load_base(source, weights, dtype=settings.dtype, device=str(device), seed=settings.seed)
    targets = None if settings.targets is None else list(settings.targets)
    lora = MoELoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
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
    """Return the token blocks of --data, once it is sure that the model takes them."""
    most = getattr(model.base.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and settings.block_size > most:
        raise UsageError(
            f"--block-size {settings.block_size}: the base model has {most} positions; use at most that many"
        )
    blocks = load_blocks(
        [DataSpec.parse(text) for text in settings.data],
        tokenizer,
        block_size=settings.block_size,
        seed=settings.seed,
        token=settings.hf_token,
    )
    check_documents_apart(model.base)
    return blocks


def add_skills(skills: SkillLibrary, model: Mixture, blocks: TokenBlocks) -> None:
    """Add a skill for each data set that has none yet: where the base model embeds its text."""
    for name, rows in blocks.evaluation.items():
        short = name.encode()[:NAME_BYTES].decode(errors="ignore")
        if short not in skills.names:
            input_ids = torch.tensor(rows[: min(4, len(rows))]["input_ids"]).to(model.device)
            skills.add(short, NoveltyDetector.embed(model, input_ids))


# ---- training ----


def training_arguments(settings: TrainSettings) -> TrainingArguments:
    """Return the settings as the Trainer takes them."""
    device = training_device(settings)
    on_cpu = device.type == "cpu"
    evaluates = settings.eval_steps > 0
    arguments = TrainingArguments(
        output_dir=settings.output_dir,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.lr_schedule,
        warmup_steps=settings.warmup if settings.warmup < 1 else int(settings.warmup),
        weight_decay=settings.weight_decay,
        max_steps=settings.max_steps or -1,
        num_train_epochs=settings.epochs or 1,
        logging_steps=settings.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=settings.eval_steps or None,
        metric_for_best_model="loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        save_strategy="steps",
        save_steps=settings.save_steps or sys.maxsize,
        save_total_limit=settings.save_total_limit,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and "WORLD_SIZE" in os.environ else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=settings.report_to,
        disable_tqdm=not sys.stderr.isatty(),
        log_level="error",
    )
    if arguments.n_gpu > 1:  # one process uses one GPU: no DataParallel
        arguments._n_gpu = 1
    return arguments


def training_device(settings: TrainSettings) -> torch.device:
    """Return the device of --device; with several processes, each uses the GPU of its local rank."""
    device = resolve_device(settings.device)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and device.index:
        raise UsageError(f"--device {device}: choose the GPU with CUDA_VISIBLE_DEVICES={device.index} --device cuda")
    return device


def begin(settings: TrainSettings, material: Material, start: Start) -> Beginning:
    """Compare the run with the one that is resumed, and read from its checkpoint what the Trainer does not read.

    Raises:
        UsageError: If the ranks or the runs differ.
        CheckpointError: If the checkpoint is not sound.
    """
    with ranks.together():
        compared = compared_settings(settings, material.model, material.blocks)
    if any(other != compared for other in ranks.gather(compared)):
        raise UsageError("the ranks have read different data or weights; give all of them the same files")
    with ranks.together():
        if start.folder is None:
            return Beginning(start, False, compared, SkillLibrary())
        checkpoint, ended = check(start.folder, compared, start.weights_only, accept_changes=settings.accept_changes)
        if start.weights_only or ended:
            load_into(checkpoint, material.model)
        return Beginning(start, ended, compared, read_skills(checkpoint))


def make_trainer(
    arguments: TrainingArguments, material: Material, beginning: Beginning, stop: StopSignals
) -> MoETrainer:
    add_skills(beginning.skills, material.model, material.blocks)
    start = beginning.start
    saver = PeftCheckpointCallback(beginning.skills, beginning.compared, interrupted=lambda: stop.received is not None)
    arguments.eval_on_start = not start.folder or start.weights_only  # the loss that the experts start from
    trainer = MoETrainer(
        model=material.model,
        args=arguments,
        train_dataset=material.blocks.train,
        eval_dataset=material.blocks.evaluation,
        data_collator=BlockCollator(),
        callbacks=[callback for callback in (stop.early, stop, saver) if callback is not None],
        start_step=start.step,
    )
    if beginning.ended:
        there = training_state.read_trainer_state(start.folder)
        trainer.state.global_step, trainer.state.log_history = there["global_step"], there.get("log_history") or []
    return trainer


def train(trainer: MoETrainer, start: Start, stop: StopSignals, claim: ExitStack) -> None:
    """Train, and keep the run folder from then on if there is a checkpoint in it."""
    resumed = start.folder if not start.weights_only else None
    try:
        with stop:
            trainer.train(None if resumed is None else str(resumed))
    finally:
        if run_folder.checkpoints(trainer.args.output_dir):
            claim.pop_all()


def result_of(trainer: MoETrainer, beginning: Beginning, stop: StopSignals) -> RunResult:
    """Return how the run ended. Unless a signal stopped it, that includes the losses; every rank computes them."""
    newest = run_folder.latest(trainer.args.output_dir)
    saved = newest.path if newest else beginning.start.folder
    held_out = [] if stop.received else held_out_results(trainer)
    return RunResult(trainer.state.global_step, saved, stop.received, beginning.ended, held_out)
