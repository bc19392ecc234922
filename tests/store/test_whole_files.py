"""Files beside the checkpoints are there whole or not at all, and replace nothing that they are not to replace."""

from __future__ import annotations

import errno
import itertools
import os
import re
import shutil
from pathlib import Path

import pytest

from dylora_moe.errors import UsageError
from dylora_moe.store import run_folder
from dylora_moe.store.files import native_errors
from dylora_moe.store.lock import LOCK
from dylora_moe.store.whole_files import Made, publish_files, publish_written, replace_file, unmake

from ..support.faults import run_with_fault
from ..support.saving import tree

OLD = {"results.json": b"old " * 100, "mine.txt": b"mine"}
NEW = {"added.jsonl": b"added " * 100, "results.json": b"new " * 200}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    (tmp_path / "run").mkdir()
    for name, data in OLD.items():
        (tmp_path / "run" / name).write_bytes(data)
    return tmp_path / "run"


def without_lock(folder: Path) -> dict[str, object]:
    return {name: data for name, data in tree(folder).items() if name != LOCK}


def write_base(folder: Path) -> None:
    """What a library would do, with plain `os` calls and `open`, so that the faults reach them."""
    os.mkdir(folder / "base")
    for name in ("config.json", "model.safetensors"):
        with open(folder / "base" / name, "wb") as file:
            file.write(name.encode() * 50)


BASE = {"base": None, "base/config.json": b"config.json" * 50, "base/model.safetensors": b"model.safetensors" * 50}


def test_files_and_folders_are_published(run):
    made = publish_written(run, write_base)
    assert without_lock(run) == OLD | BASE
    assert {each.path for each in made} == {run / name for name in BASE}
    assert publish_written(run, write_base) == []  # it is there already
    assert [each.path for each in publish_files(run, {"added.jsonl": b"x"})] == [run / "added.jsonl"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_of_another_content_is_replaced_only_if_that_is_asked_for(run, replace):
    if replace:
        made = publish_files(run, NEW, replace=True)
        assert [each.path.name for each in made] == ["added.jsonl"]  # what was replaced is not new
        assert without_lock(run) == OLD | NEW
    else:
        with pytest.raises(UsageError, match=r"(?s)run holds already:.*results\.json: a file with another.*Move that"):
            publish_files(run, NEW)
        assert without_lock(run) == OLD


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("mine.txt"), os.mkfifo])
def test_what_is_no_file_is_never_replaced(run, make):
    make(run / "added.jsonl")
    with pytest.raises(UsageError, match=r"added\.jsonl: a (folder|symbolic link|FIFO) with another content"):
        publish_files(run, NEW, replace=True)
    assert (run / "results.json").read_bytes() == OLD["results.json"]
    (run / "base").mkdir()
    with pytest.raises(UsageError, match="base: a folder with another content"):
        publish_written(run, write_base, replace=True)
    assert list((run / "base").iterdir()) == []


def test_what_was_made_is_removed_again_and_nothing_else(run):
    made = [*publish_written(run, write_base), *publish_files(run, NEW, replace=True)]
    (run / "base/notes.txt").write_text("mine")
    (run / "base/config.json").write_text("changed by its user")
    shutil.copyfile(run / "base/model.safetensors", run / "copy")
    os.replace(run / "copy", run / "base/model.safetensors")  # another file of the same content
    unmake(made)
    kept = {"base": None, "base/notes.txt": b"mine", "base/config.json": b"changed by its user"}
    kept["base/model.safetensors"] = BASE["base/model.safetensors"]
    assert without_lock(run) == OLD | kept | {"results.json": NEW["results.json"]}
    (run / "base/notes.txt").unlink()
    unmake([Made.at(run / "base"), *(Made.at(path) for path in (run / "base").iterdir())])
    assert not (run / "base").exists()


def test_a_failure_of_the_writer_leaves_what_was_there(run):
    def write(folder: Path) -> None:
        (folder / "results.json").write_bytes(b"half")
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        publish_written(run, write, replace=True)
    assert without_lock(run) == OLD


