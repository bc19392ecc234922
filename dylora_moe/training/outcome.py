"""What a run leaves in its folder beside the checkpoints: results.json, report.html and the held-out text."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import concatenate_datasets
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from ..checkpoint.write import describe_mixture
from ..distributed import ranks
from ..errors import UsageError
from ..reporting.publish import check_results, write_results
from ..reporting.results import RESULTS, Example, Results, SkillEntry, StageResult, read_results
from ..reporting.words import telling_words
from ..skills.library import Skill
from ..stages.batches import known_tokens
from ..stages.measure import HELD_OUT, Known, Measured, examples, measure, packed, read_held_out, texts_of
from ..stages.setup import Trained, sizes_of, source_rows
from ..store.whole_files import publish_files
from .callbacks import EvaluationStopped, StopSignals
from .prepare import Prepared
from .resume import Start
from .summary import RunResult
from .trainer import MoETrainer

HELD_OUT_KIND = {"kind": "dylora-moe held-out text"}  # by which it is known
WORDS = 12  # of a skill


def check_folder(run_dir: Path) -> None:
    """Refuse a run folder with files of the user that this run would replace.

    Raises:
        UsageError: If there is one.
    """
    check_results(run_dir)
    path = run_dir / HELD_OUT
    if os.path.lexists(path) and _kind(path) != HELD_OUT_KIND:
        raise UsageError(
            f"{path}: expected the held-out text of a run, which this one would replace, found something else; move it "
            "away, or choose another --output-dir"
        )


@dataclass(frozen=True)
class Earlier:
    """What the stages before a run have left beside the checkpoint that it begins with.

    Attributes:
        held_out: the held-out rows by skill.
        of_run: whether the run that goes on has left them itself, when it was stopped.
        lines: for the user, about files that cannot be used.
    """

    results: Results | None = None
    held_out: Mapping[str, Any] = field(default_factory=dict)
    of_run: bool = False
    lines: list[str] = field(default_factory=list)


def read_earlier(run: Prepared, start: Start, grown_from: str | None) -> Earlier:
    """Read what earlier stages have left. A run goes on without a file that is damaged.

    Args:
        grown_from: the checkpoint that has grown, if that is in another run folder: a run that was killed leaves no
            results in its own.
    """
    if start.folder is None:
        return Earlier()
    folder, lines = start.folder.parent, list[str]()
    of_run = run.resumes and (folder / RESULTS).exists()
    if grown_from is not None and not of_run:
        folder = Path(grown_from).resolve().parent
    results, held_out = None, dict[str, Any]()
    try:
        if (folder / RESULTS).exists():
            results = read_results(folder)
            unknown = [entry.name for entry in results.skills if entry.name not in run.skills]
            if unknown or results.experts > run.model.num_experts:
                results = None
                raise UsageError(f"{folder / RESULTS}: is not of {start.folder}, which has other skills or experts")
    except UsageError as error:
        first = str(error).partition("\n")[0].rstrip(":")
        lines.append(f"{first}: what it says of earlier stages is left out")
    try:
        held_out = read_held_out(folder, known_tokens(run.model.base))
    except UsageError as error:
        lines.append(f"{error}: what is forgotten is not measured")
    return Earlier(results, held_out, of_run, lines)


def held_out_rows(run: Prepared) -> Iterator[tuple[list[str], Trained, Any]]:
    """Yield the skills that are trained and have held-out text: the names of its data sets, the skill, the rows."""
    found: dict[str, tuple[list[str], Trained, list[Any]]] = {}
    evaluation = run.blocks.evaluation
    only = next(iter(evaluation.values())) if len(evaluation) == len(run.blocks.sources) == 1 else None
    for source, trained in zip(run.blocks.sources, run.stage.data, strict=True):
        rows = evaluation.get(source.name, only)
        if trained is not None and rows is not None and len(rows):
            names, _, parts = found.setdefault(trained.skill, ([], trained, []))
            names.append(source.name)
            parts.append(rows)
    for names, trained, parts in found.values():
        yield names, trained, parts[0] if len(parts) == 1 else concatenate_datasets(parts)


def set_losses(trainer: MoETrainer, run: Prepared, stop: StopSignals) -> dict[str, float]:
    """Note the held-out loss of each skill that was trained in the skill library. Every rank calls this.

    Returns:
        The losses by skill; those that a signal has cut short are missing.
    """
    losses: dict[str, float] = {}
    evaluation = trainer.evaluation(lambda: stop.leave_evaluation(trainer.args))
    for _, trained, rows in held_out_rows(run):
        try:
            losses[trained.skill], _ = evaluation.loss(rows, trained.expert)
        except EvaluationStopped:
            break
        if not math.isfinite(losses[trained.skill]):
            raise UsageError(
                f"training has diverged: the held-out loss of {trained.skill} is {losses[trained.skill]}, nothing was "
                "saved; go on from an earlier checkpoint or start again, with a lower --learning-rate"
            )
        run.skills.update(Skill(trained.skill, loss=losses[trained.skill]), sizes_of(run.model, trained.expert or 0))
    return losses


@dataclass(frozen=True)
class Outcome:
    """What a run has come to.

    Attributes:
        losses: what `set_losses` has returned; empty if the run was stopped, or had ended before.
    """

    run_dir: Path
    run: Prepared
    trainer: MoETrainer
    result: RunResult
    earlier: Earlier
    losses: Mapping[str, float]

    def leave(self) -> None:
        """Measure what the run has made of each skill, and write all files. Every rank calls this.

        What a signal has stopped is not measured.

        Raises:
            UsageError: If a file cannot be written.
        """
        current = {trained.skill: rows for _, trained, rows in held_out_rows(self.run)}
        found = {**self.earlier.held_out, **current}
        held_out = {name: found[name] for name in self.run.skills.names if name in found}
        measured = {}
        if self.result.stopped_by is None:
            skills, known = [skill for skill in self.run.skills if skill.name in held_out], self._known()
            measured = {
                skill.name: measure(
                    self.trainer.evaluation(), held_out[skill.name], skill.expert, known.get(skill.name, Known())
                )
                for skill in skills
            }
        texts = {name: rows for name, rows in held_out.items() if name in measured}
        shown = examples(self.run.model, self.run.tokenizer, texts)
        ranks.on_first(lambda: self._write(held_out, measured, shown))

    def _known(self) -> dict[str, Known]:
        """Return what the last evaluations of this run have told of its skills."""
        final, found = {each.name: each.after for each in self.result.held_out}, {}
        for names, trained, _ in held_out_rows(self.run):
            name = names[0]
            usage = self.trainer.usage_by_data.get(name)
            is_known = len(names) == 1 and name in final and usage is not None
            routed = (final[name], usage) if is_known else None
            found[trained.skill] = Known(routed, self.losses.get(trained.skill))
        return found

    def _write(self, held_out: Mapping[str, Any], measured: Mapping[str, Measured], examples: list[Example]) -> None:
        result, model = self.result, self.run.model
        results = Results(
            step=result.step,
            checkpoint=None if result.saved is None else os.path.relpath(result.saved, self.run_dir),
            stopped_by=None if result.stopped_by is None else result.stopped_by.name,
            base_model=model.base.config._name_or_path,
            parameters=model.parameter_counts(),
            route="specialised" if self.trainer.plan is not None else "joint",
            experts=model.num_experts,
            versions=describe_mixture(model).versions,
            stages=[*self._stages_before(), self._stage(measured)],
            skills=self._entries(measured, held_out),
            examples=examples,
        )
        write_results(self.run_dir, results)
        data = serialize(packed(held_out), metadata=HELD_OUT_KIND)
        publish_files(self.run_dir, {HELD_OUT: data}, replace=True)

    # ---- its parts ----

    def _stages_before(self) -> list[StageResult]:
        """Return the stages before this one; what a run that was stopped has written is replaced."""
        stages = [] if self.earlier.results is None else self.earlier.results.stages
        this = "grow" if self.run.stage.grows else "train", self.run.stage.first_step
        if self.earlier.of_run and stages and (stages[-1].kind, stages[-1].first_step) == this:
            return stages[:-1]
        return stages

    def _stage(self, measured: Mapping[str, Measured]) -> StageResult:
        stage = self.run.stage
        points: list[tuple[int, float | None]] = [
            (int(e["step"]), e["loss"]) for e in self.trainer.state.log_history if "loss" in e
        ]
        branch = stage.branch_step or stage.first_step
        curves = {"trunk": [p for p in points if p[0] <= branch], "experts": [p for p in points if p[0] > branch]}
        names = list(dict.fromkeys(trained.skill for trained in stage.trained))
        return StageResult(
            kind="grow" if stage.grows else "train",
            first_step=min(stage.first_step, self.result.step),
            last_step=self.result.step,
            skills=names,
            curves={name: some for name, some in curves.items() if some},
            evaluation={name: each.loss for name, each in measured.items()},
            novelty=stage.decisions,
        )

    def _entries(self, measured: Mapping[str, Measured], held_out: Mapping[str, Any]) -> list[SkillEntry]:
        """Return an entry for each skill. What is known of an earlier one stays as it is, where it is not measured."""
        run, blocks = self.run, self.run.blocks
        before = {} if self.earlier.results is None else {entry.name: entry for entry in self.earlier.results.skills}
        indices: dict[str, list[int]] = {}
        for i, trained in enumerate(run.stage.data):
            if trained is not None:
                indices.setdefault(trained.skill, []).append(i)
        # Of skills that were not trained, the held-out text is what the others are compared with.
        rows = {name: [each] for name, each in held_out.items()}
        rows |= {name: [source_rows(blocks, i) for i in some] for name, some in indices.items()}
        texts = {n: chain.from_iterable(texts_of(each, run.tokenizer) for each in some) for n, some in rows.items()}
        words = {name: some for name, some in telling_words(texts, WORDS).items() if some and name in indices}
        entries = []
        for skill in run.skills:
            old, found = before.get(skill.name), measured.get(skill.name)
            data = [] if old is None else list(old.data)
            data += [blocks.sources[i].source for i in indices.get(skill.name, ())]
            entries.append(
                SkillEntry(
                    name=skill.name,
                    expert=skill.expert,
                    tokens=skill.tokens,
                    words=words.get(skill.name, [] if old is None else old.words),
                    usage=[] if found is None else found.usage,
                    confidence=[] if found is None else found.confidence,
                    data=list(dict.fromkeys(data)),
                )
            )
        return entries


def _kind(path: Path) -> dict[str, str] | None:
    try:
        with safe_open(path, framework="numpy") as file:
            return file.metadata()
    except (OSError, SafetensorError):
        return None
