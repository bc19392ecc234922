"""`dylora-moe experts rename`: a new checkpoint in which a skill has another name."""

from __future__ import annotations

import argparse
from argparse import Namespace

from ...system import command_line
from ...system.command_line import PASSED
from ..output import add_json_flag
from .common import add_base_flags, base_of, tell_of_edit


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=command_line.path)
    parser.add_argument("new", metavar="NEW", type=command_line.path)
    parser.add_argument("skill", metavar="SKILL", type=command_line.text, help="as `experts list` shows it")
    parser.add_argument("name", metavar="NAME", type=command_line.text, help="its other name")
    add_base_flags(parser)
    add_json_flag(parser)


def run(args: Namespace) -> int:
    from ...editing.experts import rename

    tell_of_edit(args, rename(args.checkpoint, args.new, args.skill, args.name, base_of(args)))
    return PASSED
