"""Chats to text: which of it is learned, with the tokenizer's chat template or without one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ..errors import UsageError

PROMPT_COLUMNS = ("instruction", "prompt", "question")
ANSWER_COLUMNS = ("output", "response", "completion", "answer")
INPUT_COLUMNS = ("input", "context")
SYSTEM_COLUMNS = ("system", "system_prompt")
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"},
}
DATE_CODES = ("%Y", "%y", "%m", "%B", "%b", "%d", "%A", "%a", "%j", "%H", "%I", "%M", "%S", "%p")

Message = dict[str, str]
# What templates that write the date are given, or the tokens would change overnight.
TEMPLATE_DATE = datetime(2024, 7, 26)


@dataclass(frozen=True)
class Part:
    """Text, and the (start, end) characters of it that are learned; None for all of it. Parts are joined by EOS."""

    text: str
    spans: list[tuple[int, int]] | None


@dataclass(frozen=True)
class Rendered:
    parts: list[Part]
    from_template: bool = False
    unlabelled_turns: int = 0


def as_text(value: Any, where: str, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    # A float is not what was written: 13 among fractions is read as 13.0.
    raise UsageError(f"{where}: the column {column} must hold text, found {type(value).__name__}; convert it to text")


def read_messages(value: Any, where: str) -> list[Message]:
    if value is None:
        return []
    if not isinstance(value, list):
        raise UsageError(f"{where}: a chat must be a list of messages, found {type(value).__name__}")
    return [_message(one, f"{where}, message {number}") for number, one in enumerate(value, 1)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise UsageError(
            f"{where}: a message must be {{role, content}} or {{from, value}}, found {type(value).__name__}"
        )
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if role not in ROLES:
        raise UsageError(f"{where}: the role must be one of {', '.join(sorted(ROLES))}, found {role!r}; rename it")
    if value.get("tool_calls"):
        raise UsageError(f"{where}: has tool_calls, which cannot be learned; write the call as text in content")
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise UsageError(f"{where}: content has a part that is not text; only text can be learned")
        content = "".join(part["text"] for part in content)
    return {"role": ROLES[role], "content": as_text(content, where, "content")}


def pair_messages(row: dict[str, Any], where: str) -> list[Message]:
    """A prompt and its answer as a chat. Either may itself be a list of messages."""
    prompt, answer, *more = row
    system = [name for name in more if name in SYSTEM_COLUMNS]
    extra = [name for name in more if name in INPUT_COLUMNS]
    messages = []
    if system and (text := as_text(row[system[0]], where, system[0])).strip():
        messages.append({"role": "system", "content": text})
    if isinstance(row[prompt], list):
        messages += read_messages(row[prompt], where)
    else:
        text = as_text(row[prompt], where, prompt)
        if extra and (more_text := as_text(row[extra[0]], where, extra[0])).strip():
            text += f"\n\n{more_text}"
        messages.append({"role": "user", "content": text})
    if isinstance(row[answer], list):
        return messages + read_messages(row[answer], where)
    return [*messages, {"role": "assistant", "content": as_text(row[answer], where, answer)}]


def render_joined(row: dict[str, Any], where: str) -> Rendered | None:
    prompt, answer = (as_text(row[name], where, name) for name in ("prompt", "completion"))
    text = prompt + answer
    return Rendered([Part(text, [(len(prompt), len(text))])]) if answer.strip() else None


def render_plainly(messages: list[Message]) -> Rendered:
    parts, text = [], ""
    for message in messages:
        text += f"### {message['role'].capitalize()}:\n"
        start = len(text)
        text += message["content"]
        if message["role"] == "assistant":
            parts.append(Part(text, [(start, len(text))]))
            text = ""
        text += "\n\n"
    return Rendered(parts)


# --- chat templates --------------------------------------------------------------------------------------------------


def render_by_template(messages: list[Message], tokenizer: Any, where: str) -> Rendered:
    """The chat as the template writes it, and the characters of it that are answers.

    An answer is found by rendering the chat up to it and through it: both must be the beginning of the whole. Where
    that does not hold the answer is left unlabelled, and where it holds for none of them the template cannot be used.
    """

    template = _undated(tokenizer.get_chat_template())

    def render(some: list[Message], generation: bool = False) -> str:
        return tokenizer.apply_chat_template(
            some, chat_template=template, tokenize=False, add_generation_prompt=generation
        )

    messages, full = _accepted(messages, render, where)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [_answer_span(render, messages, i, full) for i in answers]
    found = [span for span in spans if span is not None]
    if not found:
        raise UsageError(
            f"{where}: the answer cannot be found in what the tokenizer's chat template renders, so that it is not "
            "known what to "
            "learn; expected a template that writes a chat from left to right. Give data with a text column, or "
            "another template"
        )
    return Rendered([Part(full, found)], from_template=True, unlabelled_turns=len(spans) - len(found))


def _undated(template: str) -> str:
    """The template with a clock that stands still, as a macro: functions are no longer let into templates (5.23)."""
    if "strftime_now" not in template:
        return template
    stopped = "".join(f" | replace({code!r}, {TEMPLATE_DATE.strftime(code)!r})" for code in DATE_CODES)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{stopped} }}}}{{%- endmacro +%}}{template}"


def _accepted(messages: list[Message], render: Callable[..., str], where: str) -> tuple[list[Message], str]:
    """The messages and their rendering. Where a template has no system role, that goes before the user's words."""
    try:
        return messages, render(messages).rstrip()
    except Exception as error:  # a template may raise what it likes
        first, *rest = messages
        if first["role"] == "system" and rest[0]["role"] == "user":
            merged = [{"role": "user", "content": f"{first['content']}\n\n{rest[0]['content']}"}, *rest[1:]]
            return _accepted(merged, render, where)
        raise UsageError(
            f"{where}: the tokenizer's chat template refuses this chat (roles: "
            f"{', '.join(m['role'] for m in messages[:8])}): {error}; mend or remove the row"
        ) from error


def _answer_span(render: Callable[..., str], messages: list[Message], i: int, full: str) -> tuple[int, int] | None:
    """From the prompt's end to the end of the turn's end token; white space after that is not the model's to write."""
    content = messages[i]["content"].strip()
    through = render(messages[: i + 1]).rstrip()
    if not full.startswith(through):
        return None
    before = render(messages[:i]) if i else ""
    prompt = render(messages[:i], generation=True) if i else ""
    if len(prompt) > len(before) and through.startswith(prompt) and content in through[len(prompt) :]:
        return len(prompt), len(through)
    # The template has no generation prompt, or one that it does not write itself: the words must stand there once.
    if not content or not through.startswith(before) or through.count(content, len(before)) != 1:
        return None
    return through.index(content, len(before)), len(through)
