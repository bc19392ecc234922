"""What all command lines share: flags in both spellings, one clear message for every error, exit codes.

Exit codes: 0 all passed; 1 a check failed; 2 could not run; 130 interrupted (143 by SIGTERM).
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence

from .errors import CheckpointError, DyLoRAMoEError

PASSED, FAILED, CANNOT_RUN, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
PASS_MARK, FAIL_MARK = "✓", "✗"


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


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None, prog: str = "") -> int:
    """Call `main` and turn what it raises into a message on standard error and an exit code."""
    prepare_streams()
    try:
        return main(argv)
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
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return CANNOT_RUN, "not enough memory; use a smaller model, or --weights none with test_checkpoint_minimal.py"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            CANNOT_RUN,
            f"no space left on the disk for {error.filename or 'the output'}; free some, or use another folder",
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return CANNOT_RUN, f"{error.filename or 'a file'} cannot be written ({error.strerror}); use another folder"
    return CANNOT_RUN, None


def prepare_streams() -> None:
    """Check marks on every terminal; a pipe that closes early is no error of ours."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            encoding = (stream.encoding or "").lower().replace("-", "")
            stream.reconfigure(
                encoding="utf-8" if encoding in ("ascii", "ansi_x3.41968", "latin1") else None, errors="replace"
            )


def in_github_actions() -> bool:
    return os.environ.get("GITHUB_ACTIONS") == "true"
