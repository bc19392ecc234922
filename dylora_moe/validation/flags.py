"""The three scripts: what sets them apart, and their settings, each of which is a flag."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import formats
from ..checkpoint.config import CheckpointConfig
from ..constants import MAX_EXPERTS, MAX_SEED
from ..errors import UsageError
from ..system.command_line import number, path, text
from ..system.settings import build_parser, flag, given, spelled
from . import workspace
from .report import JSON_HELP, JUNIT_HELP, REPORTS, report_file

DEFAULTS = {"experts": 2, "lora_r": 16, "lora_alpha": 32}
WEIGHTS = ("auto", "pretrained", "random", "none")


@dataclass(frozen=True)
class Script:
    """What sets a script apart."""

    name: str
    folder_prefix: str
    headings: dict[str, str]  # of each check, in order
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


@dataclass(frozen=True, kw_only=True)
class ScriptSettings:
    """The settings of a script. Where `experts`, `lora_r` or `lora_alpha` is None, DEFAULTS or the checkpoint has it.

    Raises:
        UsageError: If settings contradict each other.
    """

    json: str | None = flag(None, JSON_HELP, metavar="FILE", type=report_file)
    junit: str | None = flag(None, JUNIT_HELP, metavar="FILE", type=report_file)
    model: str | None = flag(
        None, "base model: hub id, folder, GGUF file or preset (default: google/codegemma-2b)", type=text
    )
    experts: int | None = flag(None, "number of experts (default: 2)", type=number(int, 1, MAX_EXPERTS))
    lora_r: int | None = flag(None, "rank of each expert (default: 16)", type=number(int, 1))
    lora_alpha: float | None = flag(
        None, "each expert is scaled by alpha / r (default: 32)", type=number(float, above=0)
    )
    hf_token: str | None = flag(None, "token for gated models (default: HF_TOKEN, or the stored login)", secret=True)
    weights: str = flag("auto", "", choices=WEIGHTS)  # each script has its own help for this flag
    device: str = flag("cpu", "cpu, cuda, mps or auto (default: cpu)", type=text)
    dtype: str | None = flag(
        None,
        "dtype of the base model: float32, bfloat16, float16 or float64 (default: the one in its config)",
        type=text,
    )
    output_dir: str | None = flag(None, "write the checkpoint to DIR/checkpoint and keep it", metavar="DIR", type=path)
    max_size_mb: float = flag(
        500, "largest size of the checkpoint in MB (default: 500)", type=number(float, most=1e12, above=0)
    )
    seed: int = flag(0, "seed of everything that is random (default: 0)", type=number(int, 0, MAX_SEED))
    keep_checkpoint: bool = flag(False, "do not remove the checkpoint at the end")
    checkpoint: str | None = flag(
        None, "validate this checkpoint, without changing it, instead of saving one", metavar="DIR", type=path
    )

    def __post_init__(self) -> None:
        if self.checkpoint and (self.output_dir or self.keep_checkpoint):
            raise UsageError(
                "--checkpoint validates what is there; --output-dir and --keep-checkpoint do not go with it."
            )


def parse(script: Script, argv: Sequence[str], description: str | None = None) -> ScriptSettings:
    """Return the settings of a command line, after every check that needs no library.

    Raises:
        UsageError: If a flag is unknown or wrong, or contradicts another one or the script.
    """
    names = [*REPORTS] if script is QUICK else None
    weights = "auto: the real ones if they are accessible, otherwise random" if script.reloads else "auto: none"
    parser = build_parser(ScriptSettings, names, {"weights": weights}, prog=script.file, description=description)
    settings = ScriptSettings(**given(parser, argv))
    if settings.weights == "none" and script.reloads:
        raise UsageError(
            f"--weights none: comparing logits needs base weights; without them run\n    {cheaper(settings)}"
        )
    if settings.output_dir:
        workspace.check_output_folder(Path(settings.output_dir))
    return settings


def given_targets(argv: Sequence[str]) -> dict[str, str]:
    """Return the values of --json and --junit, of those that are given, even where another flag is wrong."""
    found: dict[str, str] = {}
    for name in REPORTS:
        with suppress(UsageError):
            value = getattr(build_parser(ScriptSettings, [name], add_help=False).parse_known_args(argv)[0], name, None)
            found |= {name: value} if value else {}
    return found


def check_against(args: ScriptSettings, config: CheckpointConfig) -> None:
    """Refuse a flag that contradicts the config.json of the checkpoint that --checkpoint names.

    Raises:
        UsageError: For the first such flag.
    """
    found: dict[str, set[float]] = {
        "experts": {config.num_experts},
        "lora_r": {expert.r for expert in config.experts},
        "lora_alpha": {expert.lora_alpha for expert in config.experts},
    }
    for name, values in found.items():
        asked = getattr(args, name)
        if asked is not None and values != {asked}:
            there = ", ".join(f"{value:g}" for value in sorted(values))
            where = f"{args.checkpoint}/{formats.CONFIG}"
            raise UsageError(f"{spelled(name)} {asked:g} contradicts {where}, which has {there}: leave the flag out.")


def cheaper(args: ScriptSettings) -> str:
    """Return the command that checks the same without base weights."""
    names = [name for name in (*DEFAULTS, "model", "checkpoint") if getattr(args, name) is not None]
    return " ".join([f"python {MINIMAL.file}", *(f"{spelled(name)} {getattr(args, name)}" for name in names)])
