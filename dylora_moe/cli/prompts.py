"""The prompts of `generate` and `route`: words of the command line, or standard input, and their tokens."""

from __future__ import annotations

import json
from argparse import ArgumentParser
from dataclasses import dataclass
from typing import Any, TextIO

from ..data.chat import Message, as_text, read_messages, render_plainly
from ..errors import UsageError

KEYS = ("text", "prompt", "messages")  # of a JSON line
INPUT_HELP = (
    "standard input: one text, or JSON lines with text (taken as it is), prompt (as --raw says) or messages (a chat)"
)
RAW_HELP = "take a prompt as it is, without the chat template of the tokenizer"


@dataclass(frozen=True)
class Prompt:
    """What a mixture is given.

    Args:
        text: the text; of a chat, its last message.
        kind: which of `KEYS` it came as.
        messages: of a chat.
    """

    text: str
    kind: str = "prompt"
    messages: tuple[Message, ...] = ()

    def in_template(self, tokenizer: Any, raw: bool) -> bool:
        """Whether it goes through the chat template."""
        return bool(tokenizer.chat_template) and (self.kind == "messages" or (self.kind == "prompt" and not raw))


def add_raw_flag(parser: ArgumentParser) -> None:
    parser.add_argument("--raw", action="store_true", help=RAW_HELP)


def chat(messages: list[Message]) -> Prompt:
    return Prompt(messages[-1].content, "messages", tuple(messages))


def of_words(words: list[str], what: str) -> list[Prompt]:
    """Return the prompts on a command line. Raises UsageError for an empty one."""
    return [_not_empty(Prompt(clean(word)), what) for word in words]


def read_prompts(stream: TextIO) -> list[Prompt]:
    """Return the prompts of standard input: one text, or JSON lines if its first line is an object with one of `KEYS`.

    Raises:
        UsageError: if there are none, or a line is not such an object.
    """
    where = "standard input"
    try:
        content = stream.read()
    except UnicodeDecodeError:
        raise UsageError(f"{where}: is not UTF-8 text; convert it to UTF-8") from None
    lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
    if not lines or not _is_prompt(_parsed(lines[0][1])):
        return [_not_empty(Prompt(clean(content.removesuffix("\n"))), where)]
    return [_of_json(_parsed(line), f"{where}, line {number}") for number, line in lines]


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_prompt(value: Any) -> bool:
    return isinstance(value, dict) and any(key in value for key in KEYS)


def _of_json(value: Any, where: str) -> Prompt:
    kind = next((key for key in KEYS if isinstance(value, dict) and key in value), None)
    if kind is None:
        raise UsageError(f"{where}: expected a JSON object with text, prompt or messages, as the first line is")
    if kind != "messages":
        return _not_empty(Prompt(clean(as_text(value[kind], where, kind)), kind), where)
    messages = read_messages(value[kind], where)
    if not messages:
        raise UsageError(f"{where}: expected messages, found none")
    return chat([message.but(content=clean(message.content)) for message in messages])


def _not_empty(prompt: Prompt, where: str) -> Prompt:
    if not prompt.text.strip():
        raise UsageError(f"{where}: expected a text, found nothing")
    return prompt


def clean(text: str) -> str:
    """Replace lone surrogates, as which Python reads bytes that are not UTF-8: no tokenizer takes them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def encode(prompt: Prompt, tokenizer: Any, raw: bool) -> list[int]:
    """Return the token ids of a prompt, as training has seen its like.

    A chat is rendered by the chat template, or as in data/documents.py where the tokenizer has none, up to where its
    next answer begins.

    Raises:
        UsageError: if the template refuses the chat, or there is no token.
    """
    if prompt.in_template(tokenizer, raw):
        ids = _by_template(prompt, tokenizer)
    elif prompt.kind == "messages":
        ids = _plainly(prompt, tokenizer)
    else:
        ids = tokenizer(prompt.text, verbose=False)["input_ids"]
    if not ids:
        raise UsageError("the tokenizer makes no token of the prompt; give another text")
    return list(ids)


def _by_template(prompt: Prompt, tokenizer: Any) -> list[int]:
    messages = [message.fields for message in prompt.messages] or [{"role": "user", "content": prompt.text}]
    answered = messages[-1]["role"] == "assistant"
    try:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=not answered, return_dict=True)
    except Exception as error:  # a template may raise anything
        roles = ", ".join(message["role"] for message in messages[:8])
        raise UsageError(f"the tokenizer's chat template refuses this chat (roles: {roles}): {error}") from error
    return found["input_ids"]


def _plainly(prompt: Prompt, tokenizer: Any) -> list[int]:
    empty = [] if prompt.messages[-1].role == "assistant" else [Message({"role": "assistant", "content": ""})]
    parts = [part.text for part in render_plainly([*prompt.messages, *empty]).parts]
    ids = list(tokenizer(parts[0], verbose=False)["input_ids"])  # with a BOS if the tokenizer adds one
    for part in parts[1:]:
        ids += [tokenizer.eos_token_id, *tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]]
    return ids
