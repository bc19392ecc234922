r"""Rows to documents: token ids, and which of them are learned.

Where the tokenizer has a chat template, it renders all schemas but plain text. Where it has none, `prompt` and
`completion` are joined as they are, and a chat is rendered as

    ### System:\n...\n\n### User:\n...\n\n### Assistant:\nthe answer<EOS>\n\n### User:\n...

Every document ends with one EOS, which is learned if the token before it is. A document begins with a BOS if the
tokenizer adds one to plain text. What a chat template renders gets no BOS, because the model is given it as it is when
it is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from ..errors import UsageError, listed
from .chat import Part, Rendered, as_text, pair_messages, read_messages, read_tools, render_joined, with_system
from .schemas import (
    ANSWER_COLUMNS,
    CHAT_COLUMNS,
    SYSTEM_COLUMNS,
    TEXT_COLUMNS,
    TOOLS_COLUMN,
    detect_schema,
    renamed_columns,
)
from .template import ChatRenderer

BATCH_ROWS = 1000


@dataclass(frozen=True)
class Document:
    """The tokens of a document: `ids` (T,) int32, and `learned` (T,) bool, true for the tokens to be predicted."""

    ids: np.ndarray
    learned: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def key(self) -> bytes:
        """A hash of the tokens and of which of them are learned."""
        return hashlib.sha256(self.ids.astype("<i4").tobytes() + self.learned.tobytes()).digest()

    @property
    def text_key(self) -> bytes:
        """A hash of the tokens alone."""
        return hashlib.sha256(self.ids.astype("<i4").tobytes()).digest()


@dataclass(frozen=True)
class Documents:
    """The documents of a data set, and what was not read."""

    items: list[Document]
    schema: str
    unused_columns: list[str]
    unread: list[str]  # parts of the chats that nothing reads: see ChatRenderer.unread
    skipped_rows: int  # without text, or without an answer
    unlabelled_turns: int  # answers that are not learned: the chat template changes them once the chat goes on


def read_documents(rows: Dataset, tokenizer: Any, where: str) -> Documents:
    """Render and tokenize every row of a data set.

    Raises:
        UsageError: if the columns, a row, the tokenizer or its chat template are unusable, or nothing can be learned.
    """
    if tokenizer.eos_token_id is None:
        raise UsageError(
            f"{where}: the tokenizer has no end-of-sequence token to end the documents with; set its eos_token"
        )
    rows = rows.rename_columns(renamed_columns(rows.column_names))
    schema, columns = detect_schema(rows.column_names, where)
    if not tokenizer.chat_template:
        columns = [name for name in columns if name != TOOLS_COLUMN]
    _check_one_schema(rows, columns, where)
    unused = [name for name in rows.column_names if name not in columns]
    renderer = ChatRenderer(tokenizer)
    items: list[Document] = []
    number = skipped = unlabelled = 0
    for batch in _batches(rows, columns, where):
        rendered = []
        for row in batch:
            number += 1
            rendered.append(_render(row, schema, renderer, f"{where}, row {number}"))
        kept = [one for one in rendered if one is not None]
        skipped += len(rendered) - len(kept)
        unlabelled += sum(one.unlabelled_turns for one in kept)
        items += _tokenize(kept, tokenizer, where)
    if not items:
        raise UsageError(
            f"{where}: all {len(rows)} row(s) are without text or without an answer to learn (columns "
            f"{', '.join(columns)}); give documents that have some"
        )
    return Documents(items, schema, unused, renderer.unread, skipped, unlabelled)


def _batches(rows: Dataset, columns: list[str], where: str) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows in lists, each row with the columns in the given order."""
    try:
        for batch in rows.select_columns(columns).iter(BATCH_ROWS):
            values = zip(*(batch[name] for name in columns), strict=True)
            yield [dict(zip(columns, row, strict=True)) for row in values]
    except UnicodeDecodeError:
        raise UsageError(f"{where}: is not UTF-8 text; convert it to UTF-8") from None


