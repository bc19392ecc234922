"""`dylora-moe experts`: which experts a checkpoint has, and new checkpoints with others."""

from __future__ import annotations

import argparse
from argparse import Namespace

from ..experts import collapse, export, importing, merge, remove, rename
from ..experts import list as list_command

# Subcommand: its module, which has `add_flags` and `run`, and what --help says of it.
COMMANDS = {
    "list": (list_command, "the experts of a checkpoint, and the skills of each"),
    "import": (importing, "a new checkpoint with a LoRA that PEFT has saved as one more expert"),
    "export": (export, "one expert in a new folder, as a plain LoRA for PEFT"),
    "remove": (remove, "a new checkpoint without some experts and their skills"),
    "rename": (rename, "a new checkpoint in which a skill has another name"),
    "merge": (merge, "a new checkpoint in which some experts are one"),
    "collapse": (collapse, "all experts as one plain LoRA in a new folder, and what that costs"),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = "No subcommand changes a checkpoint that is there."
    commands = parser.add_subparsers(required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        module.add_flags(command)
        command.set_defaults(subcommand=module.run)


def run(args: Namespace) -> int:
    return args.subcommand(args)
