"""Flags in both spellings, messages and exit codes, streams."""

from __future__ import annotations

import errno
import io
import os
import sys

import pytest

from dylora_moe.errors import CheckpointError, UsageError
from dylora_moe.system import command_line


@pytest.fixture
def parser():
    parser = command_line.Parser(prog="x")
    parser.add_argument("--keep-checkpoint", action="store_true")
    parser.add_argument("--lora-r", type=command_line.number(int, 1, 9))
    parser.add_argument("--alpha", type=command_line.number(float, above=0))
    parser.add_argument("--name", type=command_line.text)
    return parser


def test_both_spellings(parser):
    for argv in (["--keep-checkpoint", "--lora-r", "2"], ["--keep_checkpoint", "--lora_r=2"]):
        args = parser.parse_args(argv)
        assert (args.keep_checkpoint, args.lora_r) == (True, 2)
    assert parser.parse_args(["--name=a_b"]).name == "a_b"
    assert parser.parse_args(["--name", "a_b"]).name == "a_b"


@pytest.mark.parametrize(
    "argv, text",
    [
        (["--lora-r", "0"], "expected a whole number from 1 to 9, got 0"),
        (["--lora-r", "10"], "expected a whole number from 1 to 9, got 10"),
        (["--lora-r", "1.5"], "expected a whole number from 1 to 9, got '1.5'"),
        (["--alpha", "0"], "expected a number above 0, got 0"),
        (["--alpha", "inf"], "expected a number above 0, got inf"),
        (["--alpha", "nan"], "expected a number above 0, got nan"),
        (["--name", " "], "expected a value, got an empty one"),
        (["--keep"], "unrecognized arguments: --keep"),
        (["--keep-chekpoint"], "unrecognized arguments: --keep-chekpoint (did you mean --keep-checkpoint?)"),
        (["--nam", "secret"], "unrecognized arguments: --nam (did you mean --name?)"),
        (["x"], "unrecognized arguments: x;"),
    ],
)
def test_bad_flags(parser, capsys, argv, text):
    assert command_line.run(parser.parse_args, argv, prog="x") == command_line.CANNOT_RUN
    error = capsys.readouterr().err
    assert text in error
    assert error.startswith("x: error: ") and error.endswith("; see x --help\n")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "error, code, text",
    [
        (UsageError("no such model"), 2, "x: no such model"),
        (CheckpointError("run/checkpoint-1", ["b", "a"]), 1, "is not a sound checkpoint:\n  - a\n  - b"),
        (MemoryError(), 2, "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 2, "not enough memory"),
        (OSError(errno.ENOSPC, "No space left on device", "f"), 2, "no space left on the disk for f"),
        (OSError(errno.EROFS, "Read-only file system", "f"), 2, "f cannot be read or written"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "f"), 2, "f: No such file or directory"),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), 2, "pip install -r requirements.txt"),
        (KeyboardInterrupt(), 130, "x: interrupted"),
    ],
)
def test_errors_become_one_message_and_a_code(capsys, error, code, text):
    def main(argv):
        raise error

    assert command_line.run(main, [], prog="x") == code
    assert text in capsys.readouterr().err


def test_a_mistake_of_ours_keeps_its_traceback():
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command_line.run(main, [])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_check_marks_in_every_locale(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    command_line.prepare_streams()
    print("✓ PASS: save", flush=True)
    assert raw.getvalue().decode("utf-8").rstrip() == "✓ PASS: save"


def test_closed_pipe(monkeypatch):
    read, write = os.pipe()
    os.close(read)

    def main(argv):
        print("x" * 100, flush=True)

    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert command_line.run(main, []) == command_line.PIPE_CLOSED


@pytest.mark.parametrize("style", ["", "36"])
def test_pieces_are_as_harmless_as_the_whole(style):
    """Wherever a text is cut, no line of it is a command of GitHub Actions, and no character acts on a terminal."""
    text = "a\tb\x1b[31m\n  ::error::x\n:: y\r\n##[warning]z: :: ##\n"
    printed = set()
    for cut in range(len(text)):
        stream = io.StringIO()
        pieces = command_line.Pieces(stream)
        for piece in (text[:cut], text[cut : cut + 1], text[cut + 1 :]):
            pieces.write(piece, style)
        found = stream.getvalue()
        if style:
            found = found.replace(f"\x1b[{style}m", "").replace("\x1b[0m", "")
        printed.add(found)
    assert printed == {"a\tb\\x1b[31m\n  :\\:error::x\n:\\: y\\r\n##\\[warning]z: :: ##\n"}


def test_texts_may_have_line_breaks_where_names_may_not():
    for texts in (True, False):
        parser = command_line.Parser(prog="x", texts=texts)
        parser.add_argument("--prompt")
        parser.add_argument("--base", type=command_line.path)
        if texts:
            assert parser.parse_args(["--prompt", "a\nb"]).prompt == "a\nb"
        else:
            with pytest.raises(command_line.FlagError, match="without control characters"):
                parser.parse_args(["--prompt", "a\nb"])
        with pytest.raises(command_line.FlagError, match="without control characters"):
            parser.parse_args(["--base", "a\nb"])
