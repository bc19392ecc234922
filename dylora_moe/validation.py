"""The three scripts' common driver: what is run in which order, and how its end is reported."""

from __future__ import annotations

import os
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from . import cli, commit, formats, interrupts, machine, verify, workspace
from . import validation_subject as subject
from .checks import CheckResult, check_save, check_size, check_structure, file_sizes, save_with, timed
from .errors import UsageError
from .manifest import held_still
from .reporting import Printer, Report, annotate, write_json
from .validation_flags import (
    FULL,
    MINIMAL,
    QUICK,
    Script,
    build_parser,
    check_against,
    check_contradictions,
    given_json_target,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .checks_reload import Forwards
    from .model import DyLoRAMoE

__all__ = ["FULL", "MINIMAL", "QUICK", "main"]

QUICK_BYTES = 1 << 20
INSTALL = "pip install -r requirements.txt"


def main(script: Script, description: str, argv: Sequence[str] | None = None) -> int:
    """Run a script: print, write the JSON, return the exit code."""
    started = time.perf_counter()
    cli.prepare_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    asked = given_json_target(argv)
    target = asked if asked and _can_be_written(asked) else None
    run = Run(script, Report(script.name), Printer(to_stderr=target == "-"))
    with interrupts.handled():
        try:
            if asked and target is None:  # known before the work, not after it
                raise UsageError(f"--json {asked}: expected a file in a folder that can be written to.")
            run.args = build_parser(script, description).parse_args(argv)
            run()
            run.report.exit_code = cli.PASSED if run.report.passed else cli.FAILED
        except BaseException as error:
            if isinstance(error, SystemExit):  # --help
                raise
            run.report.exit_code, run.report.error = _explain(interrupts.arrived() or error)
        with interrupts.shielded():
            run.report.seconds = time.perf_counter() - started
            run.report.peak_memory_bytes = machine.peak_memory()
            return _finish(run, target)


def _explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the one message."""
    if isinstance(error, KeyboardInterrupt):
        return getattr(error, "exit_code", cli.INTERRUPTED), str(error) or "interrupted"
    message = cli.explain(error)[1]
    if message is None:  # a mistake of ours: whoever reports it needs to see where
        traceback.print_exception(error)
        message = f"unexpected {type(error).__name__}: {error}"
    return cli.CANNOT_RUN, message


def _can_be_written(json_target: str) -> bool:
    if json_target == "-":
        return True
    path = Path(json_target)
    folder = path.absolute().parent
    return not path.is_dir() and folder.is_dir() and os.access(path if path.exists() else folder, os.W_OK)


def _finish(run: Run, json_target: str | None) -> int:
    report = run.report
    if report.error is None:
        run.printer.summary(report, run.script.success)
    else:
        run.printer.error(report.error)
    annotate(report, run.printer)
    if json_target:
        try:
            write_json(report, json_target)
        except OSError as error:
            run.printer.error(f"--json {json_target}: cannot be written ({error.strerror or error})")
            return report.exit_code or cli.CANNOT_RUN
    return report.exit_code


class Run:
    """One run of a script: its checks in order, each printed and added to the report."""

    args: Namespace

    def __init__(self, script: Script, report: Report, printer: Printer):
        self.script = script
        self.report = report
        self.printer = printer

    def __call__(self) -> None:
        if self.script is QUICK:
            self.check_environment()
            return
        check_contradictions(self.script, self.args)
        if self.args.checkpoint:
            self.validate()
        else:
            self.save_and_validate()

    # ---- one check ----

    def step(self, name: str, check: Callable[..., CheckResult], *args, **options) -> CheckResult:
        interrupts.check()
        self.printer.heading(self.script.headings[name])
        result = timed(check, *args, **options)
        result.name = name
        self.printer.result(result)
        self.report.checks.append(result)
        return result

    def skip(self, why: str, *names: str) -> None:
        """Checks that cannot be made any more have failed."""
        for name in names:
            self.step(name, CheckResult, name, problems=[f"not run: {why}"])

    # ---- quick ----

    def check_environment(self) -> None:
        machine.need_disk(QUICK_BYTES, workspace.temporary_root(), "a checkpoint of a tiny mixture")
        with workspace.temporary(self.script.folder_prefix) as folder:
            self.step("peft", _finding, lambda quick: quick.check_peft())
            self.step("safetensors", _finding, lambda quick: quick.check_safetensors(folder))
            self.step("structure", _finding, lambda quick: quick.check_structure(folder, _saving_as_training()))

    # ---- a checkpoint that is saved to be checked ----

    def save_and_validate(self) -> None:
        source, weights = subject.find_base(self.script, self.args)
        self.report.model, self.report.weights = source.name, weights
        self.report.experts = subject.setting(self.args, "experts")
        if source.note:
            self.printer(source.note)
        subject.check_room_to_save(self.script, self.args, source, weights)
        with self.target() as target:
            model = subject.build_mixture(self.args, source, weights)
            for note in model.notes:
                self.printer(note)
            self.check_saving(model, target)

    @contextmanager
    def target(self) -> Iterator[Path]:
        """Where the checkpoint is to be written; what is not to be kept is gone afterwards."""
        if self.args.output_dir:
            place = workspace.output_folder(Path(self.args.output_dir))
        else:
            place = workspace.temporary(self.script.folder_prefix, keep=self.args.keep_checkpoint)
        target = None
        try:
            with place as folder:
                target = folder / formats.CHECKPOINT
                yield target
        finally:
            if target is not None and target.exists():
                self.report.checkpoint = str(target)

    def check_saving(self, model: DyLoRAMoE, target: Path) -> None:
        forwards = None
        if self.script.reloads:
            from .checks_reload import Forwards

            forwards = Forwards(model)
        with forwards or nullcontext():
            save = self.step("save", check_save, model, target, _saving_as_training())
        if not target.is_dir():
            self.skip("nothing was saved", *[name for name in self.script.headings if name != "save"])
            return
        self.printer(f"  {target}")
        self.report.total_bytes = sum(file_sizes(target).values())
        structure = self.step("structure", check_structure, target)
        if self.script.reloads and save.passed and structure.passed:
            self.check_reloading(target, model.fresh_base(), forwards)
        elif self.script.reloads:
            self.skip("the checkpoint is not sound", "load", "consistency")
        self.step("size", check_size, target, self.args.max_size_mb)

    def check_reloading(self, folder: Path, base: PreTrainedModel, saved: Forwards | None = None) -> None:
        from .checks_reload import check_consistency, check_load

        loaded = []

        def load() -> CheckResult:
            result, instance = check_load(folder, base)
            loaded.append(instance)
            return result

        self.step("load", load)
        if loaded[0] is None:
            self.skip("the checkpoint was not loaded", "consistency")
            return
        self.step("consistency", check_consistency, loaded[0], folder, saved=saved, weights=self.report.weights)

    # ---- a checkpoint that is there already ----

    def validate(self) -> None:
        try:
            folder = commit.checkpoint_folder(Path(self.args.checkpoint))
        except UsageError as error:
            raise UsageError(f"--checkpoint {error}") from None
        with held_still(folder):  # training may rotate it away
            self.validate_folder(folder)

    def validate_folder(self, folder: Path) -> None:
        self.report.checkpoint = str(folder)
        self.report.total_bytes = sum(file_sizes(folder).values())
        config = verify.inspect_config(folder)
        if config:
            self.report.experts = config["num_experts"]
            self.report.model = config["base_model"]["name"]
            check_against(self.args, config)
        structure = self.step("structure", check_structure, folder)
        if structure.passed:
            self.validate_on_base(folder, config)
        elif self.script.reloads:
            self.skip("the checkpoint is not sound", "load", "consistency")
        self.step("size", check_size, folder, self.args.max_size_mb)

    def validate_on_base(self, folder: Path, config: dict) -> None:
        """What needs the base model, or its config."""
        trained_on = config["base_model"]
        name = self.args.model or trained_on["name"]
        if not self.script.reloads and not self.args.model:
            self.report.weights = "none"
            return
        if not name:
            raise UsageError(f"{folder / formats.CONFIG} names no base model: say which with --model.")
        revision = trained_on["revision"] if name == trained_on["name"] else None
        source, weights = subject.find_base(self.script, self.args, name, revision)
        self.report.model, self.report.weights = source.name, weights
        if source.note:
            self.printer(source.note)
        subject.check_architecture(source, config, name)
        if self.script.reloads:
            subject.check_room_to_load(self.args, source, weights, config)
            base = subject.load_base(self.args, source, weights, trained_on["dtype"])
            self.check_reloading(folder, base)


def _finding(check: Callable) -> CheckResult:
    """Whatever is wrong with the installation is what the quick checks are there to find."""
    try:
        from . import checks_quick

        return check(checks_quick)
    except Exception as error:
        if isinstance(error, UsageError) or getattr(error, "errno", None) is not None:  # the disk, not the installation
            raise
        return CheckResult("", problems=[f"{type(error).__name__}: {error}; install the tested versions: {INSTALL}"])


def _saving_as_training() -> Callable:
    from train import PeftCheckpointCallback

    return save_with(PeftCheckpointCallback)
