"""The three scripts: what sets them apart, and their flags."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import formats
from ..constants import MAX_EXPERTS, MAX_SEED
from ..errors import UsageError
from ..system import command_line
from . import workspace
from .report import JSON_HELP, report_file

DEFAULTS = {"experts": 2, "lora_r": 16, "lora_alpha": 32}


@dataclass(frozen=True)
class Script:
    """What sets a script apart."""

    name: str
    folder_prefix: str
    headings: dict[str, str]  # by check, in order
    success: str = "ALL TESTS PASSED"
    reloads: bool = False

    @property
    def file(self) -> str:
        return f"test_checkpoint_{self.name}.py"


QUICK = Script(
    "quick",
    "dylora_checkpoint_quick_",
    {name: f"TEST: {name}" for name in ("peft", "safetensors", "structure")},
    success="ALL QUICK TESTS PASSED",
)
MINIMAL = Script(
    "minimal",
    "dylora_checkpoint_minimal_",
    {
        "save": "TEST: Save Checkpoint",
        "structure": "TEST: Verify Checkpoint Structure",
        "size": "TEST: Checkpoint Size",
    },
)
FULL = Script(
    "save_load",
    "dylora_checkpoint_test_",
    {
        "save": "TEST 1: Save Checkpoint",
        "structure": "TEST 2: Verify Checkpoint Structure",
        "load": "TEST 3: Load Checkpoint",
        "consistency": "TEST 4: Output Consistency",
        "size": "TEST 5: Checkpoint Size",
    },
    reloads=True,
)


class ScriptParser(command_line.Parser):
    """Its errors are raised, so that a result in JSON has them too."""

    def error(self, message: str):
        raise UsageError(f"{self.prog}: error: {message}; see {self.prog} --help")


def build_parser(script: Script, description: str) -> command_line.Parser:
    parser = ScriptParser(prog=script.file, description=description)
    parser.add_argument("--json", metavar="FILE", type=report_file, help=JSON_HELP)
    if script is QUICK:
        return parser
    default_weights = "auto: real ones where they can be had, otherwise random" if script.reloads else "auto: none"
    parser.add_argument(
        "--model", type=command_line.text, help="hub id, folder, GGUF file or preset (google/codegemma-2b)"
    )
    parser.add_argument("--experts", type=command_line.number(int, 1, MAX_EXPERTS), help="number of experts (2)")
    parser.add_argument("--lora-r", type=command_line.number(int, 1), help="rank of each expert (16)")
    parser.add_argument("--lora-alpha", type=command_line.number(float, above=0), help="scales by alpha / r (32)")
    parser.add_argument("--hf-token", help="for gated models; default HF_TOKEN or the login")
    parser.add_argument(
        "--weights", choices=("auto", "pretrained", "random", "none"), default="auto", help=default_weights
    )
    parser.add_argument("--device", type=command_line.text, default="cpu", help="cpu, cuda, mps or auto (%(default)s)")
    parser.add_argument(
        "--dtype",
        type=command_line.text,
        help="of the base: float32, bfloat16, float16 or float64 (default: the config's)",
    )
    parser.add_argument("--output-dir", type=command_line.path, metavar="DIR", help="write DIR/checkpoint and keep it")
    parser.add_argument(
        "--max-size-mb",
        type=command_line.number(float, most=1e12, above=0),
        default=500,
        help="limit of the size (500)",
    )
    parser.add_argument("--seed", type=command_line.number(int, 0, MAX_SEED), default=0, help="of what is random (0)")
    parser.add_argument("--keep-checkpoint", action="store_true", help="do not remove the checkpoint at the end")
    parser.add_argument(
        "--checkpoint",
        type=command_line.path,
        metavar="DIR",
        help="validate this checkpoint instead of saving one; it is not changed",
    )
    return parser


def given_json_target(argv: list[str]) -> str | None:
    """The value of --json, also where another flag is wrong."""
    parser = ScriptParser(add_help=False)
    parser.add_argument("--json", type=report_file)
    try:
        return parser.parse_known_args(argv)[0].json
    except UsageError:
        return None


def check_contradictions(script: Script, args: Namespace) -> None:
    """Flags that do not go together, and devices or dtypes that there are not: known before anything is done.

    Raises:
        UsageError: names the flag and what to do.
    """
    if args.weights == "none" and script.reloads:
        raise UsageError(f"--weights none: comparing logits needs base weights; without them run\n    {cheaper(args)}")
    if args.checkpoint and (args.output_dir or args.keep_checkpoint):
        raise UsageError("--checkpoint validates what is there; --output-dir and --keep-checkpoint do not go with it.")
    if args.output_dir:
        workspace.check_output_folder(Path(args.output_dir))


def check_against(args: Namespace, config: dict) -> None:
    """Flags that contradict the config.json of the checkpoint given by --checkpoint.

    Raises:
        UsageError: for the first of them.
    """
    found = {
        "experts": {config["num_experts"]},
        "lora_r": {expert["r"] for expert in config["experts"]},
        "lora_alpha": {expert["lora_alpha"] for expert in config["experts"]},
    }
    for name, values in found.items():
        asked = getattr(args, name)
        if asked is not None and values != {asked}:
            flag = "--" + name.replace("_", "-")
            there = ", ".join(f"{value:g}" for value in sorted(values))
            where = f"{args.checkpoint}/{formats.CONFIG}"
            raise UsageError(f"{flag} {asked:g} contradicts {where}, which has {there}: leave the flag out.")


def cheaper(args: Namespace) -> str:
    """The command that checks the same without base weights."""
    given = [f"--{name.replace('_', '-')} {getattr(args, name)}" for name in (*DEFAULTS, "model", "checkpoint")
             if getattr(args, name) is not None]  # fmt: skip
    return " ".join([f"python {MINIMAL.file}", *given])
