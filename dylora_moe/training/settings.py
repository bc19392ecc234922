"""The settings of a training run: the flags of train.py and the keys of its --config file."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..base.find import DEFAULT_MODEL
from ..base.source import QUANTIZATIONS
from ..constants import MAX_EXPERTS, MAX_SEED
from ..errors import UsageError
from ..system.command_line import number, path
from ..system.settings import build_parser, flag, given, read_config, spelled

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
MIXINGS = ("equal", "proportional")
ROUTES = ("specialised", "joint")
REPORTS = ("none", "tensorboard", "wandb", "trackio")
DEMO = {  # the settings of --demo, over which a --config file and flags win
    "experts": 2, "lora_r": 8, "lora_alpha": 16, "targets": ("all-linear",), "block_size": 128, "batch_size": 8,
    "max_steps": 60, "save_steps": 30, "learning_rate": 1e-2, "device": "cpu", "output_dir": "runs/demo",
}  # fmt: skip
# What a checkpoint has fixed for the mixture that grows from it.
FIXED_IN_GROWTH = (
    "experts", "lora_r", "lora_alpha", "lora_dropout", "targets", "top_k", "temperature", "balance_coefficient",
    "route", "demo", "quantize",
)  # fmt: skip
JOINT_ONLY = ("temperature", "balance_coefficient")  # what only a router that is trained with its experts uses
RIVALS = {"max_steps": "epochs", "epochs": "max_steps"}  # whoever sets the one discards a weaker setting of the other


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The settings of a run.

    Raises:
        UsageError: If settings contradict each other, or one that is needed is missing.
    """

    model: str | None = flag(
        None, f"base model: hub id, folder, GGUF file or preset (default: {DEFAULT_MODEL})", "model"
    )
    weights: str = flag(
        "pretrained", "weights of the base model (default: pretrained)", choices=("auto", "pretrained", "random")
    )
    hf_token: str | None = flag(
        None, "token for gated models and data (default: HF_TOKEN, or the stored login)", secret=True
    )
    dtype: str | None = flag(
        None, "dtype of the base model: float32, bfloat16, float16 or float64 (default: the one in its config)"
    )
    quantize: str = flag(
        "none",
        "quantize the base model with bitsandbytes as it is loaded: nf4 (4 bits) or int8 (default: none)",
        choices=tuple(QUANTIZATIONS),
    )
    device: str = flag("auto", "auto, cpu, cuda or mps (default: auto)")
    experts: int | None = flag(
        None,
        "number of experts (default: one for each data set; with --route joint 2); if there are more experts than data "
        "sets, the documents are clustered",
        type=number(int, 1, MAX_EXPERTS),
    )
    lora_r: int = flag(16, "rank of each expert (default: 16)", type=number(int, 1))
    lora_alpha: float = flag(32, "each expert is scaled by alpha / r (default: 32)", type=number(float, above=0))
    lora_dropout: float = flag(0.05, "dropout of the experts' inputs (default: 0.05)", type=number(float, 0, 0.99))
    targets: tuple[str, ...] | None = flag(
        None,
        "names of the linear layers that get experts, as in q_proj v_proj or q_proj,v_proj, or all-linear "
        "(default: q/k/v/o_proj)",
        nargs="+",
    )
    top_k: int | None = flag(None, "experts per token once mature (default: min(2, experts))", type=number(int, 1))
    temperature: float = flag(
        1.0, "with --route joint, temperature of the router's softmax (default: 1.0)", type=number(float, above=0)
    )
    balance_coefficient: float = flag(
        0.01, "with --route joint, weight of the load-balancing loss (default: 0.01)", type=number(float, 0)
    )

    route: str = flag(
        "specialised",
        "specialised: each data set is a skill that trains an expert of its own, and the router is fitted to their "
        "texts; joint: all data train all experts and the router together (default: specialised)",
        choices=ROUTES,
    )

    data: tuple[str, ...] = flag(
        (), "file, folder or data set of the Hub; repeatable", "data", action="append", metavar="NAME_OR_PATH[=WEIGHT]"
    )
    mixing: str = flag(
        "equal",
        "equal: as many blocks of each data set, smaller ones repeated; proportional: each block once (default: equal)",
        choices=MIXINGS,
    )
    eval_data: tuple[str, ...] = flag(
        (),
        "evaluate on this instead of a held-out part of --data; repeatable. If it goes by the name of a data set of "
        "--data, or both are the only ones, it tells the loss of that skill",
        action="append",
        metavar="NAME_OR_PATH",
    )
    eval_fraction: float = flag(
        0.05, "part of each data set's documents to hold out (default: 0.05)", type=number(float, most=0.9, above=0)
    )
    eval_blocks: int | None = flag(
        None,
        "evaluate on at most that many blocks per data set (default: 64 held-out ones, all of --eval-data)",
        type=number(int, 1),
    )
    block_size: int = flag(512, "tokens per block (default: 512)", type=number(int, 8))

    learning_rate: float = flag(1e-3, "peak learning rate (default: 1e-3)", "training", type=number(float, above=0))
    lr_schedule: str = flag("cosine", "learning-rate schedule (default: cosine)", choices=SCHEDULES)
    warmup: float = flag(
        0.03, "warmup steps, or a fraction of all steps if below 1 (default: 0.03)", type=number(float, 0)
    )
    weight_decay: float = flag(0.0, "weight decay of AdamW (default: 0)", type=number(float, 0))
    label_smoothing: float = flag(0.0, "label smoothing in training (default: 0)", type=number(float, 0, 0.99))
    batch_size: int = flag(4, "blocks per micro-batch and process (default: 4)", type=number(int, 1))
    grad_accum: int = flag(1, "micro-batches per step (default: 1)", type=number(int, 1))
    max_steps: int | None = flag(None, "number of steps (default: as many as --epochs takes)", type=number(int, 1))
    epochs: float | None = flag(None, "passes over the mixed data (default: 1)", type=number(float, above=0))
    gradient_checkpointing: bool = flag(False, "use less memory; about a third slower")
    seed: int = flag(0, "seed of everything that is random (default: 0)", type=number(int, 0, MAX_SEED))
    early_stopping: int | None = flag(
        None, "stop after N evaluations without improvement", type=number(int, 1), metavar="N"
    )

    grow: bool = flag(
        False,
        "go on from the newest checkpoint of the run folder: each --data that is new gets an expert of its own, the "
        "others stay as they are",
        "growth",
    )
    from_: str | None = flag(
        None,
        "with --grow: go on from this checkpoint, in a new run folder",
        type=path,
        metavar="CHECKPOINT",
        dest="from_",
    )
    update: bool = flag(False, "with --grow: data of a known skill train the expert that has it further")

    output_dir: str = flag(
        "", "run folder, for checkpoints and tokenizer (default with --demo: runs/demo)", "run", type=path
    )
    logging_steps: int = flag(10, "steps between log lines (default: 10)", type=number(int, 1))
    eval_steps: int = flag(0, "steps between evaluations; 0: only at the end (default: 0)", type=number(int, 0))
    save_steps: int = flag(100, "steps between checkpoints; 0: only at the end (default: 100)", type=number(int, 0))
    save_total_limit: int | None = flag(
        None, "number of checkpoints to keep: the newest ones, and the best", type=number(int, 1)
    )
    resume: str | None = flag(
        None, "continue from the newest checkpoint, or from DIR", type=path, nargs="?", const="auto", metavar="DIR"
    )
    resume_weights_only: bool = flag(
        False,
        "take only the weights of the checkpoint: optimizer and data order start afresh, in a new folder at step 0",
    )
    accept_changes: bool = flag(False, "resume although settings or data differ")
    report_to: str = flag("none", "where to report metrics (default: none)", choices=REPORTS)
    config: str | None = flag(
        None, "YAML or JSON file with any of these settings; flags take precedence", type=path, metavar="FILE"
    )
    demo: bool = flag(False, "train a tiny model on this machine's Python sources, offline")

    @property
    def base_model(self) -> str:
        """The name of the base model: `model`, or the default."""
        return self.model or DEFAULT_MODEL

    @property
    def num_experts(self) -> int:
        """The number of experts: `experts`, or what follows from the data."""
        return self.experts or 1

    def __post_init__(self) -> None:
        """Check what no single flag can see, and divide targets at commas."""
        if self.targets is not None:
            names = tuple(name for word in self.targets for name in re.split(r"[,\s]+", word) if name)
            object.__setattr__(self, "targets", names)
            if not names:
                raise UsageError("--targets: expected names of linear layers, got none; as in --targets q_proj v_proj")
        if self.grow:
            self._check_growth()
        elif self.from_ or self.update:
            raise UsageError(f"--{'from' if self.from_ else 'update'} needs --grow")
        if self.experts is None and not self.grow:
            experts = 2 if self.route == "joint" else max(len(self.data), 1)
            object.__setattr__(self, "experts", experts)
        if not self.output_dir:
            raise UsageError("--output-dir is needed: the folder for checkpoints")
        if not self.data and not self.demo:
            raise UsageError("--data is needed: a file, a folder or the name of a hub data set (or --demo)")
        if self.max_steps and self.epochs:
            raise UsageError("--max-steps and --epochs contradict each other: give one")
        if self.eval_data and self.eval_fraction != type(self).eval_fraction:
            raise UsageError(
                "--eval-data and --eval-fraction contradict each other: with --eval-data nothing is held out"
            )
        if self.route == "specialised" and not self.grow and self.num_experts < len(self.data):
            raise UsageError(
                f"--experts {self.experts}: each of the {len(self.data)} data sets needs an expert of its own; leave "
                "--experts out, or train all experts on all data with --route joint"
            )
        if self.top_k and not self.grow and self.top_k > self.num_experts:
            raise UsageError(f"--top-k {self.top_k} and --experts {self.experts} contradict each other")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise UsageError(f"--warmup {self.warmup:g}: expected a whole number of steps, or a fraction below 1")
        if self.early_stopping and not self.eval_steps:
            raise UsageError("--early-stopping needs --eval-steps")
        if self.resume_weights_only and self.resume is None:
            raise UsageError("--resume-weights-only needs --resume")
        if self.report_to != "none" and importlib.util.find_spec(self.report_to) is None:
            raise UsageError(f"--report-to {self.report_to}: the package {self.report_to} is not installed")

    def _check_growth(self) -> None:
        """Check that nothing is asked for which the checkpoint that grows has fixed."""
        fixed = [name for name in FIXED_IN_GROWTH if getattr(self, name) != getattr(type(self), name)]
        if fixed:
            raise UsageError(
                f"{', '.join(map(spelled, fixed))}: --grow takes it from the checkpoint that grows; leave it out"
            )
        if self.resume_weights_only:
            raise UsageError(
                "--resume-weights-only and --grow contradict each other: --grow takes only the weights. A growth that "
                "cannot be resumed begins again from the checkpoint before it: --grow --from CHECKPOINT and another "
                "--output-dir"
            )


def parse(argv: Sequence[str] | None, description: str | None = None) -> TrainSettings:
    """Return the settings of a command line. Flags win over the --config file, which wins over those of --demo.

    Args:
        argv: The words of the command line; None for those of this process.
        description: What --help says above the flags.

    Raises:
        UsageError: If a flag or a setting of the file is unknown, wrong, missing or contradicts another.
    """
    parser = build_parser(TrainSettings, prog="train.py", description=description)
    flags = given(parser, argv)
    file = read_config(TrainSettings, parser, flags["config"]) if "config" in flags else {}
    demo = DEMO if flags.get("demo") or file.get("demo") else {}
    try:
        return TrainSettings(**_over(_over(demo, file), flags))
    except UsageError as error:
        parser.error(str(error))


def _over(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in lower.items() if RIVALS.get(name) not in upper} | upper
