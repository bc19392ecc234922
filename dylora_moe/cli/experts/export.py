"""`dylora-moe experts export`: one expert in a new folder, as a plain LoRA for PEFT."""

from __future__ import annotations

import argparse
from argparse import Namespace

from ...constants import expert_name
from ...system import command_line
from ...system.command_line import PASS_MARK, PASSED
from ..output import add_json_flag
from .common import expert, tell


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=command_line.path)
    parser.add_argument("expert", metavar="EXPERT", type=expert, help="such as expert_1")
    parser.add_argument("folder", metavar="FOLDER", type=command_line.path, help="which is made")
    add_json_flag(parser)


def run(args: Namespace) -> int:
    # Imports the package gguf, which the other commands do without.
    from ...editing.export import export_one

    folder, name = export_one(args.checkpoint, args.expert, args.folder), expert_name(args.expert)
    tell(args, [f"{PASS_MARK} {folder}: {name} as a plain LoRA"], {"expert": name, "folder": str(folder)})
    return PASSED
