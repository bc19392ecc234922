"""Safetensors and JSON files as data that may be hostile: bounded time and memory, no torch, nothing executed.

Format: https://huggingface.co/docs/safetensors - 8 bytes little-endian length of the header, the header (JSON), the
tensors' bytes without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..store.files import FileProblem, explained, is_hole, open_regular, parse_json

MAX_HEADER_BYTES = 16 << 20
MAX_JSON_BYTES = 16 << 20
MAX_NAME = 512
CHUNK_BYTES = 1 << 20
FLUSHED_AT_ONCE = 1 << 20
ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_WRITTEN = {"uint8": "U8", "float32": "F32", "int64": "I64"}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: `start` and `end` are offsets in bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Written:
    """A file just written: (bytes, SHA-256) of it, and of each of its float32 tensors what `scan_float32` would say."""

    digest: tuple[int, str]
    values: list[tuple[str, bool, bool]]


# ---- writing ----


def write_tensors(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> Written:
    """Write a safetensors file, to the byte as `safetensors.torch.save_file` does it; hash and look at it on the way.

    Unlike that function it holds no copy of the tensors, and the file's mode follows the umask. One key of metadata at
    most: safetensors itself writes several in an order that changes from run to run. A large file is flushed at once:
    the disk is busy with it while the next one is hashed.

    Args:
        arrays: contiguous uint8, float32 or int64.

    Raises:
        UsageError: where it cannot be written.
    """
    digest, size = hashlib.sha256(), 0
    seen = {name: Extent() for name, array in arrays.items() if array.dtype.name == "float32"}
    with explained("write", path), open(path, "wb", buffering=0) as file:
        for name, chunk in _serialised(arrays, metadata):
            digest.update(chunk)
            if name in seen:
                seen[name].add(chunk)
            size += len(chunk)
            while chunk:
                chunk = chunk[file.write(chunk) :]
        if size >= FLUSHED_AT_ONCE:
            os.fsync(file.fileno())
    return Written((size, digest.hexdigest()), [(name, extent.finite, extent.nonzero) for name, extent in seen.items()])


def hash_tensors(arrays: Mapping[str, np.ndarray]) -> str:
    """The SHA-256 of what `write_tensors` would write."""
    digest = hashlib.sha256()
    for _, chunk in _serialised(arrays, None):
        digest.update(chunk)
    return digest.hexdigest()


def _serialised(
    arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None
) -> Iterator[tuple[str | None, memoryview]]:
    """The bytes of a safetensors file, and whose they are, in chunks that stay in the cache."""
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name.encode()))
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    position = 0
    for name in order:
        array = arrays[name]
        entry = {"dtype": _WRITTEN[array.dtype.name], "shape": list(array.shape)}
        header[name] = entry | {"data_offsets": [position, position + array.nbytes]}
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield None, memoryview(len(text).to_bytes(8, "little") + text)
    for name in order:
        view = memoryview(np.ravel(arrays[name]).view(np.uint8))
        for start in range(0, len(view), CHUNK_BYTES):
            yield name, view[start : start + CHUNK_BYTES]


class Extent:
    """Whether all float32 values of a tensor are finite, and whether any is not zero, chunk by chunk."""

    def __init__(self):
        self.finite, self.nonzero = True, False

    def add(self, raw: bytes | memoryview) -> None:
        values = np.frombuffer(raw, dtype="<f4")
        least, most = float(values.min()), float(values.max())  # NaN where there is one
        self.finite = self.finite and math.isfinite(least) and math.isfinite(most)
        self.nonzero = self.nonzero or least != 0 or most != 0


def write_bytes(path: Path, data: bytes) -> Written:
    """Write a file, and hash it.

    Raises:
        UsageError: where it cannot be written.
    """
    with explained("write", path), open(path, "wb") as file:
        file.write(data)
    return Written((len(data), hashlib.sha256(data).hexdigest()), [])


# ---- reading ----


def open_file(path: Path) -> BinaryIO:
    """Open a regular file for reading, never through a link and never waiting for a pipe.

    Raises:
        FileProblem: where it is anything else, or cannot be opened.
    """
    try:
        return os.fdopen(open_regular(path), "rb")
    except OSError as error:
        raise FileProblem(f"expected a regular file, found none that can be opened ({error.strerror})") from None


def read_json(path: Path, most: int = MAX_JSON_BYTES) -> object:
    """Parse a JSON file of at most `most` bytes.

    Raises:
        FileProblem: where there is no such file, and as of `safefiles.parse_json`.
    """
    with open_file(path) as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise FileProblem(f"expected at most {most} bytes, found more")
    return parse_json(raw)


def read_header(path: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """The metadata and the tensors of a safetensors file, checked against the file's size.

    Raises:
        FileProblem: for a header that is cut off, huge, not JSON, or whose offsets overlap, leave gaps or lie.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise FileProblem(f"expected a safetensors file, found {size} bytes: it is empty or cut off")
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise FileProblem(
                f"expected a safetensors header of at most {min(MAX_HEADER_BYTES, size - 8)} bytes, found the length "
                f"{length}: it is cut off or no safetensors file"
            )
        header = parse_json(file.read(length))
    if not isinstance(header, dict):
        raise FileProblem(f"expected a header that is a JSON object, found {type(header).__name__}")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FileProblem("expected metadata that is a map of texts, found something else")
    tensors = {name: _tensor_info(name, entry, 8 + length) for name, entry in header.items()}
    position = 8 + length
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


def scan_float32(path: Path, tensors: Mapping[str, TensorInfo]) -> Iterator[tuple[str, bool, bool]]:
    """(name, all values are finite, any value is not zero) of each float32 tensor, a few MiB in memory at a time."""
    with open_file(path) as file:
        if is_hole(os.fstat(file.fileno())):
            raise FileProblem("expected values, found a hole: it takes next to nothing on the disk")
        for name, info in sorted(tensors.items(), key=lambda item: item[1].start):
            if info.dtype != "F32":
                continue
            extent = Extent()
            for raw in _chunks(file, name, info):
                extent.add(raw)
            yield name, extent.finite, extent.nonzero


def read_array(path: Path, name: str, info: TensorInfo) -> np.ndarray:
    """One uint8, float32 or int64 tensor; the caller has made sure that it is small."""
    with open_file(path) as file:
        raw = b"".join(_chunks(file, name, info))
    return np.frombuffer(raw, dtype={"U8": "u1", "F32": "<f4", "I64": "<i8"}[info.dtype]).reshape(info.shape)


def _chunks(file: BinaryIO, name: str, info: TensorInfo) -> Iterator[bytes]:
    file.seek(info.start)
    left = info.end - info.start
    while left:
        raw = file.read(min(left, CHUNK_BYTES))
        if not raw:
            raise FileProblem(f"tensor {name}: expected {left} bytes more, found the end of the file")
        left -= len(raw)
        yield raw
