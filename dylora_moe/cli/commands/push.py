"""`dylora-moe push`: a checkpoint to a repository on the Hub, with a model card."""

from __future__ import annotations

import argparse
from argparse import Namespace
from pathlib import Path

from ...system import command_line
from ...system.command_line import PASS_MARK, PASSED, say
from ..output import add_json_flag, people, write_json


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="CHECKPOINT_OR_RUN", type=command_line.path)
    parser.add_argument("repository", metavar="USER/REPO")
    parser.add_argument("--base-model", metavar="ID", help="on the Hub, where the checkpoint names a local path")
    parser.add_argument("--private", action="store_true", help="make the repository a private one, if it is new")
    parser.add_argument("--revision", metavar="BRANCH", help="default: main")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request")
    parser.add_argument("--training-state", action="store_true", help="push what --resume needs as well")
    parser.add_argument("--hf-token", metavar="TOKEN", help="default: HF_TOKEN, or the stored login")
    add_json_flag(parser)


def run(args: Namespace) -> int:
    from ...sharing.push import push

    url = push(
        Path(args.path),
        args.repository,
        base_model=args.base_model,
        training_state=args.training_state,
        revision=args.revision,
        token=args.hf_token,
        private=args.private or None,
        commit_message=args.message,
        create_pr=args.create_pr,
    )
    say(f"{PASS_MARK} pushed {args.path}: {url}", people(args))
    write_json(args, {"repository": args.repository, "commit": url})
    return PASSED
