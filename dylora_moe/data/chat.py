"""Rows to chats, and chats to text where there is no chat template. What a template renders is in template.py."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from .schemas import INPUT_COLUMNS, SYSTEM_COLUMNS

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"},
    **{"function": "tool", "observation": "tool"},
}
# Fields beside the content that may be all of an answer.
ANSWER_FIELDS = {"tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"}


@dataclass(frozen=True)
class Message:
    """A message of a chat.

    Args:
        fields: what a chat template is given: `role` (a value of `ROLES`), `content` (a text), and all else that the
            row says of the message, such as `reasoning_content` or `tool_calls`.
        learned: whether it is an answer to learn.
    """

    fields: dict[str, Any]
    learned: bool = False

    @property
    def role(self) -> str:
        return self.fields["role"]

    @property
    def content(self) -> str:
        return self.fields["content"]

    @property
    def extras(self) -> set[str]:
        """The names of all fields but role and content."""
        return set(self.fields) - {"role", "content"}

    @property
    def answer_fields(self) -> set[str]:
        """The names of the fields that answer something; empty if nothing does."""
        return (self.extras & ANSWER_FIELDS) | ({"content"} if self.content.strip() else set())

    def but(self, **fields: Any) -> Message:
        """Return this message with other values of some fields."""
        return Message({**self.fields, **fields}, self.learned)

    def without(self, name: str) -> Message:
        """Return this message without a field."""
        return Message({key: value for key, value in self.fields.items() if key != name}, self.learned)


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
    """Return the messages of a chat, in either form: {role, content} or {from, value}. Raises UsageError."""
    if value is None:
        return []
    if not isinstance(value, list):
        raise UsageError(f"{where}: a chat must be a list of messages, found {type(value).__name__}")
    return [_message(one, f"{where}, message {number}") for number, one in enumerate(value, 1)]


def read_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Return the tools that a chat may call, given as a list or as JSON text; None for none. Raises UsageError."""
    tools = _without_none(_parsed(value))
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UsageError(f"{where}: tools must be a list of JSON schemas, found {type(tools).__name__}")
    return tools


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise UsageError(
            f"{where}: a message must be {{role, content}} or {{from, value}}, found {type(value).__name__}"
        )
    fields = _without_none(value)
    given = fields.pop("role", None) or fields.pop("from", None)
    role = ROLES.get(given.strip().lower()) if isinstance(given, str) else None
    if role is None:
        raise UsageError(f"{where}: the role must be one of {', '.join(sorted(ROLES))}, found {given!r}; rename it")
    content = fields.pop("content", None)
    content = fields.pop("value", None) if content is None else content
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            raise UsageError(f"{where}: content has a part that is not text; only text can be learned")
        content = "".join(part["text"] for part in content)
    learned = _is_learned(fields, role, where)
    if "tool_calls" in fields:
        fields["tool_calls"] = _tool_calls(fields["tool_calls"], where)
        if not fields["tool_calls"]:
            del fields["tool_calls"]
    message = Message({"role": role, "content": as_text(content, where, "content"), **fields}, learned)
    return message if message.answer_fields else Message(message.fields)  # an empty answer is not learned


def _without_none(value: Any) -> Any:
    """Leave out keys whose value is None, at any depth: `datasets` gives all rows the keys that one of them has."""
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value


def _is_learned(fields: dict[str, Any], role: str, where: str) -> bool:
    """Take out of a message what says whether it is learned: `weight` as OpenAI has it, `train` as Axolotl has it."""
    weight = fields.pop("weight", 1)
    if weight not in (0, 1):
        raise UsageError(f"{where}: the weight must be 0 (not learned) or 1, found {weight!r}; round it or remove it")
    learned = role == "assistant" and bool(weight)
    for name in ("train", "training"):
        value = fields.pop(name, role == "assistant")
        if value not in (False, True):
            raise UsageError(f"{where}: {name} must be true or false, found {value!r}")
        if value and role != "assistant":
            raise UsageError(f"{where}: has {name}: true, but only answers are learned, and its role is {role}")
        learned = learned and bool(value)
    return learned


def _parsed(value: Any) -> Any:
    """Return what a JSON text holds if it is an object or a list; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        return value
    return found if isinstance(found, (dict, list)) else value


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Return tool calls with arguments as objects, which chat templates expect: OpenAI writes them as JSON text."""
    calls = _parsed(value)
    calls = calls if isinstance(calls, list) else [calls]
    read = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise UsageError(
                f"{where}: tool_calls must be a list of {{function: {{name, arguments}}}}, found {value!r:.80}"
            )
        if "arguments" in function:
            function = {**function, "arguments": _parsed(function["arguments"])}
        read.append({**call, "function": function} if "function" in call else function)
    return read


def pair_messages(row: dict[str, Any], where: str) -> list[Message]:
    """Return a chat of a prompt and its answer, the first two columns. Each may itself be a list of messages."""
    prompt, answer, *more = row
    extra = [name for name in more if name in INPUT_COLUMNS]
    messages = []
    if isinstance(row[prompt], list):
        messages += [Message(message.fields) for message in read_messages(row[prompt], where)]  # not learned
    else:
        text = as_text(row[prompt], where, prompt)
        if extra and (more_text := as_text(row[extra[0]], where, extra[0])).strip():
            text += f"\n\n{more_text}"
        messages.append(Message({"role": "user", "content": text}))
    if isinstance(row[answer], list):
        messages += read_messages(row[answer], where)
    else:
        text = as_text(row[answer], where, answer)
        messages.append(Message({"role": "assistant", "content": text}, learned=True))
    return with_system(row, messages, where)


def with_system(row: dict[str, Any], messages: list[Message], where: str) -> list[Message]:
    """Return a chat that begins with the system message of its row, unless it has one itself."""
    name = next((name for name in SYSTEM_COLUMNS if name in row), None)
    text = "" if name is None else as_text(row[name], where, name)
    has_one = messages and messages[0].role in ("system", "developer")
    return messages if has_one or not text.strip() else [Message({"role": "system", "content": text}), *messages]


def render_joined(row: dict[str, Any], where: str) -> Rendered | None:
    """Join `prompt` and `completion` as they are, of which the latter is learned; None if it is empty."""
    prompt, answer = (as_text(row[name], where, name) for name in ("prompt", "completion"))
    text = prompt + answer
    return Rendered([Part(text, [(len(prompt), len(text))])]) if answer.strip() else None


def render_plainly(messages: list[Message]) -> Rendered:
    """Render a chat without a template, one part per answer."""
    parts, text = [], ""
    for message in messages:
        text += f"### {message.role.capitalize()}:\n"
        start = len(text)
        text += message.content
        if message.role == "assistant":
            parts.append(Part(text, [(start, len(text))] if message.learned else []))
            text = ""
        text += "\n\n"
    return Rendered(parts)
