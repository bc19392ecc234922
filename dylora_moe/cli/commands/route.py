"""`dylora-moe route`: which expert a text goes to, how sure that is, and the tokens that decide it."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from ...errors import UsageError, counted, shown
from ...system.command_line import PASSED, number, path, say
from ..colours import named
from ..flags import add_base_flag
from ..output import add_json_flag, people, write_json
from ..prompts import INPUT_HELP, Prompt, add_raw_flag, encode, of_words, read_prompts
from ..wording import percent

if TYPE_CHECKING:
    from ..mixtures import Loaded

MOST_TEXT = 60  # characters of a text that are shown
REASONS = 5  # tokens that are shown
LEAST_REASON = 0.005  # nats; less is not shown


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Says which expert an answer to each text begins with, as `dylora-moe generate` sends it. Of the base model, "
        f"only the input embeddings are read. Without a TEXT, texts are read from {INPUT_HELP}."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=path)
    parser.add_argument("texts", metavar="TEXT", nargs="*")
    add_raw_flag(parser)
    parser.add_argument(
        "--reasons", metavar="N", type=number(int, 0), default=REASONS, help=f"show so many tokens ({REASONS})"
    )
    add_base_flag(parser)
    add_json_flag(parser)


def run(args: Namespace) -> int:
    if args.texts:
        prompts = of_words(args.texts, "TEXT")
    elif sys.stdin.isatty():
        raise UsageError("expected a TEXT, or texts on standard input, got neither; see dylora-moe route --help")
    else:
        prompts = read_prompts(sys.stdin)

    from ..mixtures import load_router  # torch takes seconds to import

    loaded = load_router(args)
    found = []
    for prompt in prompts:
        route = _route(loaded, encode(prompt, loaded.tokenizer, args.raw))
        for line in _lines(loaded, prompt, route, args.reasons):
            say(shown(line, most=None), people(args))
        found.append({"text": prompt.text} | route)
    write_json(args, {"checkpoint": args.checkpoint, "texts": found})
    return PASSED


def _route(loaded: Loaded, ids: list[int]) -> dict[str, Any]:
    """Return the route after the last token, and what each token adds to the difference of the two best experts.

    The differences are of logits, in nats: they and that of the prior sum up to log(weight / runner-up's weight).
    """
    from ...stages.measure import routing_reasons

    loaded.check_vocabulary(ids)
    weights = loaded.weights(ids)  # (T, N)
    last = weights[-1].tolist()
    best, *others = sorted(range(len(last)), key=lambda expert: (-last[expert], expert))
    runner_up = others[0] if others and last[others[0]] > 0 else None
    route: dict[str, Any] = {
        "tokens": len(ids),
        "expert": best,
        "skills": loaded.skills[best],
        "runner_up": runner_up,
        "weights": last,
        "mean_weights": weights.mean(0).tolist(),
        "reasons": [],
        "prior": None,
    }
    if runner_up is None:
        return route
    added = routing_reasons(loaded.model, {"input_ids": ids})  # (T, N)
    differences = (added[:, best] - added[:, runner_up]).tolist()
    prior = loaded.model.router.prior.tolist()
    tokens = [str(loaded.tokenizer.decode([i])) for i in ids]
    order = sorted(range(len(ids)), key=lambda place: (-abs(differences[place]), place))
    reasons = [{"token": tokens[i], "position": i, "difference": differences[i]} for i in order]
    return route | {"reasons": reasons, "prior": prior[best] - prior[runner_up]}


def _lines(loaded: Loaded, prompt: Prompt, route: dict[str, Any], most: int) -> list[str]:
    best, second, weights = route["expert"], route["runner_up"], route["weights"]
    line = f"{named(best, loaded.skills)} {percent(weights[best])}"
    if second is not None:
        line += f", then {named(second, loaded.skills)} {percent(weights[second])}"
    lines = [f"{line}  <- {shown(prompt.text.strip(), MOST_TEXT)} ({counted(route['tokens'], 'token')})"]
    telling = [reason for reason in route["reasons"][:most] if abs(reason["difference"]) >= LEAST_REASON]
    for title, sign in (("for it", 1), ("against it", -1)):
        some = [
            f"{reason['token']!r} {reason['difference']:+.2f}" for reason in telling if reason["difference"] * sign > 0
        ]
        lines += [f"    {title}: {', '.join(some)}"] if some else []
    return lines
