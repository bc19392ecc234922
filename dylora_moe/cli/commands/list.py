"""`dylora-moe list`: one line for each checkpoint of a run folder."""

from __future__ import annotations

import argparse
import shlex
from argparse import Namespace
from pathlib import Path
from typing import Any

from ...checkpoint import formats
from ...checkpoint.verify_config import inspect_config
from ...constants import MIB
from ...errors import UsageError
from ...store import run_folder
from ...store.manifest import FolderGone
from ...system import command_line
from ...system.command_line import PASSED, say
from ..output import add_json_flag, people, write_json
from ..wording import existing_folder, experts_line, states_of


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", type=command_line.path)
    add_json_flag(parser)


def run(args: Namespace) -> int:
    """Print a line for each checkpoint, by step. Nothing is hashed, so that it is fast whatever the size of the run."""
    folder = existing_folder(args.run)
    if (folder / formats.ADAPTERS).exists():
        raise UsageError(
            f"{folder}: expected a run folder, found a checkpoint; to look into it\n"
            f"    python -m dylora_moe verify {shlex.quote(str(folder))}"
        )
    complete: list[tuple[Path, str | None]] = [(found.path, None) for found in run_folder.checkpoints(folder)]
    found = sorted([*complete, *run_folder.incomplete(folder)], key=lambda item: int(item[0].name.rpartition("-")[2]))
    lines, entries = people(args), list[dict[str, Any]]()
    if not found:
        say(f"{folder}: no checkpoints", lines)
    width = max((len(path.name) for path, _ in found), default=0)
    for path, reason in found:
        try:
            size, config = sum(run_folder.file_sizes(path).values()), inspect_config(path)
        except (FileNotFoundError, FolderGone):  # training has rotated it away meanwhile
            continue
        say(f"{path.name:{width}}  {size / MIB:8.1f} MB  {experts_line(config)}  {_verdict(reason)}", lines)
        entry = {"name": path.name, "complete": reason is None, "reason": reason, "total_bytes": size}
        entries.append(entry | {"step": config and config.step, "states": states_of(config)})
    write_json(args, {"run": str(folder), "checkpoints": entries})
    return PASSED


def _verdict(reason: str | None) -> str:
    return "complete" if reason is None else f"incomplete: {reason}"
