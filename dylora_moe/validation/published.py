"""The checks that need the files of a checkpoint alone, and therefore no torch: its structure and its size.

Each check returns a `CheckResult`; none prints or ends the program. The check of a save is in saved.py, those of a
reload are in reloaded.py and those of the environment in environment.py.
"""

from __future__ import annotations

from pathlib import Path

from ..checkpoint import formats
from ..checkpoint.verify import inspect_checkpoint, require_sound
from ..constants import MIB
from ..store import run_folder
from ..store.manifest import MANIFEST
from .report import CheckResult


def check_structure(folder: Path) -> CheckResult:
    """Verify the checkpoint. If nothing is wrong with it, the result's `value` is the `SoundCheckpoint`."""
    result = CheckResult("structure")
    contents = inspect_checkpoint(folder)
    result.problems = [_as_in_the_guide(problem) for problem in contents.problems]
    result.measures["files"] = len(contents.files)
    if contents.config is not None:
        for expert in contents.config.experts:
            result.notes.append(f"{expert.name}: {expert.tensors} tensors, r={expert.r}, {expert.state}")
        result.notes.append(f"router: {contents.config.num_experts} x {contents.config.router.width}")
    if contents.beside_line:
        result.notes.append(contents.beside_line)
    if result.passed:
        result.notes.append(f"{len(contents.files)} files, their SHA-256 as in {MANIFEST}")
        result.value = require_sound(contents)
    return result


def _as_in_the_guide(problem: str) -> str:
    """Put the remedy for a merged model on a line of its own, since the guide shows the finding as a line."""
    return problem.replace("; ", "\n  ", 1) if problem.startswith("Found merged model file: ") else problem


def check_size(folder: Path, max_size_mb: float) -> CheckResult:
    """Check that all files together are below a limit. A MB is a MiB here, as in the guide."""
    result = CheckResult("size")
    sizes = run_folder.file_sizes(folder)
    total = sum(sizes.values())
    adapters = sum(size for name, size in sizes.items() if name.startswith(formats.ADAPTERS + "/"))
    training = sum(size for name, size in sizes.items() if formats.is_training_file(name))
    router = sizes.get(formats.ROUTER, 0)
    result.measures = {
        "total_bytes": total,
        "adapter_bytes": adapters,
        "training_bytes": training,
        "router_bytes": router,
        "max_bytes": int(max_size_mb * MIB),
    }
    result.notes.append(f"adapters {adapters / MIB:.1f} MB, router {router / 1024:.1f} KB")
    if training:
        result.notes.append(f"training state {training / MIB:.1f} MB")
    if not total:
        result.problems.append("the checkpoint has no files; save it again")
    if total >= max_size_mb * MIB:
        largest = max(sizes, key=lambda name: sizes[name])
        result.problems.append(
            f"the checkpoint has {total / MIB:.1f} MB, expected less than {max_size_mb:g} MB; the largest file is "
            f"{largest} ({sizes[largest] / MIB:.1f} MB); --max-size-mb raises the limit"
        )
    return result
