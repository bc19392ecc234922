"""Opening a checkpoint to make another one of it, and what is told of that one.

An edit never changes the old checkpoint. It loads the old one's mixture and skills on their base model, changes them
in memory, and publishes a new checkpoint, whole or not at all. What training needs to resume is left out: the moments
of an optimizer belong to parameters that may be gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..api import DyLoRAMoE
from ..base.find import find_base
from ..base.load import load_tokenizer
from ..checkpoint.read import named_base
from ..checkpoint.verify import SoundCheckpoint
from ..data.documents import Document, check_vocabulary
from ..data.sources import DataSpec
from ..data.texts import read_text
from ..mixture.model import Mixture
from ..skills.library import SAMPLES, SkillLibrary
from ..skills.sizes import SampleSizes
from ..stages.batches import known_tokens
from ..stages.setup import sizes_of

Numbering = Mapping[int, int]  # the index of each expert that stays -> its new one


@dataclass(frozen=True)
class BaseChoice:
    """On which base model a checkpoint is loaded (by default the one that it names), and on which device."""

    name: str | None = None
    device: str = "auto"


NAMED_BASE = BaseChoice()


@dataclass(frozen=True)
class Edited:
    """What an edit has made.

    Attributes:
        folder: the new checkpoint.
        states: of its experts.
        numbering: the new index of each expert that the old checkpoint had; None for one that is gone.
        notes: lines for the user.
    """

    folder: Path
    states: list[str]
    numbering: dict[int, int | None]
    notes: list[str] = field(default_factory=list)


def load(checkpoint: SoundCheckpoint, base: BaseChoice) -> DyLoRAMoE:
    """Load the mixture of a checkpoint. Raises UsageError if the base model is not available."""
    return DyLoRAMoE.from_checkpoint(checkpoint.folder, base.name, device=base.device)


def documents_of(spec: DataSpec, tokenizer: PreTrainedTokenizerBase, model: DyLoRAMoE) -> list[Document]:
    """Return the documents of a data set. Raises UsageError if the base model does not know one of their tokens."""
    documents = read_text(spec, tokenizer, None).read.items
    if (vocabulary := known_tokens(model.base)) is not None:
        check_vocabulary(documents, tokenizer, vocabulary, spec.source)
    return documents


def tokenizer_of(checkpoint: SoundCheckpoint, base: BaseChoice) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the base model. Raises UsageError if there is none."""
    revision = None if base.name else checkpoint.config.base_model.revision
    source, _ = find_base(base.name or named_base(checkpoint, "--base"), weights="none", revision=revision)
    return load_tokenizer(source)


def renumbered(skills: SkillLibrary, numbering: Numbering, model: Mixture) -> SkillLibrary:
    """Return the skills of the experts that stay, with their new indices, and as much of each as the mixture allows.

    Args:
        model: the mixture with the new experts.
    """
    sizes = SampleSizes(*map(max, zip(*(sizes_of(model, index) for index in range(model.num_experts)), strict=True)))
    found = SkillLibrary()
    for skill in skills:
        if skill.expert is None or skill.expert in numbering:
            expert = None if skill.expert is None else numbering[skill.expert]
            samples = {kind: getattr(skill, kind).smallest(getattr(sizes, kind)) for kind in SAMPLES}
            found.add(replace(skill, expert=expert, **samples))
    return found


def publish(
    old: SoundCheckpoint,
    new: str | Path,
    model: DyLoRAMoE,
    skills: SkillLibrary,
    numbering: Numbering,
    notes: list[str],
) -> Edited:
    """Write the new checkpoint, with the step of the old one. Raises UsageError if it cannot be written."""
    folder = model.save_checkpoint(new, step=old.config.step, skills=skills)
    every = {index: numbering.get(index) for index in range(old.config.num_experts)}
    return Edited(folder, model.expert_states, every, notes)
