"""A training run from its settings to its last checkpoint. What it says goes through `say`; the script prints it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
import transformers
from transformers import TrainingArguments

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
from ..system import command_line, machine
from . import demo, ranks, resume, sharding, training_state
from .batches import BlockCollator, check_documents_apart
from .callbacks import EarlyStopping, StopSignals
from .summary import closing_lines, describe_run, interrupted_lines, resuming_line
from .trainer import MoETrainer


def execute(args, make_saver: Callable, say: Callable[[str], None]) -> int:
    """Train until the end or a signal. With several processes, each calls it.

    Args:
        args: the settings, as train.py parses them.
        make_saver: makes the callback that writes the checkpoints, `PeftCheckpointCallback`.
        say: takes lines for the user; called on every rank.

    Returns:
        The exit code: 0, 130 or 143.

    Raises:
        DyLoRAMoEError: for whatever the user can mend.
    """
    with sharding.requested() as how:
        return _execute(args, how, make_saver, say)


def _execute(args, how: sharding.Sharding | None, make_saver: Callable, say: Callable[[str], None]) -> int:
    device = training_device(args)
    settings = training_arguments(args, device)
    _ = settings.world_size  # joins the processes of torchrun
    run_dir = Path(args.output_dir)
    with claimed(run_dir) as claim:
        with ranks.together():
            start = resume.choose(run_dir, args.resume, args.resume_weights_only) if ranks.is_first() else None
        start = ranks.gather(start)[0]
        for line in start.lines:
            say(line)
        if args.demo:
            with ranks.together():
                if ranks.is_first():
                    demo.write(args)
            demo.fill_in(args)
        with ranks.together():
            model, tokenizer = load_model(args, torch.device("cpu") if how else device)  # the device gets a part
            blocks = load_data(args, model, tokenizer)
        for line in [*model.notes, *describe_run(model, blocks)]:
            say(line)
        return _train(args, settings, model, tokenizer, blocks, start, how, make_saver, say, claim)


# ---- the run folder ----


@contextmanager
def claimed(run_dir: Path) -> Iterator[ExitStack]:
    """Make the run folder, and be its only writer to the end. On every rank; the first one does it.

    What was made is removed again, unless `pop_all()` of what this yields has been called: there is a checkpoint.

    Raises:
        UsageError: where that is not possible, or another process writes there.
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
    """What this run may leave there before it begins, and is there already."""
    return {name for name in (LOCK, *demo.FILES) if (run_dir / name).exists()}


def _remove_new(run_dir: Path, found: set[str], made: list[Path]) -> None:
    with suppress(OSError):
        for name in _own_entries(run_dir) - found - (set() if made else {LOCK}):
            path = run_dir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for folder in made:  # those inside first
            folder.rmdir()


def _save_tokenizer(tokenizer: transformers.PreTrainedTokenizerBase, run_dir: Path) -> list[Path]:
    """The files that were not there before."""
    before = set(run_dir.iterdir())
    tokenizer.save_pretrained(run_dir)
    return [path for path in run_dir.iterdir() if path not in before]


