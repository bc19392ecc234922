"""The page: report.html, made of results and template.html. It needs no script, no network and no font of its own."""

from __future__ import annotations

import functools
import unicodedata
from pathlib import Path
from typing import Any

from ..errors import shown
from . import sections
from .results import Results
from .sentences import FORGOTTEN, decision_words, names, percent, summary

MARKER = "dylora-moe report"  # by which a page of an earlier run is known
MAX_BYTES = 200_000
# (rows of a table, tokens of all examples): the first that keep the page within MAX_BYTES.
ROOM = ((64, 1200), (64, 400), (32, 400), (16, 100))
LONGEST_NAME, LONGEST_PATH = 60, 120
MOST_WORDS, MOST_PATHS = 12, 3
UNKNOWN = "\u2013"


def render(results: Results) -> str:
    """Return the page: the same bytes for the same results. What there is no room for, it leaves to results.json."""
    template, page = _template(), ""
    for most_rows, most_tokens in ROOM:
        page = template.render(_contents(results, most_rows, most_tokens))
        if len(page.encode()) <= MAX_BYTES:
            break
    return page


@functools.cache
def _template() -> Any:
    """The jinja2.Template, compiled once."""
    import jinja2  # here, to keep the other commands light

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    environment.filters |= {"loss": _loss, "percent": percent, "share": _share, "short": _short, "names": names}
    return environment.get_template("template.html")


def _contents(results: Results, most_rows: int, most_tokens: int) -> dict[str, Any]:
    shown_skills = results.skills[:most_rows]
    return {
        "marker": MARKER,
        "results": results,
        "skills": shown_skills,
        "marks": sections.skill_marks(results),
        "left_out": results.skills[most_rows:],
        "summary": summary(results),
        "losses": sections.loss_table(results, most_rows),
        "stages": sections.shown_stages(results, most_rows),
        "changes": sections.last_changes(results),
        "forgotten": FORGOTTEN,
        "curves": sections.curves(results),
        "usage": [(skill, sections.usage(skill)) for skill in shown_skills if skill.usage],
        "confidence": sections.confidence(results),
        "texts": sections.texts(results, most_tokens),
        "decisions": [
            (n, decision, decision_words(decision)) for n, decision in sections.decisions(results, most_rows)
        ],
        "most_words": MOST_WORDS,
        "most_paths": MOST_PATHS,
        "longest_path": LONGEST_PATH,
    }


def _visible(value: object) -> object:
    """Make the control characters of any text visible: they could hide or reorder what stands beside them."""
    if type(value) is not str:
        return value
    return "".join(c if _is_harmless(c) else shown(c) for c in value)


def _is_harmless(character: str) -> bool:
    return character.isprintable() or character in "\n\t" or unicodedata.category(character) == "Zs"


def _short(text: str, most: int = LONGEST_NAME) -> str:
    return text if len(text) <= most else text[:most] + "\u2026"


def _loss(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.3f}"


def _share(value: float) -> str:
    return f"{100 * value:.0f}\u00a0%"
