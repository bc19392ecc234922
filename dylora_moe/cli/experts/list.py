"""`dylora-moe experts list`: the experts of a checkpoint, and the skills of each."""

from __future__ import annotations

import argparse
from argparse import Namespace
from dataclasses import asdict

from ...checkpoint.verify import open_checkpoint
from ...editing.listing import SkillFacts, skills_of
from ...system import command_line
from ...system.command_line import PASSED
from ..output import add_json_flag
from .common import tell


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=command_line.path)
    add_json_flag(parser)


def run(args: Namespace) -> int:
    checkpoint = open_checkpoint(args.checkpoint)
    skills, lines, experts = skills_of(checkpoint), [], []
    for index, expert in enumerate(checkpoint.config.experts):
        own = [skill for skill in skills if skill.expert == index]
        size = f"r={expert.r}, alpha={expert.lora_alpha:g}, {expert.parameters:,} parameters"
        lines.append(f"{expert.name}  {expert.state:8}  {size}  {', '.join(map(_described, own)) or 'no skill'}")
        experts.append(
            {key: getattr(expert, key) for key in ("name", "state", "r", "lora_alpha", "use_rslora", "parameters")}
            | {"target_modules": expert.target_modules, "skills": [asdict(skill) for skill in own]}
        )
    if shared := [skill for skill in skills if skill.expert is None]:
        lines.append(f"of all experts together: {', '.join(map(_described, shared))}")
    value = {"checkpoint": args.checkpoint, "experts": experts, "shared_skills": [asdict(skill) for skill in shared]}
    tell(args, lines, value)
    return PASSED


def _described(skill: SkillFacts) -> str:
    loss = "" if skill.loss is None else f", held-out loss {skill.loss:.4f}"
    return f"{skill.name} ({skill.tokens:,} tokens{loss})"
