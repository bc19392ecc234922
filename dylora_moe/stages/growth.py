"""Growing a mixture: which data sets bring something new, and the experts that are added for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..data.blocks import TokenBlocks
from ..data.documents import Document
from ..errors import UsageError, counted
from ..mixture.model import Mixture
from ..mixture.targets import replace_config
from ..reporting.results import Decision
from ..skills.features import WINDOW, evenly, read_states, windows_of
from ..skills.fit import fit_router
from ..skills.library import SkillLibrary
from ..skills.novelty import NoveltyDetector, Verdict
from ..skills.sizes import MOST_STATES
from .plan import copy_expert
from .setup import Stage, Trained, add_skill, skill_names

WINDOWS = 16  # of a data set, by which it is judged as a whole
LEAST_TOKENS = 2 * WINDOW  # of a data set
DOCUMENTS = 48  # that are judged one by one, to see whether a data set is mixed
MIXED_SHARE = 1 / 3  # of the documents of a mixed data set, its smaller part has at least so many
LEAST_DOCUMENTS = 4  # of a part


@dataclass
class Judge:
    """Decides of each data set whether it is known or new. A mixed one is divided (`data.blocks.load_blocks`).

    What is new is known from then on: the data sets that follow are compared with it too.

    Args:
        update: whether a data set that was known before trains the expert that has its skill; otherwise it trains
            nothing.

    Attributes:
        decisions: of the data sets and the parts of those that were divided, in order. `skill` is a name for what is
            new, by which later ones call it `nearest`.
        parts: of each divided data set, the part of each document.
    """

    detector: NoveltyDetector
    update: bool = False
    decisions: list[Decision] = field(default_factory=list)
    parts: dict[str, str] = field(default_factory=dict)
    _new: list[tuple[str, list[Document]]] = field(default_factory=list)  # what the detector has not been told yet

    def __call__(self, sources: list[str], data: list[list[Document]]) -> list[list[int]]:
        """Return the part of each document. Raises UsageError if a data set has too little text to be judged."""
        found = []
        for source, documents in zip(sources, data, strict=True):
            self._tell_detector()
            found.append(self._divide(source, documents))
        return found

    def trains(self, index: int) -> bool:
        """Return whether a data set, or a part of one, trains an expert: the one of this index in `decisions`."""
        decision = self.decisions[index]
        new = {each.skill for each in self.decisions if not each.known}
        return self.update or not decision.known or decision.nearest in new

    def _tell_detector(self) -> None:
        for name, documents in self._new:
            some = windows_to_judge(name, [document.ids for document in documents], MOST_STATES)
            self.detector.add(name, read_states(self.detector.model, some))
        self._new.clear()

    def _divide(self, source: str, documents: list[Document]) -> list[int]:
        chosen = [documents[i] for i in evenly(len(documents), DOCUMENTS)]
        verdicts = self._verdicts(chosen)
        new = sum(verdict is not None and not verdict.known for verdict in verdicts)
        known = sum(verdict is not None and verdict.known for verdict in verdicts)
        if min(new, known) >= max(LEAST_DOCUMENTS, MIXED_SHARE * (new + known)):
            labels = self._part_of_each(verdicts if len(chosen) == len(documents) else self._verdicts(documents))
            halves = [[d for d, label in zip(documents, labels, strict=True) if label == part] for part in (0, 1)]
            judged = [half for half in halves if sum(map(len, half)) >= LEAST_TOKENS]
            decisions = [self._decide(source, half) for half in judged]
            if len({decision.known for decision in decisions}) == 2:
                self.parts[source] = "".join(map(str, labels))
                for decision, half in zip(decisions, judged, strict=True):
                    self._keep(decision, half)
                return labels
        self._keep(self._decide(source, documents, (known, new)), documents)
        return [0] * len(documents)

    def _keep(self, decision: Decision, documents: list[Document]) -> None:
        if not decision.known:
            name = decision.skill
            while name in self.detector.states or name in self.detector.left_out:
                name += "'"
            decision = replace(decision, skill=name)
            self._new.append((name, documents))
        self.decisions.append(decision)

    def _verdicts(self, documents: list[Document]) -> list[Verdict | None]:
        return self.detector.judge_documents([document.ids.tolist() for document in documents])

    @staticmethod
    def _part_of_each(verdicts: list[Verdict | None]) -> list[int]:
        """Return 0 for documents like the first one that can be judged, known or new, and 1 for the others."""
        known = [None if verdict is None else verdict.known for verdict in verdicts]
        first = next(value for value in known if value is not None)
        return [int(value is not None and value != first) for value in known]

    def _decide(self, source: str, documents: list[Document], counts: tuple[int, int] | None = None) -> Decision:
        some = windows_to_judge(source, [document.ids for document in documents])
        verdict: Verdict = self.detector.judge(read_states(self.detector.model, some))
        all_alike = (len(documents), 0) if verdict.known else (0, len(documents))
        known, new = counts if counts and any(counts) else all_alike
        tokens = sum(map(len, some))
        return Decision(source, tokens, verdict.known, verdict.skill, verdict.distance, verdict.threshold, new, known)


@dataclass(frozen=True)
class Divided:
    """Divides data sets, and trains on them, as an earlier run has: the one of this stage."""

    stage: Stage

    def trains(self, index: int) -> bool:
        """Return whether a data set, or a part of one, trains an expert."""
        return index >= len(self.stage.data) or self.stage.data[index] is not None

    def __call__(self, sources: list[str], data: list[list[Document]]) -> list[list[int]]:
        found = []
        for source, documents in zip(sources, data, strict=True):
            labels = [int(label) for label in self.stage.parts.get(source, "0" * len(documents))]
            if len(labels) != len(documents):
                raise UsageError(
                    f"{source}: expected the {len(labels)} documents of the run that is resumed, found "
                    f"{len(documents)}; give it the same data"
                )
            found.append(labels)
        return found


def windows_to_judge(
    source: str, documents: Sequence[Sequence[int] | np.ndarray], most: int = WINDOWS
) -> list[np.ndarray]:
    """Return at most so many windows of 128 tokens, evenly spaced over some documents, which are judged together.

    Raises:
        UsageError: if there are less than 256 tokens.
    """
    ids = np.concatenate([np.asarray(document, dtype=np.int32) for document in documents])
    if len(ids) < LEAST_TOKENS:
        raise UsageError(
            f"{source}: has {counted(len(ids), 'token')}, too little text to tell whether it is new; give at least "
            f"{LEAST_TOKENS}"
        )
    windows = windows_of(ids)
    return [windows[i] for i in evenly(len(windows), most)]


def check_skills(library: SkillLibrary, num_experts: int, where: str, what: str = "grown") -> None:
    """Raise UsageError if the router of a mixture cannot be fitted, because an expert has no skill with text.

    Args:
        what: what cannot be done with the mixture then.
    """
    having = {skill.expert for skill in library if len(skill.features) and len(skill.states)}
    without = [i for i in range(num_experts) if i not in having]
    if without:
        raise UsageError(
            f"{where} cannot be {what}: no skill is known of {len(without)} of its {num_experts} experts, as after "
            "--route joint; train it with --route specialised"
        )


def grow(model: Mixture, library: SkillLibrary, blocks: TokenBlocks, judge: Judge, *, first_step: int) -> Stage:
    """Add an expert for each data set that is new: a copy of the expert of the nearest skill.

    A data set that is like a new one trains that one's expert.
    """
    names = [source.name for source in blocks.sources]
    new = [name for decision, name in zip(judge.decisions, names, strict=True) if not decision.known]
    skills = dict(zip(new, skill_names(new, library.names), strict=True))
    found = {skill.name: Trained(skill.name, skill.expert) for skill in library}  # by the names that the judge uses
    data: list[Trained | None] = []
    decisions: list[Decision] = []
    for index, (decision, name) in enumerate(zip(judge.decisions, names, strict=True)):
        nearest = found[str(decision.nearest)]
        if not decision.known:
            trained = found[decision.skill] = Trained(skills[name], _add_expert(model, nearest.expert or 0))
            data.append(trained)
        else:
            data.append(nearest if judge.trains(index) else None)
        decisions.append(replace(decision, skill=name, nearest=nearest.skill))
    return Stage(first_step, None, data, decisions, judge.parts)


def grow_by(
    model: Mixture, library: SkillLibrary, name: str, documents: Sequence[Sequence[int]]
) -> tuple[Verdict, int]:
    """Add an expert for a text, a copy of the nearest skill's, unless a skill of the library has it.

    See `DyLoRAMoE.grow`.
    """
    check_skills(library, model.num_experts, "this mixture")
    documents = [ids for ids in documents if len(ids)]
    some = windows_to_judge(name, documents)
    verdict = NoveltyDetector(model, library).judge(read_states(model, some))
    nearest = library[verdict.skill].expert or 0
    if verdict.known:
        return verdict, nearest
    index = _add_expert(model, nearest)
    (unique,) = skill_names([name], library.names)
    add_skill(model, library, Trained(unique, index), [{"input_ids": ids} for ids in documents])
    fit_router(model.router, library)
    model.train_only([index])
    return verdict, index


def _add_expert(model: Mixture, nearest: int) -> int:
    index = model.add_expert(replace_config(model.expert_configs[nearest]))
    copy_expert(model, nearest, index)
    return index
