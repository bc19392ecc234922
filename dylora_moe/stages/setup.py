"""What a run begins with: the skills of its data sets, and the expert that each of them trains."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from ..constants import expert_name
from ..data.blocks import TokenBlocks
from ..mixture.expert_matrices import weight_of
from ..mixture.model import Mixture
from ..reporting.decode import decoded
from ..reporting.results import Decision
from ..skills.features import collect
from ..skills.library import Skill, SkillLibrary
from ..skills.sizes import NAME_BYTES, SampleSizes, sample_sizes
from ..store.files import FileProblem
from .plan import source_of_rows


@dataclass(frozen=True)
class Trained:
    """What the blocks of one data set train."""

    skill: str
    expert: int | None  # None: all experts together


@dataclass(frozen=True)
class Stage:
    """What a run trains. trainer_state.json keeps it, so that a resumed run trains the same.

    Attributes:
        first_step: the number of steps that were made before.
        branch_step: see `stages.plan.Plan`.
        data: what each data set trains, in their order; None for one that is known already, and not trained on.
        decisions: whether each data set was taken for a new skill, if the run grows a mixture.
        parts: of a data set that was divided, the part of each document: "0" or "1".
    """

    first_step: int
    branch_step: int | None
    data: list[Trained | None]
    decisions: list[Decision] = field(default_factory=list)
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def grows(self) -> bool:
        return bool(self.decisions)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: object, num_experts: int, step: int) -> Stage:
        """Build it from what `to_json` has returned.

        Args:
            num_experts: of the checkpoint that it is of.
            step: of that checkpoint.

        Raises:
            FileProblem: For anything else.
        """
        problems: list[str] = []
        stage = decoded(cls, found, "stage", problems)
        problems = problems or list(stage._contradictions(num_experts, step))
        if problems:
            raise FileProblem("; ".join(problems))
        return stage

    def _contradictions(self, num_experts: int, step: int) -> Iterator[str]:
        if not 0 <= self.first_step <= step:
            yield f"stage.first_step: expected a number from 0 to {step}, found {self.first_step}"
        if self.branch_step is not None and self.branch_step <= self.first_step:
            yield f"stage.branch_step: expected more than {self.first_step}, found {self.branch_step}"
        wrong = [each.expert for each in self.trained if each.expert is not None and not 0 <= each.expert < num_experts]
        if wrong:
            yield f"stage.data: expected experts from 0 to {num_experts - 1}, found {wrong[0]}"
        if len(self.decisions) not in (0, len(self.data)):
            yield f"stage.decisions: expected {len(self.data)} or none, found {len(self.decisions)}"
        if any(set(parts) - {"0", "1"} for parts in self.parts.values()):
            yield 'stage.parts: expected texts of "0" and "1", found others'

    def for_data(self, fresh: Stage) -> Stage:
        """Return this stage for the data sets of a resumed run, of which `fresh` would be the stage.

        A data set that goes by the name of a skill trains what that one did. The others, if they are as many as the
        skills that are left, are taken for those in the same order.
        """
        if len(self.data) != len(fresh.data):
            return replace(self, data=fresh.data)
        names = {each.skill for each in fresh.trained}
        known = {each.skill: each for each in self.trained if each.skill in names}
        left = list(self.data)
        for each in known.values():
            left.remove(each)
        return replace(
            self, data=[known[each.skill] if each and each.skill in known else left.pop(0) for each in fresh.data]
        )

    def for_skills(self, library: SkillLibrary, num_experts: int) -> Stage:
        """Return this stage with each skill of the library on the expert that has it, the others on those left."""
        experts = {skill.name: skill.expert for skill in library if skill.expert is not None}
        taken = {experts[each.skill] for each in self.trained if each.skill in experts}
        free = iter([index for index in range(num_experts) if index not in taken])
        named: list[Trained | None] = [
            Trained(e.skill, experts[e.skill] if e.skill in experts else next(free)) for e in self.trained
        ]
        return replace(self, data=named)

    @property
    def trained(self) -> list[Trained]:
        """What is trained."""
        return [each for each in self.data if each is not None]


def first_stage(blocks: TokenBlocks, first_step: int, branch_step: int | None, *, joint: bool) -> Stage:
    """Return the stage in which each data set is a skill, with an expert of its own unless they are trained jointly."""
    skills = skill_names(source.name for source in blocks.sources)
    return Stage(first_step, branch_step, [Trained(name, None if joint else i) for i, name in enumerate(skills)])


def skill_names(names: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """Return a name for a skill of each data set: of at most 32 bytes, and none twice or taken."""
    found: list[str] = []
    used = set(taken)
    for name in names:
        number, candidate = 1, _cut(name, NAME_BYTES)
        while candidate in used:
            number += 1
            ending = f"-{number}"
            candidate = _cut(name, NAME_BYTES - len(ending)) + ending
        used.add(candidate)
        found.append(candidate)
    return found


def _cut(name: str, most: int) -> str:
    return name.replace("\0", "").encode(errors="replace")[:most].decode(errors="ignore") or "skill"


def add_skills(model: Mixture, library: SkillLibrary, blocks: TokenBlocks, stage: Stage) -> None:
    """Add what the data sets of a stage tell of their skills to the library."""
    for index, source in enumerate(blocks.sources):
        trained = stage.data[index]
        if trained is not None:
            add_skill(model, library, trained, source_rows(blocks, index), source.tokens)


def add_skill(
    model: Mixture,
    library: SkillLibrary,
    trained: Trained,
    rows: Iterable[Mapping[str, Any]],
    tokens: int | None = None,
) -> None:
    """Add what some rows tell of a skill to the library.

    Args:
        tokens: how many there are, if rows are repeated; by default those of the rows.
    """
    sizes = sizes_of(model, trained.expert or 0)
    found = collect(model, rows, sizes)
    count = found.tokens if tokens is None else tokens
    library.update(Skill(trained.skill, trained.expert, count, None, found.features, found.states), sizes)


def source_rows(blocks: TokenBlocks, index: int) -> Any:
    """Return the training blocks of a data set."""
    return blocks.train.select(np.flatnonzero(source_of_rows(blocks.train) == index))


def sizes_of(model: Mixture, expert: int) -> SampleSizes:
    """Return how much is kept of the skill of an expert."""
    size = sum(tensor.nbytes for tensor in model.expert_tensors(expert).values())
    embeddings = weight_of(model.get_input_embeddings())
    return sample_sizes(size, embeddings.shape[1], getattr(model.config.get_text_config(), "hidden_size", None))


def trained_blocks(blocks: TokenBlocks, stage: Stage) -> tuple[Any, tuple[int, ...]]:
    """Return the blocks that a stage trains on, and the expert of each data set, by its index in `source`."""
    experts = tuple(-1 if each is None else each.expert or 0 for each in stage.data)
    keep = np.flatnonzero(np.asarray(experts)[source_of_rows(blocks.train)] >= 0)
    train = blocks.train if len(keep) == len(blocks.train) else blocks.train.select(keep)
    return train, experts


def stage_lines(stage: Stage, blocks: TokenBlocks) -> list[str]:
    """Return a line for each data set that says what it trains, or why it trains nothing."""
    lines = []
    decisions: Sequence[Decision | None] = stage.decisions or [None] * len(stage.data)
    names = [source.name for source in blocks.sources]
    for name, trained, decision in zip(names, stage.data, decisions, strict=True):
        what = "not trained on; --update trains the expert that has it"
        if trained is not None:
            skill = "" if trained.skill == name else f" as skill {trained.skill}"
            what = f"trains {'all experts' if trained.expert is None else expert_name(trained.expert)}{skill}"
        lines.append(f"skill: {name}: {what}" if decision is None else f"skill: {name}: {told(decision)}; {what}")
    return lines


def told(decision: Decision) -> str:
    """Return a decision in words, with its numbers."""
    what = "known" if decision.known else "new"
    where = f"{decision.distance:.1f} from {decision.nearest}, known up to {decision.threshold:.1f}"
    documents = decision.documents_known + decision.documents_new
    own = decision.documents_known if decision.known else decision.documents_new
    return f"{what} ({where}; so are {own} of {documents} documents, by {decision.tokens:,} tokens)"
