"""Everything that can be wrong with a checkpoint folder, found without torch, without unpickling, in bounded memory.

`open_checkpoint` returns a `SoundCheckpoint`, which all readers take: a checkpoint is verified once and handed on. The
manifest is compared with the files (store/manifest.py), then config.json (verify_config.py) with the set of files
(here), with adapters, router, skill library and probe (verify_tensors.py), and with the training state (here).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from ..constants import MODEL_TYPE, expert_name
from ..errors import CheckpointError, UsageError, listed, shown
from ..store import run_folder
from ..store.files import FileProblem, read_json
from ..store.manifest import MANIFEST, Identity, file_digest, held_still, manifest_problems
from . import formats
from .config import CheckpointConfig
from .findings import SAVE_AGAIN, Contents, Rules, natural, nothing_or, number, text
from .safetensors_file import MAX_JSON_BYTES, Scan, scan_file
from .torch_file import check_torch_file
from .verify_config import check_config
from .verify_tensors import check_experts, check_probe, check_router, check_skills

T = TypeVar("T")


@dataclass(frozen=True)
class SoundCheckpoint:
    """A checkpoint in which `open_checkpoint` has found no problem.

    Attributes:
        files: the SHA-256 of each file with tensors, by relative POSIX path.
        identity: of the folder that was verified; another folder of its name is not this checkpoint.
    """

    folder: Path
    config: CheckpointConfig
    files: Mapping[str, str]
    identity: Identity

    def held_still(self) -> AbstractContextManager[Identity]:
        """What is read inside the block counts only if the folder is still the one that was verified.

        Raises:
            FolderGone: if it is not, whatever else was raised in the block.
        """
        return held_still(self.folder, self.identity)

    def adapter_folder(self, index: int) -> str:
        """Return the folder of an expert's two files, relative to the checkpoint."""
        return formats.adapter_folder(self.files, expert_name(index))

    def adapter(self, index: int) -> str:
        """Return the file of an expert's tensors, relative to the checkpoint."""
        return f"{self.adapter_folder(index)}/{formats.ADAPTER_WEIGHTS}"


def open_checkpoint(folder: str | os.PathLike, *, weights_only: bool = False) -> SoundCheckpoint:
    """Verify a checkpoint, so that it can be read.

    Args:
        weights_only: ignore what is wrong with the training state, which will not be used.

    Raises:
        CheckpointError: with every problem.
        UsageError: if there is no folder of that name, it is a run folder, or it is moved away meanwhile.
    """
    return require_sound(inspect_checkpoint(folder), weights_only=weights_only)


def require_sound(contents: Contents, *, weights_only: bool = False) -> SoundCheckpoint:
    """Return the checkpoint that was inspected. Raises CheckpointError as `open_checkpoint` does."""
    problems = [
        text for text in contents.problems if not (weights_only and formats.is_training_file(text.partition(": ")[0]))
    ]
    if problems or contents.config is None or contents.identity is None:
        raise CheckpointError(contents.folder, problems)
    files = {name: scan.digest[1] for name, scan in contents.scans.items()}
    return SoundCheckpoint(contents.folder, contents.config, files, contents.identity)


def find_problems(folder: str | os.PathLike) -> list[str]:
    """Return every problem of a checkpoint folder, sorted; an empty list if it is complete and sound.

    Raises:
        UsageError: if there is no folder of that name, it is a run folder, or it is moved away meanwhile.
    """
    return inspect_checkpoint(folder).problems


def inspect_checkpoint(folder: str | os.PathLike) -> Contents:
    """Return what a checkpoint folder holds and its problems, like `find_problems`. Each file is hashed once."""
    contents = Contents(checkpoint_folder(folder))

    def digest(path: Path, size: int) -> tuple[int, str]:
        if path.name not in formats.TENSOR_FILES:
            return file_digest(path, size)
        scan = contents.scans[path.relative_to(contents.folder).as_posix()] = scan_file(path)
        return scan.digest

    with held_still(contents.folder) as contents.identity:
        contents.take(manifest_problems(contents.folder, digest))
        return _inspect(contents, {MANIFEST}, values=True)


def inspect_files(folder: str | os.PathLike, scans: dict[str, Scan] | None = None) -> Contents:
    """Inspect a folder that has no manifest yet, before it is published. Files of `torch.save` are not read.

    Args:
        scans: what the writer of a file has found when it read it back; it is not read again.
    """
    return _inspect(Contents(Path(folder), scans=scans or {}), set(), values=False)


