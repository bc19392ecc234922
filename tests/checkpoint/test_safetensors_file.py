"""Safetensors and JSON as data: written to the byte as safetensors does, read in bounded time and memory."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dylora_moe.checkpoint.safetensors_file import read_array, read_header, read_json, scan_file
from dylora_moe.checkpoint.tensors import write_tensors
from dylora_moe.checkpoint.torch_file import check_torch_file
from dylora_moe.store.files import FileProblem, parse_json

from ..support.mutations import edit_header

TENSORS = {
    "b": torch.linspace(-1, 1, 12).reshape(3, 4),
    "a.é": torch.ones(2, 2),
    "ids": torch.arange(3),
    "empty": torch.zeros(0, 32, dtype=torch.uint8),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "scalar": torch.tensor(3.0),
}


def header_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(start: int, end: int, shape=(1,), dtype="F32") -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


# ---- writing ----


def test_a_written_file_is_that_of_safetensors_and_is_read_back(tmp_path):
    scan = write_tensors(tmp_path / "ours", TENSORS)
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    data = (tmp_path / "ours").read_bytes()
    assert data == (tmp_path / "theirs").read_bytes()
    assert scan == scan_file(tmp_path / "ours")
    assert scan.digest == (len(data), hashlib.sha256(data).hexdigest())


def test_the_mode_of_a_file_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "x", {"x": torch.zeros(1)})
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_what_is_read_is_what_was_written(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path, metadata={"key": "value"})
    metadata, tensors = read_header(path)
    assert metadata == {"key": "value"}
    assert {name: info.shape for name, info in tensors.items()} == {n: tuple(t.shape) for n, t in TENSORS.items()}
    assert np.array_equal(read_array(path, "b", tensors["b"]), TENSORS["b"].numpy())


def test_scan_finds_nan_inf_and_zeros_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("dylora_moe.checkpoint.safetensors_file.CHUNK_BYTES", 8)
    tensors = {name: torch.ones(9) for name in ("fine", "nan", "inf", "zero", "last")}
    tensors["nan"][8], tensors["inf"][3] = float("nan"), float("-inf")
    tensors["zero"] *= 0
    tensors["last"] *= 0
    tensors["last"][8] = -1e-30
    save_file(tensors, tmp_path / "x")
    scan = scan_file(tmp_path / "x")
    found = {name: (extremes.finite, extremes.nonzero) for name, extremes in scan.extremes.items()}
    expected = {"fine": (True, True), "inf": (False, True), "last": (True, True), "nan": (False, True)}
    assert found == expected | {"zero": (True, False)}


# ---- hostile headers ----

HEADERS = {
    "a length beyond the file": (b"{}", 1 << 40, "found the length 1099511627776"),
    "a negative length": (b"{}", (1 << 64) - 1, "found the length"),
    "no JSON": (b"{]", None, "expected JSON"),
    "not UTF-8": (b'{"\xff": 1}', None, "expected JSON"),
    "no object": (b"[]", None, "found list"),
    "deep nesting": (b"[" * 200_000, None, "expected JSON"),
    "deep objects": (b'{"a":' * 100_000, None, "expected JSON"),
    "a key twice": (b'{"a": 1, "a": 2}', None, "'a' twice"),
    "a huge number": (b'{"a": ' + b"9" * 100_000 + b"}", None, "at most 40 digits, found 100000"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, None, "map of texts"),
    "a name without end": ({"x" * 600: entry(0, 4)}, None, "found 600"),
    "an entry too many": ({"x": entry(0, 4) | {"y": 1}}, None, "tensor x: expected dtype, shape"),
    "an unknown dtype": ({"x": entry(0, 4, dtype="F31")}, None, "'F31'"),
    "a dtype that is a list": ({"x": entry(0, 4, dtype=["F32"])}, None, "expected a known dtype"),
    "a shape of floats": ({"x": entry(0, 4, shape=(1.0,))}, None, "lists of whole numbers"),
    "a shape of booleans": ({"x": entry(0, 4, shape=(True,))}, None, "lists of whole numbers"),
    "a negative shape": ({"x": entry(0, 4, shape=(-1, -1))}, None, "lists of whole numbers"),
    "a shape of 1e999": (b'{"x":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}', None, "whole numbers"),
    "too many dimensions": ({"x": entry(0, 4, shape=(1,) * 17)}, None, "lists of whole numbers"),
    "a shape that is not its bytes": (
        {"x": entry(0, 4, shape=(2,))},
        None,
        "expected 8 bytes for its shape (2,), found 4",
    ),
    "offsets the wrong way": ({"x": entry(4, 0)}, None, "found -4"),
    "overlapping tensors": ({"x": entry(0, 4), "y": entry(0, 4)}, None, "tensor y: expected it to start"),
    "a gap": ({"x": entry(4, 8)}, None, "tensor x: expected it to start"),
    "bytes too few": ({"x": entry(0, 8, shape=(2,))}, None, "bytes that its header accounts for"),
    "bytes too many": ({}, None, "bytes that its header accounts for"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_row_32_a_hostile_header_is_refused_at_once(case, tmp_path):
    header, length, reason = HEADERS[case]
    path = header_file(tmp_path / "x", header, b"\0" * 4, length)
    began = time.monotonic()
    with pytest.raises(FileProblem) as caught:
        read_header(path)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 1000
    scan = scan_file(path)
    assert scan.problem == str(caught.value)
    assert scan.digest == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    assert time.monotonic() - began < 2


def test_row_32_many_repeated_keys_take_no_quadratic_time(tmp_path):
    keys = b",".join(b'"%d":0' % (i % 400_000) for i in range(400_001))
    began = time.monotonic()
    with pytest.raises(FileProblem, match="twice"):
        parse_json(b"{" + keys + b"}")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_too_short_for_a_header_is_refused(tmp_path, size):
    (tmp_path / "x").write_bytes(b"\0" * size)
    with pytest.raises(FileProblem, match=f"found {size} bytes"):
        read_header(tmp_path / "x")


def test_row_32_a_sparse_terabyte_is_refused_without_reading_it(tmp_path):
    path = header_file(tmp_path / "x", {"x": entry(0, 1 << 40, shape=(1 << 38,))})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + (1 << 40))
    began = time.monotonic()
    assert "a hole" in scan_file(path).problem
    assert time.monotonic() - began < 1


def test_row_33_only_regular_files_are_opened(tmp_path):
    (tmp_path / "target").write_text("{}")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "folder", "fifo", "nothing"):
        with pytest.raises(FileProblem, match="regular file"):
            read_json(tmp_path / name)
    with pytest.raises(FileProblem, match="regular file"):
        read_json(Path("/dev/zero"))


def test_a_json_file_beyond_the_limit_is_refused(tmp_path):
    (tmp_path / "x").write_text("[" + "1," * 100 + "1]")
    with pytest.raises(FileProblem, match="at most 50 bytes"):
        read_json(tmp_path / "x", most=50)
    assert len(read_json(tmp_path / "x")) == 101


def test_a_header_is_changed_by_the_tests_helper_and_seen(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "x")
    edit_header(tmp_path / "x", lambda header: header["x"].update(dtype="I32"))
    assert read_header(tmp_path / "x")[1]["x"].dtype == "I32"


# ---- files of torch.save ----


def test_files_of_torch_save_pass_and_every_cut_is_seen(tmp_path):
    torch.save({"x": torch.arange(10.0), "y": [1, "two"]}, tmp_path / "x.pt")
    check_torch_file(tmp_path / "x.pt")
    data = (tmp_path / "x.pt").read_bytes()
    for size in range(0, len(data), 7):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(FileProblem):
            check_torch_file(tmp_path / "cut")


def test_a_changed_byte_of_a_tensor_in_a_torch_file_is_seen(tmp_path):
    torch.save({"x": torch.full((100,), 7.0)}, tmp_path / "x.pt")
    data = bytearray((tmp_path / "x.pt").read_bytes())
    data[bytes(data).index(torch.full((2,), 7.0).numpy().tobytes())] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    check_torch_file(tmp_path / "x.pt", values=False)
    with pytest.raises(FileProblem, match="broken"):
        check_torch_file(tmp_path / "x.pt")


def test_row_31_a_pickle_is_not_a_torch_file_and_is_not_unpickled(tmp_path):
    bomb = b"cposix\nsystem\n(S'touch %s'\ntR." % os.fsencode(tmp_path / "PWNED")
    (tmp_path / "x.pt").write_bytes(bomb)
    with pytest.raises(FileProblem, match="not opened"):
        check_torch_file(tmp_path / "x.pt")
    torch.save({"x": 1}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(FileProblem, match="not opened"):
        check_torch_file(tmp_path / "x.pt")
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize(
    "module", ["safetensors_file", "torch_file", "verify", "verify_tensors", "verify_config", "formats", "findings"]
)
def test_no_torch_is_imported(module):
    code = (
        f"import dylora_moe.checkpoint.{module}, sys; "
        "assert not {'torch', 'transformers', 'peft', 'safetensors'} & set(sys.modules)"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True).stderr == b""
