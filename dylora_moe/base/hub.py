"""Asking the Hugging Face hub for a model: its config.json, whether its weights may be read, its files.

Each reason for which the hub may refuse has its own first sentence. An unreachable hub is noticed within 3 seconds.
"""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import huggingface_hub
from huggingface_hub import constants, errors, get_token, snapshot_download, try_to_load_from_cache

from ..errors import UsageError
from .quiet import quiet

REMEDY = "    export HF_TOKEN=your_token"
HUB_SECONDS = 2.5  # an unreachable hub is to be noticed within 3
FILE_SECONDS = 30.0  # for one small file, from a hub that has answered


_options: ContextVar[Mapping[str, Any]] = ContextVar("options", default=MappingProxyType({}))


@contextlib.contextmanager
def using(**options: Any) -> Iterator[None]:
    """Inside, the functions of this module use those of these options of huggingface_hub that are not None.

    They are `cache_dir`, `local_files_only`, which asks the hub for nothing, and `force_download` of `download`.
    """
    before = _options.set({key: value for key, value in options.items() if value is not None})
    try:
        yield
    finally:
        _options.reset(before)


class HubError(UsageError):
    """The hub does not provide a model. `sentence` is the reason, `advice` what to do besides setting HF_TOKEN."""

    def __init__(self, sentence: str, advice: str, unreachable: bool = False):
        super().__init__(f"{sentence} {advice}\n{REMEDY}")
        self.sentence, self.unreachable = sentence, unreachable


def ask(hub_id: str, revision: str | None, token: str | None, weight_files: Collection[str] = ()) -> Path:
    """Download the config.json of a model and return the folder that it is in, which is named like the commit.

    Args:
        weight_files: if given, the hub must have one of these files, and must let it be read. It is not downloaded.

    Raises:
        HubError: if the hub refuses, or cannot be reached.
    """
    options = _options.get()
    if constants.is_offline_mode() or options.get("local_files_only"):
        what = "HF_HUB_OFFLINE" if constants.is_offline_mode() else "local_files_only"
        raise HubError(
            f"{hub_id} was not asked of the hub, because {what} is set, and its weights are not in the cache.",
            f"Unset {what}, or give a local folder; for a gated model also",
            unreachable=True,
        )
    sent = sent_token(token)
    with quiet(), _hub_errors(hub_id, revision, sent):
        api = huggingface_hub.HfApi()
        info = _within(HUB_SECONDS, api.model_info, hub_id, revision=revision, token=sent, timeout=HUB_SECONDS)
        files = {sibling.rfilename for sibling in info.siblings or []}
        weights = next((name for name in weight_files if name in files), None)
        if weights is not None:
            # A cached config.json can be had although the model is gated. Its weights, by a HEAD request, cannot.
            url = huggingface_hub.hf_hub_url(hub_id, weights, revision=info.sha)
            _within(FILE_SECONDS, huggingface_hub.get_hf_file_metadata, url, token=sent, timeout=HUB_SECONDS)
        # With the branch as revision, its commit is noted in the cache and found again when the hub is unreachable.
        config = _within(
            FILE_SECONDS,
            huggingface_hub.hf_hub_download,
            hub_id,
            "config.json",
            revision=revision,
            token=sent,
            cache_dir=options.get("cache_dir"),
        )
    if weight_files and weights is None:
        raise HubError(
            f"{hub_id} holds no weights on the hub that can be used: expected {' or '.join(weight_files)}.",
            "Give a model that has them, or use --weights random or none; if yours are private also",
        )
    return Path(config).parent


def cached(hub_id: str, revision: str | None) -> Path | None:
    """Return the folder of the local cache that has the model's config.json, or None."""
    path = try_to_load_from_cache(hub_id, "config.json", _options.get().get("cache_dir"), revision)
    return Path(path).parent if isinstance(path, str) else None


def download(hub_id: str, revision: str | None, patterns: list[str], token: str | None) -> Path:
    """Download the files that match `patterns` and return the folder that they are in. Raises HubError."""
    sent = sent_token(token)
    with quiet(), _hub_errors(hub_id, revision, sent):
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, token=sent, **_options.get()))


def cache_folder() -> str:
    """Return the folder of the cache."""
    return str(_options.get().get("cache_dir") or constants.HF_HUB_CACHE)


def sent_token(token: str | None) -> str | Literal[False]:
    """Return the given token, or that of HF_TOKEN or the stored login. False makes huggingface_hub send none."""
    return token or get_token() or False


def _within(seconds: float, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function in a thread; raise TimeoutError if it takes longer, as name resolution heeds no other timeout."""
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["result"] = function(*args, **kwargs)
        except BaseException as error:  # raised again below, in the thread of the caller
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if "error" in outcome:
        raise outcome["error"]
    if "result" not in outcome:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return outcome["result"]


@contextlib.contextmanager
def _hub_errors(hub_id: str, revision: str | None, token: str | Literal[False]) -> Iterator[None]:
    """Turn every error of the hub, the network or the cache into a HubError with its own first sentence."""
    try:
        yield
    except Exception as error:
        raise _explained(error, hub_id, revision, token) from error


def _explained(error: Exception, hub_id: str, revision: str | None, token: str | Literal[False]) -> HubError:
    hub = constants.ENDPOINT
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        sent = "with the token that was sent" if token else "and no token was sent"
        return HubError(
            f"{hub_id} is gated: only those who accepted its terms may read it, {sent}.",
            f"Accept the terms at {hub}/{hub_id}, then",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(
            f"{hub_id} has no revision {revision!r} on {hub}.", "Check the revision; if the model is private also"
        )
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return HubError(
            f"{hub_id} on {hub} has no config.json.", "Give a model in the transformers format; if it is private also"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return HubError(
            f"The cache of the hub cannot be written: {error}.",
            "Make room, or set HF_HOME to a folder that can be written; for a gated model also",
        )
    if not isinstance(error, errors.HfHubHTTPError) or isinstance(error, errors.LocalEntryNotFoundError):
        # Of httpx or sockets, our own TimeoutError, or HTML of a proxy instead of JSON.
        cause = str(error).strip().splitlines()
        return HubError(
            f"The hub at {hub} cannot be reached ({cause[0] if cause else type(error).__name__}).",
            f"Check the network, or give a local folder instead of {hub_id}; for a gated model also",
            unreachable=True,
        )
    if status == 401 and token:
        return HubError(
            f"The hub at {hub} refuses the token that was sent for {hub_id} (HTTP 401).",
            "Make a new one in your settings there, then",
        )
    if status in (401, 404):
        seen = "with this token" if token else "without a token"
        near = f" (nor is there a folder {hub_id} here)" if Path(hub_id).parent.is_dir() else ""
        return HubError(
            f"There is no model {hub_id} on {hub} that may be seen {seen}{near}.",
            "Check the spelling; if it is private,",
        )
    if status == 403:
        return HubError(
            f"The hub at {hub} forbids access to {hub_id} with what was sent (HTTP 403).",
            "Use a token that may read it:",
        )
    return HubError(
        f"The hub at {hub} answered with an error for {hub_id} (HTTP {status}).",
        "Try again later, or give a local folder; for a gated model also",
        unreachable=True,
    )
