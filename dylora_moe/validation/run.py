"""One run of a script: its checks in order, each printed and added to the report."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable

from ..system import interrupts
from .flags import Script
from .report import CheckResult, Printer, Report, timed


class Run:
    """One run of a script.

    Args:
        checkpoint_callback: returns the class of the callback that saves, `PeftCheckpointCallback`; called once the
            flags are known to be right.
    """

    args: Namespace

    def __init__(self, script: Script, printer: Printer, checkpoint_callback: Callable[[], type]):
        self.script = script
        self.report = Report(script.name)
        self.printer = printer
        self.checkpoint_callback = checkpoint_callback

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
