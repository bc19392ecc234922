"""Asks the hub for a model: whether it is there and may be read, its config.json, its files; and what its cache has.

Each way in which the hub can refuse has a first sentence of its own, and an unreachable hub is known within 3 seconds.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors, get_token, snapshot_download, try_to_load_from_cache
from huggingface_hub.file_download import repo_folder_name

from ..errors import UsageError
from .quiet import quiet

REMEDY = "    export HF_TOKEN=your_token"
HUB_SECONDS = 2.5  # an unreachable hub is to be known within 3
FILE_SECONDS = 30.0  # for one small file from a hub that has answered


class HubError(UsageError):
    """Why the hub does not give the model. `sentence` is one line; `advice` says what to do besides giving a token."""

    def __init__(self, sentence: str, advice: str, unreachable: bool = False):
        super().__init__(f"{sentence} {advice}\n{REMEDY}")
        self.sentence, self.unreachable = sentence, unreachable


def ask(hub_id: str, revision: str | None, token: str | None, weight_files: Collection[str] = ()) -> tuple[str, Path]:
    """The commit and the snapshot folder, with its config.json in it.

    With `weight_files`, the hub must have one of them and let it be read; it is not downloaded. Raises HubError.
    """
    if is_offline():
        raise HubError(
            f"{hub_id} was not asked of the hub, because HF_HUB_OFFLINE is set, and its weights are not in the cache.",
            "Unset HF_HUB_OFFLINE, or give a local folder; for a gated model also",
            unreachable=True,
        )
    token = _token(token)
    sent = token if token is not None else False  # False: huggingface_hub adds none of its own
    api = huggingface_hub.HfApi()
    asked = functools.partial(api.model_info, hub_id, revision=revision, token=sent, timeout=HUB_SECONDS)
    with quiet(), _hub_errors(hub_id, revision, token):
        info = _within(HUB_SECONDS, asked)
        files = {sibling.rfilename for sibling in info.siblings or []}
        wanted = next((name for name in weight_files if name in files), None)
        if wanted is not None:
            url = huggingface_hub.hf_hub_url(hub_id, wanted, revision=info.sha)
            # A HEAD: a cached config.json would otherwise hide that the weights are gated.
            head = functools.partial(huggingface_hub.get_hf_file_metadata, url, token=sent, timeout=HUB_SECONDS)
            _within(FILE_SECONDS, head)
        small = functools.partial(huggingface_hub.hf_hub_download, hub_id, "config.json", revision=info.sha, token=sent)
        folder = Path(_within(FILE_SECONDS, small)).parent
        _note_revision(hub_id, revision, info.sha)
    if weight_files and wanted is None:
        raise HubError(
            f"{hub_id} holds no weights on the hub that can be used: expected {' or '.join(weight_files)}.",
            "Give a model that has them, or use --weights random or none; if yours are private also",
        )
    return info.sha, folder


def is_offline() -> bool:
    """Whether the user forbids to ask (HF_HUB_OFFLINE)."""
    return constants.is_offline_mode()


def cached(hub_id: str, revision: str | None) -> Path | None:
    """The snapshot folder in the local cache that has a config.json, or None."""
    path = try_to_load_from_cache(hub_id, "config.json", revision=revision)
    return Path(path).parent if isinstance(path, str) else None


def download(hub_id: str, revision: str | None, patterns: list[str], token: str | None) -> Path:
    """The snapshot folder with the files of those patterns in it. Raises HubError."""
    token = _token(token)
    with quiet(), _hub_errors(hub_id, revision, token):
        sent = token if token is not None else False
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, token=sent))


def _note_revision(hub_id: str, revision: str | None, commit: str) -> None:
    """Bind the branch to its commit in the cache, so that the same name finds the same files without a network."""
    branch = revision or "main"
    if branch == commit or ".." in branch:
        return
    ref = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=hub_id, repo_type="model") / "refs" / branch
    with contextlib.suppress(OSError):  # a cache that others own
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)


def _token(token: str | None) -> str | None:
    """The argument, then HF_TOKEN, then the stored login (get_token knows both)."""
    return token or os.environ.get("HF_TOKEN") or get_token()


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """The call's result, or TimeoutError. A thread, because name resolution and slow senders heed no timeout."""
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["result"] = call()
        except BaseException as error:  # handed over to the caller's thread
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
def _hub_errors(hub_id: str, revision: str | None, token: str | None) -> Iterator[None]:
    """Each way in which the hub can refuse, as its own first sentence."""
    hub = constants.ENDPOINT
    try:
        yield
    except errors.GatedRepoError as error:
        sent = "with the token that was sent" if token else "and no token was sent"
        raise HubError(
            f"{hub_id} is gated: only those who accepted its terms may read it, {sent}.",
            f"Accept the terms at {hub}/{hub_id}, then",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{hub_id} has no revision {revision!r} on {hub}.", "Check the revision; if the model is private also"
        ) from error
    except errors.LocalEntryNotFoundError as error:  # an EntryNotFoundError, but of the cache
        raise _unreachable(hub_id, hub, error) from error
    except errors.EntryNotFoundError as error:
        raise HubError(
            f"{hub_id} on {hub} has no config.json.", "Give a model in the transformers format; if it is private also"
        ) from error
    except errors.HfHubHTTPError as error:
        raise _refusal(hub_id, hub, token, error) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise _unreachable(hub_id, hub, error) from error
        raise HubError(
            f"The cache of the hub cannot be written: {error}.",
            "Make room, or set HF_HOME to a folder that can be written; for a gated model also",
        ) from error
    except Exception as error:  # httpx, sockets, our own TimeoutError, a proxy's HTML instead of JSON
        raise _unreachable(hub_id, hub, error) from error


def _unreachable(hub_id: str, hub: str, error: Exception) -> HubError:
    cause = str(error).strip().splitlines()
    return HubError(
        f"The hub at {hub} cannot be reached ({cause[0] if cause else type(error).__name__}).",
        f"Check the network, or give a local folder instead of {hub_id}; for a gated model also",
        unreachable=True,
    )


def _refusal(hub_id: str, hub: str, token: str | None, error: Exception) -> HubError:
    status = getattr(getattr(error, "response", None), "status_code", None)
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
