"""From rows to documents: which text is learned, and as which tokens.

| columns | what is learned |
|---|---|
| `messages` ({role, content}) or `conversations` ({from, value}) | every assistant turn, with its end token |
| `prompt` + `completion` | the completion |
| `instruction`, `prompt`, `question` + `output`, `response`, `completion`, `answer` | the answer and its end token |
| `text` or `content` | everything |

With `input` or `context` beside it an instruction or question is followed by an empty line and that text; `system`
or `system_prompt` becomes the system message. Where the tokenizer has a chat template, all but plain text is rendered
by it. Where it has none, `prompt` + `completion` are joined as they stand, and a chat is rendered as

    ### System:\\n...\\n\\n### User:\\n...\\n\\n### Assistant:\\nthe answer<EOS>\\n\\n### User:\\n...

Every document ends with one EOS, which is learned. A document begins with a BOS where the tokenizer adds one to plain
text; what a chat template renders is taken as it is, since that is what the model is given when it is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
from datasets import Dataset

from .errors import UsageError, listed

PROMPT_COLUMNS = ("instruction", "prompt", "question")
ANSWER_COLUMNS = ("output", "response", "completion", "answer")
INPUT_COLUMNS = ("input", "context")
SYSTEM_COLUMNS = ("system", "system_prompt")
CHAT_COLUMNS = ("messages", "conversations")
TEXT_COLUMNS = ("text", "content")
READ_COLUMNS = (*PROMPT_COLUMNS, *ANSWER_COLUMNS, *INPUT_COLUMNS, *SYSTEM_COLUMNS, *CHAT_COLUMNS, *TEXT_COLUMNS)
KNOWN_SCHEMAS = [
    "messages: a list of {role, content}",
    "conversations: a list of {from, value}",
    f"one of {', '.join(PROMPT_COLUMNS)} with one of {', '.join(ANSWER_COLUMNS)}",
    "text or content: plain text",
]
ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"},
}
BATCH_ROWS = 1000
# What templates that write the date are given, or the tokens would change overnight.
TEMPLATE_DATE = datetime(2024, 7, 26)
DATE_CODES = ("%Y", "%y", "%m", "%B", "%b", "%d", "%A", "%a", "%j", "%H", "%I", "%M", "%S", "%p")

Message = dict[str, str]


@dataclass(frozen=True)
class Document:
    """One document: `ids` (T,) int32, and `learned` (T,) bool, true where the token is to be predicted."""

    ids: np.ndarray
    learned: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def key(self) -> bytes:
        """The same for the same tokens, in any data set and on any machine."""
        return hashlib.sha256(self.ids.astype("<i4").tobytes() + self.learned.tobytes()).digest()

    @property
    def text_key(self) -> bytes:
        """The same for the same tokens, whichever of them are learned."""
        return hashlib.sha256(self.ids.astype("<i4").tobytes()).digest()


@dataclass(frozen=True)
class Documents:
    """The documents of a data set.

    Skipped are rows without text or without an answer. Unlabelled are answers within a chat which the chat template
    writes otherwise once the chat goes on, so that they are no example of what to write.
    """

    items: list[Document]
    schema: str
    unused_columns: list[str]
    skipped_rows: int
    unlabelled_turns: int


@dataclass(frozen=True)
class _Part:
    """Text, and the (start, end) characters of it that are learned; None for all of it. Parts are joined by EOS."""

    text: str
    spans: list[tuple[int, int]] | None


@dataclass(frozen=True)
class _Rendered:
    parts: list[_Part]
    from_template: bool = False
    unlabelled_turns: int = 0


def read_documents(rows: Dataset, tokenizer: Any, where: str) -> Documents:
    """Tokenizes every row.

    Raises:
        UsageError: for unknown columns, rows of several schemas, a row that is not what its columns promise, a chat
            that the template refuses, a tokenizer that cannot do it, and where nothing is left.
    """
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"{where}: the tokenizer has no end-of-sequence token to end the documents with; set its eos_token"
        )
    schema, columns = detect_schema(rows.column_names, where)
    _check_one_schema(rows, columns, where)
    unused = [name for name in rows.column_names if name not in columns]
    rows = rows.select_columns(columns)
    items: list[Document] = []
    skipped = unlabelled = 0
    for start in range(0, len(rows), BATCH_ROWS):
        batch = _batch(rows, start, where)
        rendered = []
        for offset in range(len(batch[columns[0]])):
            row = {name: batch[name][offset] for name in columns}
            rendered.append(_render(row, schema, tokenizer, f"{where}, row {start + offset + 1}"))
        kept = [one for one in rendered if one is not None]
        skipped += len(rendered) - len(kept)
        unlabelled += sum(one.unlabelled_turns for one in kept)
        items += _tokenize(kept, tokenizer, where)
    if not items:
        raise UsageError(
            f"{where}: all {len(rows)} row(s) are without text or without an answer to learn (columns "
            f"{', '.join(columns)}); "
            "give documents that have some"
        )
    return Documents(items, schema, unused, skipped, unlabelled)


def _batch(rows: Dataset, start: int, where: str) -> dict[str, list]:
    try:
        return rows[start : start + BATCH_ROWS]
    except UnicodeDecodeError:
        raise UsageError(f"{where}: is not UTF-8 text; convert it to UTF-8") from None


def detect_schema(columns: list[str], where: str) -> tuple[str, list[str]]:
    """The schema's name and the columns that it reads."""

    def first(names: tuple[str, ...]) -> str | None:
        return next((name for name in names if name in columns), None)

    if chat := first(CHAT_COLUMNS):
        return "chat", [chat]
    prompt, answer = first(PROMPT_COLUMNS), first(ANSWER_COLUMNS)
    if prompt and answer:
        more = [first(SYSTEM_COLUMNS), first(INPUT_COLUMNS) if prompt != "prompt" else None]
        return f"{prompt} + {answer}", [prompt, answer, *(name for name in more if name)]
    if text := first(TEXT_COLUMNS):
        return "text", [text]
    raise UsageError(
        f"{where}: the columns are none that can be trained on; found {', '.join(sorted(columns)) or 'none'}; "
        f"rename them to one of:\n{listed(KNOWN_SCHEMAS)}"
    )


