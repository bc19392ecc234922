"""Chats to text by the chat template of a tokenizer, and which characters of it are learned.

A template decides which fields of a message it writes, and it may leave out whole messages. What it leaves out is
found by rendering the chat without it: if the text is the same, the template does not read it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from functools import lru_cache
from typing import Any

from ..errors import UsageError
from .chat import Message, Part, Rendered, render_plainly

DATE_CODES = ("%Y", "%y", "%m", "%B", "%b", "%d", "%A", "%a", "%j", "%H", "%I", "%M", "%S", "%p")
TEMPLATE_DATE = datetime(2024, 7, 26)  # for templates that write the date: otherwise tokens would change every day
# Roles whose messages a template may leave out. Without users and answers there is no chat.
SIDE_ROLES = ("system", "developer", "tool")

Tools = list[dict[str, Any]] | None
Render = Callable[..., str]  # (messages, tools, generation=False) -> text


class ChatRenderer:
    """Renders the chats of a data set, by the tokenizer's chat template if it has one."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._read: set[str] = set()
        self._unread: set[str] = set()

    @property
    def has_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @property
    def unread(self) -> list[str]:
        """What the chats have and nothing reads: fields of messages, `tools`, and "messages of the role ROLE"."""
        return sorted(self._unread - self._read)

    def render(self, messages: list[Message], tools: Tools, where: str) -> Rendered:
        """Render a chat whose last message is learned.

        Raises:
            UsageError: if the template refuses the chat, if no answer can be found in what it renders, or if an answer
                has nothing but fields that are not rendered.
        """
        if self.has_template:
            return self._by_template(messages, tools, where)
        messages = _with_system_role(messages)
        unread = {name for message in messages for name in message.extras}
        self._unread |= unread
        _check_answers(messages, unread, where)
        return render_plainly(messages)

    def _by_template(self, messages: list[Message], tools: Tools, where: str) -> Rendered:
        """Render a chat by the template, and find its answers.

        An answer lies between the rendering of the messages before it and the rendering that includes it. Both must be
        prefixes of the whole chat; otherwise the answer is not learned.
        """
        template = _undated(self._tokenizer.get_chat_template(tools=tools))
        if "developer" not in template:
            messages = _with_system_role(messages)

        def render(some: list[Message], some_tools: Tools, generation: bool = False) -> str:
            return self._tokenizer.apply_chat_template(
                [message.fields for message in some],
                tools=some_tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=generation,
            )

        for form, text in _accepted(messages, tools, render, where):
            full, eos = text.rstrip(), str(self._tokenizer.eos_token)
            answers = [i for i, message in enumerate(form) if message.learned]
            spans = [_answer_span(render, form, tools, i, full, eos) for i in answers]
            found = [span for span in spans if span is not None]
            if found:
                break
        self._note_unread(form, tools, render, text, where)
        if not found:
            raise UsageError(
                f"{where}: the answer cannot be found in what the tokenizer's chat template renders, so that it is not "
                "known what to learn; expected a template that writes a chat from left to right. Give data with a text "
                "column, or another template"
            )
        return Rendered([Part(full, found)], from_template=True, unlabelled_turns=len(spans) - len(found))

    def _note_unread(self, messages: list[Message], tools: Tools, render: Render, text: str, where: str) -> None:
        """Find what the template does not read of a chat. What it reads of one chat counts as read."""
        fields = {name for message in messages for name in message.extras}
        without = {name: ([message.without(name) for message in messages], tools) for name in sorted(fields)}
        for role in SIDE_ROLES:
            if any(message.role == role for message in messages):
                without[f"messages of the role {role}"] = [m for m in messages if m.role != role], tools
        if tools:
            without["tools"] = messages, None
        unread: set[str] = set()
        for name, chat in without.items():
            if name not in self._read:
                (unread if _rendered_as(chat, render, text) else self._read).add(name)
        self._unread |= unread
        _check_answers(messages, unread, where)


def _with_system_role(messages: list[Message]) -> list[Message]:
    """Where the role `developer` is not known, it is what `system` was before."""
    return [message.but(role="system") if message.role == "developer" else message for message in messages]


