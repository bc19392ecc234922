"""Experts of a checkpoint that are removed or merged, and skills that get another name, in a new checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoint.read import read_skills
from ..constants import NEW, expert_name
from ..errors import UsageError
from ..skills.fit import fit_router
from ..skills.library import SkillLibrary
from ..stages.growth import check_skills
from ..stages.merging import combined, experts_of, rebuilt
from .checked import check_experts, sound
from .edit import NAMED_BASE, BaseChoice, Edited, load, publish, renumbered


def remove(old: str | Path, new: str | Path, experts: Collection[int], base: BaseChoice = NAMED_BASE) -> Edited:
    """Write a new checkpoint without some experts and their skills.

    The others keep their bits, and so do the router's rows of them: without those of the experts that are gone, its
    softmax is the probability of each other one, given that it is one of them.

    Raises:
        UsageError: if an expert is not there, if none would be left, or if the new checkpoint cannot be written.
        CheckpointError: if the old checkpoint is not sound.
    """
    checkpoint = sound(old, new)
    gone = check_experts(checkpoint, experts)
    if len(gone) == checkpoint.config.num_experts:
        raise UsageError(f"{old}: no expert would be left; keep at least one of {len(gone)}")
    model, skills = load(checkpoint, base), read_skills(checkpoint)
    every = experts_of(model)
    kept = [index for index in range(len(every)) if index not in gone]
    smaller = rebuilt(model, [every[index] for index in kept])
    with torch.no_grad():
        for name, parameter in smaller.router.named_parameters():
            parameter.copy_(model.router.get_parameter(name)[kept])
    numbering = {index: place for place, index in enumerate(kept)}
    left = renumbered(skills, numbering, smaller)
    lost = [name for name in skills.names if name not in left]
    notes = [f"with {_named(gone)} went the skills {', '.join(lost)}" if lost else f"{_named(gone)} had no skill"]
    return publish(checkpoint, new, smaller, left, numbering, notes)


def merge(
    old: str | Path, new: str | Path, experts: Sequence[int], rank: int | None = None, base: BaseChoice = NAMED_BASE
) -> Edited:
    """Write a new checkpoint in which some experts are one, their mean, in the place of the first; it has their skills.

    The router is fitted again to the skills of all experts.

    Args:
        rank: the most that the expert may have; by default the largest of theirs. The sum of theirs makes it exact.

    Raises:
        UsageError: if there are less than two experts, one was never trained, the router cannot be fitted, or the new
            checkpoint cannot be written.
        CheckpointError: if the old checkpoint is not sound.
    """
    checkpoint = sound(old, new)
    merged = check_experts(checkpoint, experts)
    states = checkpoint.config.states
    if len(merged) < 2:
        raise UsageError(f"{old}: expected two experts or more to merge, got {len(merged)}")
    if untrained := [index for index in merged if states[index] == NEW]:
        raise UsageError(f"{old}: {_named(untrained)} was never trained: there is nothing of it to merge; remove it")
    model = load(checkpoint, base)
    every, kept = experts_of(model), [index for index in range(len(states)) if index not in merged[1:]]
    one, held = combined(model, dict.fromkeys(merged, 1 / len(merged)), rank)
    smaller = rebuilt(model, [one if index == merged[0] else every[index] for index in kept])
    places = {index: place for place, index in enumerate(kept)}
    numbering = places | dict.fromkeys(merged, places[merged[0]])
    skills = SkillLibrary()
    for skill in renumbered(read_skills(checkpoint), numbering, smaller):
        lost = skill.expert == places[merged[0]]  # its loss is that of another expert
        skills.add(replace(skill, loss=None) if lost else skill)
    if len(kept) > 1:
        check_skills(skills, len(kept), str(old), "merged in this way")
        fit_router(smaller.router, skills)
    notes = [f"{_named(merged)} are one expert of rank {one.config.r}, which holds {held:.1%} of their mean"]
    return publish(checkpoint, new, smaller, skills, numbering, notes)


def rename(old: str | Path, new: str | Path, name: str, to: str, base: BaseChoice = NAMED_BASE) -> Edited:
    """Write a new checkpoint in which a skill has another name.

    Raises:
        UsageError: if there is no such skill, the other name is taken or cannot be one, or the new checkpoint cannot
            be written.
        CheckpointError: if the old checkpoint is not sound.
    """
    checkpoint = sound(old, new)
    skills, renamed = read_skills(checkpoint), SkillLibrary()
    chosen = skills[name]
    for skill in skills:
        renamed.add(replace(skill, name=to) if skill is chosen else skill)
    model = load(checkpoint, base)
    numbering = {index: index for index in range(model.num_experts)}
    return publish(checkpoint, new, model, renamed, numbering, [f"the skill {name} is now {to}"])


def _named(experts: Sequence[int]) -> str:
    return ", ".join(map(expert_name, experts))
