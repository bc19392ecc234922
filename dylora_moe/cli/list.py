"""`dylora-moe list`: one line for each checkpoint of a run folder."""

from __future__ import annotations

import argparse
import shlex
from argparse import Namespace
from pathlib import Path

from ..checkpoint import formats
from ..checkpoint.verify import inspect_config
from ..constants import MIB
from ..errors import UsageError
from ..store import run_folder
from ..store.manifest import FolderGone
from ..system import command_line
from ..system.command_line import PASSED
from .wording import existing_folder, experts_line


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN_DIR", type=command_line.path)


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
    if not found:
        command_line.say(f"{folder}: no checkpoints")
    width = max((len(path.name) for path, _ in found), default=0)
    for path, reason in found:
        try:
            size, experts = sum(run_folder.file_sizes(path).values()), experts_line(inspect_config(path))
        except (FileNotFoundError, FolderGone):  # training has rotated it away meanwhile
            continue
        command_line.say(f"{path.name:{width}}  {size / MIB:8.1f} MB  {experts}  {_verdict(reason)}")
    return PASSED


def _verdict(reason: str | None) -> str:
    return "complete" if reason is None else f"incomplete: {reason}"