def inspect_facts(folder: str | os.PathLike) -> Contents:
    """Return the config and the skills of a checkpoint, with the problems of these two files. Nothing else is read."""
    contents = Contents(Path(folder))
    contents.walk()
    contents.config = check_config(contents)
    if contents.config is not None:
        check_skills(contents)
    return contents


def _inspect(contents: Contents, besides: set[str], *, values: bool) -> Contents:
    contents.walk()
    _check_pollution(contents)
    contents.config = config = _guarded(contents, check_config)
    if config is not None:
        _guarded(contents, lambda c: _check_file_set(c, config, besides))
        for check in (check_experts, check_router, check_probe):
            _guarded(contents, check, config)
    if not contents.is_old:
        if formats.GENERATION in contents.files:
            contents.read_object(formats.GENERATION)
        _guarded(contents, check_skills)
        _guarded(contents, lambda c: _check_training(c, values))
    contents.problems = sorted(set(contents.problems))
    contents.beside.sort()
    return contents


def _guarded(contents: Contents, check: Callable[..., T], *args: object) -> T | None:
    """Report an unforeseen exception of a check as a problem: it is no reason to pass the checkpoint."""
    try:
        return check(contents, *args)
    except Exception as error:
        contents.report(
            ".",
            f"expected to be able to check it, found {type(error).__name__}: {str(error)[:200]}",
            f"{SAVE_AGAIN}, and report this as a bug",
        )
        return None


# ---- the file set ----


def _check_pollution(contents: Contents) -> None:
    for name in [*contents.files, *contents.beside]:
        if formats.is_merged_model(PurePosixPath(name).name):
            contents.problems = [p for p in contents.problems if not p.startswith(f"{shown(name)}: ")]
            why = "expected experts and router only; delete it, and save without the base model's weights"
            contents.problems.append(f"Found merged model file: {shown(name)}; {why}")
            contents.suspects.add(shown(name))


def _check_file_set(contents: Contents, config: CheckpointConfig, besides: set[str]) -> None:
    expected = {formats.CONFIG, formats.ROUTER, formats.SKILLS} | besides
    for index in range(config.num_experts):
        folder = formats.adapter_folder(contents.files, expert_name(index))
        expected |= {f"{folder}/{formats.ADAPTER_CONFIG}", f"{folder}/{formats.ADAPTER_WEIGHTS}"}
    if config.probe:
        expected.add(formats.PROBE)
    expected |= {formats.GENERATION}.intersection(contents.files)
    expected |= _expected_training_files(contents.files)
    for name in expected.difference(contents.files):
        if not contents.is_known(name):
            contents.report(name, "expected in this checkpoint, found nothing")
    for name in set(contents.files).difference(expected):
        if not contents.is_known(name):
            expected_none = f"expected no such file in a checkpoint of {config.num_experts} experts"
            contents.report(name, expected_none, "remove it, or restore the checkpoint from a copy")


def _expected_training_files(files: Iterable[str]) -> set[str]:
    """Return all files of the training state if there is any: with several processes, the random state of each."""
    found = {name for name in files if formats.is_training_file(name)}
    if not found:
        return set()
    ranks = {int(match[2]) for name in found if (match := formats.RNG_STATE.fullmatch(name)) and match[2]}
    if ranks and "rng_state.pth" not in found:
        random = {f"rng_state_{rank}.pth" for rank in range(max(2, min(max(ranks) + 1, 1 << 16)))}
    else:
        random = {"rng_state.pth"}
    return {*formats.TRAINING_FILES, *random} | (found & {formats.SCALER})


# ---- training state ----


def _check_training(contents: Contents, values: bool) -> None:
    for name in contents.files:
        if formats.is_training_file(name) and name != formats.TRAINER_STATE:
            contents.read(name, lambda path: check_torch_file(path, values=values))
    name = formats.TRAINER_STATE
    if name not in contents.files or contents.files[name].st_size > MAX_JSON_BYTES:
        return  # the log of a long run; the manifest vouches for it
    state = contents.read_object(name)
    if state is None:
        return
    contents.follow(name, state, TRAINER_RULES)
    step = state.get("global_step")
    if contents.config and natural(step) and step != contents.config.step:
        contents.expect(name, "global_step", f"{contents.config.step} as in {formats.CONFIG}", step)


