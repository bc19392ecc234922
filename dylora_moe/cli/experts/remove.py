"""`dylora-moe experts remove`: a new checkpoint without some experts and their skills.

The other experts keep their bits, and the router its rows of them.
"""

from __future__ import annotations

import argparse
from argparse import Namespace

from ...system import command_line
from ...system.command_line import PASSED
from ..output import add_json_flag
from .common import add_base_flags, base_of, expert, tell_of_edit


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=command_line.path)
    parser.add_argument("new", metavar="NEW", type=command_line.path)
    parser.add_argument("experts", metavar="EXPERT", nargs="+", type=expert, help="such as expert_1")
    add_base_flags(parser)
    add_json_flag(parser)


def run(args: Namespace) -> int:
    from ...editing.experts import remove

    tell_of_edit(args, remove(args.checkpoint, args.new, args.experts, base_of(args)))
    return PASSED
