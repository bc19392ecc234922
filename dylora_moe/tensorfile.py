"""Reads safetensors files as data that may be hostile: bounded time and memory, no torch, nothing executed.

Format: https://huggingface.co/docs/safetensors - 8 bytes little-endian length of the header, the header (JSON), the
tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

MAX_HEADER_BYTES = 16 << 20
MAX_JSON_BYTES = 16 << 20
CHUNK_BYTES = 4 << 20
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


class FileProblem(ValueError):
    """What is wrong with one file; the text does not repeat the file's name."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `start` and `end` are offsets in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, never through a link and never waiting for a pipe.

    Raises:
        FileProblem: where it is anything else, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise FileProblem(f"cannot be opened as a regular file ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileProblem("is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_json(path: Path) -> object:
    """Parse a JSON file; a key that stands twice is an error, since readers would disagree about it."""
    with open_regular(path) as file:
        raw = file.read(MAX_JSON_BYTES + 1)
    if len(raw) > MAX_JSON_BYTES:
        raise FileProblem(f"is larger than {MAX_JSON_BYTES} bytes, which no such file is")
    return parse_json(raw)


def parse_json(raw: bytes) -> object:
    def unique(pairs: list[tuple[str, object]]) -> dict:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            raise FileProblem(f"has the key {next(k for k in keys if keys.count(k) > 1)!r} twice")
        return result

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except FileProblem:
        raise
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise FileProblem(f"is not valid JSON ({type(error).__name__}: {str(error)[:120]})") from None


def read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """The metadata and the tensors of a safetensors file, checked against the file's size.

    Raises:
        FileProblem: for a header that is cut off, huge, not JSON, or whose offsets overlap, leave gaps or lie.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise FileProblem(f"has {size} bytes, too few for a safetensors file; it is empty or cut off")
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise FileProblem(
                f"says that its header has {length} bytes, but the file has {size}; it is not safetensors"
            )
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise FileProblem("has a header that is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileProblem("has metadata that is not a map of texts")
    tensors = {name: _tensor_info(name, entry, 8 + length) for name, entry in header.items()}
    position = 8 + length
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            raise FileProblem(f"tensor {name} starts at byte {info.start}, expected {position}: overlap or gap")
        position = info.end
    if position != size:
        raise FileProblem(f"has {size} bytes, its header accounts for {position}; it is cut off or has bytes too many")
    return metadata, tensors


def _tensor_info(name: str, entry: object, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileProblem(f"tensor {name[:200]} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise FileProblem(f"tensor {name[:200]} has the unknown dtype {str(dtype)[:40]!r}")
    if not _naturals(shape, most=16) or not _naturals(offsets, most=2) or len(offsets) != 2:
        raise FileProblem(f"tensor {name[:200]} has a shape or offsets that are not lists of whole numbers")
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_BYTES[dtype]:
        raise FileProblem(
            f"tensor {name[:200]} of shape {tuple(shape)} does not fit its {offsets[1] - offsets[0]} bytes"
        )
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _naturals(value: object, most: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 48 for v in value)
    )


def scan_float32(path: Path, tensors: dict[str, TensorInfo]) -> Iterator[tuple[str, bool, bool]]:
    """(name, all values are finite, any value is not zero) of each float32 tensor, a few MiB in memory at a time."""
    import numpy as np

    with open_regular(path) as file:
        for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
            if info.dtype != "F32":
                continue
            file.seek(info.start)
            finite, nonzero, left = True, False, info.end - info.start
            while left:
                raw = file.read(min(left, CHUNK_BYTES))
                if not raw:
                    raise FileProblem(f"ends within tensor {name}")
                left -= len(raw)
                values = np.frombuffer(raw, dtype="<f4")
                finite = finite and bool(np.isfinite(values).all())
                nonzero = nonzero or bool(values.any())
            yield name, finite, nonzero
