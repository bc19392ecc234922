"""Checks the files of `torch.save` without unpickling anything in them: they are zip archives.

Format: https://docs.pytorch.org/docs/stable/notes/serialization.html - stored (not compressed) members data.pkl,
version and data/0, data/1, ... below one folder.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from ..store.files import FileProblem, is_hole
from .safetensors_file import CHUNK_BYTES, open_file

MAX_DIRECTORY_BYTES = 64 << 20
_END = b"PK\x05\x06"
_END_BYTES = 22
_CANNOT = (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, RuntimeError, struct.error, zlib.error)


def check_torch_file(path: Path, *, values: bool = True) -> None:
    """Check the archive's directory and, with `values`, the CRC-32 of every member.

    Raises:
        FileProblem: if `torch.save` did not write it, or not to its end.
    """
    with open_file(path) as file:
        info = os.fstat(file.fileno())
        if file.read(4) != b"PK\x03\x04":
            raise FileProblem("expected a zip archive of torch.save, found something else; it is not opened")
        if is_hole(info):
            raise FileProblem("expected values, found a hole: it takes next to nothing on the disk")
        _check_directory_size(file, info.st_size)
        try:
            with zipfile.ZipFile(file) as archive:
                _check_members(archive, info.st_size, values)
        except FileProblem:
            raise
        except _CANNOT as error:
            raise FileProblem(
                f"expected a zip archive of torch.save, found one that is broken ({str(error)[:120]})"
            ) from None


def _check_directory_size(file: BinaryIO, size: int) -> None:
    """Limit the directory of the archive, which zipfile reads into memory as a whole."""
    file.seek(max(0, size - _END_BYTES))
    end = file.read(_END_BYTES)
    if not end.startswith(_END):  # torch.save writes no comment behind it
        raise FileProblem("expected a zip archive's end, found something else: it is cut off or has bytes too many")
    directory = int.from_bytes(end[12:16], "little")
    if directory != 0xFFFFFFFF and directory > MAX_DIRECTORY_BYTES:
        raise FileProblem(f"expected a directory of at most {MAX_DIRECTORY_BYTES} bytes, found {directory}")
    if size > 76:
        file.seek(size - _END_BYTES - 20 - 56)
        zip64 = file.read(56)
        if zip64.startswith(b"PK\x06\x06") and int.from_bytes(zip64[40:48], "little") > MAX_DIRECTORY_BYTES:
            raise FileProblem(f"expected a directory of at most {MAX_DIRECTORY_BYTES} bytes, found more")


def _check_members(archive: zipfile.ZipFile, size: int, values: bool) -> None:
    members = archive.infolist()
    leaves = {member.filename.partition("/")[2] for member in members}
    if not leaves.issuperset({"data.pkl", "version"}) or len(leaves) != len(members):
        raise FileProblem("expected the members data.pkl and version, each once, as torch.save writes them")
    position = 0
    for member in sorted(members, key=lambda m: m.header_offset):
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise FileProblem(f"{member.filename[:80]!r}: expected to be stored, found it compressed or encrypted")
        if member.header_offset < position:
            raise FileProblem(f"{member.filename[:80]!r}: expected members side by side, found one inside another")
        position = member.header_offset + member.file_size
    if position > size:
        raise FileProblem(f"expected {position} bytes at least, found {size}")
    for member in members if values else ():
        with archive.open(member) as file:
            while file.read(CHUNK_BYTES):  # raises BadZipFile where the CRC is another
                pass
