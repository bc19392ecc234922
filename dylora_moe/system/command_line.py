"""What all command lines share: flags in both spellings, one clear message for every error, exit codes.

Exit codes: 0 all passed; 1 a check failed; 2 could not run; 130 interrupted (143 by SIGTERM).
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress

from ..errors import CheckpointError, DyLoRAMoEError, is_out_of_memory

PASSED, FAILED, CANNOT_RUN, INTERRUPTED, PIPE_CLOSED, TERMINATED = 0, 1, 2, 130, 141, 143
PASS_MARK, FAIL_MARK = "✓", "✗"

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose flags may be written with dashes or underscores, and never cut short."""

    def __init__(self, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        return super().parse_known_args([_dashed(arg) for arg in args], namespace)

    def error(self, message: str):
        self.exit(CANNOT_RUN, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _dashed(argument: str) -> str:
    """--keep_checkpoint as --keep-checkpoint; a value after = stays as it is."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value


def number(
    kind: type, least: float | None = None, most: float | None = None, *, above: float | None = None
) -> Callable:
    """An argparse type: an int or a finite float in a range, named in the error."""
    wanted = "a whole number" if kind is int else "a number"
    if above is not None:
        wanted += f" above {above}"
    if least is not None:
        wanted += f" from {least}" if most is not None else f" of at least {least}"
    if most is not None:
        wanted += f" to {most}"

    def parse(text: str):
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
    """An argparse type: what a shell makes of an unset variable is no value."""
    if not value.strip():
        raise argparse.ArgumentTypeError("expected a value, got an empty one")
    return value


def path(value: str) -> str:
    """An argparse type: a shell leaves the ~ of --output-dir=~/run alone. The home of nobody stays as it is written."""
    return os.path.expanduser(text(value))


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None, prog: str = "") -> int:
    """Call `main` and turn what it raises into a message on standard error and an exit code."""
    prepare_streams()
    try:
        return main(argv)
    except BrokenPipeError:  # `... | head`: whoever read has seen enough
        mute(sys.stdout)
        return PIPE_CLOSED
    except Exception as error:
        code, message = explain(error)
        if message is None:
            raise
        print(f"{prog}: {message}" if prog else message, file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print(f"{prog}: interrupted" if prog else "interrupted", file=sys.stderr)
        return INTERRUPTED


def explain(error: BaseException) -> tuple[int, str | None]:
    """The exit code for an error and its message; no message for what is not the user's to mend."""
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
    """Check marks on every terminal: UTF-8 where the locale's encoding has none."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding=None if _has_marks(stream.encoding) else "utf-8", errors="replace")


def _has_marks(encoding: str | None) -> bool:
    try:
        (PASS_MARK + FAIL_MARK).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def mute(stream) -> None:
    """Let what is still written to a closed pipe go nowhere, at the end of the program too."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def in_github_actions() -> bool:
    return os.environ.get("GITHUB_ACTIONS") == "true"
