"""What the subcommands of `dylora-moe experts` share: flags, the numbers of experts, and what they print."""

from __future__ import annotations

import argparse
import re
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...constants import EXPERT_PREFIX, expert_name
from ...errors import counted, shown
from ...system import command_line
from ...system.command_line import PASS_MARK, say
from ..output import people, write_json

if TYPE_CHECKING:
    from ...editing.edit import BaseChoice, Edited

NO_TRAINING_STATE = "There is no training state in it: train.py goes on from it with --grow --from, not with --resume."


def expert(text: str) -> int:
    """An argparse type for an expert: expert_1, or 1."""
    match = re.fullmatch(rf"(?:{EXPERT_PREFIX})?(0|[1-9]\d{{0,4}})", text, re.ASCII)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected an expert like {expert_name(1)} or 1, got {text!r}")
    return int(match[1])


def add_base_flags(parser: argparse.ArgumentParser) -> None:
    base = "the base model, by hub id, folder or GGUF file, if it has moved"
    parser.add_argument("--base", metavar="NAME", type=command_line.path, help=base)
    device = "auto, cpu, cuda or mps (default: auto)"
    parser.add_argument("--device", type=command_line.text, default="auto", help=device)


def add_rank_flag(parser: argparse.ArgumentParser) -> None:
    what = "the most rank of the result (default: the largest of the experts; the sum of theirs makes it exact)"
    parser.add_argument("--rank", metavar="R", type=command_line.number(int, 1), help=what)


def base_of(args: Namespace) -> BaseChoice:
    from ...editing.edit import BaseChoice

    return BaseChoice(args.base, args.device)


def tell(args: Namespace, lines: Sequence[str], value: dict[str, Any]) -> None:
    """Print the lines for people, and write the JSON if it is asked for; on standard output, it stands alone."""
    for line in lines:
        say(shown(line, most=None), people(args))
    write_json(args, value)


def tell_of_edit(args: Namespace, made: Edited) -> None:
    numbering = {expert_name(old): None if new is None else expert_name(new) for old, new in made.numbering.items()}
    lines = [f"{PASS_MARK} {made.folder}: {counted(len(made.states), 'expert')}", *(f"  {note}" for note in made.notes)]
    lines += [f"  {old} is now {new}" for old, new in numbering.items() if new not in (None, old)]
    value = {"checkpoint": str(made.folder), "states": made.states, "numbering": numbering, "notes": made.notes}
    tell(args, [*lines, f"  {NO_TRAINING_STATE}"], value)
