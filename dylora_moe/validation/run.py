"""One run of a script: its checks in order, each of them printed and added to the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..system import interrupts
from .flags import Script, ScriptSettings
from .report import CheckResult, Printer, Report, timed


@dataclass(frozen=True)
class Run:
    """One run of a script.

    Args:
        checkpoint_callback: Returns the class of the callback that saves, `PeftCheckpointCallback`. It is called only
            once the flags are known to be right, since importing that class takes seconds.
    """

    script: Script
    args: ScriptSettings
    report: Report
    printer: Printer
    checkpoint_callback: Callable[[], type]

    def step(self, name: str, check: Callable[..., CheckResult], *args: Any, **options: Any) -> CheckResult:
        """Make one check, print it, and add its result to the report."""
        interrupts.check()
        self.printer.heading(self.script.headings[name])
        result = timed(check, *args, **options)
        result.name = name
        self.printer.result(result)
        self.report.checks.append(result)
        return result

    def skip(self, why: str, *names: str) -> None:
        """Report checks that cannot be made any more as failed."""
        for name in names:
            self.step(name, CheckResult, name, problems=[f"not run: {why}"])
