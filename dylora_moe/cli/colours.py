"""Which expert each token of an answer has: by colours, or by the experts' numbers where there are none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TextIO

from ..constants import expert_name
from ..errors import shown
from ..system.command_line import Pieces

COLOURS = (36, 33, 35, 32, 34, 31)  # of ANSI terminals; from the seventh expert on they are underlined
MOST_IN_LEGEND = 12


def has_colours(stream: TextIO) -> bool:
    """Return whether to colour what is printed to a stream (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def named(expert: int, skills: Sequence[str]) -> str:
    """Return the name of an expert with its skills, as in "expert_0 (python, prose)"."""
    return f"{expert_name(expert)} ({shown(skills[expert])})" if skills[expert] else expert_name(expert)


class RoutedText:
    """Prints tokens as they come, each marked by its expert: `[1]` where it changes, if there are no colours."""

    def __init__(self, stream: TextIO):
        self._pieces = Pieces(stream)
        self._colours = has_colours(stream)
        self._expert: int | None = None

    def legend(self, skills: Sequence[str]) -> None:
        """Print which colour or number each expert has, on a line of its own."""
        for expert in range(min(len(skills), MOST_IN_LEGEND)):
            mark = ("  " if expert else "") + ("" if self._colours else f"[{expert}] ")
            self._pieces.write(mark)
            self._pieces.write(named(expert, skills), _style(expert) if self._colours else "")
        if len(skills) > MOST_IN_LEGEND:
            self._pieces.write(f"  ... and {len(skills) - MOST_IN_LEGEND} more experts")
        self._pieces.write("\n")

    def write(self, text: str, expert: int | None) -> None:
        """Print a token; without a mark if its expert is None."""
        if expert is not None and expert != self._expert and not self._colours:
            self._pieces.write(f"[{expert}]")
        self._expert = expert
        self._pieces.write(text, _style(expert) if self._colours and expert is not None else "")

    def end(self) -> None:
        """End an answer: the next one begins with a mark."""
        self._pieces.write("\n")
        self._expert = None


def _style(expert: int) -> str:
    underlined = "4;" if expert // len(COLOURS) % 2 else ""
    return f"{underlined}{COLOURS[expert % len(COLOURS)]}"
