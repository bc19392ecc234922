"""A save that returned is there; a save that did not has never happened; whatever is wrong is named."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import pytest

from dylora_moe.errors import UsageError
from dylora_moe.store import run_folder
from dylora_moe.store.lock import LOCK
from dylora_moe.store.manifest import MANIFEST, FolderGone, file_digest, first_reason, manifest_problems
from dylora_moe.store.publish import seal, staged

from ..support.faults import CHANGES, MODES, run_with_fault
from ..support.saving import FILES, NESTED, content, python, save, steps, tree, write_files

ROOT = Path(__file__).parents[2]
STRANGERS = ["checkpoint-10.tmp", "checkpoint-best", "old-checkpoint-30", "checkpoint-007", "checkpoint-٣", "elsewhere"]
LEFTOVERS = [".dylora-staging-1-0000000a", ".dylora-trash-1-0000000b"]


@pytest.fixture(autouse=True)
def light(monkeypatch):
    """One worker makes the order of operations fixed; flushing for real costs time and shows nothing here."""
    monkeypatch.setattr("dylora_moe.store.files.WORKERS", 1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """A folder in memory where there is one: thousands of runs make many files, and none has to last."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path_factory.mktemp("memory")
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def sound(run) -> Path:
    save(run, 10)
    return run / "checkpoint-10"


# ---- what is published ----------------------------------------------------------------------------------------------


def test_a_save_publishes_exactly_its_files_and_their_manifest(run):
    save(run, 10)
    folder = run / "checkpoint-10"
    assert sorted(path for path, data in tree(folder).items() if data is not None) == sorted([*FILES, MANIFEST])
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["format_version"] == 1
    assert list(manifest["files"]) == sorted(FILES)
    for path in FILES:
        data = content(10, path)
        assert (folder / path).read_bytes() == data
        assert manifest["files"][path] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert manifest_problems(folder) == []
    assert run_folder.latest(run) == run_folder.Checkpoint(10, folder)
    assert {path.name for path in run.iterdir()} == {"checkpoint-10", LOCK}


def test_manifest_bytes_depend_on_the_files_alone(tmp_path, monkeypatch):
    for name, workers in (("one", 1), ("two", 4)):
        monkeypatch.setattr("dylora_moe.store.files.WORKERS", workers)
        (tmp_path / name).mkdir()
        save(tmp_path / name, 10)
    assert tree(tmp_path / "one/checkpoint-10") == tree(tmp_path / "two/checkpoint-10")


def test_any_name_can_be_a_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with staged("checkpoint") as folder:
        write_files(folder, 1)
    assert manifest_problems("checkpoint") == []


def test_the_staging_folder_is_beside_the_target_and_no_checkpoint(run):
    with staged(run / "checkpoint-10") as folder:
        write_files(folder, 10)
        assert folder.parent == run
        assert not re.search(r"checkpoint|^[^.]", folder.name)
        assert (run_folder.checkpoints(run), run_folder.incomplete(run)) == ([], [])


def test_the_same_step_again_leaves_the_published_one_untouched(run):
    save(run, 10)
    before = tree(run)
    with staged(run / "checkpoint-10") as folder:
        assert folder is None
    assert tree(run) == before


def test_a_published_checkpoint_with_a_stray_file_is_not_replaced_either(sound):
    (sound / ".DS_Store").write_text("x")
    with staged(sound) as folder:
        assert folder is None
    assert {path.name for path in sound.parent.iterdir()} == {sound.name, LOCK}


def test_an_incomplete_folder_of_that_name_is_moved_aside(run):
    for expected in ("checkpoint-10.incomplete", "checkpoint-10.incomplete-2"):
        (run / "checkpoint-10").mkdir()
        (run / "checkpoint-10/half.bin").write_text(expected)
        save(run, 10)
        assert (run / expected / "half.bin").read_text() == expected
        assert manifest_problems(run / "checkpoint-10") == []
        shutil.rmtree(run / "checkpoint-10")


