"""Texts that come with Python, and so are on every machine: for a demo without downloads."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from ..errors import UsageError
from .text_files import files_in, text_of


def python_sources(max_bytes: int = 1_000_000, max_file_bytes: int = 50_000) -> list[str]:
    """Return sources of Python's standard library.

    The files are taken in the order of their paths until `max_bytes` are reached; those above `max_file_bytes` are
    left out. The result is the same on every run with the same Python.
    """
    texts, total = [], 0
    folder = Path(sysconfig.get_paths()["stdlib"])
    for file in files_in(folder):
        left_out = {"site-packages", "dist-packages", "test", "tests"} & set(file.relative_to(folder).parts)
        if file.suffix != ".py" or left_out or not 0 < file.stat().st_size <= max_file_bytes:
            continue
        text = text_of(file)
        if text is None:
            continue
        total += len(text.encode())
        if total > max_bytes:
            break
        texts.append(text)
    return texts


def python_help() -> list[str]:
    """Return the help texts that come with Python, in the order of their topics.

    Raises:
        UsageError: If this Python has none.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UsageError("this Python has no pydoc_data, which the demo trains on; pass --data") from None
    return [topics[name] for name in sorted(topics)]