def _is_log(value: object) -> bool:
    entries = value if isinstance(value, list) else [None]
    return all(isinstance(e, dict) and natural(e.get("step")) and all(map(_is_logged, e, e.values())) for e in entries)


def _is_logged(name: str, value: object) -> bool:
    """Whether it is a number, if it is a held-out loss, by which the best checkpoint is chosen."""
    return number(value) or not re.fullmatch("eval_(.+_)?loss", name)


def _is_callbacks(value: object) -> bool:
    """Whether these are states of callbacks as Transformers writes them: objects with attributes, or lists of such."""
    if not isinstance(value, dict):
        return False
    states = [state for each in value.values() for state in (each if isinstance(each, list) else [each])]
    return all(isinstance(s, dict) and isinstance(s.get(part, {}), dict) for s in states for part in _PARTS) and all(
        natural(s.get("attributes", {}).get("early_stopping_patience_counter", 0)) for s in states
    )


_PARTS = ("args", "attributes")  # of the state of a callback
_COUNT, _NUMBER, _SWITCH = nothing_or(natural), nothing_or(number), nothing_or(lambda v: isinstance(v, bool))
TRAINER_RULES: Rules = (  # for every field of a TrainerState
    ("global_step", "a whole number", natural),
    ("log_history", "a list of objects with their steps, and numbers as held-out losses", nothing_or(_is_log)),
    ("best_model_checkpoint", "null, since no file decides what is loaded or deleted", lambda v: v is None),
    ("stateful_callbacks", "an object of the states of callbacks", nothing_or(_is_callbacks)),
    ("train_batch_size", "a whole number above 0", lambda v: natural(v, 1)),
    *((key, "a whole number or null", _COUNT) for key in ("best_global_step", "num_input_tokens_seen", "max_steps")),
    *((key, "a number or null", _NUMBER) for key in ("epoch", "best_metric", "num_train_epochs", "total_flos")),
    *((key, "a number or null", _NUMBER) for key in ("logging_steps", "eval_steps", "save_steps")),
    *((f"is_{key}", "true or false", _SWITCH) for key in ("local_process_zero", "world_process_zero")),
    ("is_hyper_param_search", "true or false", _SWITCH),
    ("trial_name", "a text or null", nothing_or(text)),
    ("trial_params", "an object or null", nothing_or(lambda v: isinstance(v, dict))),
)


def _model_type(folder: Path) -> str | None:
    """Return what kind of model the config.json of a folder is of, if it says so."""
    with suppress(OSError, FileProblem):
        found = read_json(folder / formats.CONFIG, MAX_JSON_BYTES)
        if isinstance(found, dict) and isinstance(found.get("model_type"), str):
            return shown(found["model_type"])
    return None


def checkpoint_folder(folder: os.PathLike | str) -> Path:
    """Return the folder that a user names as a checkpoint.

    Raises:
        UsageError: if it is missing, a file, or a folder around checkpoints; the message names the one to give.
    """
    folder = Path(folder)
    try:
        found = "a folder" if folder.is_dir() else "a file" if folder.exists() else "nothing"
    except (OSError, ValueError) as error:
        found = str(error)
    if found != "a folder":
        raise UsageError(
            f"{folder}: expected a checkpoint folder, found {found}; name a folder like RUN/checkpoint-100"
        )
    # A damaged checkpoint has some of these left; a folder that cannot be listed is reported when it is inspected.
    can_list = os.access(folder, os.R_OK | os.X_OK)
    if can_list and not any(os.path.lexists(folder / name) for name in (MANIFEST, formats.ROUTER, formats.ADAPTERS)):
        if newest := run_folder.latest(folder):
            raise UsageError(f"{folder} is a run folder: name its newest checkpoint,\n    {newest.path}")
        if broken := run_folder.incomplete(folder):
            reasons = listed([f"{path.name}: {reason}" for path, reason in broken])
            raise UsageError(f"{folder} is a run folder without a complete checkpoint:\n{reasons}")
        if os.path.lexists(folder / formats.CHECKPOINT / MANIFEST):
            raise UsageError(f"{folder}: the checkpoint is in it,\n    {folder / formats.CHECKPOINT}")
        if (model_type := _model_type(folder)) not in (None, MODEL_TYPE):
            raise UsageError(f"{folder} is a model ({model_type}), not a checkpoint of a mixture: from_base loads it")
    return folder
