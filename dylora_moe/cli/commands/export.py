"""`dylora-moe export`: the experts of a checkpoint for a server that sends each request to one of them."""

from __future__ import annotations

import argparse
from argparse import Namespace
from dataclasses import asdict

from ...errors import counted
from ...system import command_line
from ...system.command_line import PASS_MARK, PASSED
from ..experts.common import tell
from ..output import add_json_flag

VLLM, LLAMA_CPP = "vllm", "llama.cpp"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=command_line.path)
    parser.add_argument("folder", metavar="FOLDER", type=command_line.path, help="which is made")
    parser.add_argument("--to", required=True, choices=(VLLM, LLAMA_CPP), help="the server")
    add_json_flag(parser)


def run(args: Namespace) -> int:
    """Write the experts, and print the command that serves them."""
    # Imports the package gguf, which the other commands do without.
    from ...editing.export import export_for_llama_cpp, export_for_vllm

    made = (export_for_vllm if args.to == VLLM else export_for_llama_cpp)(args.checkpoint, args.folder)
    lines = [
        f"{PASS_MARK} {made.folder}: {counted(len(made.adapters), 'expert')} for {args.to}; to serve them",
        "",
        f"    {made.command}",
        "",
        f"A request gets the first one if it says {made.request}.",
    ]
    tell(args, lines, asdict(made) | {"folder": str(made.folder), "to": args.to})
    return PASSED
