"""--json, which every command has: what it found, for other programs. The lines for people then go elsewhere."""

from __future__ import annotations

import argparse
import json
import sys
from argparse import Namespace
from typing import Any, TextIO

from ..validation import report
from ..validation.report import JSON_HELP, can_be_written, finite, report_file


def add_json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", type=_json_file, help=JSON_HELP)


def _json_file(value: str) -> str:
    target = report_file(value)
    if not can_be_written(target):
        raise argparse.ArgumentTypeError(f"expected a file in a folder that can be written to, got {value}")
    return target


def people(args: Namespace) -> TextIO:
    """Return the stream for people: standard error if standard output is for JSON."""
    return sys.stderr if args.json == "-" else sys.stdout


def write_json(args: Namespace, value: dict[str, Any]) -> None:
    """Write the result of a command if --json asks for it. Numbers that are not finite become text."""
    if args.json:
        report.write_text(json.dumps(finite(value), indent=2) + "\n", args.json)
