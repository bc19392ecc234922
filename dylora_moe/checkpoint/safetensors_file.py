"""Safetensors and JSON files as data that may be hostile: bounded time and memory, no torch, nothing executed.

Format: https://huggingface.co/docs/safetensors - 8 bytes little-endian length of the header, the header (JSON), the
tensors' bytes without gaps.
"""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from ..store.files import FileProblem, is_hole, open_regular, parse_json

if TYPE_CHECKING:
    import numpy as np  # imported where it is used: `dylora-moe list` starts in half the time without it

MAX_HEADER_BYTES = 16 << 20
MAX_JSON_BYTES = 16 << 20
MAX_NAME = 512
CHUNK_BYTES = 1 << 20
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
HOLE = "expected values, found a hole: it takes next to nothing on the disk"
_one_header_at_a_time = threading.Lock()  # a hostile one takes hundreds of megabytes


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `start` and `end` are offsets in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Extremes:
    """Of the float32 values of a tensor: whether all are finite, and whether any is not zero."""

    finite: bool
    nonzero: bool


@dataclass
class Scan:
    """What one reading of a safetensors file tells. With a `problem`, only the digest counts."""

    metadata: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    extremes: dict[str, Extremes] = field(default_factory=dict)  # of the float32 tensors
    problem: str | None = None
    digest: tuple[int, str] = (0, "")  # bytes and SHA-256 of the file


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Hashing:
    """A file whose bytes are hashed as they are read."""

    def __init__(self, file: BinaryIO):
        self._file, self._hash, self.length = file, hashlib.sha256(), 0

    def read(self, size: int, /) -> bytes:
        raw = self._file.read(size)
        self._hash.update(raw)
        self.length += len(raw)
        return raw

    def digest(self) -> tuple[int, str]:
        return self.length, self._hash.hexdigest()


def scan_file(path: Path) -> Scan:
    """Hash a safetensors file, check its header and look at its float32 values, all in one reading.

    A few MiB are in memory at a time. A sparse file, whose zeros it would take hours to read, is not read to its end.

    Raises:
        OSError: if it cannot be read, or is not a regular file.
    """
    scan = Scan()
    with os.fdopen(open_regular(path), "rb") as file:
        info = os.fstat(file.fileno())
        hashing = _Hashing(file)
        try:
            scan.metadata, scan.tensors = _parse_header(hashing, info.st_size)
            if is_hole(info):
                raise FileProblem(HOLE)
            for name, tensor in sorted(scan.tensors.items(), key=lambda item: item[1].start):
                chunks = _chunks(hashing, name, tensor)
                if tensor.dtype == "F32":
                    scan.extremes[name] = _extremes(chunks)
                else:
                    for _ in chunks:
                        pass
        except FileProblem as error:
            scan.problem = str(error)
        while not is_hole(info) and hashing.length <= info.st_size and hashing.read(CHUNK_BYTES):
            pass
    scan.digest = hashing.digest()
    return scan


def _extremes(chunks: Iterator[bytes]) -> Extremes:
    import numpy as np

    finite, nonzero = True, False
    for raw in chunks:
        values = np.frombuffer(raw, dtype="<f4")
        least, most = float(values.min()), float(values.max())  # NaN if there is one
        finite = finite and math.isfinite(least) and math.isfinite(most)
        nonzero = nonzero or least != 0 or most != 0
    return Extremes(finite, nonzero)


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading, without following a link or waiting for a pipe.

    Raises:
        FileProblem: if it is anything else, or cannot be opened.
    """
    try:
        return os.fdopen(open_regular(path), "rb")
    except OSError as error:
        raise FileProblem(f"expected a regular file, found none that can be opened ({error.strerror})") from None


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> object:
    """Parse a JSON file of at most `most` bytes.

    Raises:
        FileProblem: if it cannot be opened or is larger, and like `store.files.parse_json`.
    """
    with open_file(path) as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise FileProblem(f"expected at most {most} bytes, found more")
    return parse_json(raw)


def read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Return the metadata and the tensors of a safetensors file, checked against the size of the file.

    Raises:
        FileProblem: if the header is cut off, huge or not JSON, or if its offsets overlap, leave gaps or lie.
    """
    with open_file(path) as file:
        return _parse_header(file, os.fstat(file.fileno()).st_size)


def _parse_header(file: Readable, size: int) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    if size < 8:
        raise FileProblem(f"expected a safetensors file, found {size} bytes: it is empty or cut off")
    length = int.from_bytes(file.read(8), "little")
    if length > min(MAX_HEADER_BYTES, size - 8):
        raise FileProblem(
            f"expected a safetensors header of at most {min(MAX_HEADER_BYTES, size - 8)} bytes, found the length "
            f"{length}: it is cut off or no safetensors file"
        )
    with _one_header_at_a_time:
        return _check_header(parse_json(file.read(length)), 8 + length, size)


def _check_header(header: object, data_start: int, size: int) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    if not isinstance(header, dict):
        raise FileProblem(f"expected a header that is a JSON object, found {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileProblem("expected metadata that is a map of texts, found something else")
    tensors = {name: _tensor_info(name, entry, data_start) for name, entry in header.items()}
    position = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != position:
            raise FileProblem(f"tensor {name}: expected it to start at byte {position}, found {info.start}")
        position = info.end
    if position != size:
        raise FileProblem(f"expected the {position} bytes that its header accounts for, found {size}")
    return metadata, tensors


def _tensor_info(name: str, entry: object, data_start: int) -> TensorInfo:
    if len(name) > MAX_NAME:
        raise FileProblem(f"tensor {name[:80]}...: expected a name of at most {MAX_NAME} characters, found {len(name)}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileProblem(f"tensor {name}: expected dtype, shape and data_offsets, found something else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise FileProblem(f"tensor {name}: expected a known dtype, found {str(dtype)[:40]!r}")
    if not _naturals(shape, most=16) or not _naturals(offsets, most=2) or len(offsets) != 2:
        raise FileProblem(f"tensor {name}: expected shape and offsets as lists of whole numbers, found something else")
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise FileProblem(
            f"tensor {name}: expected {expected} bytes for its shape {tuple(shape)}, found {offsets[1] - offsets[0]}"
        )
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _naturals(value: object, most: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) <= most
        and all(isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 48 for v in value)
    )


def read_array(path: Path, name: str, info: TensorInfo) -> np.ndarray:
    """Read one uint8, float32 or int64 tensor; the caller has made sure that it is small."""
    import numpy as np

    with open_file(path) as file:
        file.seek(info.start)
        raw = b"".join(_chunks(file, name, info))
    return np.frombuffer(raw, dtype={"U8": "u1", "F32": "<f4", "I64": "<i8"}[info.dtype]).reshape(info.shape)


def _chunks(file: Readable, name: str, info: TensorInfo) -> Iterator[bytes]:
    """Yield the bytes of a tensor, at whose start the file must be."""
    left = info.end - info.start
    while left:
        raw = file.read(min(left, CHUNK_BYTES))
        if len(raw) < min(left, CHUNK_BYTES):
            raise FileProblem(f"tensor {name}: expected {left} bytes more, found the end of the file")
        left -= len(raw)
        yield raw
