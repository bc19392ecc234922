"""Signals end a script by an exception, once, and whenever they arrive, nothing temporary is left."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import suppress

import pytest

from dylora_moe.system import interrupts
from dylora_moe.validation import workspace


@pytest.fixture(autouse=True)
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    "number, code, text",
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "hung up")],
)
def test_raises_with_the_exit_code(number, code, text):
    with interrupts.handled(), pytest.raises(interrupts.Interrupted) as raised:
        send(number)
    assert (raised.value.exit_code, str(raised.value)) == (code, text)


def test_handlers_are_as_found():
    before = signal.getsignal(signal.SIGTERM)
    with interrupts.handled():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


def test_ignored_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interrupts.handled():
        send(signal.SIGHUP)


def test_impatience_is_ignored_for_a_while(monkeypatch):
    with interrupts.handled():
        with pytest.raises(interrupts.Interrupted):
            send(signal.SIGINT)
        send(signal.SIGINT)
        monkeypatch.setattr(interrupts, "DEAF_SECONDS", 0)
        with pytest.raises(interrupts.Interrupted):
            send(signal.SIGTERM)
        assert interrupts.arrived().exit_code == 130


def test_what_a_library_swallowed_is_raised_again():
    with interrupts.handled():
        interrupts.check()
        with suppress(BaseException):
            send(signal.SIGINT)
        with pytest.raises(interrupts.Interrupted):
            interrupts.check()


def test_temporary_folder_is_removed_when_interrupted(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for keep in (False, True):
        with (
            interrupts.handled(),
            pytest.raises(interrupts.Interrupted),
            workspace.temporary("x_", keep=keep) as folder,
        ):
            (folder / "file").touch()
            send(signal.SIGTERM)
    assert list(tmp_path.iterdir()) == []
    with workspace.temporary("x_", keep=True) as folder:
        pass
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("at", ["os.mkdir", "shutil.rmtree"])
@pytest.mark.parametrize("before", [True, False])
def test_temporary_folder_is_removed_when_it_is_being_made_or_removed(tmp_path, monkeypatch, at, before):
    """Whether the signal arrives just before the call or just after it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    module = {"os": os, "shutil": shutil}[at.partition(".")[0]]
    call = getattr(module, at.partition(".")[2])

    def interrupted(*args, **options):
        if before:
            send(signal.SIGTERM)
        call(*args, **options)
        send(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(at, interrupted)
        with interrupts.handled(), pytest.raises(interrupts.Interrupted), workspace.temporary("x_") as folder:
            (folder / "file").touch()
    workspace._remove_what_is_left()  # as at exit
    assert list(tmp_path.iterdir()) == []
    workspace._temporary.clear()


def test_output_folder_leaves_no_trace(tmp_path):
    for existing in (False, True):
        target = tmp_path / "a" / "b"
        if existing:
            target.mkdir(parents=True)
        with pytest.raises(RuntimeError), workspace.output_folder(target):
            raise RuntimeError
        assert target.exists() == existing
        assert [path.name for path in tmp_path.rglob("*")] == (["a", "b"] if existing else [])
