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
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from dylora_moe import bases, checkpoint, cli, commit, demo, interrupts, ranks, training_state
from dylora_moe.config import MAX_EXPERTS, MAX_SEED
from dylora_moe.errors import CheckpointError, UsageError, listed
from dylora_moe.model import DyLoRAMoE
from dylora_moe.skills import SkillLibrary

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
WEIGHTS = ("auto", "pretrained", "random")
LISTS = ("data", "targets")  # settings that a file may give several values
REPORTS = ("none", "tensorboard", "wandb", "trackio")
RIVALS = {"max_steps": "epochs", "epochs": "max_steps"}  # a flag wins over a file's or the demo's setting of the other


class PeftCheckpointCallback(TrainerCallback, ExportableState):
    """Writes every checkpoint of a run, whole or not at all, and rotates afterwards.

    For `dylora_moe.training.MoETrainer`, which writes nothing itself and resumes exactly. A stock Trainer would write
    the merged model into every checkpoint; with `save_strategy="no"` it does not, and this callback saves by itself
    every `save_steps` steps and at the end, and keeps `save_total_limit`. Such a run can be resumed with
    --resume-weights-only.

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
        self.trainer_saves = True  # MoETrainer says that it does not
        self._due = False

    def state(self) -> dict:
        """What trainer_state.json keeps of this callback."""
        return {"args": {}, "attributes": {"run": self.run}}

    # ---- as the Trainer calls it ----

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Refuse to start where a save would fail or a part of the mixture would stay as it is."""
        with ranks.together():
            if self.trainer_saves and args.save_strategy != "no":
                raise UsageError(
                    "this Trainer would write the merged model into every checkpoint: use "
                    'dylora_moe.training.MoETrainer, or save_strategy="no", with which this callback saves by itself '
                    "every save_steps steps"
                )
            model.check_optimizer(optimizer)
            if args.should_save:
                commit.make_run_dir(args.output_dir)
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
        with ranks.together():
            _check_finite(model, state.global_step)
            rng_state, digest = training_state.rng_state(), _digest(model)
        rng_states = _agreed(rng_state, digest)
        outputs = checkpoint.probe_outputs(model) if model.sharded else None  # every rank takes part

        def training_files(folder: Path) -> None:
            training_state.write(
                folder, optimizer=optimizer, scheduler=lr_scheduler, trainer_state=state, rng_states=rng_states
            )

        with ranks.together():
            if ranks.is_first():
                checkpoint.save(
                    Path(args.output_dir, self.name.format(step=state.global_step)),
                    model,
                    step=state.global_step,
                    skills=self.skills,
                    training_files=training_files if optimizer is not None else None,
                    outputs=outputs,
                )
                if getattr(args, "save_total_limit", None):
                    _rotate(args, state)

    # ---- with a stock Trainer ----

    def on_step_begin(self, args, state, control, **kwargs):
        if self._due:
            self._due = False
            self.on_save(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        """Only now is the step evaluated and logged: what is due is saved when the next one begins."""
        self._due = self.trainer_saves and args.save_steps >= 1 and state.global_step % args.save_steps == 0

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if self.trainer_saves:
            control.should_training_stop = True
            self.on_save(args, state, control, model=model, **kwargs)


def _check_finite(model: DyLoRAMoE, step: int) -> None:
    extremes = {name: torch.stack(torch.aminmax(p.detach())) for name, p in model.trained_parameters().items()}
    broken = [
        name for name, least_and_most in extremes.items() if not least_and_most.isfinite().all()
    ]  # NaN shows, too
    if broken:
        raise UsageError(
            f"training has diverged at step {step}, nothing was saved: NaN or infinity in\n{listed(broken)}\n"
            "Go on from an earlier checkpoint or start again, with a lower learning rate"
        )


def _agreed(rng_state: dict, digest: str) -> list[dict]:
    """The random generators of every rank; an error where the ranks' experts or routers are not the same."""
    states, digests = zip(*ranks.gather((rng_state, digest)), strict=True)
    if len(set(digests)) > 1:
        found = ", ".join(f"rank {rank}: {digest[:12]}" for rank, digest in enumerate(digests))
        raise UsageError(f"the ranks have drifted apart, nothing was saved: experts or router differ ({found})")
    return list(states)


def _digest(model: DyLoRAMoE) -> str:
    """A hash of what is trained, to compare ranks with; empty where there is one."""
    if ranks.world()[1] == 1:
        return ""
    digest = hashlib.sha256()
    for parameter in model.trained_parameters().values():
        digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def _rotate(args, state) -> None:
    """Keep the newest checkpoints and, of those that were evaluated, the best."""
    steps = [found.step for found in commit.checkpoints(args.output_dir)]
    metric = f"eval_{(args.metric_for_best_model or 'loss').removeprefix('eval_')}"
    best = training_state.best_step(state.log_history, steps, metric, greater=bool(args.greater_is_better))
    commit.rotate(args.output_dir, args.save_total_limit, keep=[] if best is None else [best])


# ---- command line ----


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="train.py", description=__doc__)
    whole, real = (lambda least: cli.number(int, least)), (lambda least, most=None: cli.number(float, least, most))

    model = parser.add_argument_group("model")
    model.add_argument("--model", help=f"hub id, folder, GGUF file or preset ({bases.DEFAULT_MODEL})")
    model.add_argument(
        "--weights", choices=("auto", "pretrained", "random"), default="pretrained", help="of the base (pretrained)"
    )
    model.add_argument("--hf-token", help="for gated models and data; default HF_TOKEN or the login")
    model.add_argument("--dtype", help="of the base: float32, bfloat16, float16 or float64 (default: the config's)")
    model.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (auto)")
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
    training.add_argument("--learning-rate", type=cli.number(float, above=0), default=1e-3, help="(1e-3)")
    training.add_argument("--lr-schedule", choices=SCHEDULES, default="cosine", help="(cosine)")
    training.add_argument("--warmup", type=real(0), default=0.03, help="steps, or a fraction below 1 (0.03)")
    training.add_argument("--weight-decay", type=real(0), default=0.0, help="(0)")
    training.add_argument("--label-smoothing", type=real(0, 0.99), default=0.0, help="(0)")
    training.add_argument("--batch-size", type=whole(1), default=4, help="blocks per step and process (4)")
    training.add_argument("--grad-accum", type=whole(1), default=1, help="micro-batches per step (1)")
    training.add_argument("--max-steps", type=whole(1), help="default: --epochs")
    training.add_argument("--epochs", type=cli.number(float, above=0), help="(1)")
    training.add_argument("--gradient-checkpointing", action="store_true", help="less memory, about a third slower")
    training.add_argument("--seed", type=cli.number(int, 0, MAX_SEED), default=0, help="(0)")
    training.add_argument(
        "--early-stopping", type=whole(1), metavar="N", help="stop after N evaluations without a better one"
    )

    run = parser.add_argument_group("run")
    run.add_argument("--output-dir", type=cli.path, help="the run folder (runs/demo with --demo)")
    run.add_argument("--logging-steps", type=whole(1), default=10, help="(10)")
    run.add_argument("--eval-steps", type=whole(0), default=0, help="0: at the end only (0)")
    run.add_argument("--save-steps", type=whole(0), default=100, help="0: at the end only (100)")
    run.add_argument("--save-total-limit", type=whole(1), help="keep that many checkpoints, and the best")
    run.add_argument(
        "--resume", type=cli.path, nargs="?", const="auto", metavar="DIR", help="from the newest checkpoint, or DIR"
    )
    run.add_argument(
        "--resume-weights-only",
        action="store_true",
        help="with fresh optimizer and data order; from step 0 in a new folder",
    )
    run.add_argument("--accept-changes", action="store_true", help="resume although settings differ")
    run.add_argument("--report-to", choices=REPORTS, default="none", help="(none)")
    run.add_argument(
        "--config", type=cli.path, metavar="FILE", help="YAML or JSON with any of these settings; flags win"
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
    args.model = args.model or bases.DEFAULT_MODEL
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


def _check_arguments(parser: cli.Parser, args) -> None:
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


def _read_config(parser: cli.Parser, path: str) -> dict:
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
    return cli.run(_main, argv, prog="train.py")


def _main(argv: Sequence[str] | None) -> int:
    args = parse_arguments(argv)

    from dylora_moe import run  # the Trainer and the data sets, which the callback's other users do not need

    def say(line: str) -> None:
        if ranks.is_first():
            print(line, flush=True)

    try:
        with interrupts.handled():  # before the first step and after the last; in between, a signal saves
            return run.execute(args, PeftCheckpointCallback, say)
    except interrupts.Interrupted as error:
        print(f"train.py: {error}", file=sys.stderr)
        return error.exit_code
    except CheckpointError as error:  # a run that cannot start: 2, as for all that a user can mend
        raise UsageError(str(error)) from error


if __name__ == "__main__":
    raise SystemExit(main())