def test_an_empty_folder_of_that_name_is_not_silently_replaced(run):
    (run / "checkpoint-10").mkdir()
    save(run, 10)
    assert (run / "checkpoint-10.incomplete").is_dir()


def test_a_folder_with_other_files_is_refused_and_stays(run):
    save(run, 10)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused = pytest.raises(UsageError, match=r"nothing was saved: .* other files \(.*checkpoint-10.*name a new one")
    with refused, staged(run):
        pytest.fail("nothing is to be written")
    assert before.items() <= {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}.items()


def test_a_manifest_of_something_else_makes_no_checkpoint(tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / MANIFEST).write_text('{"manifest_version": 3}')
    with pytest.raises(UsageError, match=r"web holds other files \(manifest\.json\)"), staged(tmp_path / "web"):
        pytest.fail("nothing is to be written")


def test_a_broken_checkpoint_of_another_name_is_moved_aside_and_an_empty_folder_is_used(tmp_path):
    for moved in (set(), {"mine.incomplete"}):
        (tmp_path / "mine").mkdir(exist_ok=True)
        with staged(tmp_path / "mine") as folder:
            write_files(folder, 1)
        assert manifest_problems(tmp_path / "mine") == []
        assert {path.name for path in tmp_path.iterdir()} - {LOCK} == {"mine", *moved}
        (tmp_path / "mine/config.json").unlink()


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("elsewhere"), os.mkfifo])
def test_a_target_that_is_no_folder_is_an_error(run, make):
    make(run / "checkpoint-10")
    before = {path.name for path in run.iterdir()}
    with pytest.raises(UsageError, match=r"checkpoint-10 is .*, not a folder: move it away"):
        save(run, 10)
    assert {path.name for path in run.iterdir()} == before


@pytest.mark.parametrize("error", [RuntimeError("expert_1 cannot be saved"), KeyboardInterrupt(), OSError(28, "full")])
def test_an_exception_while_writing_passes_and_leaves_nothing(run, error):
    save(run, 10)
    before = tree(run)
    with pytest.raises(type(error)) as caught, staged(run / "checkpoint-20") as folder:
        write_files(folder, 20)
        raise error
    assert caught.value is error
    assert tree(run) == before
    save(run, 20)
    assert steps(run) == [10, 20]


def spoil_with_link(folder: Path) -> None:
    (folder / "link").symlink_to("/etc/passwd")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_with_link, r"link: expected files, found a symbolic link"),
        (lambda folder: os.mkfifo(folder / "pipe"), r"pipe: expected files, found a FIFO"),
        (lambda folder: (folder / "expert_1").mkdir(), r"expert_1: expected files, found a folder without any"),
        (lambda folder: (folder / "a\\b").touch(), r"found a\\b"),
        (lambda folder: (folder / MANIFEST).touch(), r"manifest\.json"),
    ],
)
def test_what_a_reader_would_refuse_is_not_published(run, spoil, message):
    with pytest.raises(UsageError, match=message), staged(run / "checkpoint-10") as folder:
        write_files(folder, 10)
        spoil(folder)
    assert list(run.iterdir()) == []


def test_a_manifest_too_large_to_be_read_is_not_published(run, monkeypatch):
    monkeypatch.setattr("dylora_moe.store.manifest.MAX_MANIFEST_BYTES", 100)
    with pytest.raises(UsageError, match=r"manifest\.json: expected at most 100 bytes"):
        save(run, 10)
    assert run_folder.checkpoints(run) == []


@pytest.mark.parametrize(
    ("parent", "message"),
    [("missing", r"missing: No such file or directory \(ENOENT\); create"), ("file", r"\(ENOTDIR\); choose a folder")],
)
def test_a_run_folder_that_is_none_is_an_error(tmp_path, parent, message):
    (tmp_path / "file").touch()
    saves = [lambda run: save(run, 10)] if parent == "file" else []  # a save makes what is missing
    for action in (*saves, run_folder.check_writable, lambda run: run_folder.rotate(run, 1)):
        with pytest.raises(UsageError, match=message):
            action(tmp_path / parent)


