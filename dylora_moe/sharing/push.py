"""Putting a checkpoint on the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from ..base import hub
from ..checkpoint import formats
from ..checkpoint.config import BESIDE, CheckpointConfig, encode
from ..checkpoint.safetensors_file import read_json
from ..checkpoint.verify import SoundCheckpoint, open_checkpoint
from ..errors import UsageError
from ..reporting.results import results_of
from ..store import manifest, run_folder
from ..store.manifest import MANIFEST, is_tokenizer_file, read_manifest
from .card import model_card
from .pull import CARD, local_checkpoint


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    base_model: str | None = None,
    training_state: bool = False,
    revision: str | None = None,
    **options: Any,
) -> str:
    """Push a checkpoint, or the newest one of a run folder, to a repository on the Hub, which is made if need be.

    The repository then holds the files of the checkpoint, the tokenizer of its run folder, and a model card with the
    run's results; what an earlier push has left of a checkpoint is removed. A model card that is there stays as it is.
    No text is pushed. Skills keep their names, which training takes from those of the data files.

    Args:
        repo_id: such as "user/repo".
        base_model: the id of the base model on the Hub, for a checkpoint that names it by a local path.
        training_state: whether to push what training needs to resume as well, with the paths of the data.
        revision: the branch to push to; "main" by default.
        options: `token`, `private`, `commit_message` and `create_pr`, as in huggingface_hub.

    Returns:
        The URL of the commit.

    Raises:
        CheckpointError: if the checkpoint is not sound.
        UsageError: if it names its base by a local path, or the Hub refuses.
    """
    unknown = sorted(options.keys() - {"token", "private", "commit_message", "create_pr"})
    if unknown:
        raise UsageError(f"push_to_hub has no option {', '.join(unknown)}")
    checkpoint = open_checkpoint(local_checkpoint(Path(folder)))
    config = _on_the_hub(checkpoint.config, base_model)
    files = package(checkpoint, config, training_state=training_state)
    token, private = options.pop("token", None), options.pop("private", None)
    api = huggingface_hub.HfApi(token=hub.sent_token(token))
    with _refusals(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr/"):
            _make_branch(api, repo_id, revision, others=bool(options.get("create_pr")))
        there = set(api.list_repo_files(repo_id, revision=revision))
        if CARD not in there:
            files[CARD] = _card(repo_id, checkpoint, config)
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in sorted(files.items())]
        operations += [CommitOperationDelete(name) for name in sorted(_stale(there) - files.keys())]
        message = options.pop("commit_message", None) or f"Checkpoint of step {checkpoint.config.step}"
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision, **options)
    return str(commit.commit_url)


def _make_branch(api: huggingface_hub.HfApi, repo_id: str, name: str, *, others: bool) -> None:
    """Make a branch if need be. `others`: whether the repository may be somebody else's, who has made it."""
    try:
        api.create_branch(repo_id, branch=name, exist_ok=True)
    except HfHubHTTPError as error:
        if not others or error.response.status_code != HTTPStatus.FORBIDDEN:
            raise


def package(checkpoint: SoundCheckpoint, config: CheckpointConfig, *, training_state: bool) -> dict[str, Path | bytes]:
    """Return what is pushed of a checkpoint and its run folder, by the names in the repository.

    Args:
        config: what config.json is to say.
    """
    listed = read_manifest(checkpoint.folder)
    listed = {name: entry for name, entry in listed.items() if training_state or not formats.is_training_file(name)}
    changed: dict[str, bytes] = {}
    if config != checkpoint.config:
        changed[formats.CONFIG] = config.to_json()
        for index in range(config.num_experts):
            path = f"{checkpoint.adapter_folder(index)}/{formats.ADAPTER_CONFIG}"
            adapter = cast(dict[str, Any], read_json(checkpoint.folder / path))
            base = config.base_model
            changed[path] = encode(adapter | {"base_model_name_or_path": base.name, "revision": base.revision})
    listed |= {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in changed.items()}
    changed[MANIFEST] = manifest.encode(listed)[0]
    return _tokenizer(checkpoint.folder) | {name: checkpoint.folder / name for name in listed} | changed


def _on_the_hub(config: CheckpointConfig, base_model: str | None) -> CheckpointConfig:
    """Return a config that names its base by an id on the Hub. Raises UsageError if it is not known."""
    name = config.base_model.name
    if base_model is not None:
        return replace(config, base_model=replace(config.base_model, name=base_model, revision=None))
    if name is None or name.startswith(BESIDE) or os.path.isabs(name):
        where = f"by a local path, {name}, which others do not have" if name else "not at all"
        raise UsageError(
            f"the checkpoint names its base model {where}: say which model on the Hub it is, with base_model= (on the "
            "command line --base-model)"
        )
    return config


def _tokenizer(folder: Path) -> dict[str, Path]:
    """Return the files of the tokenizer in the run folder and beside the checkpoint's files."""
    found: dict[str, Path] = {}
    for place in (run_folder.run_of(folder), folder):
        for path in [] if place is None else [*place.glob("*"), *place.glob("additional_chat_templates/*")]:
            name = path.relative_to(cast(Path, place)).as_posix()
            if is_tokenizer_file(name) and path.is_file():
                found[name] = path
    return found


def _card(repo_id: str, checkpoint: SoundCheckpoint, config: CheckpointConfig) -> bytes:
    size = sum(size for size, _ in read_manifest(checkpoint.folder).values())
    return model_card(repo_id, config, size, results_of(checkpoint.folder)).encode()


def _stale(names: Iterable[str]) -> set[str]:
    """Return those files of a repository that may be left of an earlier checkpoint."""
    own = {formats.CONFIG, formats.ROUTER, formats.SKILLS, formats.PROBE, formats.GENERATION, MANIFEST}
    return {
        name
        for name in names
        if name in own or name.startswith(f"{formats.ADAPTERS}/") or formats.is_training_file(name)
    }


@contextmanager
def _refusals(repo_id: str) -> Iterator[None]:
    """Turn what the Hub answers to a push into a UsageError."""
    try:
        yield
    except UsageError:
        raise
    except HFValidationError as error:
        raise UsageError(
            f"{repo_id!r} is no id of a repository on the Hub, such as user/repo: {str(error).splitlines()[0]}"
        ) from error
    except Exception as error:  # of the Hub, the network or a proxy
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is None:
            cause = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UsageError(
                f"nothing was pushed to {repo_id}: the Hub at {constants.ENDPOINT} cannot be reached ({cause})"
            ) from error
        words = {401: "it does not accept the token", 403: "the token may not write there"}
        why = words.get(status, str(error).strip().splitlines()[0])
        raise UsageError(
            f"nothing was pushed to {repo_id}: the Hub at {constants.ENDPOINT} answered with HTTP {status}, {why}\n"
            "Give a token with the right to write (token=, on the command line --hf-token), or\n"
            f"{hub.REMEDY}"
        ) from error
