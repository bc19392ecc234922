"""Train a mixture of LoRA experts on a frozen causal LM, in checkpoints that can be trusted.

    python train.py --demo
    python train.py --model google/codegemma-2b --data code.jsonl=2 --data prose/ --experts 4 --output-dir runs/first
    python train.py ... --output-dir runs/first --resume
    torchrun --nproc_per_node 2 train.py ...

Stopped by SIGTERM or Ctrl-C it saves at the end of the step; --resume goes on as if it had never been stopped.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from dylora_moe import bases, checkpoint, cli, commit, training_state
from dylora_moe.config import MAX_EXPERTS, MoELoraConfig, RouterConfig
from dylora_moe.errors import UsageError, listed
from dylora_moe.model import DyLoRAMoE, seeded
from dylora_moe.skills import NAME_BYTES, NoveltyDetector, SkillLibrary

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
REPORTS = ("none", "tensorboard", "wandb", "trackio")
# These may differ between a run and its resumption: they change what is shown and kept, not what is learned.
FREE_SETTINGS = ("output_dir", "resume", "resume_weights_only", "accept_changes", "logging_steps", "eval_steps", "save_steps",
                 "save_total_limit", "report_to", "config", "demo", "device", "hf_token",
                 "model_is_default")  # fmt: skip


class PeftCheckpointCallback(TrainerCallback, ExportableState):
    """Writes every checkpoint of a run, whole or not at all, and rotates afterwards.

    Args:
        skills: the skill library to save.
        run: the settings of the run, kept in trainer_state.json so that a resumption can be compared with it.
        interrupted: says whether the run is being stopped before its end; otherwise the last save makes the experts
            mature.
        name: of the folder inside `args.output_dir`, with {step}.
    """

    def __init__(
        self,
        skills: SkillLibrary | None = None,
        run: dict | None = None,
        interrupted: Callable[[], bool] = lambda: False,
        name: str = "checkpoint-{step}",
    ):
        self.skills = skills if skills is not None else SkillLibrary()
        self.run = run or {}
        self.interrupted = interrupted
        self.name = name

    def state(self) -> dict:
        """What trainer_state.json keeps of this callback."""
        return {"args": {}, "attributes": {"run": self.run}}

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Refuse to start where a save would fail or a part of the mixture would stay as it is."""
        model.check_optimizer(optimizer)
        if args.should_save:
            commit.check_writable(args.output_dir)
        model.mark_immature()

    def on_save(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        """Publish `checkpoint-<step>`: adapters, router, skill library, config, probe and, in training, its state.

        One rank writes. Every rank takes part, since each has its own random generators, and since a failure must stop
        all of them.

        Raises:
            UsageError: on every rank, where the checkpoint could not be written.
        """
        if control.should_training_stop and not self.interrupted():
            model.mark_mature()
        rank, _ = training_state.world()
        others = training_state.gather((training_state.rng_state(), _digest(model)))
        if len({digest for _, digest in others}) > 1:
            ranks = ", ".join(f"rank {r}: {digest[:12]}" for r, (_, digest) in enumerate(others))
            raise UsageError(f"the ranks have drifted apart, nothing was saved: experts or router differ ({ranks})")

        def training_files(folder: Path) -> None:
            training_state.write(
                folder,
                optimizer=optimizer,
                scheduler=lr_scheduler,
                trainer_state=state,
                rng_states=[rng for rng, _ in others],
            )

        failure = None
        if rank == 0:
            try:
                run_dir = Path(args.output_dir)
                checkpoint.save(
                    run_dir / self.name.format(step=state.global_step),
                    model,
                    step=state.global_step,
                    skills=self.skills,
                    training_files=training_files if optimizer is not None else None,
                )
                limit = getattr(args, "save_total_limit", None)
                if limit:
                    best = getattr(state, "best_global_step", None)
                    commit.rotate(run_dir, limit, keep=[best] if best else [])
            except Exception as error:
                failure = error
        failures = training_state.gather(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        if failures[0] is not None:
            raise UsageError(f"rank 0 could not save: {failures[0]}")


def _digest(model: DyLoRAMoE) -> str:
    """A hash of what is trained, to compare ranks with; empty where there is one."""
    if training_state.world()[1] == 1:
        return ""
    digest = hashlib.sha256()
    for parameter in model.trained_parameters().values():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


# ---- command line ----


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="train.py", description=__doc__)
    whole, real = (lambda least: cli.number(int, least)), (lambda least, most=None: cli.number(float, least, most))

    model = parser.add_argument_group("model")
    model.add_argument("--model", help=f"hub id, folder, GGUF file or preset ({bases.DEFAULT_MODEL})")
    model.add_argument("--weights", choices=bases.WEIGHTS, default="pretrained", help="of the base (%(default)s)")
    model.add_argument("--hf-token", help="for gated models and data; default HF_TOKEN or the login")
    model.add_argument("--dtype", help="of the base: float32, bfloat16 or float16 (default: the config's)")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (%(default)s)")
    model.add_argument("--experts", type=cli.number(int, 1, MAX_EXPERTS), default=2, help="number of experts (2)")
    model.add_argument("--lora-r", type=whole(1), default=16, help="rank of each expert (16)")
    model.add_argument("--lora-alpha", type=cli.number(float, above=0), default=32, help="scales by alpha / r (32)")
    model.add_argument("--lora-dropout", type=real(0, 0.99), default=0.05, help="(0.05)")
    model.add_argument("--targets", nargs="+", help="names of linear layers, or all-linear (default: q/k/v/o_proj)")
    model.add_argument("--top-k", type=whole(1), help="experts per token once mature (default: min(2, experts))")
    model.add_argument("--temperature", type=cli.number(float, above=0), default=1.0, help="of the router (1.0)")
    model.add_argument("--balance-coefficient", type=real(0), default=0.01, help="of the balance loss (0.01)")

    data = parser.add_argument_group("data")
    data.add_argument("--data", action="append", metavar="NAME_OR_PATH[=WEIGHT]", help="repeatable")
    data.add_argument("--block-size", type=whole(8), default=512, help="tokens per block (512)")

    training = parser.add_argument_group("training")
    training.add_argument("--learning-rate", type=cli.number(float, above=0), default=5e-4, help="(5e-4)")
    training.add_argument("--lr-schedule", choices=SCHEDULES, default="cosine", help="(cosine)")
    training.add_argument("--warmup", type=real(0), default=0.03, help="steps, or a fraction below 1 (0.03)")
    training.add_argument("--weight-decay", type=real(0), default=0.0, help="(0)")
    training.add_argument("--label-smoothing", type=real(0, 0.99), default=0.0, help="(0)")
    training.add_argument("--batch-size", type=whole(1), default=4, help="blocks per step and process (4)")
    training.add_argument("--grad-accum", type=whole(1), default=1, help="micro-batches per step (1)")
    training.add_argument("--max-steps", type=whole(1), help="default: --epochs")
    training.add_argument("--epochs", type=cli.number(float, above=0), help="(1)")
    training.add_argument("--gradient-checkpointing", action="store_true", help="less memory, about a third slower")
    training.add_argument("--seed", type=whole(0), default=0, help="(0)")
    training.add_argument(
        "--early-stopping", type=whole(1), metavar="N", help="stop after N evaluations without a better one"
    )

    run = parser.add_argument_group("run")
    run.add_argument("--output-dir", help="the run folder (runs/demo with --demo)")
    run.add_argument("--logging-steps", type=whole(1), default=10, help="(10)")
    run.add_argument("--eval-steps", type=whole(0), default=0, help="0: at the end only (0)")
    run.add_argument("--save-steps", type=whole(0), default=100, help="0: at the end only (100)")
    run.add_argument("--save-total-limit", type=whole(1), help="keep that many checkpoints, and the best")
    run.add_argument("--resume", nargs="?", const="auto", metavar="DIR", help="from the newest checkpoint, or from DIR")
    run.add_argument(
        "--resume-weights-only", action="store_true", help="with fresh optimizer, data order and step count"
    )
    run.add_argument("--accept-changes", action="store_true", help="resume although settings differ")
    run.add_argument("--report-to", choices=REPORTS, default="none", help="(none)")
    run.add_argument("--config", metavar="FILE", help="YAML or JSON with any of these settings; flags win")
    run.add_argument("--demo", action="store_true", help="train a tiny model on this machine's Python sources, offline")
    return parser


def parse_arguments(argv: Sequence[str] | None) -> object:
    """The settings: flags, then --config, then those of --demo, then the defaults."""
    parser = build_parser()
    first = parser.parse_args(argv)
    defaults = dict(demo_settings()) if first.demo else {}
    if first.config:
        defaults |= _config_defaults(parser, first.config)
    data = defaults.pop("data", None)  # argparse would append the flags to it
    parser.set_defaults(**defaults)
    args = parser.parse_args(argv)
    args.data = args.data or data
    args.model_is_default = args.model is None
    args.model = args.model or bases.DEFAULT_MODEL
    if args.demo and not args.output_dir:
        args.output_dir = "runs/demo"
    if not args.output_dir:
        parser.error("--output-dir is needed: the folder for checkpoints")
    if not args.data and not args.demo:
        parser.error("--data is needed: a file, a folder or the name of a hub data set (or --demo)")
    if args.max_steps and args.epochs:
        parser.error("--max-steps and --epochs contradict each other: give one")
    if args.early_stopping and not args.eval_steps:
        parser.error("--early-stopping needs --eval-steps")
    if args.resume_weights_only and not args.resume:
        parser.error("--resume-weights-only needs --resume")
    return args


def demo_settings() -> dict:
    return {"experts": 2, "lora_r": 8, "lora_alpha": 16, "targets": ["all-linear"], "block_size": 128, "batch_size": 8,
            "max_steps": 60, "save_steps": 30, "logging_steps": 10, "learning_rate": 5e-3, "device": "cpu"}  # fmt: skip


def _config_defaults(parser: cli.Parser, path: str) -> dict:
    """The settings of a --config file, checked as the flags are."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        if path.endswith(".json"):
            import json

            settings = json.loads(text)
        else:
            import yaml

            settings = yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UsageError(f"--config {path}: is not valid JSON: {error}") from None
    except Exception as error:  # yaml.YAMLError, known only where yaml is imported
        raise UsageError(f"--config {path}: is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"--config {path}: expected settings by name, found {type(settings).__name__}")
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    defaults = {}
    for name, value in settings.items():
        action = actions.get(str(name).replace("-", "_"))
        if action is None:
            raise UsageError(f"--config {path}: there is no setting {name!r}; see train.py --help")
        flag = action.option_strings[0]
        words = (
            [flag]
            if value is True and action.nargs == 0
            else [flag, *map(str, value if isinstance(value, list) else [value])]
        )
        if value is None or value is False:
            continue
        if action.dest == "data" and isinstance(value, list):
            words = [word for item in value for word in (flag, str(item))]
        try:
            parsed, _ = parser.parse_known_args(words)
        except SystemExit:
            raise UsageError(f"--config {path}: {name}: {value!r} is not a value for {flag}") from None
        defaults[action.dest] = getattr(parsed, action.dest)
    return defaults


# ---- a run ----


def choose_checkpoint(args) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from (None: start afresh), and lines for the user.

    Raises:
        UsageError: where the run folder and the flags do not go together.
    """
    run_dir = Path(args.output_dir)
    complete = commit.checkpoints(run_dir) if run_dir.is_dir() else []
    broken = commit.incomplete(run_dir) if run_dir.is_dir() else []
    passed_over = [f"passed over {path}: {reason}" for path, reason in broken]
    if not args.resume:
        if complete or broken:
            newest = complete[-1].path if complete else broken[-1][0]
            raise UsageError(
                f"{run_dir} already holds checkpoints (newest: {newest.name}); go on with --resume, or start another run "
                "with another --output-dir"
            )
        return None, []
    if args.resume == "auto":
        if complete:
            return complete[-1].path, passed_over
        if broken:
            lines = [f"{path.name}: {reason}" for path, reason in broken]
            raise UsageError(
                f"{run_dir} holds only incomplete checkpoints:\n{listed(lines)}\nMove them away to start from the beginning"
            )
        return None, [f"no checkpoint in {run_dir} yet: starting from the beginning"]
    chosen = Path(args.resume)
    if not chosen.is_dir():
        raise UsageError(
            f"--resume {chosen}: there is no such folder; --resume alone takes the newest checkpoint of the run"
        )
    newer = [
        c
        for c in complete
        if c.path.resolve() != chosen.resolve() and _step(chosen) is not None and c.step > _step(chosen)
    ]
    if newer and chosen.resolve().parent == run_dir.resolve():
        raise UsageError(
            f"--resume {chosen}: {run_dir} holds newer checkpoints ({', '.join(c.path.name for c in newer)}), which this run "
            "would meet; use another --output-dir, or move them away"
        )
    return chosen, []


def _step(folder: Path) -> int | None:
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if folder.name.startswith("checkpoint-") and number.isdigit() else None


def run_settings(args, fingerprint: str, processes: int) -> dict:
    """What must be the same for a resumed run to be the run that was stopped."""
    settings = {name: value for name, value in vars(args).items() if name not in FREE_SETTINGS}
    if args.early_stopping:
        settings["eval_steps"] = args.eval_steps
    return settings | {"data_fingerprint": fingerprint, "processes": processes}


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_main, argv, prog="train.py")


