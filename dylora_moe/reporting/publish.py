"""The files of a run's results: written together, whole or not at all, and never in place of a file of the user."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import UsageError
from ..store.files import FileProblem, parse_json, read_json
from ..store.whole_files import publish_files
from .results import KIND, MAX_BYTES, RESULTS, Results, decode_results, encode_results


def write_results(run_dir: os.PathLike | str, results: Results) -> None:
    """Write results.json into a run folder that exists, in place of earlier ones.

    Raises:
        UsageError: If it cannot be written, or a file of that name is not of a run.
    """
    check_results(run_dir)
    data = encode_results(results)
    decode_results(parse_json(data))  # what cannot be read again is not written
    publish_files(run_dir, {RESULTS: data}, replace=True)


def check_results(run_dir: os.PathLike | str) -> None:
    """Refuse a run folder whose results.json is not of a run: it is the user's.

    Raises:
        UsageError: If there is one.
    """
    path = Path(run_dir, RESULTS)
    try:
        found = read_json(path, MAX_BYTES)
    except FileNotFoundError:
        return
    except (OSError, FileProblem):
        found = None
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise UsageError(
            f"{path}: expected the results of a run, which this one would replace, found something else; move it "
            "away, or choose another --output-dir"
        )
