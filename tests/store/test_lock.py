"""One process writes into a run folder; its threads and children do not get into each other's way."""

from __future__ import annotations

import os
import re
import shutil
import signal
import threading
from pathlib import Path

import pytest

from dylora_moe.errors import UsageError
from dylora_moe.store import lock, run_folder
from dylora_moe.store.claim import claimed
from dylora_moe.store.lock import LOCK, writer_lock
from dylora_moe.store.manifest import manifest_problems
from dylora_moe.store.publish import staged
from dylora_moe.store.whole_files import publish_files

from ..support.saving import python, save, steps, tree, write_files


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


HOLD = """
with writer_lock(sys.argv[1]):
    print("holding", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_gets_an_error_that_names_the_first(run):
    with staged(run / "checkpoint-10") as folder:
        write_files(folder, 10)
        for action in ("staged(run / 'checkpoint-20').__enter__()", "rotate(run, 1)", "check_writable(run)"):
            second = python(f"run = Path(sys.argv[1])\n{action}", run)
            error = second.communicate()[1]
            assert second.returncode == 1
            assert re.search(rf"UsageError: .*another process writes .* here \(process {os.getpid()} on ", error)
    assert steps(run) == [10]
    assert python("rotate(sys.argv[1], 1)", run).wait() == 0


def test_a_killed_holder_does_not_block(run):
    holder = python(HOLD, run)
    assert holder.stdout.readline() == "holding\n"
    with pytest.raises(UsageError, match=rf"process {holder.pid} on"):
        save(run, 10)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    save(run, 10)
    assert steps(run) == [10]


def test_the_lock_is_reentrant_and_ends_with_the_last(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    with writer_lock(run), writer_lock(tmp_path / "link"):
        save(run, 10)
        assert python("rotate(sys.argv[1], 1)", run).wait() == 1
    assert python("rotate(sys.argv[1], 1)", run).wait() == 0


def test_a_forked_child_neither_has_the_lock_nor_keeps_it(run):
    """A data loader's worker may outlive the training process that was killed."""
    ready, done = os.pipe(), os.pipe()
    with writer_lock(run):
        child = os.fork()
        if child == 0:
            os.close(done[1])
            try:
                with writer_lock(run):
                    os.write(ready[1], b"locked")
            except UsageError:
                os.write(ready[1], b"refused")
            os.read(done[0], 1)
            os._exit(0)
        assert os.read(ready[0], 10) == b"refused"
    assert python("rotate(sys.argv[1], 1)", run).wait() == 0
    os.close(done[1])
    os.waitpid(child, 0)


def test_a_link_in_place_of_the_lock_is_not_followed(run, tmp_path):
    (run / LOCK).symlink_to(tmp_path / "precious")
    with pytest.raises(UsageError, match=r"cannot write in"):
        save(run, 10)
    assert not (tmp_path / "precious").exists()


