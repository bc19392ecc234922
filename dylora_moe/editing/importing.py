"""A LoRA from elsewhere as a new expert of a checkpoint, with a skill that is read from a text of the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..api import DyLoRAMoE
from ..checkpoint.read import read_skills
from ..checkpoint.verify import SoundCheckpoint
from ..constants import MAX_EXPERTS, expert_name
from ..data.sources import DataSpec
from ..errors import UsageError, shown
from ..mixture.model import Mixture
from ..skills.fit import fit_router
from ..skills.library import Skill
from ..stages.growth import LEAST_TOKENS, check_skills
from ..stages.setup import Trained, add_skill, skill_names
from .checked import sound
from .edit import NAMED_BASE, BaseChoice, Edited, documents_of, load, publish, tokenizer_of
from .foreign import Lora, find_lora, read_lora


@dataclass(frozen=True)
class Source:
    """What is imported.

    Args:
        lora: a folder with a LoRA that PEFT has saved, or the id of one on the Hub.
        data: files, folders or data sets of the Hub with text of its skill, as train.py takes them.
        name: of the skill; by default that of the first data set.
        revision: a branch, tag or commit on the Hub.
    """

    lora: str
    data: Sequence[str]
    name: str | None = None
    revision: str | None = None


def import_expert(old: str | Path, new: str | Path, source: Source, base: BaseChoice = NAMED_BASE) -> Edited:
    """Write a new checkpoint with a LoRA as one more expert. The router is fitted again to the skills of all experts.

    Raises:
        UsageError: if the LoRA cannot be an expert of this mixture, the text cannot be read or is too little, the name
            is taken, the router cannot be fitted, or the new checkpoint cannot be written.
        CheckpointError: if the old checkpoint is not sound.
    """
    checkpoint, specs = sound(old, new), [DataSpec.parse(text) for text in source.data]
    skills, count = read_skills(checkpoint), checkpoint.config.num_experts
    name = source.name or skill_names([specs[0].name])[0]
    Skill(name)  # may it be a name?
    if name in skills:
        raise UsageError(f"{old} has a skill {name!r} already: choose another name for the new one with --name")
    if count >= MAX_EXPERTS:
        raise UsageError(f"{old} has {count} experts, and a mixture has at most {MAX_EXPERTS}")
    check_skills(skills, count, str(old))
    folder = find_lora(source.lora, source.revision)
    model = load(checkpoint, base)
    lora = read_lora(folder, model)
    documents = _documents(checkpoint, specs, model, base)
    index = add(model, lora, folder)
    add_skill(model, skills, Trained(name, index), [{"input_ids": ids} for ids in documents])
    fit_router(model.router, skills)
    tokens = sum(map(len, documents))
    notes = [f"{expert_name(index)} has the skill {name}, read from {tokens:,} tokens", *lora.notes]
    return publish(checkpoint, new, model, skills, {i: i for i in range(count)}, notes)


def _documents(
    checkpoint: SoundCheckpoint, specs: Sequence[DataSpec], model: DyLoRAMoE, base: BaseChoice
) -> list[list[int]]:
    """Return the token ids of the text."""
    tokenizer = tokenizer_of(checkpoint, base)
    found = []
    for spec in specs:
        found += [document.ids.tolist() for document in documents_of(spec, tokenizer, model)]
    if (tokens := sum(map(len, found))) < LEAST_TOKENS:
        raise UsageError(
            f"{specs[0].source}: has {tokens} tokens, too little text to tell a skill by; give at least {LEAST_TOKENS}"
        )
    return found


@torch.no_grad()
def add(model: Mixture, lora: Lora, folder: Path) -> int:
    """Add a LoRA to a mixture as a mature expert, and return its index.

    Raises:
        UsageError: if a part of it is where no expert can be. The mixture has the expert nevertheless.
    """
    index = model.add_expert(lora.config)
    here = model.expert_tensors(index)
    if outside := sorted(lora.tensors.keys() - here.keys()):
        raise UsageError(f"{folder}: {shown(outside[0])} is outside of the decoder layers, where an expert cannot be")
    for name, parameter in here.items():
        parameter.copy_(lora.tensors[name])
    model.mark_mature([index])
    return index
