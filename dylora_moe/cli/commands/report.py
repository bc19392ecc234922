"""`dylora-moe report`: the page report.html of a run folder, made from its results.json."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path

from ...errors import UsageError, listed
from ...reporting.publish import write_report
from ...reporting.results import RESULTS
from ...system import command_line
from ...system.command_line import PASSED, say
from ..output import add_json_flag, people, write_json
from ..wording import existing_folder


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", type=command_line.path)
    add_json_flag(parser)


def run(args: Namespace) -> int:
    """Write the page and say where it is."""
    folder = existing_folder(args.run)
    if not (folder / RESULTS).exists():
        near = sorted({str(path.parent) for path in _near(folder)})
        remedy = f"these folders have one:\n{listed(near)}" if near else "train.py writes one at the end of each stage."
        raise UsageError(f"{folder}: expected {RESULTS}, found none; {remedy}")
    page = write_report(folder)
    say(f"wrote {page}", people(args))
    write_json(args, {"run": str(folder), "report": str(page)})
    return PASSED


def _near(folder: Path) -> list[Path]:
    """Return the results of the runs in a folder; otherwise of the run that it is in, or of those beside it."""
    absolute = folder.absolute()
    inside, around = list(absolute.glob(f"*/{RESULTS}")), list(absolute.parent.glob(RESULTS))
    return inside or around or list(absolute.parent.glob(f"*/{RESULTS}"))