@pytest.mark.parametrize("kind", [Exception, RuntimeError])
def test_a_full_disk_that_native_code_reports_is_one(run, kind):
    def write(folder: Path) -> None:
        raise kind("No space left on device (os error 28)")

    with pytest.raises(UsageError, match=r"cannot write in \S+/run: No space left on device \(ENOSPC\); free space"):
        publish_written(run, write)
    with pytest.raises(OSError) as caught, native_errors():
        write(run)
    assert caught.value.errno == errno.ENOSPC


def test_everything_is_on_the_disk_before_it_has_its_name(run):
    def function(ack):
        publish_written(run, write_base)
        ack("published")

    calls = run_with_fault(function, 0, "kill").calls
    staging = next(call.split(" ")[1] for call in calls if call.startswith("mkdir"))
    at = {call: index for index, call in enumerate(calls)}
    flushed = [at[f"fsync {staging}/base{name}"] for name in ("/config.json", "/model.safetensors", "")]
    order = [
        *sorted(flushed[:2]),
        flushed[2],
        at[f"fsync {staging}"],
        at[f"replace {staging}/base"],
        at[f"fsync {run}"],
    ]
    assert [*order, at["ack published"]] == sorted([*order, at["ack published"]])


@pytest.mark.small_process
@pytest.mark.parametrize("mode", ["kill", "half-kill", "EIO", "ENOSPC"])
def test_a_fault_at_every_operation_leaves_each_file_old_or_new(run, mode):
    template = run.rename(run.with_name("template"))

    def function(ack):
        publish_files(run, NEW, replace=True)
        ack("files")
        publish_written(run, write_base)
        ack("base")

    for k in itertools.count(1):
        shutil.copytree(template, run)
        outcome = run_with_fault(function, k, mode)
        left = {name: data for name, data in without_lock(run).items() if not name.startswith(".dylora-")}
        whole = OLD | NEW | BASE
        for name, data in left.items():
            assert data in (whole[name], OLD.get(name, whole[name])), (k, name)
        assert OLD.keys() <= left.keys(), k
        assert ("base" in left) <= (BASE.items() <= left.items()), (k, "half a base")
        if outcome.acks:
            assert NEW.items() <= left.items(), (k, "an acknowledged file is lost")
        if outcome.error:
            assert re.match(r"UsageError: cannot [a-z ]+ \S+/run", outcome.error), outcome.error
            assert "added.jsonl" not in left or outcome.acks == ["files"], (k, "a failure has left something new")
            assert "base" not in left, (k, "a failure has left something new")
        assert outcome.killed or not [name for name in tree(run) if name.startswith(".dylora-staging-") and "/" in name]
        assert outcome.killed == (outcome.fired and mode.endswith("kill"))
        run_folder.clean_leftovers(run)
        publish_written(run, write_base)
        assert {name for name in tree(run) if name.startswith(".")} <= {LOCK}
        shutil.rmtree(run)
        if not outcome.fired:
            assert outcome.acks == ["files", "base"]
            break
    assert k - 1 >= {"kill": 25, "half-kill": 4, "EIO": 40, "ENOSPC": 20}[mode]


def test_a_single_file_is_replaced_whole_without_a_lock(run, monkeypatch):
    (run / "link").symlink_to("results.json")
    replace_file(run / "link", b"whole")
    assert tree(run) == OLD | {"results.json": b"whole", "link": "results.json"} and (run / "link").is_symlink()
    monkeypatch.setattr(os, "write", lambda *a: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(UsageError, match=r"cannot write .*link: No space left on device"):
        replace_file(run / "link", b"half")
    assert tree(run) == OLD | {"results.json": b"whole", "link": "results.json"}


def test_what_is_no_file_is_written_into(tmp_path):
    reader, writer = os.pipe()
    replace_file(f"/dev/fd/{writer}", b"through a pipe")
    os.close(writer)
    assert os.read(reader, 99) == b"through a pipe"
    os.close(reader)
