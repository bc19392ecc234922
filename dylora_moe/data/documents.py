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

    ### System:\n...\n\n### User:\n...\n\n### Assistant:\nthe answer<EOS>\n\n### User:\n...

Every document ends with one EOS, which is learned. A document begins with a BOS where the tokenizer adds one to plain
text; what a chat template renders is taken as it is, since that is what the model is given when it is used.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from ..errors import UsageError, listed
from .chat import (
    ANSWER_COLUMNS,
    INPUT_COLUMNS,
    PROMPT_COLUMNS,
    SYSTEM_COLUMNS,
    Part,
    Rendered,
    as_text,
    pair_messages,
    read_messages,
    render_by_template,
    render_joined,
    render_plainly,
)

CHAT_COLUMNS = ("messages", "conversations")
TEXT_COLUMNS = ("text", "content")
READ_COLUMNS = (*PROMPT_COLUMNS, *ANSWER_COLUMNS, *INPUT_COLUMNS, *SYSTEM_COLUMNS, *CHAT_COLUMNS, *TEXT_COLUMNS)
KNOWN_SCHEMAS = [
    "messages: a list of {role, content}",
    "conversations: a list of {from, value}",
    f"one of {', '.join(PROMPT_COLUMNS)} with one of {', '.join(ANSWER_COLUMNS)}",
    "text or content: plain text",
]
BATCH_ROWS = 1000


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


def _render(row: dict[str, Any], schema: str, tokenizer: Any, where: str) -> Rendered | None:
    """None where there is nothing to learn."""
    if schema == "text":
        text = as_text(next(iter(row.values())), where, next(iter(row)))
        return Rendered([Part(text, None)]) if text.strip() else None
    if schema == "chat":
        messages = read_messages(next(iter(row.values())), where)
    else:
        joined = schema == "prompt + completion" and not tokenizer.chat_template
        if joined and not isinstance(row["completion"], list):
            return render_joined(row, where)
        messages = pair_messages(row, where)
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # what no answer follows teaches nothing
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        return None
    return render_by_template(messages, tokenizer, where) if tokenizer.chat_template else render_plainly(messages)


# --- text to tokens --------------------------------------------------------------------------------------------------


def _tokenize(rendered: list[Rendered], tokenizer: Any, where: str) -> list[Document]:
    parts = [part for one in rendered for part in one.parts]
    tokens = iter(_tokenize_parts(parts, tokenizer, where))
    starts = [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
    return [
        _document([next(tokens) for _ in one.parts], [] if one.from_template else starts, tokenizer.eos_token_id)
        for one in rendered
    ]


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _tokenize_parts(parts: list[Part], tokenizer: Any, where: str) -> list[Document]:
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