def _remove_files(paths: list[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink()


# ---- what is trained, on what ----


def training_device(args) -> torch.device:
    """With several processes each has the GPU of its local rank."""
    device = resolve_device(args.device)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and device.index:
        raise UsageError(f"--device {device}: choose the GPU with CUDA_VISIBLE_DEVICES={device.index} --device cuda")
    return device


def load_model(args, device: torch.device) -> tuple[Mixture, transformers.PreTrainedTokenizerBase]:
    """The mixture with fresh experts, and the tokenizer."""
    source, weights = find_base(args.model, weights=args.weights, token=args.hf_token)
    tokenizer = load_tokenizer(source, token=args.hf_token)
    base = load_base(source, weights, dtype=args.dtype, device=str(device), seed=args.seed)
    lora = MoELoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear" if args.targets == ["all-linear"] else args.targets,
    )
    router = RouterConfig(args.temperature, args.top_k, args.balance_coefficient)
    with seeded(args.seed):
        model = Mixture(base, args.experts, lora=lora, router=router, label_smoothing=args.label_smoothing)
    model.base_revision = source.revision
    if source.note:
        model.notes.append(source.note)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    counts = model.parameter_counts()
    # Weights and two moments, in float32.
    machine.need_disk(12 * (counts["experts"] + counts["router"]), args.output_dir, "one checkpoint")
    return model, tokenizer


def load_data(args, model: Mixture, tokenizer) -> TokenBlocks:
    _check_positions(args.block_size, model)
    blocks = load_blocks(
        [DataSpec.parse(text) for text in args.data],
        tokenizer,
        block_size=args.block_size,
        seed=args.seed,
        token=args.hf_token,
    )
    check_documents_apart(model.base)
    return blocks


def _check_positions(block_size: int, model: Mixture) -> None:
    most = getattr(model.base.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and block_size > most:
        raise UsageError(f"--block-size {block_size}: the base model has {most} positions; use at most that many")


def add_skills(skills: SkillLibrary, model: Mixture, blocks: TokenBlocks) -> None:
    """One skill per data set: where its text lies for the base model."""
    for name, rows in blocks.evaluation.items():
        short = name.encode()[:NAME_BYTES].decode(errors="ignore")
        if short not in skills.names:
            input_ids = torch.tensor(rows[: min(4, len(rows))]["input_ids"]).to(model.device)
            skills.add(short, NoveltyDetector.embed(model, input_ids))


# ---- training ----


def training_arguments(args, device: torch.device) -> TrainingArguments:
    on_cpu = device.type == "cpu"
    evaluates = args.eval_steps > 0
    settings = TrainingArguments(
        output_dir=args.output_dir,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.grad_accum,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.lr_schedule,
        warmup_steps=args.warmup if args.warmup < 1 else int(args.warmup),
        weight_decay=args.weight_decay,
        max_steps=args.max_steps or -1,
        num_train_epochs=args.epochs or 1,
        logging_steps=args.logging_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=args.eval_steps or None,
        metric_for_best_model="loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        save_strategy="steps",
        save_steps=args.save_steps or sys.maxsize,
        save_total_limit=args.save_total_limit,
        seed=args.seed,
        data_seed=args.seed,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and "WORLD_SIZE" in os.environ else None,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=args.report_to,
        disable_tqdm=not sys.stderr.isatty(),
        log_level="error",
    )
    if settings.n_gpu > 1:  # one process, one GPU: not DataParallel
        settings._n_gpu = 1
    return settings


def _train(args, settings, model, tokenizer, blocks, start, how, make_saver, say, claim: ExitStack) -> int:
    with ranks.together():
        run = resume.settings(args, model, blocks)
    if any(other != run for other in ranks.gather(run)):
        raise UsageError("the ranks have read different data or weights; give all of them the same files")
    with ranks.together():
        ended = bool(start.folder) and resume.check(start, run, accept_changes=args.accept_changes)
        if start.weights_only or ended:
            load_into(start.folder, model, weights_only=start.weights_only)
        skills = read_skills(start.folder) if start.folder else SkillLibrary()
    if how is not None:
        say(sharding.shard(model, settings.device, how))
    early = EarlyStopping(early_stopping_patience=args.early_stopping) if args.early_stopping else None
    stop = StopSignals(early)
    add_skills(skills, model, blocks)
    saver = make_saver(skills=skills, run=run, interrupted=lambda: stop.received is not None)
    settings.eval_on_start = not start.folder or start.weights_only  # what the experts start from
    trainer = MoETrainer(
        model=model,
        args=settings,
        train_dataset=blocks.train,
        eval_dataset=blocks.evaluation,
        data_collator=BlockCollator(),
        callbacks=[callback for callback in (early, stop, saver) if callback is not None],
        start_step=start.step,
    )
    if ended:
        there = training_state.read_trainer_state(start.folder)
        trainer.state.global_step, trainer.state.log_history = there["global_step"], there.get("log_history") or []
        say(f"{start.folder} is the last checkpoint of a run that has ended: there is nothing left to train")
    else:
        if ranks.is_first():
            claim.callback(_remove_files, _save_tokenizer(tokenizer, Path(args.output_dir)))
        if start.folder:
            say(resuming_line(start))
        try:
            with stop:
                trainer.train(None if start.weights_only or not start.folder else str(start.folder))
        finally:
            if run_folder.checkpoints(args.output_dir):
                claim.pop_all()
    newest = run_folder.latest(args.output_dir)
    if stop.received is not None:
        return interrupted_lines(stop.received, trainer.state.global_step, newest.path, say)
    closing_lines(args, trainer, newest.path if newest else start.folder, say)
    return command_line.PASSED
