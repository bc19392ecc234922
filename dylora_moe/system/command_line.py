"""What all command lines share: flags in two spellings, one clear message for every error, exit codes.

The exit codes are 0 when everything passed, 1 when a check failed, 2 when the command could not run, 130 when Ctrl-C
interrupted it and 143 when SIGTERM did.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any, NoReturn, TextIO

from ..errors import CheckpointError, DyLoRAMoEError, UsageError, has_controls, is_out_of_memory, printable, shown

PASSED, FAILED, CANNOT_RUN, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141
PASS_MARK, FAIL_MARK = "✓", "✗"

_NO_CONTROLS = "without control characters or line breaks; rename the file or folder"
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class FlagError(UsageError):
    """A command line that cannot be parsed. `message` is the text without the name of the program."""

    def __init__(self, prog: str, message: str):
        self.message = message
        super().__init__(f"{prog}: error: {message}; see {prog} --help")


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that takes flags with dashes or underscores, never abbreviated, and raises `FlagError`.

    Args:
        texts: whether words may have line breaks, as a prompt has. The types `text` and `path` refuse them even then.
    """

    def __init__(self, *, texts: bool = False, **options: Any):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)
        self._texts = texts

    def parse_known_args(  # type: ignore[override]  # the three overloads of argparse would be longer than the method
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        args = sys.argv[1:] if args is None else args
        if not self._texts and any(has_controls(arg) for arg in args):
            self.error(f"expected words {_NO_CONTROLS}")
        return super().parse_known_args([_dashed(arg) for arg in args], namespace)

    def parse_args(  # type: ignore[override]  # as above
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            # Without the values, since one may be a secret.
            words = [word.partition("=")[0] for word in unknown if word.startswith("-")] or unknown
            hint = did_you_mean(words[0], re.findall(r"--[a-z][a-z0-9-]*", self.format_usage()))
            self.error(f"unrecognized arguments: {' '.join(words)}{hint}")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise FlagError(self.prog, message)


def _dashed(argument: str) -> str:
    """Turn --keep_checkpoint into --keep-checkpoint. A value after = is not changed."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean ...?)" with the known word that is most like a misspelled one; "" if none is."""
    close = get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def number(
    kind: type, least: float | None = None, most: float | None = None, *, above: float | None = None
) -> Callable[[str], float]:
    """Return an argparse type for an int or a finite float in a range. Its errors name the range."""
    wanted = "a whole number" if kind is int else "a number"
    if above is not None:
        wanted += f" above {above}"
    if least is not None:
        wanted += f" from {least}" if most is not None else f" of at least {least}"
    if most is not None:
        wanted += f" to {most}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}") from None
        low = (least is None or value >= least) and (above is None or value > above)
        if not low or not (most is None or value <= most) or value in (float("inf"), float("-inf")) or value != value:
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text}")
        return value

    return parse


def text(value: str) -> str:
    """An argparse type that refuses an empty value, such as a shell makes of a variable that is not set."""
    if not value.strip():
        raise argparse.ArgumentTypeError("expected a value, got an empty one")
    if has_controls(value):
        raise argparse.ArgumentTypeError(f"expected a name {_NO_CONTROLS}")
    return value


def path(value: str) -> str:
    """An argparse type that expands ~, which a shell does not do in --output-dir=~/run.

    ~name is not changed where there is no such user.
    """
    return os.path.expanduser(text(value))


def say(text: object = "", file: TextIO | None = None) -> None:
    """Print a text. All that is printed goes through here: no name in a file of others may act on a terminal or CI."""
    print(printable(text), file=sys.stdout if file is None else file, flush=True)


class Pieces:
    """Prints a text that comes in pieces, in printable form, but with its tabs.

    What would make a line a command of GitHub Actions is told across the pieces.
    """

    def __init__(self, file: TextIO | None = None):
        self._file = sys.stdout if file is None else file
        self._line = ""  # what there is of the last line

    def write(self, text: str, style: str = "") -> None:
        """Print a piece.

        Args:
            style: of a terminal, by its numbers in an ANSI escape sequence, such as "4;36"; none by default.
        """
        made = "".join(map(self._fit, text))
        self._file.write(f"\x1b[{style}m{made}\x1b[0m" if style and made else made)
        self._file.flush()

    def _fit(self, character: str) -> str:
        before, self._line = self._line, "" if character == "\n" else self._line + character
        if character in "\n\t":
            return character
        begins_command = before.lstrip() + character == "::" or (before + character).endswith("##[")
        return ("\\" if begins_command else "") + shown(character)


def annotate(title: str, text: str, file: TextIO | None = None) -> None:
    """Print a failure as an annotation of GitHub Actions, by its workflow command `error`."""
    escaped = printable(text).replace("%", "%25").replace("\n", "%0A")
    print(f"::error title={title}::{escaped}", file=sys.stdout if file is None else file, flush=True)


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None, prog: str = "") -> int:
    """Call `main`, and turn an exception into a message on standard error and an exit code."""
    prepare_streams()
    try:
        return main(argv)
    except BrokenPipeError:  # the reader of a pipe, such as head, has closed it
        mute(sys.stdout)
        return PIPE_CLOSED
    except Exception as error:
        code, message = explain(error)
        if message is None:
            raise
        named = not prog or isinstance(error, FlagError)  # a FlagError begins with the name of its program
        say(message if named else f"{prog}: {message}", sys.stderr)
        return code
    except KeyboardInterrupt:
        say(f"{prog}: interrupted" if prog else "interrupted", sys.stderr)
        return INTERRUPTED


def explain(error: BaseException) -> tuple[int, str | None]:
    """Return the exit code and the message for an error. The message is None where the user cannot mend the cause."""
    if isinstance(error, CheckpointError):
        return FAILED, str(error)
    if isinstance(error, DyLoRAMoEError):
        return CANNOT_RUN, str(error)
    if is_out_of_memory(error):
        return CANNOT_RUN, "not enough memory; use a smaller model, or --weights none with test_checkpoint_minimal.py"
    if isinstance(error, OSError):
        return CANNOT_RUN, _explain_os(error)
    if isinstance(error, ImportError) and not (error.name or "").startswith(("dylora_moe", "train")):
        return CANNOT_RUN, f"{error}; install what is needed with\n    pip install -r requirements.txt"
    return CANNOT_RUN, None


def _explain_os(error: OSError) -> str | None:
    if error.errno in _FULL_DISK:
        return f"no space left on the disk for {error.filename or 'the output'}; free some, or use another folder"
    if error.errno in _READ_ONLY:
        return f"{error.filename or 'a file'} cannot be read or written ({error.strerror}); use another folder"
    if error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return None


def prepare_streams() -> None:
    """Switch standard output and error to UTF-8 where the encoding of the locale has no check marks."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding=None if _has_marks(stream.encoding) else "utf-8", errors="replace")


def _has_marks(encoding: str | None) -> bool:
    try:
        (PASS_MARK + FAIL_MARK).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def mute(stream: TextIO) -> None:
    """Discard everything that is written to this stream from now on, including what Python flushes at exit."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def in_github_actions() -> bool:
    return os.environ.get("GITHUB_ACTIONS") == "true"
