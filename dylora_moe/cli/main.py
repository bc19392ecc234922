"""What is in a checkpoint, what is in a run folder, and what a run has learned; without loading a model.

dylora-moe verify runs/first/checkpoint-100
dylora-moe verify runs/first/checkpoint-100 --json result.json
dylora-moe list runs/first
dylora-moe convert OLD NEW
dylora-moe report runs/first
"""

from __future__ import annotations

from collections.abc import Sequence

from .. import __version__
from ..system import command_line
from . import convert, report, verify
from . import list as list_command

# Command: its module, which has `add_flags` and `run`, and what --help says of it.
COMMANDS = {
    "verify": (verify, "exit code 0: complete and sound, 1: problems, all of which are listed, 2: not a folder"),
    "list": (list_command, "one line for each checkpoint of a run folder"),
    "convert": (convert, "the experts of a checkpoint of version 0.2.1 in a new checkpoint, with a fresh router"),
    "report": (report, "write the page report.html of a run folder, from its results.json"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command `dylora-moe`, also as `python -m dylora_moe`; returns the exit code."""
    return command_line.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)
    return args.command(args)


def build_parser() -> command_line.Parser:
    parser = command_line.Parser(prog="dylora-moe", description=__doc__)
    parser.add_argument("--version", action="version", version=f"dylora-moe {__version__}")
    commands = parser.add_subparsers(required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        module.add_flags(command)
        command.set_defaults(command=module.run)
    return parser
