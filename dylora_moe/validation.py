"""The three scripts' common driver: flags, what is run in which order, and where the checkpoint is written."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import cli, commit, formats, machine
from .checks import CheckResult, timed
from .errors import UsageError
from .reporting import Printer, Report, annotate, write_json

if TYPE_CHECKING:
    from .model import DyLoRAMoE

MAX_EXPERTS = 1024
DEFAULTS = {"model": None, "experts": 2, "lora_r": 16, "lora_alpha": 32}
SMALL_FILES = 1 << 20  # more than everything in a checkpoint but adapters and the probe of many experts
MINIMAL_COMMAND = "python test_checkpoint_minimal.py"


@dataclass(frozen=True)
class Script:
    """What sets a script apart."""

    name: str
    folder_prefix: str
    headings: dict[str, str]  # by check, in order
    success: str = "ALL TESTS PASSED"
    reloads: bool = False


QUICK = Script("quick", "dylora_checkpoint_quick_", {}, success="ALL QUICK TESTS PASSED")
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


class Terminated(Exception):
    """SIGTERM arrived: what is temporary is removed on the way out."""


# ---- flags ----


def build_parser(script: Script, description: str) -> cli.Parser:
    parser = cli.Parser(prog=f"test_checkpoint_{script.name}.py", description=description)
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON; - for standard output")
    if script is QUICK:
        return parser
    default_weights = "auto: real ones where they can be had, otherwise random" if script.reloads else "auto: none"
    parser.add_argument("--model", help="hub id, folder, GGUF file or preset (google/codegemma-2b)")
    parser.add_argument("--experts", type=cli.number(int, 1, MAX_EXPERTS), help="number of experts (2)")
    parser.add_argument("--lora-r", type=cli.number(int, 1), help="rank of each expert (16)")
    parser.add_argument("--lora-alpha", type=cli.number(float, above=0), help="scales by alpha / r (32)")
    parser.add_argument("--hf-token", help="for gated models; default HF_TOKEN or the login")
    parser.add_argument(
        "--weights", choices=("auto", "pretrained", "random", "none"), default="auto", help=default_weights
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps or auto (%(default)s)")
    parser.add_argument("--dtype", help="of the base: float32, bfloat16 or float16 (default: the config's)")
    parser.add_argument("--output-dir", metavar="DIR", help="write DIR/checkpoint and keep it")
    parser.add_argument("--max-size-mb", type=cli.number(float, above=0), default=500, help="limit of the size (500)")
    parser.add_argument("--seed", type=cli.number(int, 0), default=0, help="of what is random (0)")
    parser.add_argument("--keep-checkpoint", action="store_true", help="do not remove the checkpoint at the end")
    parser.add_argument(
        "--checkpoint", metavar="DIR", help="validate this checkpoint instead of saving one; it is not changed"
    )
    return parser


def main(script: Script, description: str, argv: Sequence[str] | None = None) -> int:
    """Run a script: print, write the JSON, return the exit code."""
    started = time.perf_counter()
    cli.prepare_streams()
    args = build_parser(script, description).parse_args(argv)
    printer = Printer(to_stderr=args.json == "-")
    report = Report(script.name)
    try:
        with _terminable():
            _check_json_target(args.json)
            run = _run_quick if script is QUICK else _run
            run(script, args, report, printer)
        report.exit_code = cli.PASSED if report.passed else cli.FAILED
    except KeyboardInterrupt:
        report.exit_code, report.error = cli.INTERRUPTED, "interrupted"
    except Terminated:
        report.exit_code, report.error = cli.TERMINATED, "terminated"
    except Exception as error:
        _, report.error = cli.explain(error)
        report.exit_code = cli.CANNOT_RUN
        if report.error is None:
            raise
    report.seconds = time.perf_counter() - started
    report.peak_memory_bytes = machine.peak_memory()
    if report.error is None:
        printer.summary(report, script.success)
    else:
        print(f"{cli.FAIL_MARK} {report.error}", file=sys.stderr)
    annotate(report, printer)
    if args.json:
        with suppress(OSError):
            write_json(report, args.json)
    return report.exit_code


def _check_json_target(target: str | None) -> None:
    """A result that cannot be written is known before the work, not after it."""
    if target and target != "-":
        folder = Path(target).absolute().parent
        if Path(target).is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UsageError(f"--json {target}: expected a file in a folder that can be written to")


@contextmanager
def _terminable() -> Iterator[None]:
    def stop(number, frame):
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: whoever started it handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# ---- quick ----


def _run_quick(script: Script, args, report: Report, printer: Printer) -> None:
    from train import PeftCheckpointCallback

    from . import checks

    save = checks.save_with(PeftCheckpointCallback)
    for check, extra in (
        (checks.check_peft, ()),
        (checks.check_safetensors, ()),
        (checks.check_quick_structure, (save,)),
    ):
        try:
            result = timed(check, *extra)
        except UsageError:
            raise
        except Exception as error:  # whatever is wrong with the installation is this check's finding
            result = CheckResult(check.__name__.rpartition("_")[2], problems=[f"{type(error).__name__}: {error}"])
        printer.heading(f"TEST: {result.name}")
        printer.result(result)
        report.checks.append(result)


# ---- minimal and full ----


def _run(script: Script, args, report: Report, printer: Printer) -> None:
    from . import checks

    if args.weights == "none" and script.reloads:
        raise UsageError(f"comparing logits needs base weights; without them run\n    {MINIMAL_COMMAND}")
    given = checks.existing_checkpoint(Path(args.checkpoint)) if args.checkpoint else None
    if given is not None and (args.output_dir or args.keep_checkpoint):
        raise UsageError("--checkpoint validates what is there; --output-dir and --keep-checkpoint do not go with it")
    if given is not None:
        _validate(script, args, given, report, printer)
        return
    source, weights = _find_base(script, args, args.model, report, printer)
    configs, router = _mixture(args, report)
    _check_room(script, args, source, weights, report)
    with _target(script, args, report) as target:
        model = _build_model(args, source, weights, configs, router)
        for note in model.notes:
            printer(note)
        _save_and_check(script, args, model, target, report, printer)


def _save_and_check(script: Script, args, model: DyLoRAMoE, target: Path, report: Report, printer: Printer) -> None:
    from train import PeftCheckpointCallback

    from . import checks

    def run(name: str, check: Callable, *extra, **options) -> CheckResult:
        return _step(script, name, report, printer, check, *extra, **options)

    save = run("save", checks.check_save, model, target, checks.save_with(PeftCheckpointCallback))
    printer(f"  {target}")
    if not target.is_dir():
        return
    report.total_bytes = _total_bytes(target)
    structure = run("structure", checks.check_structure, target)
    if script.reloads and save.passed and structure.passed:
        _reload(script, target, model.fresh_base(), model.fresh_base(), report, printer, saved=model)
    elif script.reloads:
        _skip(report, printer, script, "the checkpoint is not sound")
    run("size", checks.check_size, target, args.max_size_mb)


def _validate(script: Script, args, folder: Path, report: Report, printer: Printer) -> None:
    """Checks of a checkpoint that is there already."""
    from . import checks

    report.checkpoint = str(folder)
    report.total_bytes = _total_bytes(folder)
    contents = _peek(folder)
    source = None
    if contents:
        report.experts = contents["num_experts"]
        report.model = contents["base_model"]["name"]
        _check_flags(args, contents)
        if script.reloads or args.model:
            name = args.model or contents["base_model"]["name"]
            if not name:
                raise UsageError(f"{folder}/{formats.CONFIG} names no base model: say which with --model")
            args.dtype = args.dtype or contents["base_model"]["dtype"]
            source, weights = _find_base(script, args, name, report, printer, contents["base_model"]["revision"])
            _check_architecture(source, contents, name)
    structure = _step(script, "structure", report, printer, checks.check_structure, folder)
    if script.reloads and structure.passed:
        _check_room(script, args, source, weights, report, contents)
        base = _load_base(args, source, weights)
        from .model import fresh_base

        _reload(script, folder, base, fresh_base(base), report, printer)
    elif script.reloads:
        _skip(report, printer, script, "the checkpoint is not sound")
    _step(script, "size", report, printer, checks.check_size, folder, args.max_size_mb)


def _reload(script: Script, folder: Path, base, spare, report: Report, printer: Printer, saved=None) -> None:
    from . import checks

    loaded: list = []

    def load() -> CheckResult:
        result, model = checks.check_load(folder, base)
        loaded.append(model)
        return result

    _step(script, "load", report, printer, load)
    if loaded[0] is None:
        _skip(report, printer, script, "the checkpoint was not loaded", only="consistency")
        return
    consistency = checks.check_consistency
    _step(
        script,
        "consistency",
        report,
        printer,
        consistency,
        loaded[0],
        folder,
        saved=saved,
        weights=report.weights,
        spare=spare,
    )


def _step(
    script: Script, name: str, report: Report, printer: Printer, check: Callable, *extra, **options
) -> CheckResult:
    printer.heading(script.headings[name])
    result = timed(check, *extra, **options)
    result.name = name
    printer.result(result)
    report.checks.append(result)
    return result


def _skip(report: Report, printer: Printer, script: Script, why: str, only: str | None = None) -> None:
    """Checks that cannot be made any more have failed."""
    for name in (only,) if only else ("load", "consistency"):
        printer.heading(script.headings[name])
        result = CheckResult(name, problems=[f"not run: {why}"])
        printer.result(result)
        report.checks.append(result)


# ---- what they are run on ----


def _find_base(script: Script, args, name: str | None, report: Report, printer: Printer, revision: str | None = None):
    from . import bases

    weights = args.weights
    if weights == "auto" and not script.reloads:
        weights = "none"
    source, weights = bases.find_base(
        name or bases.DEFAULT_MODEL, weights=weights, token=args.hf_token, revision=revision
    )
    report.model, report.weights = source.name, weights
    if source.note:
        printer(source.note)
    return source, weights


def _mixture(args, report: Report):
    from .config import MoELoraConfig, RouterConfig

    report.experts = args.experts or DEFAULTS["experts"]
    r, alpha = args.lora_r or DEFAULTS["lora_r"], args.lora_alpha or DEFAULTS["lora_alpha"]
    return [MoELoraConfig(r=r, lora_alpha=alpha)] * report.experts, RouterConfig()


def _load_base(args, source, weights: str):
    from . import bases

    return bases.load_base(source, weights, dtype=args.dtype, device=args.device, seed=args.seed)


def _build_model(args, source, weights: str, configs: list, router) -> DyLoRAMoE:
    from . import checks
    from .model import DyLoRAMoE, seeded

    base = _load_base(args, source, weights)
    with seeded(args.seed):
        model = DyLoRAMoE(base, configs, router=router)
    model.base_revision = source.revision
    checks.fill_experts(model, args.seed)
    return model


def _check_room(script: Script, args, source, weights: str, report: Report, contents: dict | None = None) -> None:
    """Estimate memory and disk, and refuse before anything large is allocated or written.

    Experts are float32. Two mixtures hold them, and one more copy of one expert is written or read at a time; logits
    and activations of the few tokens are a small part of the base.
    """
    from . import bases
    from .model import adapter_parameters

    if contents:
        per_expert = max(expert["parameters"] for expert in contents["experts"])
        all_experts = 4 * sum(expert["parameters"] for expert in contents["experts"])
    else:
        per_expert = adapter_parameters(source.config, args.lora_r or DEFAULTS["lora_r"])
        all_experts = 4 * per_expert * report.experts
        folder = Path(args.output_dir) if args.output_dir else Path(tempfile.gettempdir())
        machine.need_disk(all_experts + SMALL_FILES, folder, f"a checkpoint of {report.experts} experts")
    base = 0
    if weights == "pretrained":
        base = bases.parameter_bytes(source.config, args.dtype)
    elif weights == "random":
        base = bases.shared_random_bytes(source.config, args.dtype)
    copies = 2 if script.reloads else 1
    needed = base + copies * all_experts + 2 * 4 * per_expert
    what = f"{report.experts} experts on {source.name} with {weights} weights"
    machine.need_memory(needed, what, cheaper=MINIMAL_COMMAND if script.reloads else None)


def _check_flags(args, contents: dict) -> None:
    """Flags that contradict the checkpoint."""
    found = {
        "experts": {contents["num_experts"]},
        "lora_r": {expert["r"] for expert in contents["experts"]},
        "lora_alpha": {expert["lora_alpha"] for expert in contents["experts"]},
    }
    for name, values in found.items():
        asked = getattr(args, name)
        if asked is not None and values != {asked}:
            flag = "--" + name.replace("_", "-")
            there = ", ".join(f"{value:g}" for value in sorted(values))
            raise UsageError(f"{flag} {asked:g} contradicts {args.checkpoint}, which has {there}; leave the flag out")


def _check_architecture(source, contents: dict, name: str) -> None:
    from . import bases

    here, there = bases.architecture(source.config), contents["base_model"]["architecture"]
    if here["fingerprint"] != there["fingerprint"]:
        keys = [k for k in there if k != "fingerprint" and here.get(k) != there[k]]
        differences = ", ".join(f"{k} {there[k]} there, {here.get(k)} here" for k in keys) or "other parameters"
        trained_on = contents["base_model"]["name"]
        raise UsageError(f"--model {name} is not what the checkpoint was trained on, {trained_on} ({differences})")


def _peek(folder: Path) -> dict:
    """The config of a checkpoint where it can be relied on; what is wrong with it is the structure check's to say."""
    from . import verify

    return verify.inspect_config(folder)