def test_a_save_makes_the_folder_around_it_which_goes_again_if_it_fails(tmp_path):
    with pytest.raises(RuntimeError), staged(tmp_path / "grown/new/checkpoint-1"):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    save(tmp_path / "grown/new", 1)
    assert steps(tmp_path / "grown/new") == [1]


# ---- hashing --------------------------------------------------------------------------------------------------------


def test_every_file_is_read_once(run):
    def function(ack):
        save(run, 10)
        ack("saved")

    calls = run_with_fault(function, 0, "kill").calls
    reads = {path: sum(call.startswith("read") and call.endswith(f"/{path}") for call in calls) for path in FILES}
    assert reads == dict.fromkeys(FILES, 2)  # the second read finds the end
    assert manifest_problems(run / "checkpoint-10") == []


def test_a_file_that_changes_while_it_is_hashed_is_not_published(run, monkeypatch):
    real = file_digest

    def slow(path, size):
        if path.name == "config.json":
            path.write_bytes(b"changed")
        return real(path, size)

    monkeypatch.setattr("dylora_moe.store.publish.file_digest", slow)
    with pytest.raises(UsageError, match=r"config\.json: expected the \d+ bytes"):
        save(run, 10)
    assert run_folder.checkpoints(run) == []


# ---- flushed in time ------------------------------------------------------------------------------------------------


def test_everything_is_on_the_disk_before_its_name_and_its_name_before_the_acknowledgement(run):
    """What a power cut leaves: content flushed < manifest < folders, the inner first < rename < parent < ack."""

    def function(ack):
        save(run, 10)
        ack("saved")

    calls = run_with_fault(function, 0, "kill").calls
    created = next(call.split(" ")[1] for call in calls if call.startswith("mkdir"))
    at = {call: index for index, call in enumerate(calls)}  # the last of equal calls
    rename = at[f"rename {created}"]
    manifest = calls.index(f"open {created}/{MANIFEST}")
    assert len([call for call in calls if call.startswith("rename")]) == 1
    for path in FILES:
        assert at[f"write {created}/{path}"] < at[f"fsync {created}/{path}"] < manifest
    assert manifest < at[f"write {created}/{MANIFEST}"] < at[f"fsync {created}/{MANIFEST}"] < at[f"fsync {created}"]
    inner = [f"fsync {created}/{'/'.join(NESTED.split('/')[:depth])}" for depth in (3, 2, 1)]
    order = [at[call] for call in [*inner, f"fsync {created}"]]
    assert order == sorted(order)
    assert not [call for call in calls[order[0] : rename] if call.startswith(("write", "mkdir"))]
    assert rename < at[f"fsync {run}"] < at["ack saved"]


def test_the_name_is_flushed_again_if_its_writer_could_not(sound):
    def function(ack):
        with staged(sound) as folder:
            assert folder is None
        ack("saved")

    outcome = run_with_fault(function, 0, "kill")
    assert outcome.acks == ["saved"]
    assert f"fsync {sound.parent}" in outcome.calls


def test_rotation_flushes_the_new_name_before_it_deletes(run):
    save(run, 10)
    save(run, 20)
    calls = run_with_fault(lambda ack: run_folder.rotate(run, 1), 0, "kill").calls
    renamed, flushed = calls.index(f"rename {run}/checkpoint-10"), calls.index(f"fsync {run}")
    deleted = next(index for index, call in enumerate(calls) if call.startswith(("unlink", "rmdir")))
    assert renamed < flushed < deleted


# ---- faults at every operation --------------------------------------------------------------------------------------

