"""`dylora-moe generate`: answers a prompt, the prompts of standard input, or a chat in the terminal."""

from __future__ import annotations

import argparse
import sys
from argparse import Namespace
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

from ...constants import MAX_SEED
from ...data.chat import Message
from ...errors import UsageError
from ...system.command_line import PASSED, number, path, say
from ..colours import RoutedText
from ..flags import add_model_flags
from ..output import add_json_flag, people, write_json
from ..prompts import INPUT_HELP, Prompt, add_raw_flag, chat, clean, encode, of_words, read_prompts

if TYPE_CHECKING:
    from ..answers import Answer, Answers

NEW_TOKENS = 256
LEAST_ROOM = 64  # tokens for an answer, for which a chat forgets its first messages


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Without --prompt, a terminal begins a chat, in which Ctrl-C ends an answer and Ctrl-D the chat. Otherwise the "
        f"prompts are read from {INPUT_HELP}."
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=path)
    parser.add_argument("--prompt", metavar="TEXT", help="answer this prompt")
    add_raw_flag(parser)
    parser.add_argument(
        "--show-routing", action="store_true", help="colour each token by the expert that has the most weight there"
    )
    parser.add_argument("--expert", metavar="I", type=number(int, 0), help="send every token to this expert")
    parser.add_argument(
        "--max-new-tokens", metavar="N", type=number(int, 1), default=NEW_TOKENS, help=f"of an answer ({NEW_TOKENS})"
    )
    parser.add_argument(
        "--temperature", metavar="T", type=number(float, 0), help="0: always the likeliest token (default: the base's)"
    )
    parser.add_argument(
        "--top-p", metavar="P", type=number(float, most=1, above=0), help="sample from so much of the probability"
    )
    parser.add_argument(
        "--seed", metavar="N", type=number(int, 0, MAX_SEED), default=0, help="of sampling (default: 0)"
    )
    add_model_flags(parser)
    add_json_flag(parser)


def run(args: Namespace) -> int:
    if args.show_routing and args.expert is not None:
        raise UsageError(
            "--show-routing and --expert contradict each other: with --expert, every token has that expert"
        )
    if args.temperature == 0 and args.top_p is not None:
        raise UsageError("--temperature 0 and --top-p contradict each other: --top-p is of sampling")
    prompts = None  # a chat
    if args.prompt is not None:
        prompts = of_words([args.prompt], "--prompt")
    elif not sys.stdin.isatty():
        prompts = read_prompts(sys.stdin)

    # torch takes seconds to import: flags and prompts are looked at first.
    from ...base.preserve import seeded
    from ..answers import Answers
    from ..mixtures import load

    answers = Answers.of(load(args), args)
    screen = RoutedText(people(args))
    if args.show_routing:
        screen.legend(answers.loaded.skills)
    with seeded(args.seed):
        found = _chat(answers, screen) if prompts is None else _answers(answers, screen, prompts)
    write_json(args, {"checkpoint": args.checkpoint, "answers": found})
    return PASSED


def _answers(answers: Answers, screen: RoutedText, prompts: list[Prompt]) -> list[dict[str, Any]]:
    from ..answers import Stop

    encoded = [answers.encode(prompt) for prompt in prompts]  # what is wrong is told before the first answer
    found = []
    for prompt, ids in zip(prompts, encoded, strict=True):
        try:
            found.append(_as_json(answers, prompt, answers.answer(ids, screen.write, Stop())))
        finally:
            screen.end()
    return found


# ---- a chat ----


def _chat(answers: Answers, screen: RoutedText) -> list[dict[str, Any]]:
    """Answer line after line until Ctrl-D or Ctrl-C. Returns what --json has of each answer."""
    with suppress(ImportError):  # there is none on Windows
        import readline  # noqa: F401  # with it, lines can be edited, and brought back

    say("Ctrl-C ends an answer, Ctrl-D the chat", sys.stderr)
    messages, found = list[Message](), list[dict[str, Any]]()
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            line = _typed(people(answers.args))
            if not line.strip():
                continue
            try:
                messages = _turn(answers, screen, [*messages, _of_user(line)], found)
            except UsageError as error:
                say(error, sys.stderr)
    screen.end()
    return found


def _typed(screen: TextIO) -> str:
    """Return the next line of the user. `input` writes its prompt to standard output, also where that is for JSON."""
    if screen is sys.stdout:
        return input("> ")
    screen.write("> ")
    screen.flush()
    return input()


def _of_user(line: str) -> Message:
    return Message({"role": "user", "content": clean(line)})


def _turn(answers: Answers, screen: RoutedText, messages: list[Message], found: list[dict[str, Any]]) -> list[Message]:
    """Answer the last message, add the answer to `found`, and return the chat with it."""
    from ..answers import Stop

    if answers.args.raw:
        messages, prompt = messages[-1:], Prompt(messages[-1].content)
    else:
        messages = _fitting(answers, messages)
        prompt = chat(messages)
    ids, stop = answers.encode(prompt), Stop()
    with stop.by_interrupt():
        answer = answers.answer(ids, screen.write, stop)
    screen.end()
    found.append(_as_json(answers, prompt, answer))
    return [*messages, Message({"role": "assistant", "content": answer.text})]


def _fitting(answers: Answers, messages: list[Message]) -> list[Message]:
    """Return a chat without its first messages, if they leave too little room for an answer."""
    left, wanted = messages, min(LEAST_ROOM, answers.args.max_new_tokens)
    while len(left) > 1 and answers.room(encode(chat(left), answers.loaded.tokenizer, False)) < wanted:
        left = left[2:]
    if len(left) < len(messages):
        out = len(messages) - len(left)
        say(f"the chat is too long for the base model: its first {out} messages are left out", sys.stderr)
    return left


def _as_json(answers: Answers, prompt: Prompt, answer: Answer) -> dict[str, Any]:
    value: dict[str, Any] = {
        "prompt": prompt.text,
        "prompt_tokens": answer.prompt_tokens,
        "text": answer.text,
        "tokens": len(answer.ids),
        "ended": answer.ended,
    }
    if answer.weights is None:
        return value | {"expert": answers.args.expert, "usage": None, "routing": None}
    tokens = [answers.loaded.tokenizer.decode([i]) for i in answer.ids]
    routing = [
        {"token": token, "expert": int(weights.argmax()), "weight": round(float(weights.max()), 6)}
        for token, weights in zip(tokens, answer.weights, strict=True)
    ]
    usage = answer.weights.mean(0).tolist() if routing else []
    return value | {"expert": None, "usage": [round(share, 6) for share in usage], "routing": routing}
