"""Train a mixture of LoRA experts on a frozen causal LM, in checkpoints that can be trusted.

    python train.py --demo
    python train.py --model google/codegemma-2b --data code.jsonl=2 --data prose/ --experts 4 --output-dir runs/first
    python train.py ... --output-dir runs/first --resume
    torchrun --nproc_per_node 2 train.py ...
    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 train.py ...

Stopped by SIGTERM or Ctrl-C it saves at the end of the step; --resume goes on as if it had never been stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dylora_moe.base.find import DEFAULT_MODEL
from dylora_moe.constants import MAX_EXPERTS, MAX_SEED
from dylora_moe.errors import CheckpointError, UsageError
from dylora_moe.system import command_line, interrupts
from dylora_moe.training import demo, ranks
from dylora_moe.training.checkpoint_callback import PeftCheckpointCallback

__all__ = ["PeftCheckpointCallback", "main"]

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
WEIGHTS = ("auto", "pretrained", "random")
LISTS = ("data", "targets")  # settings that a file may give several values
REPORTS = ("none", "tensorboard", "wandb", "trackio")
RIVALS = {"max_steps": "epochs", "epochs": "max_steps"}  # a flag wins over a file's or the demo's setting of the other


# ---- command line ----


def build_parser() -> command_line.Parser:
    parser = command_line.Parser(prog="train.py", description=__doc__)
    whole, real = (
        (lambda least: command_line.number(int, least)),
        (lambda least, most=None: command_line.number(float, least, most)),
    )

    model = parser.add_argument_group("model")
    model.add_argument("--model", help=f"hub id, folder, GGUF file or preset ({DEFAULT_MODEL})")
    model.add_argument(
        "--weights", choices=("auto", "pretrained", "random"), default="pretrained", help="of the base (pretrained)"
    )
    model.add_argument("--hf-token", help="for gated models and data; default HF_TOKEN or the login")
    model.add_argument("--dtype", help="of the base: float32, bfloat16, float16 or float64 (default: the config's)")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
    model.add_argument(
        "--experts", type=command_line.number(int, 1, MAX_EXPERTS), default=2, help="number of experts (2)"
    )
    model.add_argument("--lora-r", type=whole(1), default=16, help="rank of each expert (16)")
    model.add_argument(
        "--lora-alpha", type=command_line.number(float, above=0), default=32, help="scales by alpha / r (32)"
    )
    model.add_argument("--lora-dropout", type=real(0, 0.99), default=0.05, help="(0.05)")
    model.add_argument("--targets", nargs="+", help="names of linear layers, or all-linear (default: q/k/v/o_proj)")
    model.add_argument("--top-k", type=whole(1), help="experts per token once mature (default: min(2, experts))")
    model.add_argument(
        "--temperature", type=command_line.number(float, above=0), default=1.0, help="of the router (1.0)"
    )
    model.add_argument("--balance-coefficient", type=real(0), default=0.01, help="of the balance loss (0.01)")

    data = parser.add_argument_group("data")
    data.add_argument("--data", action="append", metavar="NAME_OR_PATH[=WEIGHT]", help="repeatable")
    data.add_argument("--block-size", type=whole(8), default=512, help="tokens per block (512)")

    training = parser.add_argument_group("training")
    training.add_argument("--learning-rate", type=command_line.number(float, above=0), default=1e-3, help="(1e-3)")
    training.add_argument("--lr-schedule", choices=SCHEDULES, default="cosine", help="(cosine)")
    training.add_argument("--warmup", type=real(0), default=0.03, help="steps, or a fraction below 1 (0.03)")
    training.add_argument("--weight-decay", type=real(0), default=0.0, help="(0)")
    training.add_argument("--label-smoothing", type=real(0, 0.99), default=0.0, help="(0)")
    training.add_argument("--batch-size", type=whole(1), default=4, help="blocks per step and process (4)")
    training.add_argument("--grad-accum", type=whole(1), default=1, help="micro-batches per step (1)")
    training.add_argument("--max-steps", type=whole(1), help="default: --epochs")
    training.add_argument("--epochs", type=command_line.number(float, above=0), help="(1)")
    training.add_argument("--gradient-checkpointing", action="store_true", help="less memory, about a third slower")
    training.add_argument("--seed", type=command_line.number(int, 0, MAX_SEED), default=0, help="(0)")
    training.add_argument(
        "--early-stopping", type=whole(1), metavar="N", help="stop after N evaluations without a better one"
    )

    run = parser.add_argument_group("run")
    run.add_argument("--output-dir", type=command_line.path, help="the run folder (runs/demo with --demo)")
    run.add_argument("--logging-steps", type=whole(1), default=10, help="(10)")
    run.add_argument("--eval-steps", type=whole(0), default=0, help="0: at the end only (0)")
    run.add_argument("--save-steps", type=whole(0), default=100, help="0: at the end only (100)")
    run.add_argument("--save-total-limit", type=whole(1), help="keep that many checkpoints, and the best")
    run.add_argument(
        "--resume",
        type=command_line.path,
        nargs="?",
        const="auto",
        metavar="DIR",
        help="from the newest checkpoint, or DIR",
    )
    run.add_argument(
        "--resume-weights-only",
        action="store_true",
        help="with fresh optimizer and data order; from step 0 in a new folder",
    )
    run.add_argument("--accept-changes", action="store_true", help="resume although settings differ")
    run.add_argument("--report-to", choices=REPORTS, default="none", help="(none)")
    run.add_argument(
        "--config", type=command_line.path, metavar="FILE", help="YAML or JSON with any of these settings; flags win"
    )
    run.add_argument("--demo", action="store_true", help="train a tiny model on this machine's Python sources, offline")
    return parser


def parse_arguments(argv: Sequence[str] | None) -> object:
    """The settings: flags, then --config, then those of --demo, then the defaults."""
    parser = build_parser()
    given = _given(argv)
    lower = dict(demo.SETTINGS) if given.get("demo") else {}
    if given.get("config"):
        lower = _over(lower, _read_config(parser, given["config"]))
        lower = _over(dict(demo.SETTINGS), lower) if lower.get("demo") else lower
    parser.set_defaults(**_over(lower, given))
    args = parser.parse_args([])
    args.model_is_default = args.model is None
    args.model = args.model or DEFAULT_MODEL
    if args.demo:
        args.output_dir = args.output_dir or "runs/demo"
    _check_arguments(parser, args)
    return args


def _given(argv: Sequence[str] | None, refuse: Callable[[str], None] | None = None) -> dict:
    """What the command line itself says, without defaults. What is wrong with it goes to `refuse`, if given."""
    parser = build_parser()
    if refuse:
        parser.error = refuse
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return vars(parser.parse_args(argv))


def _over(lower: dict, upper: dict) -> dict:
    return {name: value for name, value in lower.items() if RIVALS.get(name) not in upper} | upper


def _check_arguments(parser: command_line.Parser, args) -> None:
    """What no single flag can see."""
    if not args.output_dir:
        parser.error("--output-dir is needed: the folder for checkpoints")
    if not args.data and not args.demo:
        parser.error("--data is needed: a file, a folder or the name of a hub data set (or --demo)")
    if args.max_steps and args.epochs:
        parser.error("--max-steps and --epochs contradict each other: give one")
    if args.top_k and args.top_k > args.experts:
        parser.error(f"--top-k {args.top_k} and --experts {args.experts} contradict each other")
    if args.warmup >= 1 and args.warmup != int(args.warmup):
        parser.error(f"--warmup {args.warmup:g}: expected a whole number of steps, or a fraction below 1")
    if args.early_stopping and not args.eval_steps:
        parser.error("--early-stopping needs --eval-steps")
    if args.resume_weights_only and args.resume is None:
        parser.error("--resume-weights-only needs --resume")
    if args.report_to != "none" and importlib.util.find_spec(args.report_to) is None:
        parser.error(f"--report-to {args.report_to}: the package {args.report_to} is not installed")


def _read_config(parser: command_line.Parser, path: str) -> dict:
    """The settings of a --config file, checked as the flags are."""
    settings = _load_config(path)
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}

    def refuse(message: str):
        raise UsageError(f"--config {path}: {message}")

    found = {}
    for name, value in settings.items():
        action = actions.get(str(name).replace("-", "_"))
        if action is None:
            raise UsageError(f"--config {path}: there is no setting {name!r}; see train.py --help")
        if action.dest in found:
            raise UsageError(f"--config {path}: {action.dest} is there twice, with - and with _; leave one out")
        if value is None or value is False:
            continue
        if isinstance(value, dict) or (isinstance(value, list) and name not in LISTS):
            raise UsageError(f"--config {path}: {name}: expected a value, got {value!r}")
        found[action.dest] = _given(_as_words(action, value), refuse)[action.dest]
    return found


def _as_words(action: argparse.Action, value: object) -> list[str]:
    """A setting of a file as it would stand on the command line."""
    flag = action.option_strings[0]
    if value is True and action.nargs in (0, "?"):
        return [flag]
    values = [str(each) for each in value] if isinstance(value, list) else [str(value)]
    if action.nargs == "+":
        return [flag, *values]
    return [f"{flag}={each}" for each in values]


def _load_config(path: str) -> dict:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not text in UTF-8"
        raise UsageError(f"--config {path}: cannot be read ({reason})") from None
    if path.endswith(".json"):
        kind, load, errors = "JSON", json.loads, ValueError
    else:
        import yaml

        kind, load, errors = "YAML", yaml.safe_load, yaml.YAMLError
    try:
        settings = load(text)
    except errors as error:
        raise UsageError(f"--config {path}: is not valid {kind}: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UsageError(f"--config {path}: expected settings by name, found {type(settings).__name__}")
    return settings


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(_main, argv, prog="train.py")


def _main(argv: Sequence[str] | None) -> int:
    args = parse_arguments(argv)

    from dylora_moe.training.run import execute  # the Trainer and the data sets, which the callback does not need

    def say(line: str) -> None:
        if ranks.is_first():
            print(line, flush=True)

    try:
        with interrupts.handled():  # before the first step and after the last; in between, a signal saves
            return execute(args, PeftCheckpointCallback, say)
    except interrupts.Interrupted as error:
        print(f"train.py: {error}", file=sys.stderr)
        return error.exit_code
    except CheckpointError as error:  # a run that cannot start: 2, as for all that a user can mend
        raise UsageError(str(error)) from error


if __name__ == "__main__":
    raise SystemExit(main())
