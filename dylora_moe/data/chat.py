"""Chats to text, with or without a chat template of the tokenizer, and which characters of it are learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ..errors import UsageError
from .schemas import INPUT_COLUMNS, SYSTEM_COLUMNS

ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"},
}
DATE_CODES = ("%Y", "%y", "%m", "%B", "%b", "%d", "%A", "%a", "%j", "%H", "%I", "%M", "%S", "%p")

TEMPLATE_DATE = datetime(2024, 7, 26)  # for templates that write the date: otherwise tokens would change every day

Message = dict[str, str]  # "role" and "content"


@dataclass(frozen=True)
class Part:
    """A text, and the (start, end) of the characters that are learned; None for all. An EOS ends each part."""

    text: str
    spans: list[tuple[int, int]] | None


@dataclass(frozen=True)
class Rendered:
    """A row as text."""

    parts: list[Part]
    from_template: bool = False
    unlabelled_turns: int = 0


def as_text(value: Any, where: str, column: str) -> str:
    """Return the value of a column as text, "" for None. Raises UsageError for anything but text and integers."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    # A float is not what was written: in a column with fractions, 13 is read as 13.0.
    raise UsageError(f"{where}: the column {column} must hold text, found {type(value).__name__}; convert it to text")


def read_messages(value: Any, where: str) -> list[Message]:
    """Return the messages of a chat with the roles system, user, assistant and tool. Raises UsageError."""
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
    """Return a chat of a prompt and its answer, the first two columns. Each may itself be a list of messages."""
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
    """Join `prompt` and `completion` as they are, of which the latter is learned; None if it is empty."""
    prompt, answer = (as_text(row[name], where, name) for name in ("prompt", "completion"))
    text = prompt + answer
    return Rendered([Part(text, [(len(prompt), len(text))])]) if answer.strip() else None


def render_plainly(messages: list[Message]) -> Rendered:
    """Render a chat without a template, one part per answer."""
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


def render_by_template(messages: list[Message], tokenizer: Any, where: str) -> Rendered:
    """Render a chat by the tokenizer's template and find the characters that are answers.

    An answer lies between the rendering of the messages before it and the rendering that includes it. Both must be
    prefixes of the whole chat; otherwise the answer is not learned.

    Raises:
        UsageError: if the template refuses the chat, or no answer can be found.
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
            "known what to learn; expected a template that writes a chat from left to right. Give data with a text "
            "column, or another template"
        )
    return Rendered([Part(full, found)], from_template=True, unlabelled_turns=len(spans) - len(found))


def _undated(template: str) -> str:
    """Fix the date of a template by a macro, as transformers 5.23 lets no functions into templates any more."""
    if "strftime_now" not in template:
        return template
    stopped = "".join(f" | replace({code!r}, {TEMPLATE_DATE.strftime(code)!r})" for code in DATE_CODES)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{stopped} }}}}{{%- endmacro +%}}{template}"


def _accepted(messages: list[Message], render: Callable[..., str], where: str) -> tuple[list[Message], str]:
    """Return the messages and their rendering; without a system role in the template, merged into the user's turn."""
    try:
        return messages, render(messages).rstrip()
    except Exception as error:  # a template may raise anything
        first, *rest = messages
        if first["role"] == "system" and rest[0]["role"] == "user":
            merged = [{"role": "user", "content": f"{first['content']}\n\n{rest[0]['content']}"}, *rest[1:]]
            return _accepted(merged, render, where)
        raise UsageError(
            f"{where}: the tokenizer's chat template refuses this chat (roles: "
            f"{', '.join(m['role'] for m in messages[:8])}): {error}; mend or remove the row"
        ) from error


def _answer_span(render: Callable[..., str], messages: list[Message], i: int, full: str) -> tuple[int, int] | None:
    """Return where answer `i` is, from the end of the prompt to the end of its end token; None if it is not found."""
    content = messages[i]["content"].strip()
    through = render(messages[: i + 1]).rstrip()
    if not full.startswith(through):
        return None
    before = render(messages[:i]) if i else ""
    prompt = render(messages[:i], generation=True) if i else ""
    if len(prompt) > len(before) and through.startswith(prompt) and content in through[len(prompt) :]:
        return len(prompt), len(through)
    # There is no generation prompt, or none that precedes the answer: the content itself must occur exactly once.
    if not content or not through.startswith(before) or through.count(content, len(before)) != 1:
        return None
    return through.index(content, len(before)), len(through)
