"""`dylora-moe experts import`: a new checkpoint with a LoRA that PEFT has saved as one more expert.

The text tells the router which tokens the expert is for: give some of what the LoRA was trained on, or text like it.
"""

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
    parser.add_argument("lora", metavar="LORA", type=command_line.text, help="a folder, or an id on the Hub")
    data = "files, folders or data sets of the Hub with text of its skill, as for train.py"
    parser.add_argument("--data", metavar="DATA", nargs="+", required=True, type=command_line.text, help=data)
    parser.add_argument("--name", type=command_line.text, help="of the skill (default: that of the first data set)")
    parser.add_argument("--revision", type=command_line.text, help="of the LoRA on the Hub: branch, tag or commit")
    add_base_flags(parser)
    add_json_flag(parser)


def run(args: Namespace) -> int:
    from ...editing.importing import Source, import_expert

    source = Source(args.lora, args.data, args.name, args.revision)
    tell_of_edit(args, import_expert(args.checkpoint, args.new, source, base_of(args)))
    return PASSED
