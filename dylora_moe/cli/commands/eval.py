"""`dylora-moe eval`: the loss of each data set, routed, by each expert alone, and of the base model."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from ...constants import expert_name
from ...errors import shown
from ...system.command_line import PASSED, number, path, say
from ..flags import add_model_flags
from ..output import add_json_flag, people, write_json
from ..wording import percent, table

if TYPE_CHECKING:
    from ..evaluation import Evaluated

BATCH_SIZE = 4
MOST_EXPERTS = 8  # columns of the table


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prints losses in nats per token. Give text that was not trained on; without --data, it is the held-out text "
        "of each skill that train.py has left in the run folder of the checkpoint."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=path)
    parser.add_argument(
        "--data",
        metavar="NAME_OR_PATH",
        type=path,
        action="append",
        default=[],
        help="file, folder or data set of the Hub, as for train.py; repeatable",
    )
    parser.add_argument(
        "--block-size", metavar="N", type=number(int, 8), help="tokens of a block (512, or what the base model takes)"
    )
    parser.add_argument("--eval-blocks", metavar="N", type=number(int, 1), help="at most so many of each --data (all)")
    parser.add_argument(
        "--batch-size", metavar="N", type=number(int, 1), default=BATCH_SIZE, help=f"blocks of a batch ({BATCH_SIZE})"
    )
    add_model_flags(parser)
    add_json_flag(parser)


def run(args: Namespace) -> int:
    from ..evaluation import evaluate, rows_of  # torch takes seconds to import
    from ..mixtures import load

    loaded = load(args)
    data = rows_of(loaded, args)
    found = []
    for one in evaluate(loaded, data, args.batch_size):
        found.append(one)
        say(shown(f"measured {one.name}, {len(found)} of {len(data)}", most=None), sys.stderr)
    for line in _lines(found, loaded.model.num_experts):
        say(shown(line, most=None), people(args))
    write_json(args, {"checkpoint": args.checkpoint, "data": [_as_json(one) for one in found]})
    return PASSED


def _lines(found: list[Evaluated], experts: int) -> list[str]:
    columns = range(min(experts, MOST_EXPERTS))
    titles = ["data set", "tokens", "base", "routed", "own expert", "best alone", *map(expert_name, columns)]
    rows = []
    for one in found:
        loss, alone = one.measured.loss, one.measured.alone
        losses = [f"{value:.4f}" if value is not None else "-" for value in (loss.base, loss.routed, loss.own)]
        best = f"{loss.best:.4f} ({loss.best_expert})"
        rows.append([one.name, f"{one.tokens:,}", *losses, best, *(f"{alone[expert]:.4f}" for expert in columns)])
    lines = table(titles, rows)
    if experts > len(columns):
        lines.append(f"... and {experts - len(columns)} more experts, which --json has")
    shares = [[one.name, *(percent(one.measured.usage[expert]) for expert in columns)] for one in found]
    return [*lines, "", *table(["goes to", *map(expert_name, columns)], shares)]


def _as_json(one: Evaluated) -> dict[str, Any]:
    loss = one.measured.loss
    return {
        "name": one.name,
        "tokens": one.tokens,
        "base": loss.base,
        "routed": loss.routed,
        "own": loss.own,
        "own_expert": one.own,
        "best": loss.best,
        "best_expert": loss.best_expert,
        "experts": [one.measured.alone[expert] for expert in sorted(one.measured.alone)],
        "usage": one.measured.usage,
    }