def _check_one_schema(rows: Dataset, columns: list[str], where: str) -> None:
    """`datasets` reads rows of several schemas as rows of all their columns, with None where a row has none."""
    others = [name for name in (*CHAT_COLUMNS, *ANSWER_COLUMNS, *TEXT_COLUMNS) if name in rows.column_names]
    others = [name for name in others if name not in columns]
    rows = rows.select_columns([*columns, *others])
    for start in range(0, len(rows), BATCH_ROWS) if others else ():
        batch = _batch(rows, start, where)
        for offset, values in enumerate(zip(*(batch[name] for name in columns), strict=True)):
            filled = [name for name in others if (value := batch[name][offset]) and value == value]  # NaN is nothing
            if filled and not any(values):
                raise UsageError(
                    f"{where}, row {start + offset + 1}: has nothing in {', '.join(columns)}, by which the rows are "
                    f"read, but something in {', '.join(filled)}; expected rows of one kind: give each kind a file of "
                    "its own, or leave one of the columns out"
                )


# --- rows to text ----------------------------------------------------------------------------------------------------


def _render(row: dict[str, Any], schema: str, tokenizer: Any, where: str) -> _Rendered | None:
    """None where there is nothing to learn."""
    if schema == "text":
        text = _string(next(iter(row.values())), where, next(iter(row)))
        return _Rendered([_Part(text, None)]) if text.strip() else None
    if schema == "chat":
        messages = _messages(next(iter(row.values())), where)
    else:
        joined = schema == "prompt + completion" and not tokenizer.chat_template
        if joined and not isinstance(row["completion"], list):
            return _render_joined(row, where)
        messages = _pair_messages(row, where)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # what no answer follows teaches nothing
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        return None
    return _render_by_template(messages, tokenizer, where) if tokenizer.chat_template else _render_plainly(messages)


