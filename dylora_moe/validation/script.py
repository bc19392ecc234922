"""How the three scripts run: the checks in their order, and the report at the end."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence

from ..errors import UsageError
from ..system import interrupts, machine
from ..system.command_line import CANNOT_RUN, FAILED, INTERRUPTED, PASSED, explain, prepare_streams, say
from .flags import QUICK, Script, given_targets, parse
from .report import Printer, Report, annotate, can_be_written, write_text
from .run import Run


def run_script(
    script: Script, description: str, checkpoint_callback: Callable[[], type], argv: Sequence[str] | None = None
) -> int:
    """Run a script: print what it checks, write the JSON, and return the exit code.

    Args:
        description: The docstring of the script, for --help.
        checkpoint_callback: Returns the class of the callback that saves, `PeftCheckpointCallback`. It is called only
            once the flags are known to be right, since importing that class takes seconds.
    """
    started = time.perf_counter()
    prepare_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    asked = given_targets(argv)
    targets = {name: target for name, target in asked.items() if can_be_written(target)}
    report, printer = Report(script.name), Printer(to_stderr="-" in targets.values())
    with interrupts.handled():
        try:
            for name in asked.keys() - targets.keys():  # told before the work, not after it
                raise UsageError(f"--{name} {asked[name]}: expected a file in a folder that can be written to.")
            _run_checks(Run(script, parse(script, argv, description), report, printer, checkpoint_callback))
            report.exit_code = PASSED if report.passed else FAILED
        except SystemExit:  # --help
            raise
        except BaseException as error:
            report.exit_code, report.error = _explain(interrupts.arrived() or error)
    report.seconds = time.perf_counter() - started
    report.peak_memory_bytes = machine.peak_memory()
    return _finish(report, printer, script.success, targets)


def _run_checks(run: Run) -> None:
    """Import torch and what needs it only now: it takes seconds, and refusing a flag does not need it."""
    if run.script is QUICK:
        from .environment import check_environment as run_checks
    elif run.args.checkpoint:
        from .existing import check_existing_checkpoint as run_checks
    else:
        from .sequence import check_new_checkpoint as run_checks
    run_checks(run)


def _explain(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the message for an error."""
    if isinstance(error, KeyboardInterrupt):
        return getattr(error, "exit_code", INTERRUPTED), str(error) or "interrupted"
    message = explain(error)[1]
    if message is None:  # an error in this package: whoever reports it needs the traceback
        say("".join(traceback.format_exception(error)).rstrip(), sys.stderr)
        message = f"unexpected {type(error).__name__}: {error}"
    return CANNOT_RUN, message


def _finish(report: Report, printer: Printer, success: str, targets: Mapping[str, str]) -> int:
    if report.error is None:
        printer.summary(report, success)
    else:
        printer.error(report.error)
    annotate(report, printer)
    for name, target in targets.items():
        try:
            write_text(report.as_json() if name == "json" else report.as_junit(), target)
        except UsageError as error:
            printer.error(f"--{name}: {error}")
            report.exit_code = report.exit_code or CANNOT_RUN
    return report.exit_code
