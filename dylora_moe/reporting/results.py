"""The results of a run, as frozen dataclasses: what `results.json` in its run folder says.

    results = Results(base_model="...", route="specialised", experts=2, versions={...}, stages=[...], skills=[...])
    write_results(run_dir, results)          # publish.py: results.json and report.html
    results = read_results(run_dir)

Losses are in nats per token, and None where they were not measured. Experts are told by their index. There are no clock
times and no secrets. Reading is strict: every field is there, no other is, and each has its type.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..constants import MAX_EXPERTS
from ..errors import UsageError, listed, shown
from ..store.files import FileProblem, read_json
from .decode import decoded

RESULTS = "results.json"
KIND = "dylora-moe results"  # by which the file of an earlier run is known, of whatever version
FORMAT_VERSION = 1
MAX_BYTES = 1 << 26
DIGITS = 6  # behind the point, of every number in the file


@dataclass(frozen=True)
class SkillLoss:
    """The held-out loss of one skill at the end of a stage."""

    base: float | None  # without experts
    routed: float | None
    own: float | None  # every token to the skill's own expert
    best: float | None  # every token to the one expert that is best on average
    best_expert: int | None  # which that is


@dataclass(frozen=True)
class Decision:
    """Whether a data set was taken for a known skill or for a new one, when a run was grown."""

    skill: str  # name of the data set
    tokens: int  # that the decision was made from
    known: bool
    nearest: str | None  # the nearest skill
    distance: float | None  # to it
    threshold: float | None  # beyond which the data would be new
    documents_new: int
    documents_known: int


@dataclass(frozen=True)
class StageResult:
    """One stage of a run: its first training, or one growth."""

    kind: Literal["train", "grow"]
    first_step: int
    last_step: int
    skills: list[str]  # names of those trained in it
    curves: dict[str, list[tuple[int, float | None]]]  # (step, training loss) by series, such as "trunk" or a skill
    evaluation: dict[str, SkillLoss]  # by skill, of earlier stages too; empty if nothing was held out
    novelty: list[Decision] = field(default_factory=list)


@dataclass(frozen=True)
class SkillEntry:
    """One skill. What is measured is measured at the end of the run, on its held-out text."""

    name: str
    expert: int | None  # its own; None in a jointly trained mixture
    tokens: int  # that it was trained on
    words: list[str]  # the most telling ones first; see words.py
    usage: list[float]  # share of the routed weight, by expert; empty if nothing was held out
    confidence: list[tuple[int, float]]  # (position in the text, mean weight of its own expert there)
    data: list[str]  # files and folders


@dataclass(frozen=True)
class Example:
    """A held-out text, and the routing weights of each of its tokens."""

    title: str
    skills: list[str]  # that it is made of, in order
    tokens: list[tuple[str, list[float]]]  # (text, weight by expert)


@dataclass(frozen=True)
class Results:
    """Everything that `results.json` says, apart from its kind and format version, which this package fixes."""

    step: int
    checkpoint: str | None  # the newest one, relative to the run folder
    stopped_by: str | None  # the signal that has stopped the run before its end
    base_model: str
    parameters: dict[str, int]  # of "base", "experts" and "router"
    route: Literal["specialised", "joint"]
    experts: int  # number of experts
    versions: dict[str, str]  # of the libraries that trained it
    stages: list[StageResult]  # in order; the file is written anew at the end of each
    skills: list[SkillEntry]  # in the order in which they were learned
    examples: list[Example] = field(default_factory=list)


def encode_results(results: Results) -> bytes:
    """Return the bytes of results.json: the same for the same results. Losses that are not finite become null."""
    kind = {"kind": KIND, "format_version": FORMAT_VERSION}
    return (json.dumps(kind | _rounded(asdict(results)), indent=1) + "\n").encode()


def decode_results(found: object) -> Results:
    """Build results from the parsed content of results.json.

    Raises:
        FileProblem: With everything that is wrong.
    """
    if not isinstance(found, dict) or found.get("kind") != KIND:
        raise FileProblem("expected the results of a run of DyLoRA-MoE, found something else")
    if found.get("format_version") != FORMAT_VERSION:
        version = shown(found.get("format_version", "none"), most=40)
        raise FileProblem(
            f"expected format_version {FORMAT_VERSION}, found {version}; another version of the package wrote it"
        )
    problems: list[str] = []
    fields = {key: value for key, value in found.items() if key not in ("kind", "format_version")}
    results = decoded(Results, fields, "", problems)
    problems = problems or list(_contradictions(results))
    if problems:
        raise FileProblem(f"it is not sound:\n{listed(problems)}")
    return results


def read_results(run_dir: Path) -> Results:
    """Read the results of a run folder.

    Raises:
        UsageError: If there are none, or they cannot be read.
    """
    path = run_dir / RESULTS
    remedy = "bring it back from a copy, or train again"
    try:
        return decode_results(read_json(path, MAX_BYTES))
    except FileProblem as error:
        raise UsageError(f"{path}: {error}\n{remedy}") from None
    except OSError as error:
        raise UsageError(
            f"{path}: expected the results of a run, cannot read it ({error.strerror}); {remedy}"
        ) from None


def results_of(checkpoint: Path) -> Results | None:
    """Return the results in the folder that a checkpoint is in, if they can be read and are of this checkpoint."""
    folder = checkpoint.resolve()
    with suppress(UsageError):
        results = read_results(folder.parent)
        if results.checkpoint and (folder.parent / results.checkpoint).resolve() == folder:
            return results
    return None


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, DIGITS) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


def _contradictions(results: Results) -> Iterator[str]:
    """Say what in the results contradicts something else in them."""
    if not 1 <= results.experts <= MAX_EXPERTS:
        yield f"experts: expected 1 to {MAX_EXPERTS}, found {results.experts}"
    names = Counter(skill.name for skill in results.skills)
    yield from (f"skills: expected each name once, found {shown(name)} {n} times" for name, n in names.items() if n > 1)
    for number, stage in enumerate(results.stages):
        where = f"stages[{number}]"
        for name in [*stage.skills, *stage.evaluation]:
            if name not in names:
                yield f"{where}: expected names of skills, found {shown(name)}"
        if stage.first_step > stage.last_step:
            yield f"{where}: expected its first step before its last, found {stage.first_step} and {stage.last_step}"
        indices = [loss.best_expert for loss in stage.evaluation.values()]
        yield from (_wrong_index(where, index, results.experts) for index in indices if _is_wrong(index, results))
    for number, skill in enumerate(results.skills):
        if _is_wrong(skill.expert, results):
            yield _wrong_index(f"skills[{number}]", skill.expert, results.experts)
        if len(skill.usage) not in (0, results.experts):
            yield f"skills[{number}].usage: expected {results.experts} shares or none, found {len(skill.usage)}"
    for number, example in enumerate(results.examples):
        for place, (_, weights) in enumerate(example.tokens):
            if len(weights) != results.experts:
                where = f"examples[{number}].tokens[{place}]"
                yield f"{where}: expected {results.experts} weights, found {len(weights)}"


def _is_wrong(index: int | None, results: Results) -> bool:
    return index is not None and not 0 <= index < results.experts


def _wrong_index(where: str, index: int | None, experts: int) -> str:
    return f"{where}: expected an expert from 0 to {experts - 1}, found {index}"