def _check_one_schema(rows: Dataset, columns: list[str], where: str) -> None:
    """Check that no row has its content in columns of another schema.

    From rows of several schemas, `datasets` makes rows with all of their columns and fills the gaps with None.
    """
    others = [name for name in (*CHAT_COLUMNS, *ANSWER_COLUMNS, *TEXT_COLUMNS) if name in rows.column_names]
    others = [name for name in others if name not in columns]
    if not others:
        return
    number = 0
    for batch in _batches(rows, [*columns, *others], where):
        for row in batch:
            number += 1
            filled = [name for name in others if (value := row[name]) and value == value]  # not NaN
            if filled and not any(row[name] for name in columns):
                raise UsageError(
                    f"{where}, row {number}: has nothing in {', '.join(columns)}, by which the rows are "
                    f"read, but something in {', '.join(filled)}; expected rows of one kind: give each kind a file of "
                    "its own, or leave one of the columns out"
                )


def _render(row: dict[str, Any], schema: str, renderer: ChatRenderer, where: str) -> Rendered | None:
    """Render a row as text; None if it has nothing to learn."""
    if schema == "text":
        text = as_text(next(iter(row.values())), where, next(iter(row)))
        return Rendered([Part(text, None)]) if text.strip() else None
    if schema == "chat":
        messages = with_system(row, read_messages(next(iter(row.values())), where), where)
    else:
        joined = schema == "prompt + completion" and not renderer.has_template and row.keys().isdisjoint(SYSTEM_COLUMNS)
        if joined and not isinstance(row["completion"], list):
            return render_joined(row, where)
        messages = pair_messages(row, where)
    while messages and not messages[-1].learned:
        messages.pop()  # nothing is learned of a turn that no answer follows
    if not any(message.learned and message.answer_fields for message in messages):
        return None
    return renderer.render(messages, read_tools(row.get(TOOLS_COLUMN), where), where)


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
            f"{type(tokenizer).__name__}; convert the tokenizer, or give data with a text column"
        )
    encoded = tokenizer(
        [part.text for part in parts],
        add_special_tokens=False,
        return_attention_mask=False,
        return_offsets_mapping=need_spans,
        verbose=False,  # no warning of long sequences: they are cut into blocks later
    )
    documents = []
    for number, part in enumerate(parts):
        ids = np.asarray(encoded["input_ids"][number], dtype=np.int32)
        if part.spans is None:
            learned = np.ones(len(ids), dtype=bool)
        else:
            offsets = np.asarray(encoded["offset_mapping"][number]).reshape(-1, 2)  # (T, 2): first character, end
            learned = np.zeros(len(ids), dtype=bool)
            for start, end in part.spans:
                learned |= (offsets[:, 1] > start) & (offsets[:, 0] < end)
        documents.append(Document(ids, learned))
    return documents


def _document(parts: list[Document], starts: list[int], eos: int) -> Document:
    """Join the parts, each of which ends with one EOS, after the tokens `starts`, which are not learned."""
    ids, learned = [], []
    if starts and parts[0].ids[:1].tolist() != starts:
        ids.append(np.asarray(starts, dtype=np.int32))
        learned.append(np.zeros(1, dtype=bool))
    for part in parts:
        ids.append(part.ids)
        learned.append(part.learned)
        if part.ids[-1:].tolist() != [eos]:
            ids.append(np.asarray([eos], dtype=np.int32))
            learned.append(part.learned[-1:] if len(part) else np.ones(1, dtype=bool))
    all_learned = np.concatenate(learned)
    all_learned[0] = False  # no token before the first could predict it
    return Document(np.concatenate(ids), all_learned)


def check_vocabulary(documents: list[Document], tokenizer: Any, size: int, where: str) -> None:
    """Check that a base model with a vocabulary of `size` knows every token of the documents.

    Raises:
        UsageError: naming the tokens that it does not know, as if tokens were added without resizing its embedding.
    """
    found = [set(document.ids[document.ids >= size].tolist()) for document in documents]
    beyond = sorted(set().union(*found))
    if beyond:
        tokens = [f"{tokenizer.convert_ids_to_tokens(one)!r} (id {one})" for one in beyond]
        raise UsageError(
            f"{where}: the tokenizer makes {len(beyond)} token(s), in {sum(map(bool, found)):,} document(s), that the "
            f"base model does not know, because its vocabulary ends at id {size - 1}:\n{listed(tokens)}\nUse the "
            "tokenizer of the base model, or add the tokens to it: model.resize_token_embeddings(len(tokenizer)), then "
            "save both with save_pretrained"
        )
