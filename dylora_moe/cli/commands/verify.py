"""`dylora-moe verify`: everything that is wrong with a checkpoint, or that it is complete and sound."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path
from typing import Any

from ...checkpoint.findings import Contents
from ...checkpoint.verify import inspect_checkpoint
from ...constants import MIB
from ...errors import counted
from ...system import command_line
from ...system.command_line import FAIL_MARK, FAILED, PASS_MARK, PASSED, say
from ..output import add_json_flag, people, write_json
from ..wording import experts_line, states_of


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="DIR", type=command_line.path)
    add_json_flag(parser)


def run(args: Namespace) -> int:
    folder = Path(args.checkpoint)
    contents = inspect_checkpoint(folder)
    code = FAILED if contents.problems else PASSED
    lines = people(args)
    for problem in contents.problems:
        say(f"{FAIL_MARK} {problem}", lines)
    if contents.problems:
        say(f"{FAIL_MARK} {folder}: not complete and sound, {counted(len(contents.problems), 'problem')}", lines)
    else:
        say(f"{PASS_MARK} {folder}: complete and sound, {_summary(contents)}", lines)
    if contents.beside_line:
        say(f"  {contents.beside_line}", lines)
    write_json(args, _as_json(folder, contents, code))
    return code


def _as_json(folder: Path, contents: Contents, code: int) -> dict[str, Any]:
    return {
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


def _summary(contents: Contents) -> str:
    step = contents.config and contents.config.step
    files, experts = counted(len(contents.files), "file"), experts_line(contents.config)
    return f"step {step}, {contents.total_bytes / MIB:.1f} MB in {files}, {experts}"
