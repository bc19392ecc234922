"""The files of a run's results: written together, whole or not at all, and never in place of a file of the user."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UsageError
from ..store.files import FileProblem, chunks, parse_json, read_json
from ..store.whole_files import publish_files
from . import page
from .results import KIND, MAX_BYTES, RESULTS, Results, decode_results, encode_results, read_results

REPORT = "report.html"
HEAD_BYTES = 1000  # of a page, which have its marker


def write_results(run_dir: os.PathLike | str, results: Results) -> None:
    """Write results.json and report.html into a run folder that exists, in place of earlier ones.

    Raises:
        UsageError: If they cannot be written, or one of them is there and not of a run.
    """
    check_results(run_dir)
    data = encode_results(results)
    written = decode_results(parse_json(data))  # what cannot be read again is not written
    publish_files(run_dir, {RESULTS: data, REPORT: page.render(written).encode()}, replace=True)


def write_report(run_dir: os.PathLike | str) -> Path:
    """Write report.html from the results.json of a run folder, and return its path.

    Raises:
        UsageError: If results.json is missing or not sound, or report.html cannot be written or is not of a run.
    """
    rendered = page.render(read_results(Path(run_dir))).encode()
    _check_report(Path(run_dir, REPORT))
    publish_files(run_dir, {REPORT: rendered}, replace=True)
    return Path(run_dir, REPORT)


def check_results(run_dir: os.PathLike | str) -> None:
    """Refuse a run folder whose results.json or report.html is not of a run: it is the user's.

    Raises:
        UsageError: If there is one.
    """
    path = Path(run_dir, RESULTS)
    try:
        found = read_json(path, MAX_BYTES)
        if not isinstance(found, dict) or found.get("kind") != KIND:
            raise _theirs(path)
    except FileNotFoundError:
        pass
    except (OSError, FileProblem):
        raise _theirs(path) from None
    _check_report(Path(run_dir, REPORT))


def _check_report(path: Path) -> None:
    try:
        head = next(chunks(path, HEAD_BYTES), b"")[:HEAD_BYTES]
    except FileNotFoundError:
        return
    except OSError:
        head = b""
    if page.MARKER.encode() not in head:
        raise _theirs(path)


def _theirs(path: Path) -> UsageError:
    return UsageError(
        f"{path}: expected what a run wrote, which is replaced now, found something else; move it away, or choose "
        "another run folder"
    )