def test_two_threads_do_not_remove_each_others_work(run, tmp_path):
    (tmp_path / "link").symlink_to(run)
    errors = []

    def work(numbers, path):
        try:
            for step in numbers:
                save(path, step)
                run_folder.check_writable(path)
                run_folder.rotate(path, 100)
        except BaseException as error:
            errors.append(error)

    paths = [(range(0, 40, 2), run), (range(1, 40, 2), tmp_path / "link"), (range(40), run)]
    threads = [threading.Thread(target=work, args=args) for args in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert steps(run) == list(range(40))
    assert all(manifest_problems(checkpoint.path) == [] for checkpoint in run_folder.checkpoints(run))
    assert not [path for path in run.iterdir() if path.name.endswith("incomplete")]


# ---- a copy that consists of hard links ----


def snapshot(run: Path) -> Path:
    """What `cp -al` makes."""
    return shutil.copytree(run, run.with_name("snapshot"), copy_function=os.link)


def test_the_lock_of_a_hard_linked_copy_is_another_one(run):
    save(run, 10)
    with writer_lock(run):
        copy = snapshot(run)
        text = (run / LOCK).read_text()
        assert os.stat(run / LOCK).st_nlink == 2
        assert python("rotate(sys.argv[1], 1)", run).wait() == 1  # though its file is shared
        holder = python(HOLD, copy)
        assert holder.stdout.readline() == "holding\n"
        assert (run / LOCK).read_text() == text
        assert f"process {holder.pid} on" in (copy / LOCK).read_text()
        for folder in (run, copy):
            assert python("rotate(sys.argv[1], 1)", folder).wait() == 1
    save(run, 20)  # the lock of the copy does not block the original
    assert (steps(run), steps(copy)) == ([10, 20], [10])
    holder.kill()
    holder.wait()
    assert {path.name for path in copy.iterdir()} == {"checkpoint-10", LOCK}


def test_the_original_gets_a_lock_of_its_own_as_well(run):
    save(run, 10)
    copy = snapshot(run)
    before = (copy / LOCK).read_text()
    with writer_lock(run):
        assert python("rotate(sys.argv[1], 1)", copy).wait() == 0
        assert python("rotate(sys.argv[1], 1)", run).wait() == 1
    assert (run / LOCK).read_text() != (copy / LOCK).read_text() != before


def test_of_two_that_replace_a_shared_file_one_does(run):
    """The second has seen the shared file, too, and comes when it is replaced already."""
    (run / LOCK).touch()
    os.link(run / LOCK, run.with_name("elsewhere"))
    shared = os.stat(run / LOCK)
    first = lock._replace(run / LOCK, shared)
    assert os.path.samestat(os.fstat(first), os.stat(run / LOCK))
    assert lock._replace(run / LOCK, shared) is None
    assert os.path.samestat(os.fstat(first), os.stat(run / LOCK))
    assert [path.name for path in run.iterdir()] == [LOCK]
    os.close(first)


CONTEND = """
import os, time
from dylora_moe.errors import UsageError
run, inside = sys.argv[1], sys.argv[1] + "/inside"
end, times = time.monotonic() + float(sys.argv[2]), 0
while time.monotonic() < end:
    try:
        with writer_lock(run) as lock:
            os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
            times += 1
            lock.discard = times % 2 == 0
            time.sleep(0.001)
            os.unlink(inside)
    except UsageError:
        pass
print(times)
"""


def test_one_of_many_gets_in_though_the_file_is_shared_and_removed_all_the_time(run):
    others = run.with_name("links")
    others.mkdir()
    writers = [python(CONTEND, run, 2.0) for _ in range(4)]
    number = 0
    while any(writer.poll() is None for writer in writers):
        try:
            os.link(run / LOCK, others / str(number))
            number += 1
        except FileNotFoundError:
            pass
    ends = [(*writer.communicate(), writer.returncode) for writer in writers]
    assert [err for _, err, code in ends if code] == []
    assert sum(int(out) for out, _, _ in ends) > 20
    assert number > 20


# ---- claimed: what was made goes again ----


def test_what_a_claim_has_made_goes_again_unless_it_is_kept(run):
    for keep in (False, True):
        with claimed(run / "a/b") as claim:
            claim.made += publish_files(run / "a/b", {"code.jsonl": b"made here"})
            if keep:
                claim.keep()
        assert set(tree(run)) == ({"a", "a/b", "a/b/code.jsonl", f"a/b/{LOCK}"} if keep else set())


def test_what_a_claim_has_not_made_stays(run):
    (run / LOCK).touch()
    with pytest.raises(KeyboardInterrupt), claimed(run) as claim:
        claim.made += publish_files(run, {"code.jsonl": b"made here"})
        (run / "code.jsonl").write_text("written by its user since")
        (run / "base").mkdir()
        raise KeyboardInterrupt
    assert set(tree(run)) == {LOCK, "base", "code.jsonl"}
    with claimed(run / "new"):
        (run / "new/notes.txt").touch()
    assert set(tree(run / "new")) == {"notes.txt"}


def test_a_lock_that_another_process_holds_is_never_removed(run):
    holder = python(HOLD, run)
    assert holder.stdout.readline() == "holding\n"
    with pytest.raises(UsageError, match="another process"), claimed(run):
        pytest.fail("must not be entered")
    assert python("rotate(sys.argv[1], 1)", run).wait() == 1
    holder.kill()
    holder.wait()


def test_a_save_inside_a_claim_leaves_its_lock(run):
    with claimed(run / "new") as claim:
        with pytest.raises(RuntimeError), staged(run / "new/checkpoint-1"):
            raise RuntimeError
        assert python("rotate(sys.argv[1], 1)", run / "new").wait() == 1
        claim.keep()
    assert set(tree(run)) == {"new", f"new/{LOCK}"}