def _string(value: Any, where: str, column: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    # A float is not what was written: 13 among fractions is read as 13.0.
    raise UsageError(f"{where}: the column {column} must hold text, found {type(value).__name__}; convert it to text")


def _messages(value: Any, where: str) -> list[Message]:
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
    return {"role": ROLES[role], "content": _string(content, where, "content")}


def _pair_messages(row: dict[str, Any], where: str) -> list[Message]:
    """A prompt and its answer as a chat. Either may itself be a list of messages."""
    prompt, answer, *more = row
    system = [name for name in more if name in SYSTEM_COLUMNS]
    extra = [name for name in more if name in INPUT_COLUMNS]
    messages = []
    if system and (text := _string(row[system[0]], where, system[0])).strip():
        messages.append({"role": "system", "content": text})
    if isinstance(row[prompt], list):
        messages += _messages(row[prompt], where)
    else:
        text = _string(row[prompt], where, prompt)
        if extra and (more_text := _string(row[extra[0]], where, extra[0])).strip():
            text += f"\n\n{more_text}"
        messages.append({"role": "user", "content": text})
    if isinstance(row[answer], list):
        return messages + _messages(row[answer], where)
    return [*messages, {"role": "assistant", "content": _string(row[answer], where, answer)}]


def _render_joined(row: dict[str, Any], where: str) -> _Rendered | None:
    prompt, answer = (_string(row[name], where, name) for name in ("prompt", "completion"))
    text = prompt + answer
    return _Rendered([_Part(text, [(len(prompt), len(text))])]) if answer.strip() else None


def _render_plainly(messages: list[Message]) -> _Rendered:
    parts, text = [], ""
    for message in messages:
        text += f"### {message['role'].capitalize()}:\n"
        start = len(text)
        text += message["content"]
        if message["role"] == "assistant":
            parts.append(_Part(text, [(start, len(text))]))
            text = ""
        text += "\n\n"
    return _Rendered(parts)


# --- chat templates --------------------------------------------------------------------------------------------------


def _render_by_template(messages: list[Message], tokenizer: Any, where: str) -> _Rendered:
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
    return _Rendered([_Part(full, found)], from_template=True, unlabelled_turns=len(spans) - len(found))


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


# --- text to tokens --------------------------------------------------------------------------------------------------


def _tokenize(rendered: list[_Rendered], tokenizer: Any, where: str) -> list[Document]:
    parts = [part for one in rendered for part in one.parts]
    tokens = iter(_tokenize_parts(parts, tokenizer, where))
    starts = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
    return [
        _document([next(tokens) for _ in one.parts], [] if one.from_template else starts, tokenizer.eos_token_id)
        for one in rendered
    ]


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _tokenize_parts(parts: list[_Part], tokenizer: Any, where: str) -> list[Document]:
    if not parts:
        return []
    need_spans = any(part.spans is not None for part in parts)
    if need_spans and not tokenizer.is_fast:
        raise UsageError(
            f"{where}: learning answers only needs a fast tokenizer (one with tokenizer.json), got "
            f"{type(tokenizer).__name__}; "
            "convert the tokenizer, or give data with a text column"
        )
    encoded = tokenizer(
        [part.text for part in parts],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=need_spans,
        verbose=False,  # "sequence is longer than the model's maximum": it will be cut into blocks
    )
    documents = []
    for number, part in enumerate(parts):
        ids = np.asarray(encoded["input_ids"][number], dtype=np.int32)
        if part.spans is None:
            learned = np.ones(len(ids), dtype=bool)
        else:
            offsets = np.asarray(encoded["offset_mapping"][number]).reshape(-1, 2)  # (T, 2) characters from, to
            learned = np.zeros(len(ids), dtype=bool)
            for start, end in part.spans:
                learned |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        documents.append(Document(ids, learned))
    return documents


def _document(parts: list[Document], starts: list[int], eos: int) -> Document:
    ids, learned = [], []
    if starts and parts[0].ids[:1].tolist() != starts:
        ids.append(np.asarray(starts, dtype=np.int32))
        learned.append(np.zeros(1, dtype=bool))
    for part in parts:
        ids.append(part.ids)
        learned.append(part.learned)
        if part.ids[-1:].tolist() != [eos]:
            ids.append(np.asarray([eos], dtype=np.int32))
            learned.append(np.ones(1, dtype=bool))
    all_learned = np.concatenate(learned)
    all_learned[0] = False  # nothing stands before the first token that could predict it
    return Document(np.concatenate(ids), all_learned)