def _main(argv: Sequence[str] | None) -> int:
    args = parse_arguments(argv)
    say = print if int(os.environ.get("RANK", "0")) == 0 else (lambda *_, **__: None)
    resume, lines = choose_checkpoint(args)
    for line in lines:
        say(line)
    _check_output_dir(Path(args.output_dir))
    if args.demo:
        from dylora_moe import demo

        demo.prepare(args)
    model, tokenizer = load_model(args)
    for note in model.notes:
        say(note)
    return train(args, model, tokenizer, resume, say)


def _check_output_dir(folder: Path) -> None:
    """Whether a run could be saved there; nothing is created yet."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--output-dir {folder}: expected a folder, found a file")
    while not folder.exists():
        folder = folder.parent
    commit.check_writable(folder)


def load_model(args) -> tuple[DyLoRAMoE, object]:
    """The mixture with fresh experts, and the tokenizer."""
    source, weights = bases.find_base(args.model, weights=args.weights, token=args.hf_token)
    tokenizer = bases.load_tokenizer(source, token=args.hf_token)
    base = bases.load_base(source, weights, dtype=args.dtype, device=_device(args), seed=args.seed)
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
    return model, tokenizer


def _device(args) -> str:
    """With several processes each has the GPU of its local rank."""
    device = str(bases.resolve_device(args.device))
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def train(args, model: DyLoRAMoE, tokenizer, resume: Path | None, say: Callable) -> int:
    """Train until the end or a signal; the last step is always saved."""
    import transformers

    from dylora_moe import data, training

    transformers.set_seed(args.seed)
    blocks = data.load_blocks(
        [data.DataSpec.parse(text) for text in args.data],
        tokenizer,
        block_size=args.block_size,
        seed=args.seed,
        token=args.hf_token,
    )
    data.check_documents_apart(model.base)
    for line in describe_run(model, blocks):
        say(line)
    settings = training_arguments(args, model)
    run = run_settings(args, data.data_fingerprint(blocks), settings.world_size)
    if resume:
        training.check_resumable(resume, run, weights_only=args.resume_weights_only, accept_changes=args.accept_changes)
        say(f"resuming from {resume}" + (" (weights only)" if args.resume_weights_only else ""))
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    if settings.should_save:
        tokenizer.save_pretrained(args.output_dir)

    stop = training.StopSignals()
    saver = PeftCheckpointCallback(run=run, interrupted=lambda: stop.received is not None)
    callbacks = [stop, saver]
    if args.early_stopping:
        callbacks.insert(0, transformers.EarlyStoppingCallback(early_stopping_patience=args.early_stopping))
    trainer = training.MoETrainer(
        model=model,
        args=settings,
        train_dataset=blocks.train,
        eval_dataset=blocks.evaluation,
        data_collator=data.BlockCollator(),
        callbacks=callbacks,
    )
    if resume and args.resume_weights_only:
        saver.skills = checkpoint.load_into(resume, model)
        resume = None
    add_skills(saver.skills, model, blocks)
    trainer.skills = saver.skills
    with stop:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return report(args, trainer, stop, say)


def training_arguments(args, model: DyLoRAMoE):
    from transformers import TrainingArguments

    on_cpu = model.device.type == "cpu"
    evaluates = args.eval_steps > 0
    return TrainingArguments(
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
        eval_strategy="steps" if evaluates else "no",
        eval_steps=args.eval_steps or None,
        metric_for_best_model="loss" if evaluates else None,
        greater_is_better=False if evaluates else None,
        save_strategy="steps",
        save_steps=args.save_steps or sys.maxsize,
        save_total_limit=args.save_total_limit,
        seed=args.seed,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and "WORLD_SIZE" in os.environ else None,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=args.report_to,
        disable_tqdm=not sys.stderr.isatty(),
        log_level="warning",
    )


def describe_run(model: DyLoRAMoE, blocks) -> list[str]:
    """What is about to be trained, on what."""
    counts = model.parameter_counts()
    trained = counts["experts"] + counts["router"]
    lines = [
        f"base: {model.base.config._name_or_path} ({counts['base']:,} parameters, {checkpoint.dtype_name(model)}, frozen)",
        f"experts: {model.num_experts} on {', '.join(sorted(model.expert_configs[0].target_modules))} "
        f"({trained:,} parameters trained, {100 * trained / counts['base']:.2f} % of the base)",
    ]
    for source in blocks.sources:
        lines.append(
            f"data: {source.name}: {source.documents:,} documents ({source.schema}), {source.blocks:,} blocks of "
            f"{blocks.block_size} tokens; {source.held_out_documents:,} documents held out"
        )
    return lines


def add_skills(skills: SkillLibrary, model: DyLoRAMoE, blocks) -> None:
    """One skill per data set: where its text lies for the base model."""
    import torch

    for name, rows in blocks.evaluation.items():
        input_ids = torch.tensor(rows[: min(4, len(rows))]["input_ids"]).to(model.device)
        short = name.encode()[:NAME_BYTES].decode(errors="ignore")
        skills.add(short, NoveltyDetector.embed(model, input_ids))


def report(args, trainer, stop, say: Callable) -> int:
    """The closing lines: where to go on after a signal; otherwise the final table."""
    newest = commit.latest(args.output_dir)
    if stop.received is not None:
        say(f"stopped by {stop.received.name} at step {trainer.state.global_step}; saved {newest.path}")
        say(f"go on with: python train.py {resume_command(args)}")
        return cli.INTERRUPTED if stop.received.name == "SIGINT" else cli.TERMINATED
    metrics = next(
        (m for m in reversed(trainer.state.log_history) if "eval_loss" in m and m["step"] == trainer.state.global_step),
        None,
    )
    metrics = metrics or trainer.evaluate()
    say("")
    for line in final_table(trainer, metrics):
        say(line)
    say("")
    say(f"saved {newest.path}")
    say(f"validate it: python test_checkpoint_save_load.py --checkpoint {newest.path}")
    return cli.PASSED


def resume_command(args) -> str:
    words = [word for word in sys.argv[1:] if not word.startswith("--resume=")]
    if "--resume" in words:
        at = words.index("--resume")
        has_value = at + 1 < len(words) and not words[at + 1].startswith("--")
        del words[at : at + 1 + has_value]
    return shlex.join([*words, "--resume"])


def final_table(trainer, metrics: dict) -> list[str]:
    """Loss per data set and how its tokens were routed."""
    experts = [f"expert_{i}" for i in range(trainer.mixture.num_experts)]
    shown = experts[:8]
    width = max([len("data set"), *(len(name) for name in trainer.eval_dataset)])
    lines = [f"{'data set':<{width}}  {'held-out loss':>13}  " + "  ".join(f"{name:>9}" for name in shown)]
    for name in trainer.eval_dataset:
        usage = trainer.usage_by_data.get(name)
        shares = usage.shares() if usage else [1.0] if len(experts) == 1 else [float("nan")] * len(experts)
        cells = "  ".join(f"{100 * share:>7.1f} %" for share in shares[: len(shown)])
        lines.append(f"{name:<{width}}  {metrics[f'eval_{name}_loss']:>13.4f}  {cells}")
    if len(experts) > len(shown):
        lines.append(f"... and {len(experts) - len(shown)} more experts")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
