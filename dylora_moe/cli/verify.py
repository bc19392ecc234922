"""`dylora-moe verify`: everything that is wrong with a checkpoint, or that it is complete and sound."""

from __future__ import annotations

import argparse
import json
import sys
from argparse import Namespace
from pathlib import Path

from ..checkpoint.findings import Contents
from ..checkpoint.verify import inspect_checkpoint
from ..constants import MIB
from ..errors import counted
from ..system import command_line
from ..system.command_line import FAIL_MARK, FAILED, PASS_MARK, PASSED, say
from ..validation.report import JSON_HELP, report_file
from .wording import experts_line, states_of


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="DIR", type=command_line.path)
    parser.add_argument("--json", metavar="FILE", type=report_file, help=JSON_HELP)


def run(args: Namespace) -> int:
    folder = Path(args.checkpoint)
    contents = inspect_checkpoint(folder)
    code = FAILED if contents.problems else PASSED
    lines = sys.stderr if args.json == "-" else sys.stdout
    for problem in contents.problems:
        say(f"{FAIL_MARK} {problem}", lines)
    if contents.problems:
        say(f"{FAIL_MARK} {folder}: not complete and sound, {counted(len(contents.problems), 'problem')}", lines)
    else:
        say(f"{PASS_MARK} {folder}: complete and sound, {_summary(contents)}", lines)
    if contents.beside_line:
        say(f"  {contents.beside_line}", lines)
    if args.json:
        _write_json(args.json, folder, contents, code)
    return code


def _write_json(target: str, folder: Path, contents: Contents, code: int) -> None:
    value = {
        "checkpoint": str(folder),
        "passed": not contents.problems,
        "exit_code": code,
        "problems": contents.problems,
        "files": len(contents.files),
        "beside": contents.beside,
        "total_bytes": contents.total_bytes,
        "step": contents.config and contents.config.step,
        "experts": contents.config and contents.config.num_experts,
        "states": states_of(contents.config),
    }
    text = json.dumps(value, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        Path(target).write_text(text, encoding="utf-8")


def _summary(contents: Contents) -> str:
    step = contents.config and contents.config.step
    files, experts = counted(len(contents.files), "file"), experts_line(contents.config)
    return f"step {step}, {contents.total_bytes / MIB:.1f} MB in {files}, {experts}"
