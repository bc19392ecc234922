"""`dylora-moe experts collapse`: all experts as one plain LoRA in a new folder, and what that costs.

The cost is measured on --data, or else on the held-out text that training has left in the run folder.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from dataclasses import asdict
from typing import TYPE_CHECKING

from ...constants import expert_name
from ...system import command_line
from ...system.command_line import PASS_MARK, PASSED
from ..output import add_json_flag
from .common import add_base_flags, add_rank_flag, base_of, tell

if TYPE_CHECKING:
    from ...editing.collapse import Collapsed

NOT_MEASURED = "What it costs was not measured: there is no held-out text beside the checkpoint; give some with --data."


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=command_line.path)
    parser.add_argument("folder", metavar="FOLDER", type=command_line.path, help="which is made")
    weights = "one for each expert (default: as the router uses them on the text; without text, the same for all)"
    parser.add_argument("--weights", metavar="W", nargs="+", type=command_line.number(float), help=weights)
    add_rank_flag(parser)
    parser.add_argument("--data", metavar="DATA", nargs="+", default=(), type=command_line.text, help="held-out text")
    add_base_flags(parser)
    add_json_flag(parser)


def run(args: Namespace) -> int:
    from ...editing.collapse import collapse

    options = {"weights": args.weights, "rank": args.rank, "data": args.data, "base": base_of(args)}
    made = collapse(args.checkpoint, args.folder, **options)
    tell(args, _lines(made), asdict(made) | {"folder": str(made.folder)})
    return PASSED


def _lines(made: Collapsed) -> list[str]:
    parts = ", ".join(f"{weight:.2f} {expert_name(i)}" for i, weight in enumerate(made.weights))
    lines = [f"{PASS_MARK} {made.folder}: one LoRA of rank {made.rank}, which holds {made.held:.1%} of {parts}"]
    if not made.losses:
        return [*lines, f"  {NOT_MEASURED}"]
    width = max(map(len, ["held-out loss", *made.losses]))
    lines.append(f"  {'held-out loss':{width}}  {'mixture':>9}  {'one LoRA':>9}  {'base':>9}")
    for name, loss in made.losses.items():
        lines.append(f"  {name:{width}}  {loss.mixture:9.4f}  {loss.merged:9.4f}  {loss.base:9.4f}")
    return lines