SCENARIOS = {
    # name: (steps published before, step saved, limit, keep)
    "first save": ([], 10, None, []),
    "second save": ([10], 20, None, []),
    "limit 1": ([10], 20, 1, []),
    "limit 2": ([10, 20], 30, 2, []),
    "limit 1 and the best": ([10, 20], 30, 1, [10]),
    "after a crash": ([10], 20, 1, []),
    "over a half-saved one": ([10], 20, 1, []),
    "the same step again": ([10, 20], 20, 1, []),
}
# How many operations of the first save a mode must reach, so that the faults are known to be placed.
AT_LEAST = {"kill": 60, "half-kill": 6, "EIO": 90, "ENOSPC": 40, "half-ENOSPC": 6}


def strangers_in(run: Path) -> dict[str, object]:
    names = [*STRANGERS, "checkpoint-7", "checkpoint-8", "checkpoint-999"]
    return {name: (os.lstat(run / name).st_mode, tree(run / name)) for name in names if os.path.lexists(run / name)}


def add_strangers(run: Path) -> None:
    """What bears a similar name is never chosen and never deleted, be it as sound as a checkpoint."""
    for name in STRANGERS:
        (run / name).mkdir()
        (run / name / "router.safetensors").write_text(name)
        seal(run / name)
    (run / "checkpoint-7").write_text("a file")
    (run / "checkpoint-8").symlink_to("elsewhere")
    (run / "checkpoint-999").symlink_to("nowhere")


def prepare(run: Path, scenario: str) -> None:
    """The run folder as it is before the save."""
    run.mkdir()
    add_strangers(run)
    for step in SCENARIOS[scenario][0]:
        save(run, step)
    if scenario == "after a crash":
        for name in LEFTOVERS:
            (run / name).mkdir()
            (run / name / "half.bin").write_text("half")
    if scenario == "over a half-saved one":
        (run / "checkpoint-20").mkdir()
        (run / "checkpoint-20/router.safetensors").write_text("half")


def check_what_is_left(run: Path, scenario: str, outcome, strangers: dict[str, object]) -> None:
    before, step, limit, keep = SCENARIOS[scenario]
    newest, complete = run_folder.latest(run), steps(run)
    if before:
        assert newest.step >= max(before), "the newest complete one is lost"
    if "saved" in outcome.acks:
        assert newest.step == max(step, *before, 0), "an acknowledged save is lost"
    there = {*before, step} if outcome.acks else set(before)
    assert there - set(run_folder.to_delete([*before, step], limit or 99, keep)) <= set(complete), (
        "rotation must keep these"
    )
    for checkpoint in run_folder.checkpoints(run):
        assert manifest_problems(checkpoint.path) == []
        assert all((checkpoint.path / path).read_bytes() == content(checkpoint.step, path) for path in FILES)
    if outcome.error:
        assert outcome.error.startswith("UsageError"), outcome.error
        if "saved" not in outcome.acks:
            assert step in before or step not in complete, "a save that failed was published"
    if outcome.killed:
        assert outcome.error is None
    assert strangers_in(run) == strangers

    save(run, 1000)  # the next save succeeds, and cleans up
    assert run_folder.latest(run).step == 1000
    names = {path.name for path in run.iterdir()} - strangers.keys()
    if scenario == "over a half-saved one":
        aside = names & {"checkpoint-20.incomplete"}
        assert len(aside) == 1 or (run / "checkpoint-20/router.safetensors").read_text() == "half"
        names -= {"checkpoint-20.incomplete", "checkpoint-20"}
    assert names <= {LOCK, *(f"checkpoint-{step}" for step in steps(run))}


