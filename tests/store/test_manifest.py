"""What a folder has too few, too many or other than its manifest says is named; nothing outside it is touched."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from dylora_moe.errors import UsageError
from dylora_moe.store import run_folder
from dylora_moe.store.manifest import MANIFEST, MAX_MANIFEST_BYTES, FolderGone, first_reason, manifest_problems, survey

from ..support.saving import FILES, NESTED, save

ROOT = Path(__file__).parents[2]


@pytest.fixture
def sound(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    (tmp_path / "run").mkdir()
    save(tmp_path / "run", 10)
    return tmp_path / "run/checkpoint-10"


def edit_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def listing(**entries):
    """Entries for the manifest, by a name that stands for the path."""
    return lambda manifest: manifest["files"].update(entries)


def entry(size=3, sha256="0" * 64, **more):
    return {"bytes": size, "sha256": sha256, **more}


def rewrite(text: bytes | str):
    def spoil(folder: Path) -> None:
        (folder / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())

    return spoil


def edited(change):
    return lambda folder: edit_manifest(folder, change)


def replaced(path: str, make):
    def spoil(folder: Path) -> None:
        shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()
        make(folder / path)

    return spoil


def swap_links(folder: Path) -> None:
    """The content is right, but it lies behind a link out of the folder."""
    shutil.move(folder / NESTED, folder.parent / "outside")
    (folder / NESTED).symlink_to(folder.parent / "outside")


def flip_bit(folder: Path) -> None:
    data = bytearray((folder / FILES[2]).read_bytes())
    data[5] ^= 1
    (folder / FILES[2]).write_bytes(data)


def grow_sparse(folder: Path) -> None:
    os.truncate(folder / FILES[0], 1 << 40)
    edit_manifest(folder, lambda manifest: manifest["files"].update({FILES[0]: entry(1 << 40)}))


def rename_with_surrogate(folder: Path) -> None:
    os.rename(os.fsencode(folder / FILES[0]), os.fsencode(folder) + b"/co\xffnfig\n.json")


DAMAGE = {
    "manifest missing": (lambda folder: (folder / MANIFEST).unlink(), [r"manifest\.json: .*not found"]),
    "manifest empty": (rewrite(""), [r"manifest\.json: expected JSON, .*Expecting value"]),
    "manifest truncated": (rewrite('{"format_version": 1, "fil'), [r"manifest\.json: "]),
    "manifest not UTF-8": (rewrite(b'{"format_version": 1, "files": {"\xff": 1}}'), [r"manifest\.json: .*utf-8"]),
    "manifest UTF-16": (rewrite('{"format_version": 1, "files": {}}'.encode("utf-16")), [r"manifest\.json: .*utf-8"]),
    "manifest too large": (rewrite(" " * (MAX_MANIFEST_BYTES + 1)), [r"manifest\.json: expected at most"]),
    "manifest too deep": (rewrite("[" * 1_000_000), [r"manifest\.json: "]),
    "number too long": (rewrite('{"format_version": ' + "9" * 1_000_000), [r"manifest\.json: expected numbers of"]),
    "a key twice": (
        rewrite('{"format_version": 1, "format_version": 1}'),
        [r"found 'format_version' twice"],
    ),
    "many keys twice": (
        rewrite("{" + ",".join(f'"{i}":0' for i in range(200_000)) + ',"7":0}'),
        [r"found '7' twice"],
    ),
    "no object": (rewrite("[]"), [r"manifest\.json: expected an object"]),
    "no version": (rewrite('{"files": {}}'), [r"manifest\.json: expected .*format_version"]),
    "version true": (edited(lambda m: m.update(format_version=True)), [r"expected .*the integer format_version"]),
    "newer version": (edited(lambda m: m.update(format_version=2)), [r"expected format_version 1, found 2; update"]),
    "no files": (rewrite('{"format_version": 1}'), [r"manifest\.json: expected .*files"]),
    "files a list": (rewrite('{"format_version": 1, "files": []}'), [r"manifest\.json: expected .*files"]),
    "another key": (edited(lambda m: m.update(extra=1)), [r"manifest\.json: expected .*nothing else"]),
    "bytes true": (edited(listing(ghost=entry(True))), [r"expected bytes and sha256 of ghost, found .*True"]),
    "bytes negative": (edited(listing(ghost=entry(-1))), [r"expected bytes and sha256 of ghost, found .*-1"]),
    "bytes a float": (edited(listing(ghost=entry(3.0))), [r"expected bytes and sha256 of ghost"]),
    "bytes NaN": (edited(listing(ghost=entry(float("nan")))), [r"expected bytes and sha256 of ghost"]),
    "hash too short": (edited(listing(ghost=entry(3, "ab"))), [r"expected bytes and sha256 of ghost"]),
    "hash with newline": (edited(listing(ghost=entry(3, "0" * 64 + "\n"))), [r"expected bytes and sha256 of ghost"]),
    "entry null": (edited(listing(ghost=None)), [r"expected bytes and sha256 of ghost, found None"]),
    "entry with more": (edited(listing(ghost=entry(mode=1))), [r"expected bytes and sha256 of ghost"]),
    "absolute": (edited(listing(**{"/etc/passwd": entry()})), [r"relative paths inside the folder, found /etc/passwd"]),
    "dots": (edited(listing(**{"a/../../b": entry()})), [r"relative paths inside the folder, found a/\.\./\.\./b"]),
    "dot": (edited(listing(**{"./config.json": entry()})), [r"relative paths .* found \./config\.json"]),
    "no name": (edited(listing(**{"": entry()})), [r"relative paths"]),
    "backslash": (edited(listing(**{"..\\b": entry()})), [r"relative paths"]),
    "NUL": (edited(listing(**{"a\0b": entry()})), [r"relative paths .* found a\\x00b;"]),
    "itself": (edited(listing(**{MANIFEST: entry()})), [r"relative paths"]),
    "surrogate": (edited(listing(**{"a\ud800": entry()})), [r"^a\\ud800: expected a file of 3 bytes, found no such"]),
    "file missing": (lambda folder: (folder / FILES[2]).unlink(), [r"adapter_model\.safe.*found no such file"]),
    "folder missing": (lambda folder: shutil.rmtree(folder / NESTED), ["_config.json: .*no such", "_model.s", "_0: "]),
    "file too many": (lambda folder: (folder / "model.bin").touch(), [r"^model\.bin: .*found a file more"]),
    "folder too many": (lambda folder: (folder / "expert_9").mkdir(), [r"^expert_9: .*found a folder more"]),
    "two things": (lambda f: (flip_bit(f), (f / "x").touch()), [r"adapter_model\.saf.*expected sha256", r"^x: "]),
    "empty": (lambda folder: os.truncate(folder / FILES[0], 0), [r"^config\.json: .*found 0 bytes"]),
    "one byte more": (lambda f: os.truncate(f / FILES[0], (f / FILES[0]).stat().st_size + 1), [r"^config\.json: "]),
    "one bit": (flip_bit, [r"adapter_model\.safetensors: expected sha256 [0-9a-f]{64}, found [0-9a-f]{64}.*copy"]),
    "sparse": (grow_sparse, [r"^config\.json: expected a file of 1099511627776 bytes, found a hole"]),
    "link for a file": (replaced(FILES[0], lambda p: p.symlink_to("/etc/passwd")), [r"^config\.json: .*a symb"]),
    "FIFO for a file": (replaced(FILES[0], os.mkfifo), [r"^config\.json: .*found a FIFO"]),
    "folder for a file": (replaced(FILES[0], Path.mkdir), [r"^config\.json: .*found a folder"]),
    "file for a folder": (replaced(NESTED, Path.touch), ["_config.json", "_model.s", r"expert_0: .*a file more"]),
    "link for a folder": (swap_links, ["_config.json: .*no such", "_model.s", r"expert_0: .*a symbolic link more"]),
    "link for the manifest": (replaced(MANIFEST, lambda p: p.symlink_to("/etc/passwd")), [r"manifest.*a symbol"]),
    "FIFO for the manifest": (replaced(MANIFEST, os.mkfifo), [r"manifest\.json: expected a regular file, found a F"]),
    "folder for the manifest": (replaced(MANIFEST, Path.mkdir), [r"manifest\.json: .*found a folder"]),
    "a name that cannot be printed": (rename_with_surrogate, [r"^co\\udcffnfig\\n\.json: ", r"^config\.json"]),
}
STILL_COMPLETE = {"file too many", "folder too many", "two things", "one bit"}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damage_is_named(sound, damage):
    spoil, expected = DAMAGE[damage]
    spoil(sound)
    problems = manifest_problems(sound)
    assert len(problems) == len(expected), problems
    for pattern in expected:
        assert any(re.search(pattern, problem) for problem in problems), problems
    assert all(re.search(r"; \w+", problem) and problem.encode() for problem in problems)  # a remedy; can be printed
    assert (first_reason(sound) is None) == (damage in STILL_COMPLETE)
    assert bool(run_folder.incomplete(sound.parent)) != (damage in STILL_COMPLETE)


@pytest.mark.parametrize("workers", [1, 4])
def test_every_byte_counts(sound, workers, monkeypatch):
    monkeypatch.setattr("dylora_moe.store.files.WORKERS", workers)
    path = sound / FILES[0]
    data = path.read_bytes()
    for index in range(len(data)):
        path.write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
        assert len(manifest_problems(sound)) == 1
        assert first_reason(sound) is None
    path.write_bytes(data)
    assert manifest_problems(sound) == []


def test_too_many_files_end_the_search(sound, monkeypatch):
    monkeypatch.setattr("dylora_moe.store.manifest.MAX_ENTRIES", 100)
    for number in range(200):
        (sound / str(number)).touch()
    assert re.search("more than 100 files", *manifest_problems(sound))


def test_a_folder_that_is_moved_away_while_it_is_read_has_no_problems_but_is_gone(sound, monkeypatch):
    run = sound.parent
    with pytest.raises(FolderGone, match=r"checkpoint-11 is not there, or was removed meanwhile"):
        manifest_problems(run / "checkpoint-11")
    real = survey

    def rotated_meanwhile(folder):
        found = real(folder)
        rotated = run / "gone"
        folder.rename(rotated)
        save(run, 10)
        return found

    monkeypatch.setattr("dylora_moe.store.manifest.survey", rotated_meanwhile)
    with pytest.raises(FolderGone):
        manifest_problems(run / "checkpoint-10")


def test_a_file_is_no_checkpoint_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not a folder"):
        manifest_problems(tmp_path / "file")
