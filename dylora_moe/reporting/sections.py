"""What each section of the report shows, ready for the template: rows of tables, charts, stretches of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from .charts import COLOURS, Chart, Mark, Scale, Tick, line_chart, mark_of
from .results import Decision, Example, Results, SkillEntry, SkillLoss, StageResult

MOST_STAGES = 12  # rows of the forgetting matrix
MOST_EXAMPLES = 6
SMALL_SHARE = 0.02  # of the routed weight: what is less is "others"
WEIGHTS_SHOWN = 3  # of one token
HALF = 0.5
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class LossRow:
    """The held-out losses of one skill, and where they stand on the scale, by shape."""

    name: str
    mark: Mark | None
    loss: SkillLoss
    best_mark: Mark | None
    change: float | None  # of the routed loss against the base's, relative
    places: list[tuple[str, float]]


@dataclass(frozen=True)
class LossTable:
    """The losses of the last stage that has any."""

    stage: int  # counted from 1
    rows: list[LossRow]
    ticks: list[Tick]


@dataclass(frozen=True)
class Cell:
    """One skill at the end of one stage."""

    loss: float | None  # where the skill was trained in the stage
    change: float | None  # of its routed loss since it was last trained, relative


@dataclass(frozen=True)
class Segment:
    """A part of a bar: the share of one expert, or of all others together."""

    mark: Mark
    share: float
    start: float  # in per cent


@dataclass(frozen=True)
class Run:
    """Tokens in a row whose largest weight is the same expert's: (text, weights, whether that is at least half)."""

    mark: Mark
    tokens: list[tuple[str, str, bool]]


@dataclass(frozen=True)
class Text:
    """An example as it is shown."""

    title: str
    skills: list[str]
    runs: list[Run]
    left_out: int  # tokens at its end that are not shown


def skill_marks(results: Results) -> dict[str, Mark]:
    """Return a mark for each skill: that of its expert, or a letter where it has none of its own."""
    return {
        skill.name: _letter(number) if skill.expert is None else mark_of(skill.expert)
        for number, skill in enumerate(results.skills)
    }


def _letter(number: int) -> Mark:
    return Mark(LETTERS[number % len(LETTERS)], number % COLOURS)


def measured_stage(results: Results) -> tuple[int, StageResult] | None:
    """Return the last stage that measured held-out losses, with its number, or None."""
    measured = [(number, stage) for number, stage in enumerate(results.stages, 1) if stage.evaluation]
    return measured[-1] if measured else None


def loss_table(results: Results, most: int) -> LossTable | None:
    """Return the last losses that were measured, of at most so many skills, or None."""
    measured = measured_stage(results)
    if measured is None:
        return None
    number, stage = measured
    losses = list(stage.evaluation.items())[:most]
    scale = Scale.around([value for _, loss in losses for _, value in _shapes(loss)])
    marks = {skill.name: mark_of(skill.expert) for skill in results.skills if skill.expert is not None}
    rows = [
        LossRow(
            name,
            marks.get(name),
            loss,
            None if loss.best_expert is None else mark_of(loss.best_expert),
            relative(loss.routed, loss.base),
            [(shape, scale.at(value)) for shape, value in _shapes(loss)],
        )
        for name, loss in losses
    ]
    return LossTable(number, rows, [Tick(scale.at(value), f"{value:g}") for value in scale.ticks(4)])


def _shapes(loss: SkillLoss) -> list[tuple[str, float]]:
    """Return the measured losses by the shape that stands for them, in the order in which they are drawn."""
    shapes = {"base": loss.base, "best": loss.best, "own": loss.own, "routed": loss.routed}
    return [(shape, value) for shape, value in shapes.items() if value is not None]


def relative(value: float | None, to: float | None) -> float | None:
    return None if value is None or not to else value / to - 1


def forgetting(results: Results) -> list[list[Cell]]:
    """Return a row for each stage, with a cell for each skill."""
    reference: dict[str, float | None] = {}
    rows = []
    for stage in results.stages:
        row = []
        for skill in results.skills:
            loss = stage.evaluation.get(skill.name)
            routed = None if loss is None else loss.routed
            if skill.name in stage.skills:
                reference[skill.name] = routed
                row.append(Cell(routed, None))
            else:
                row.append(Cell(None, relative(routed, reference.get(skill.name))))
        rows.append(row)
    return rows


