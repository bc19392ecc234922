"""One process writes into a run folder; its threads and children do not get into each other's way."""

from __future__ import annotations

import os
import re
import signal
import threading
from pathlib import Path

import pytest

from dylora_moe.errors import UsageError
from dylora_moe.store import run_folder
from dylora_moe.store.lock import LOCK, writer_lock
from dylora_moe.store.manifest import manifest_problems
from dylora_moe.store.publish import staged

from ..support.saving import python, save, steps, write_files


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
