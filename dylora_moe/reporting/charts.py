"""The geometry of the charts, in per cent of their width and height, so that they fit any screen.

Lines are paths in a box of 100 by 100 that is stretched to its place; texts and marks are placed by per cent and keep
their size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLOURS = 6  # in template.html; an expert's number stands wherever its colour does
NAMED_LINES, MOST_LINES = 12, 64  # of a chart: the first are named, the next grey, the rest not drawn
POINTS = 1280  # of all lines of a chart together
MARK_HEIGHT = 8.0  # in per cent of a chart's height
MOST_POINTS = 120  # of one line

Point = tuple[float, float | None]


@dataclass(frozen=True)
class Mark:
    """What stands for an expert, or for a line without one: a short text and a colour, always seen together."""

    text: str
    colour: int | None = None  # 0 to COLOURS - 1; None: grey

    @property
    def style(self) -> str:
        """The CSS class of its colour."""
        return "none" if self.colour is None else f"e{self.colour}"


def mark_of(expert: int) -> Mark:
    return Mark(str(expert), expert % COLOURS)


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    mark: Mark
    dash: int  # lines of one colour differ in it
    path: str  # of SVG
    last: float  # its last value
    top: float | None  # where its mark stands, in per cent from the top; None: it has none


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in per cent, and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """Lines over two axes."""

    lines: list[Line]
    x: list[Tick]
    y: list[Tick]
    rules: list[float]  # vertical lines, in per cent


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` become 0 to 100."""

    low: float
    high: float

    @classmethod
    def around(cls, values: Sequence[float], margin: float = 0.05) -> Scale:
        """Return a scale that holds all values, which may be none or all the same, with a margin at both ends."""
        low, high = (min(values), max(values)) if values else (0.0, 1.0)
        is_range = high - low > 1e-9 * max(abs(low), abs(high))
        room = (high - low) * margin if is_range else max(abs(high) / 20, 0.5)
        return cls(low - room, high + room)

    def at(self, value: float) -> float:
        return round(100 * (value - self.low) / (self.high - self.low), 1)

    def ticks(self, most: int) -> list[float]:
        """Return round values inside the scale: at most `most`, at least two where the scale allows it."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / most))
        step = next(step * times for times in (1, 2, 5, 10, 20, 50) if self._inside(step * times) <= most)
        first = math.ceil(self.low / step)
        return [(first + number) * step for number in range(self._inside(step))]

    def _inside(self, step: float) -> int:
        return math.floor(self.high / step) - math.ceil(self.low / step) + 1


def line_chart(
    series: Mapping[str, Sequence[Point]],
    marks: Mapping[str, Mark],
    y: Scale | None = None,
    rules: Sequence[float] = (),
) -> Chart:
    """Draw each of the first series as a line; `NAMED_LINES` of them in colour, with a mark at the end.

    Args:
        series: Points by name; a value of None is left out.
        marks: The mark of each series.
        y: The scale of the values; by default one that holds them all.
        rules: Where vertical lines stand, in the unit of the points' places.
    """
    first = dict(list(series.items())[:MOST_LINES])
    most = min(MOST_POINTS, POINTS // max(len(first), 1))
    drawn = {name: thinned(points, most) for name, points in first.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    along = Scale.around([x for points in drawn.values() for x, _ in points], margin=0)
    y = y or Scale.around([value for points in drawn.values() for _, value in points])
    tops = spread([100 - y.at(points[-1][1]) for points in list(drawn.values())[:NAMED_LINES]], MARK_HEIGHT)
    lines: list[Line] = []
    for number, (name, points) in enumerate(drawn.items()):
        place = [f"{along.at(x):g} {100 - y.at(value):g}" for x, value in points]
        path = "M" + "L".join(place) if len(place) > 1 else f"M{place[0]}h0.01"
        dash = sum(line.mark.colour == marks[name].colour for line in lines) % 3
        top = tops[number] if number < NAMED_LINES else None
        lines.append(Line(name, marks[name], dash, path, points[-1][1], top))
    x_ticks = [Tick(along.at(value), number_text(value)) for value in along.ticks(5)]
    y_ticks = [Tick(100 - y.at(value), number_text(value)) for value in y.ticks(5)]
    return Chart(lines, x_ticks, y_ticks, [along.at(x) for x in rules if along.low < x < along.high])


def thinned(points: Sequence[Point], most: int) -> list[tuple[float, float]]:
    """Return at most `most` points, by their place: the means of as many neighbours as that takes."""
    known = sorted((x, y) for x, y in points if y is not None)
    size = math.ceil(len(known) / most)
    groups = [known[start : start + size] for start in range(0, len(known), size or 1)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def spread(tops: Sequence[float], gap: float) -> list[float]:
    """Move places apart that are closer than `gap`, and keep their order; from 0 to 100 as far as there is room."""
    order = sorted(range(len(tops)), key=lambda place: tops[place])
    moved, floor = list(tops), 0.0
    for place in order:
        moved[place] = floor = max(tops[place], floor)
        floor += gap
    ceiling = 100.0
    for place in reversed(order):
        moved[place] = ceiling = max(min(moved[place], ceiling), 0.0)
        ceiling -= gap
    return [round(each, 1) for each in moved]


def number_text(value: float) -> str:
    """Return a number without needless digits, with a true minus."""
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"
    return text.replace("-", "\u2212") if text != "-0" else "0"