def last_changes(results: Results) -> dict[str, float]:
    """Return by how much the loss of each skill has changed since it was last trained, where that is known."""
    columns = zip(*forgetting(results), strict=True)
    changes = {}
    for skill, cells in zip(results.skills, columns, strict=False):
        last = next((cell for cell in reversed(cells) if (cell.loss, cell.change) != (None, None)), None)
        if last is not None and last.change is not None:
            changes[skill.name] = last.change
    return changes


def curves(results: Results) -> Chart | None:
    """Return the training losses of all stages, one after the other, or None.

    The steps of a stage may begin at 0 again, as in another run folder.
    """
    marks, series, kinds, ends = skill_marks(results), {}, {}, [0]
    for number, stage in enumerate(results.stages, 1):
        moved = max(0, ends[-1] - stage.first_step)
        for name, points in stage.curves.items():
            label = name if name not in series else f"{name}, stage {number}"
            series[label] = [(step + moved, loss) for step, loss in points]
            kinds[label] = marks.get(name, Mark(name[:1] or "?"))
        ends.append(stage.last_step + moved)
    chart = line_chart(series, kinds, rules=ends[1:-1])
    return chart if chart.lines else None


def confidence(results: Results) -> Chart | None:
    """Return the weight of each skill's own expert over the positions of its text, or None."""
    chart = line_chart({skill.name: skill.confidence for skill in results.skills}, skill_marks(results), Scale(0, 1))
    return chart if chart.lines else None


def usage(skill: SkillEntry) -> list[Segment]:
    """Return the shares of the experts: the skill's own first, then the largest, then all small ones as "others"."""
    shares = dict(enumerate(skill.usage))
    large = sorted((e for e in shares if shares[e] >= SMALL_SHARE), key=lambda e: (e != skill.expert, -shares[e], e))
    parts = [(mark_of(expert), shares[expert]) for expert in large]
    others = sum(share for expert, share in shares.items() if expert not in large)
    if others > 0 and round(100 * others):
        parts.append((Mark("others"), others))
    segments, start = list[Segment](), 0.0
    for mark, share in parts:
        segments.append(Segment(mark, share, round(100 * start, 1)))
        start += share
    return segments


def texts(results: Results, most_tokens: int) -> list[Text]:
    """Return the examples, with at most so many tokens of them all together."""
    shown = results.examples[:MOST_EXAMPLES]
    return [_text(example, most_tokens // len(shown)) for example in shown]


def _text(example: Example, most: int) -> Text:
    runs = []
    tokens = example.tokens[:most]
    for expert, group in groupby(tokens, key=lambda token: largest(token[1])[0]):
        run = [(text, weights_text(weights), weights[expert] >= HALF) for text, weights in group]
        runs.append(Run(mark_of(expert), run))
    return Text(example.title, example.skills, runs, len(example.tokens) - len(tokens))


def largest(weights: Sequence[float]) -> list[int]:
    """Return the experts by their weight, the largest first."""
    return sorted(range(len(weights)), key=lambda expert: (-weights[expert], expert))


def weights_text(weights: Sequence[float]) -> str:
    """Return the largest weights of a token: "0: 91 %, 2: 7 %" for experts 0 and 2."""
    shown = [expert for expert in largest(weights)[:WEIGHTS_SHOWN] if round(100 * weights[expert])]
    return ", ".join(f"{expert}: {100 * weights[expert]:.0f}\u00a0%" for expert in shown)


def shown_stages(results: Results, most: int) -> list[tuple[int, StageResult, list[Cell]]]:
    """Return the last rows of the forgetting matrix, with cells for so many skills, each with the stage's number."""
    rows = list(zip(range(1, len(results.stages) + 1), results.stages, forgetting(results), strict=True))
    return [(n, stage, cells[:most]) for n, stage, cells in rows[-MOST_STAGES:]]


def decisions(results: Results, most: int) -> list[tuple[int, Decision]]:
    """Return so many of the last novelty decisions, each with the number of its stage."""
    found = [(number, decision) for number, stage in enumerate(results.stages, 1) for decision in stage.novelty]
    return found[-most:]
