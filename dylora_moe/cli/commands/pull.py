"""`dylora-moe pull`: a checkpoint from the Hub into its cache, verified."""

from __future__ import annotations

import argparse
from argparse import Namespace

from ...checkpoint.verify_config import inspect_config
from ...system.command_line import PASS_MARK, PASSED, say
from ..output import add_json_flag, people, write_json
from ..wording import experts_line


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repository", metavar="USER/REPO")
    parser.add_argument("--revision", metavar="REVISION", help="a branch, tag or commit; default: main")
    parser.add_argument("--hf-token", metavar="TOKEN", help="default: HF_TOKEN, or the stored login")
    add_json_flag(parser)


def run(args: Namespace) -> int:
    from ...sharing.pull import pull

    folder = pull(args.repository, revision=args.revision, token=args.hf_token)
    lines = people(args)
    say(f"{PASS_MARK} {args.repository}: complete and sound, {experts_line(inspect_config(folder))}", lines)
    say(f"  {folder}", lines)
    write_json(args, {"repository": args.repository, "folder": str(folder)})
    return PASSED