@pytest.mark.small_process
@pytest.mark.parametrize(
    "mode",
    [
        "kill",
        pytest.param("half-kill", marks=pytest.mark.slow),
        "EIO",
        pytest.param("ENOSPC", marks=pytest.mark.slow),
        pytest.param("half-ENOSPC", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_fault_at_every_operation_of_a_save(scenario, mode, memory):
    template = memory / f"{scenario}, {mode}"
    prepare(template, scenario)
    strangers = strangers_in(template)
    assert len(strangers) == len(STRANGERS) + 3
    _, step, limit, keep = SCENARIOS[scenario]
    for k in itertools.count(1):
        run = memory / str(k)
        shutil.copytree(template, run, symlinks=True, copy_function=os.link)  # quicker; nothing writes into a file

        def function(ack, run=run):
            save(run, step)
            ack("saved")
            if limit is not None:
                run_folder.rotate(run, limit, keep)
            ack("rotated")

        outcome = run_with_fault(function, k, mode)
        try:
            check_what_is_left(run, scenario, outcome, strangers)
        except Exception as error:
            raise AssertionError(f"k = {k}, after {outcome.calls[-3:]}, {outcome.error}: {error}") from error
        shutil.rmtree(run)
        if not outcome.fired:
            assert outcome.acks == ["saved", "rotated"]
            break
        assert outcome.killed == mode.endswith("kill")
    print(f"{scenario}, {mode}: faults at {k - 1} operations")
    assert k - 1 >= AT_LEAST[mode] or scenario == "the same step again"  # that there is something to see


@pytest.mark.small_process
def test_the_faults_reach_native_writers_and_open(run):
    """Files of safetensors are written by its own code, where no shim of `os` sees it."""
    unseen = os.open, os.write, os.close  # what the native code calls, whatever is put over it

    def save_file(data, path):
        descriptor = unseen[0](path, os.O_WRONLY | os.O_CREAT)
        unseen[1](descriptor, data)
        unseen[2](descriptor)

    native = types.SimpleNamespace(save_file=save_file)

    def function(ack):
        native.save_file(b"0123456789", run / "native.bin")
        ack("native")
        with open(run / "text.json", "w") as file:
            file.write("0123456789")
        ack("text")

    sizes = []
    for k in itertools.count(1):
        outcome = run_with_fault(function, k, "half-kill", writers=[(native, "save_file")])
        sizes.append([path.stat().st_size for path in sorted(run.iterdir())])
        if not outcome.fired:
            break
    assert outcome.acks == ["native", "text"]
    assert sizes[0] == [5] and sizes[-2] == [10, 5] and sizes[-1] == [10, 10]


@pytest.mark.small_process
@pytest.mark.parametrize(
    ("mode", "cause", "kinds"),
    [
        ("ENOSPC", r": No space left on device \(ENOSPC\); free space on that disk", {"write", "fsync", "rename"}),
        ("EIO", r": Input/output error \(EIO\); the disk reports an error", {"write", "fsync", "close", "rename"}),
    ],
)
def test_a_failed_save_leaves_nothing_and_names_the_file_the_cause_and_the_remedy(run, mode, cause, kinds):
    save(run, 1)
    before, failures = tree(run), set()
    for k in itertools.count(1):
        outcome = run_with_fault(lambda ack: save(run, 10), k, mode)
        if not outcome.fired:
            break
        failed = [call for call in outcome.calls if call.split(" ")[0] in MODES[mode]][k - 1]
        if outcome.error:
            assert tree(run) | {LOCK: b""} == before | {LOCK: b""}
            failures.add((failed.split(" ")[0], outcome.error.partition("\n")[0].replace(str(run), "RUN")))
        else:  # the text in the lock file is for people, and may be missing
            assert failed.split(" ")[0] not in CHANGES or failed.endswith(f"/{LOCK}"), failed
            shutil.rmtree(run / "checkpoint-10")
    errors = {error for _, error in failures}
    for error in errors:
        assert re.match(rf"UsageError: cannot [a-z ]+ RUN\S*{cause}", error), error
    assert kinds <= {name for name, _ in failures}
    for what in (r"flush RUN/\S+/router\.safetensors", r"write RUN/\S+/manifest\.json", r"publish RUN/checkpoint-10"):
        assert any(re.search(f"UsageError: cannot {what}{cause}", error) for error in errors), errors


# ---- rotation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "limit", "keep", "deleted"),
    [
        ([], 1, [], []),
        ([10], 1, [], []),
        ([10, 20], 1, [], [10]),
        ([10, 20, 30], 2, [], [10]),
        ([10, 20, 30], 3, [], []),
        ([10, 20, 30], 99, [], []),
        ([9, 10, 100], 1, [], [9, 10]),  # by number, not by text
        ([30, 10, 20], 2, [], [10]),
        ([10, 20, 30], 1, [10], [20]),  # the best and the newest stay, though they are two
        ([10, 20, 30], 1, [30], [10, 20]),
        ([10, 20, 30, 40, 50], 3, [10], [20, 30]),  # as Transformers counts: the best is one of the three
        ([10, 20, 30, 40], 2, [10, 20], [30]),
        ([10, 20, 30], 2, [77], [10]),  # to be kept, but not there
    ],
)
def test_to_delete(there, limit, keep, deleted):
    assert run_folder.to_delete(there, limit, keep) == deleted


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_an_error(run, limit):
    with pytest.raises(UsageError, match=rf"at least 1, got {limit}"):
        run_folder.rotate(run, limit)


def test_rotation_goes_by_step_over_complete_checkpoints_only(run):
    add_strangers(run)
    for step in (9, 30, 10, 20):
        save(run, step)
    (run / "checkpoint-40").mkdir()
    (run / "checkpoint-40/half.bin").touch()
    before = tree(run)
    assert run_folder.rotate(run, 2, keep=[9]) == [run / "checkpoint-10", run / "checkpoint-20"]
    after = tree(run)
    gone = {path.partition("/")[0] for path in before.keys() - after.keys()}
    assert gone == {"checkpoint-10", "checkpoint-20"}
    assert after.items() <= before.items()


def test_row_38_rotation_leaves_a_checkpoint_in_which_somebody_has_put_a_file(run):
    for step in (1, 2, 3):
        save(run, step)
    (run / "checkpoint-1" / "peft_adapters" / "notes.txt").touch()
    (run / "checkpoint-2" / "empty").mkdir()
    assert run_folder.rotate(run, 1) == [run / "checkpoint-2"]
    assert (run / "checkpoint-1" / "peft_adapters" / "notes.txt").is_file()


# ---- finding --------------------------------------------------------------------------------------------------------


def test_only_complete_folders_of_the_exact_name_are_checkpoints(run):
    add_strangers(run)
    assert run_folder.latest(run) is None
    for step in (0, 9, 10, 100):
        save(run, step)
    assert run_folder.checkpoints(run) == [
        run_folder.Checkpoint(step, run / f"checkpoint-{step}") for step in (0, 9, 10, 100)
    ]
    assert run_folder.latest(run).step == 100


def test_the_newest_is_half_saved(run):
    for step in (10, 20, 30, 40):
        save(run, step)
    (run / "checkpoint-40" / MANIFEST).unlink()
    (run / "checkpoint-30/router.safetensors").write_bytes(b"")
    assert run_folder.latest(run).step == 20
    passed_over = run_folder.incomplete(run)
    assert [path.name for path, _ in passed_over] == ["checkpoint-30", "checkpoint-40"]
    assert re.search(r"router\.safetensors: expected a file of \d+ bytes, found 0 bytes", passed_over[0][1])
    assert re.search(r"manifest\.json: .*not found", passed_over[1][1])


def test_times_play_no_part(run):
    for step in (10, 20):
        save(run, step)
    for path, time in ((run / "checkpoint-10", 4e9), (run / "checkpoint-20", 1.0)):
        os.utime(path, (time, time))
    assert run_folder.latest(run).step == 20
    assert run_folder.rotate(run, 1) == [run / "checkpoint-10"]


def test_a_run_folder_that_is_not_there_has_no_checkpoints(tmp_path):
    assert (
        run_folder.checkpoints(tmp_path / "none"),
        run_folder.latest(tmp_path / "none"),
        run_folder.incomplete(tmp_path / "none"),
    ) == ([], None, [])
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot list"):
        run_folder.latest(tmp_path / "file")


def test_one_that_cannot_be_read_is_passed_over_but_not_moved_aside(run):
    save(run, 10)
    save(run, 20)
    real = os.open

    def failing(path, *args, **kwargs):
        if os.fspath(path).endswith(f"checkpoint-20/{MANIFEST}"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return real(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", failing)
        assert run_folder.latest(run).step == 10
        assert "Input/output error" in run_folder.incomplete(run)[0][1]
        assert "Input/output error" in manifest_problems(run / "checkpoint-20")[0]
        with pytest.raises(UsageError, match=r"cannot look at .*checkpoint-20: Input/output error \(EIO\)"):
            save(run, 20)
    assert steps(run) == [10, 20]


def test_a_target_that_cannot_be_looked_at_is_not_taken_for_missing(sound, monkeypatch):
    real = os.lstat

    def failing(path, **kwargs):
        if os.fspath(path).endswith("checkpoint-10"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        return real(path, **kwargs)

    monkeypatch.setattr(os, "lstat", failing)
    with pytest.raises(UsageError, match=r"cannot look at .*checkpoint-10: .*\(EIO\)"), staged(sound):
        pytest.fail("must not be entered")


def test_a_write_that_takes_only_a_part_is_continued(run, sound, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, data[:7]))
    with staged(run / "checkpoint-20") as folder:
        for path in FILES:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes((sound / path).read_bytes())
    assert tree(run / "checkpoint-20") == tree(sound)


def test_a_listing_made_during_a_save_and_a_rotation_is_made_again(run, monkeypatch):
    """The old one is listed, then the new one published and the old one removed: the answer is the new one."""
    save(run, 10)
    real, calls = first_reason, []

    def late(folder):
        if not calls:
            calls.append(folder)
            save(run, 20)
            shutil.rmtree(run / "checkpoint-10")
        return real(folder)

    monkeypatch.setattr("dylora_moe.store.run_folder.first_reason", late)
    assert run_folder.latest(run) == run_folder.Checkpoint(20, run / "checkpoint-20")


def test_a_reader_sees_an_old_or_a_new_one_never_a_mixture(run):
    save(run, 1)
    code = """
import os
os.fsync = lambda descriptor: None
for step in range(2, int(sys.argv[2])):
    with staged(Path(sys.argv[1], f"checkpoint-{step}")) as folder:
        for name in "abc":
            (folder / name).write_text(f"{name} of {step}" * 1000)
    rotate(sys.argv[1], 1)
"""
    writer = python(code, run, 150)
    looks, seen = 0, set()
    while writer.poll() is None:
        newest = run_folder.latest(run)
        assert newest is not None
        seen.add(newest.step)
        try:
            assert manifest_problems(newest.path) == []
        except FolderGone:
            continue
        looks += 1
    assert writer.wait() == 0, writer.communicate()[1]
    assert steps(run) == [149]
    assert looks > 3 and len(seen) > 3


# ---- leftovers ------------------------------------------------------------------------------------------------------


def test_leftovers_are_removed_and_nothing_else(run):
    add_strangers(run)
    (run / ".dylora-staging-notes").mkdir()
    (run / ".dylora-trash-5-0000000c").symlink_to("elsewhere")
    before = tree(run)
    for name in LEFTOVERS:
        (run / name).mkdir()
        (run / name / "half.bin").touch()
    (run / ".dylora-probe-1-0000000d").touch()
    removed = {path.name for path in run_folder.clean_leftovers(run)}
    assert removed == {*LEFTOVERS, ".dylora-probe-1-0000000d", ".dylora-trash-5-0000000c"}
    after = tree(run)
    assert before.keys() - after.keys() == {".dylora-trash-5-0000000c"}  # the link, not what it points to
    assert after.keys() - before.keys() <= {LOCK}


def test_leftovers_of_a_live_process_stay(run):
    holder = python("with staged(Path(sys.argv[1], 'checkpoint-10')): print('x', flush=True); sys.stdin.read()", run)
    holder.stdout.readline()
    before = tree(run)
    with pytest.raises(UsageError, match="another process"):
        run_folder.clean_leftovers(run)
    assert tree(run) == before
    holder.kill()
    holder.wait()
    assert len(run_folder.clean_leftovers(run)) == 1
    assert {path.name for path in run.iterdir()} == {LOCK}


# ---- before the start -----------------------------------------------------------------------------------------------


def test_a_run_folder_is_made_with_its_parents_and_each_is_flushed_before_it_counts(tmp_path):
    def function(ack):
        ack(" ".join(path.name for path in run_folder.make_run_dir(tmp_path / "a/b/run")))

    calls = run_with_fault(function, 0, "kill").calls
    calls = [call.replace(str(tmp_path), "TMP") for call in calls if call.startswith(("mkdir", "fsync", "ack"))]
    assert calls == [
        f"fsync {tmp_path.parent}",  # the parent of what is there: a maker that was killed could not flush it
        "mkdir TMP/a",
        "fsync TMP",
        "mkdir TMP/a/b",
        "fsync TMP/a",
        "mkdir TMP/a/b/run",
        "fsync TMP/a/b",
        "ack run b a",
    ]
    assert run_folder.make_run_dir(tmp_path / "a/b/run") == []


@pytest.mark.small_process
def test_a_run_folder_can_be_made_after_a_fault_at_every_operation(tmp_path):
    for mode in ("kill", "EIO"):
        for k in itertools.count(1):
            outcome = run_with_fault(
                lambda ack, k=k, mode=mode: run_folder.make_run_dir(tmp_path / f"{mode} {k}/run"), k, mode
            )
            assert not outcome.error or re.match(r"UsageError: cannot create .*\(EIO\)", outcome.error)
            assert not (outcome.error and (tmp_path / f"{mode} {k}").exists())
            run_folder.make_run_dir(tmp_path / f"{mode} {k}/run")
            assert (tmp_path / f"{mode} {k}/run").is_dir()
            if not outcome.fired:
                break
        assert k > 8


def test_a_run_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for path in ("file", "file/run", "link"):
        with pytest.raises(UsageError, match=rf"cannot create {tmp_path}/{path}: .*; c"):
            run_folder.make_run_dir(tmp_path / path)


def test_a_parent_that_may_not_be_read_need_not_be_flushed(tmp_path, monkeypatch):
    real = os.open

    def refusing(path, *args, **kwargs):
        if os.fspath(path) == os.fspath(tmp_path):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    assert run_folder.make_run_dir(tmp_path / "run") == [tmp_path / "run"]


def test_a_writable_folder_is_left_as_it_was(run):
    run_folder.check_writable(run)
    assert {path.name for path in run.iterdir()} == {LOCK}


@pytest.mark.parametrize("code", ["EROFS", "EACCES", "ENOSPC"])
def test_a_folder_that_cannot_be_written_is_found_at_the_start(run, code, monkeypatch):
    """Injected, since root may write anywhere."""
    number, real = getattr(errno, code), os.open

    def refusing(path, flags, *args, **kwargs):
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), path)
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(UsageError, match=rf"cannot write in {re.escape(str(run))}: .* \({code}\); .*output folder"):
        run_folder.check_writable(run)


@pytest.mark.small_process
def test_a_full_disk_is_found_at_the_start(run):
    for k in itertools.count(1):
        outcome = run_with_fault(lambda ack: run_folder.check_writable(run), k, "half-ENOSPC")
        if outcome.error or not outcome.fired:
            break
    assert re.match(r"UsageError: cannot write in .*\(ENOSPC\); free space", outcome.error)
    assert {path.name for path in run.iterdir()} == {LOCK}


def test_a_file_system_without_fsync_of_folders_will_do(run, monkeypatch):
    def picky(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", picky)
    save(run, 10)
    assert steps(run) == [10]


def test_importing_it_is_light():
    heavy = ("torch", "numpy", "shutil", "tempfile", "logging")
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import dylora_moe.store.publish; "
    code += f"print(*[name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-S", "-E", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
