"""The checks of the minimal and the full script, in order, for a checkpoint that is there already.

torch takes seconds to import. It is imported only if a check needs the base model: none of the minimal script does,
unless --model asks for a comparison.
"""

from __future__ import annotations

from pathlib import Path

from ..checkpoint.verify import checkpoint_folder
from ..checkpoint.verify_config import inspect_config
from ..errors import UsageError
from ..store import run_folder
from ..store.manifest import held_still
from .flags import check_against
from .published import check_size, check_structure
from .run import Run


def needs_a_model(run: Run) -> bool:
    """Return whether the flags ask for checks that need the base model, or its config."""
    args = run.args
    return run.script.reloads or args.model is not None or args.dtype is not None or args.device != "cpu"


def check_existing_checkpoint(run: Run) -> None:
    """Check the checkpoint that --checkpoint names, without changing it."""
    if needs_a_model(run):
        from . import subject  # torch

        subject.check_device(run.args)
    try:
        folder = checkpoint_folder(Path(run.args.checkpoint or ""))
    except UsageError as error:
        raise UsageError(f"--checkpoint {error}") from None
    with held_still(folder):  # training may rotate it away
        _check_folder(run, folder)


def _check_folder(run: Run, folder: Path) -> None:
    """Make every check of the script but "save"."""
    run.report.checkpoint = str(folder)
    run.report.total_bytes = sum(run_folder.file_sizes(folder).values())
    config = inspect_config(folder)  # flags that contradict it are refused before anything is checked
    if config is not None:
        run.report.experts = config.num_experts
        run.report.model = config.base_model.located(folder)
        check_against(run.args, config)
    structure = run.step("structure", check_structure, folder)
    if structure.passed and needs_a_model(run):
        from .sequence import validate_on_base  # torch

        validate_on_base(run, structure.value)
    elif structure.passed:
        run.report.weights = "none"
    elif run.script.reloads:
        run.skip("the checkpoint is not sound", "load", "consistency")
    run.step("size", check_size, folder, run.args.max_size_mb)