def _rendered_as(chat: tuple[list[Message], Tools], render: Render, text: str) -> bool:
    """Return whether a chat is rendered as `text`. A template may raise anything if it misses something."""
    try:
        return render(*chat) == text
    except Exception:
        return False


def _check_answers(messages: list[Message], unread: set[str], where: str) -> None:
    """Refuse answers of which nothing is rendered: an empty answer would be learned."""
    for message in messages:
        if message.learned and message.answer_fields and message.answer_fields <= unread:
            raise UsageError(
                f"{where}: an answer has no content but {', '.join(sorted(message.answer_fields))}, which the chat "
                "template of the tokenizer does not write; use one that writes it, or write it into content"
            )


@lru_cache
def _undated(template: str) -> str:
    """Fix the date of a template by a macro, as transformers 5.23 lets no functions into templates any more."""
    if "strftime_now" not in template:
        return template
    stopped = "".join(f" | replace({code!r}, {TEMPLATE_DATE.strftime(code)!r})" for code in DATE_CODES)
    return f"{{%- macro strftime_now(format) -%}}{{{{ format{stopped} }}}}{{%- endmacro +%}}{template}"


def _accepted(messages: list[Message], tools: Tools, render: Render, where: str) -> Iterator[tuple[list[Message], str]]:
    """Yield the messages in each form that the template takes, and their rendering. Raises UsageError for none."""
    errors: list[Exception] = []
    accepted = False
    for form in _forms(messages):
        try:
            text = render(form, tools)
        except Exception as error:  # a template may raise anything
            errors.append(error)
            continue
        accepted = True
        yield form, text
    if not accepted:
        raise UsageError(
            f"{where}: the tokenizer's chat template refuses this chat (roles: "
            f"{', '.join(m.role for m in messages[:8])}): {errors[0]}; mend or remove the row"
        ) from errors[0]


def _forms(messages: list[Message]) -> Iterator[list[Message]]:
    """Yield a chat as it is, and for templates that do not take it, in other forms.

    A few, such as that of DeepSeek-V3.1, want the arguments of tool calls as JSON text. Those that know no system role,
    such as that of Gemma, get it at the beginning of the user's turn.
    """
    yield messages
    if any("tool_calls" in message.fields for message in messages):
        yield [_with_arguments_as_text(message) for message in messages]
    first, *rest = messages
    if first.role == "system" and rest[0].role == "user":
        merged = rest[0].but(content=f"{first.content}\n\n{rest[0].content}")
        yield from _forms([merged, *rest[1:]])


def _with_arguments_as_text(message: Message) -> Message:
    if "tool_calls" not in message.fields:
        return message
    calls = copy.deepcopy(message.fields["tool_calls"])
    for function in (call.get("function", call) for call in calls):
        if isinstance(function.get("arguments"), (dict, list)):
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return message.but(tool_calls=calls)


def _answer_span(
    render: Render, messages: list[Message], tools: Tools, i: int, full: str, eos: str
) -> tuple[int, int] | None:
    """Return where answer `i` is, from the end of the prompt to the end of its end token; None if it is not found."""
    content = messages[i].content.strip()
    try:
        through = render(messages[: i + 1], tools).rstrip()
        before = render(messages[:i], tools) if i else ""
        prompt = render(messages[:i], tools, generation=True) if i else ""
    except Exception:  # the template takes the whole chat, but not a part of it
        return None
    if not full.startswith(through):  # some templates end a chat with the EOS as well
        through = through.removesuffix(eos).rstrip()
    if not full.startswith(through):
        return None
    conclusion = content.rpartition("</think>")[2].strip()  # some templates write what is before it in their own way
    if prompt != before and through.startswith(prompt) and conclusion in through[len(prompt) :]:
        return len(prompt), len(through)
    # There is no generation prompt, or none that precedes the answer: the content itself must occur exactly once.
    if not through.startswith(before):
        return None
    if not content:  # a call of a tool
        return len(before), len(through)
    return (through.index(content, len(before)), len(through)) if through.count(content, len(before)) == 1 else None
