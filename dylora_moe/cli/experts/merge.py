"""`dylora-moe experts merge`: a new checkpoint in which some experts are one, their mean.

It has the skills of all of them, and the router is fitted again.
"""

from __future__ import annotations

import argparse
from argparse import Namespace

from ...system import command_line
from ...system.command_line import PASSED
from ..output import add_json_flag
from .common import add_base_flags, add_rank_flag, base_of, expert, tell_of_edit


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=command_line.path)
    parser.add_argument("new", metavar="NEW", type=command_line.path)
    parser.add_argument("experts", metavar="EXPERT", nargs="+", type=expert, help="two or more, such as expert_1")
    add_rank_flag(parser)
    add_base_flags(parser)
    add_json_flag(parser)


def run(args: Namespace) -> int:
    from ...editing.experts import merge

    tell_of_edit(args, merge(args.checkpoint, args.new, args.experts, args.rank, base_of(args)))
    return PASSED
