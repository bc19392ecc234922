"""A training run from its settings to its last checkpoint. What it says goes through `say`; the script prints it."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
import transformers
from transformers import TrainingArguments

from . import bases, checkpoint, cli, commit, data, demo, machine, ranks, resuming, sharding, training, training_state
from .config import MoELoraConfig, RouterConfig
from .errors import UsageError
from .model import DyLoRAMoE, seeded
from .skills import NAME_BYTES, NoveltyDetector, SkillLibrary
from .targets import shown

SHOWN_EXPERTS = 8  # columns of the table


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
            start = resuming.choose(run_dir, args.resume, args.resume_weights_only) if ranks.is_first() else None
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
        for line in [*model.notes, *describe(model, blocks)]:
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
                undo.callback(_remove_new, run_dir, found, commit.make_run_dir(run_dir))
                lock.enter_context(commit.writer_lock(run_dir))
                commit.check_writable(run_dir)
        yield undo


def _own_entries(run_dir: Path) -> set[str]:
    """What this run may leave there before it begins, and is there already."""
    return {name for name in (commit.LOCK, *demo.FILES) if (run_dir / name).exists()}


def _remove_new(run_dir: Path, found: set[str], made: list[Path]) -> None:
    with suppress(OSError):
        for name in _own_entries(run_dir) - found - (set() if made else {commit.LOCK}):
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
    device = bases.resolve_device(args.device)
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    if device.type == "cuda" and device.index:
        raise UsageError(f"--device {device}: choose the GPU with CUDA_VISIBLE_DEVICES={device.index} --device cuda")
    return device


def load_model(args, device: torch.device) -> tuple[DyLoRAMoE, transformers.PreTrainedTokenizerBase]:
    """The mixture with fresh experts, and the tokenizer."""
    source, weights = bases.find_base(args.model, weights=args.weights, token=args.hf_token)
    tokenizer = bases.load_tokenizer(source, token=args.hf_token)
    base = bases.load_base(source, weights, dtype=args.dtype, device=str(device), seed=args.seed)
    lora = MoELoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules="all-linear" if args.targets == ["all-linear"] else args.targets,
    )
    router = RouterConfig(args.temperature, args.top_k, args.balance_coefficient)
    with seeded(args.seed):
        model = DyLoRAMoE(base, args.experts, lora=lora, router=router, label_smoothing=args.label_smoothing)
    model.base_revision = source.revision
    if source.note:
        model.notes.append(source.note)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    counts = model.parameter_counts()
    # Weights and two moments, in float32.
    machine.need_disk(12 * (counts["experts"] + counts["router"]), args.output_dir, "one checkpoint")
    return model, tokenizer


def load_data(args, model: DyLoRAMoE, tokenizer) -> data.TokenBlocks:
    _check_positions(args.block_size, model)
    blocks = data.load_blocks(
        [data.DataSpec.parse(text) for text in args.data],
        tokenizer,
        block_size=args.block_size,
        seed=args.seed,
        token=args.hf_token,
    )
    data.check_documents_apart(model.base)
    return blocks


def _check_positions(block_size: int, model: DyLoRAMoE) -> None:
    most = getattr(model.base.config.get_text_config(), "max_position_embeddings", None)
    if most is not None and block_size > most:
        raise UsageError(f"--block-size {block_size}: the base model has {most} positions; use at most that many")


def describe(model: DyLoRAMoE, blocks: data.TokenBlocks) -> list[str]:
    """What is about to be trained, on what."""
    counts = model.parameter_counts()
    trained = counts["experts"] + counts["router"]
    targets = sorted(model.expert_configs[0].target_modules)
    lines = [
        f"base: {model.base.config._name_or_path} ({counts['base']:,} parameters, {checkpoint.dtype_name(model)}, "
        "frozen)",
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


def _not_learned(source: data.SourceStats) -> Iterator[str]:
    """What of a data set is not learned, though it could be thought so."""
    if source.unused_columns:
        yield f"columns that are not used: {shown(list(source.unused_columns))}"
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


def add_skills(skills: SkillLibrary, model: DyLoRAMoE, blocks: data.TokenBlocks) -> None:
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
        run = resuming.settings(args, model, blocks)
    if any(other != run for other in ranks.gather(run)):
        raise UsageError("the ranks have read different data or weights; give all of them the same files")
    with ranks.together():
        ended = bool(start.folder) and resuming.check(start, run, accept_changes=args.accept_changes)
        if start.weights_only or ended:
            checkpoint.load_into(start.folder, model, weights_only=start.weights_only)
        skills = checkpoint.read_skills(start.folder) if start.folder else SkillLibrary()
    if how is not None:
        say(sharding.shard(model, settings.device, how))
    early = training.EarlyStopping(early_stopping_patience=args.early_stopping) if args.early_stopping else None
    stop = training.StopSignals(early)
    add_skills(skills, model, blocks)
    saver = make_saver(skills=skills, run=run, interrupted=lambda: stop.received is not None)
    settings.eval_on_start = not start.folder or start.weights_only  # what the experts start from
    trainer = training.MoETrainer(
        model=model,
        args=settings,
        train_dataset=blocks.train,
        eval_dataset=blocks.evaluation,
        data_collator=data.BlockCollator(),
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
            say(_resuming_line(start))
        try:
            with stop:
                trainer.train(None if start.weights_only or not start.folder else str(start.folder))
        finally:
            if commit.checkpoints(args.output_dir):
                claim.pop_all()
    newest = commit.latest(args.output_dir)
    if stop.received is not None:
        return _interrupted(stop.received, trainer.state.global_step, newest.path, say)
    _report(args, trainer, newest.path if newest else start.folder, say)
    return cli.PASSED


def _resuming_line(start: resuming.Start) -> str:
    if not start.weights_only:
        return f"resuming from {start.folder}"
    return f"experts and router from {start.folder}; all else fresh, from step {start.step}"


# ---- the end ----


def _interrupted(received: signal.Signals, step: int, saved: Path, say: Callable[[str], None]) -> int:
    say(f"stopped by {received.name} at step {step}; saved {saved}")
    say(f"go on with: {resume_command()}")
    return cli.INTERRUPTED if received is signal.SIGINT else cli.TERMINATED


def _report(args, trainer: training.MoETrainer, saved: Path, say: Callable[[str], None]) -> None:
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


def final_table(trainer: training.MoETrainer, metrics: dict) -> list[str]:
    """Loss per data set, before and after, and how its tokens were routed."""
    experts = trainer.mixture.num_experts
    before = trainer.state.log_history[0] if trainer.state.log_history else {}  # see eval_on_start
    shown = min(experts, SHOWN_EXPERTS)
    width = max([len("data set"), *(len(name) for name in trainer.eval_dataset)])
    titles = "  ".join(f"{f'expert_{i}':>9}" for i in range(shown))
    lines = [f"{'data set':<{width}}  {'at the start':>12}  {'held-out loss':>13}  {titles}"]
    for name in trainer.eval_dataset:
        usage = trainer.usage_by_data.get(name)
        shares = usage.shares() if usage else [1.0]
        cells = "  ".join(f"{100 * share:>7.1f} %" for share in shares[:shown])
        start = f"{before[key]:.4f}" if (key := f"eval_{name}_loss") in before else "-"
        lines.append(f"{name:<{width}}  {start:>12}  {metrics[f'final_{name}_loss']:>13.4f}  {cells}")
    if experts > shown:
        lines.append(f"... and {experts - shown} more experts")
    return lines