def _total_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def _target(script: Script, args, report: Report) -> Iterator[Path]:
    """Where the checkpoint is written; a temporary folder is removed whatever happens, unless it is to be kept."""
    if args.output_dir:
        folder = Path(args.output_dir)
        target = folder / "checkpoint"
        if target.exists():
            raise UsageError(f"{target} exists already; a checkpoint is never replaced: choose another --output-dir")
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--output-dir {folder}: expected a folder, found a file")
        made = _make_folders(folder)
        try:
            commit.check_writable(folder)
            report.checkpoint = str(target)
            yield target
        except BaseException:
            report.checkpoint = None
            _remove_empty(made)
            raise
        return
    try:
        folder = Path(tempfile.mkdtemp(prefix=script.folder_prefix))
    except OSError as error:
        raise UsageError(f"no temporary folder can be made ({error}); set TMPDIR, or give --output-dir") from None
    keep = False
    try:
        target = folder / "checkpoint"
        report.checkpoint = str(target) if args.keep_checkpoint else None
        yield target
        keep = args.keep_checkpoint
    finally:
        if not keep:
            report.checkpoint = None
            _remove(folder)


def _make_folders(folder: Path) -> list[Path]:
    """Create a folder and its parents; the ones that were not there."""
    missing = [p for p in (folder, *folder.parents) if not p.exists()]
    with commit.explained("create", folder):
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            (folder / commit.LOCK).unlink(missing_ok=True)
            folder.rmdir()


def _remove(folder: Path) -> None:
    """Remove a temporary folder, also when Ctrl-C is pressed again meanwhile."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except (KeyboardInterrupt, Terminated):
        shutil.rmtree(folder, ignore_errors=True)
        raise
