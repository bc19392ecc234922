"""The three scripts' common driver: what is run in which order, and how its end is reported."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import UsageError
from ..system import command_line, interrupts, machine
from .flags import QUICK, Script, build_parser, check_contradictions, given_json_target
from .report import Printer, annotate, write_json
from .run import Run


def run_script(
    script: Script, description: str, checkpoint_callback: Callable[[], type], argv: Sequence[str] | None = None
) -> int:
    """Run a script: print, write the JSON, return the exit code.

    Args:
        description: the script's docstring.
        checkpoint_callback: returns the class of the callback that saves, `PeftCheckpointCallback`; called once the
            flags are known to be right.
    """
    started = time.perf_counter()
    command_line.prepare_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    asked = given_json_target(argv)
    target = asked if asked and _can_be_written(asked) else None
    run = Run(script, Printer(to_stderr=target == "-"), checkpoint_callback)
    with interrupts.handled():
        try:
            if asked and target is None:  # known before the work, not after it
                raise UsageError(f"--json {asked}: expected a file in a folder that can be written to.")
            run.args = build_parser(script, description).parse_args(argv)
            _run_checks(run)
            run.report.exit_code = command_line.PASSED if run.report.passed else command_line.FAILED
        except BaseException as error:
            if isinstance(error, SystemExit):  # --help
                raise
            run.report.exit_code, run.report.error = _explain(interrupts.arrived() or error)
        with interrupts.shielded():
            run.report.seconds = time.perf_counter() - started
            run.report.peak_memory_bytes = machine.peak_memory()
            return _finish(run, target)


def _run_checks(run: Run) -> None:
    """The door to torch: what is imported here takes seconds, and is not needed to refuse a flag."""
    if run.script is QUICK:
        from .environment import check_environment as run_checks
    else:
        check_contradictions(run.script, run.args)
        from .sequence import check_checkpoint as run_checks
    run_checks(run)


def _explain(error: BaseException) -> tuple[int, str]:
    """The exit code and the one message."""
    if isinstance(error, KeyboardInterrupt):
        return getattr(error, "exit_code", command_line.INTERRUPTED), str(error) or "interrupted"
    message = command_line.explain(error)[1]
    if message is None:  # a mistake of ours: whoever reports it needs to see where
        traceback.print_exception(error)
        message = f"unexpected {type(error).__name__}: {error}"
    return command_line.CANNOT_RUN, message


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
            return report.exit_code or command_line.CANNOT_RUN
    return report.exit_code
