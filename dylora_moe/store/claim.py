"""Claiming a run folder: it is made where it is missing, and locked; what was made goes again if nothing is kept.

    with claimed(run_dir) as claim:
        claim.made += publish_files(run_dir, {"code.jsonl": data})
        save(run_dir)
        claim.keep()

Only what this process has made is removed, known by having made it: names say nothing about whose a file is.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UsageError
from . import run_folder
from .files import explained
from .lock import writer_lock
from .whole_files import Made, unmake


@dataclass
class Claim:
    """What this process has made in a run folder since it claimed it, and whether that stays."""

    made: list[Made] = field(default_factory=list)
    kept: bool = False

    def keep(self) -> None:
        """Let everything stay when the claim ends."""
        self.kept = True


@contextmanager
def claimed(run_dir: os.PathLike | str) -> Iterator[Claim]:
    """Make a run folder where it is missing, and hold its lock inside the block.

    Unless `keep` was called by then, the end of the block removes the `made` of the claim, the lock file if it is new,
    and the folders that were made if nothing else is in them.

    Raises:
        UsageError: If the folder cannot be made or written to, or another process writes there.
    """
    run_dir, claim, folders = Path(os.path.abspath(run_dir)), Claim(), list[Made]()
    try:
        new = run_folder.make_run_dir(run_dir)
        with explained("look at", run_dir):
            folders += [Made.at(folder) for folder in new]
        with writer_lock(run_dir) as lock:
            is_first = lock.blocks == 1
            try:
                yield claim
            finally:
                if not claim.kept:
                    with suppress(UsageError):
                        run_folder.clean_leftovers(run_dir)
                    unmake(claim.made)
                    lock.discard = lock.made and is_first
    finally:
        if not claim.kept:
            unmake(folders)
