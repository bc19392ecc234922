"""The checks of the minimal and the full script, in order, and what they need a model for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from ..checkpoint import formats
from ..checkpoint.read import named_base
from ..checkpoint.verify import SoundCheckpoint
from ..mixture.model import Mixture
from ..store import run_folder
from . import subject, workspace
from .published import check_size, check_structure
from .reloaded import check_consistency, check_load
from .run import Run
from .saved import check_save, save_with


def check_new_checkpoint(run: Run) -> None:
    """Save a mixture as the flags ask for, and check what was saved."""
    subject.check_device(run.args)
    source, weights = subject.base_of(run.script, run.args)
    run.report.model, run.report.weights = source.name, weights
    run.report.experts = subject.setting(run.args, "experts")
    if source.note:
        run.printer(source.note)
    subject.check_room_to_save(run.script, run.args, source, weights)
    _say_loading(run)
    with target_folder(run) as target:
        model = subject.build_mixture(run.args, source, weights)
        for note in model.notes:
            run.printer(note)
        check_saving(run, model, target)


def _say_loading(run: Run) -> None:
    """Say which base model is loaded, which may take a minute."""
    if run.report.weights != "none":
        run.printer(f"loading {run.report.model} ({run.report.weights} weights)")


@contextmanager
def target_folder(run: Run) -> Iterator[Path]:
    """Yield where to write the checkpoint, which is removed at the end unless it is to be kept."""
    if run.args.output_dir:
        place = workspace.output_folder(Path(run.args.output_dir))
    else:
        place = workspace.temporary(run.script.folder_prefix, keep=run.args.keep_checkpoint)
    target = None
    try:
        with place as folder:
            target = folder / formats.CHECKPOINT
            yield target
    finally:
        if target is not None and target.exists():
            run.report.checkpoint = str(target)


def check_saving(run: Run, model: Mixture, target: Path) -> None:
    """Save the mixture and make every check of the script."""
    save = run.step("save", check_save, model, target, save_with(run.checkpoint_callback()))
    if not target.is_dir():
        run.skip("nothing was saved", *[name for name in run.script.headings if name != "save"])
        return
    run.printer(f"  {target}")
    run.report.total_bytes = sum(run_folder.file_sizes(target).values())
    structure = run.step("structure", check_structure, target)
    if run.script.reloads and save.passed and structure.passed:
        check_reloading(run, structure.value, model.fresh_base(), model)
    elif run.script.reloads:
        run.skip("the checkpoint is not sound", "load", "consistency")
    run.step("size", check_size, target, run.args.max_size_mb)


def check_reloading(run: Run, checkpoint: SoundCheckpoint, base: PreTrainedModel, saved: Mixture | None = None) -> None:
    """Load the checkpoint into a fresh instance and compare what that instance computes."""
    load = run.step("load", check_load, checkpoint, base)
    if load.value is None:
        run.skip("the checkpoint was not loaded", "consistency")
        return
    run.step("consistency", check_consistency, load.value, saved=saved, weights=run.report.weights)


# ---- an existing checkpoint ----


def validate_on_base(run: Run, checkpoint: SoundCheckpoint) -> None:
    """Make the checks that need the base model, or its config."""
    trained_on = checkpoint.config.base_model
    name = run.args.model or named_base(checkpoint, "--model")
    revision = trained_on.revision if name == trained_on.name else None
    source, weights = subject.base_of(run.script, run.args, name, revision)
    run.report.model, run.report.weights = source.name, weights
    if source.note:
        run.printer(source.note)
    source = replace(source, quantization=trained_on.quantization)
    subject.check_architecture(source, trained_on, run.args.model)
    if run.script.reloads:
        subject.check_room_to_load(run.args, source, weights, checkpoint.config)
        _say_loading(run)
        base = subject.base_weights_of(run.args, source, weights, trained_on.dtype)
        for note in getattr(base, "notes", ()):
            run.printer(note)
        check_reloading(run, checkpoint, base)
