"""Holding out: which documents of a data set are trained on, and which are for evaluation. See blocks.py."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError
from .documents import Document, Documents
from .sources import DataSpec
from .texts import Text, read_text


@dataclass(frozen=True)
class Split:
    """The documents of a data set, divided into those to train on and those held out."""

    spec: DataSpec
    where: str  # for messages
    read: Documents
    skipped_files: int
    train: list[Document]
    evaluation: list[Document]
    held_out: set[bytes]  # the text keys on which no data set trains
    by_tokens: bool  # whether the last tokens of a single document are held out


def split_text(text: Text, seed: int, fraction: float, max_tokens: float) -> Split:
    """Divide a data set. Raises UsageError if it has one document that is too short to be divided."""
    spec, read = text.spec, text.read
    if not fraction:
        return Split(spec, text.where, read, text.skipped_files, read.items, [], held_out=set(), by_tokens=False)
    by_key = {document.key: document for document in read.items}
    by_tokens = len(by_key) == 1
    if by_tokens:
        train, evaluation = _split_tokens(text.where, read.items, fraction, max_tokens)
    else:
        train, evaluation = _split_documents(read.items, by_key, seed, fraction, max_tokens)
    return Split(
        spec=spec,
        where=text.where,
        read=read,
        skipped_files=text.skipped_files,
        train=train,
        evaluation=evaluation,
        # Of a document split by tokens the whole text, on which no other data set may train either.
        held_out={document.text_key for document in (by_key.values() if by_tokens else evaluation)},
        by_tokens=by_tokens,
    )


def read_evaluation(spec: DataSpec, tokenizer: Any, token: str | None, seed: int, max_tokens: float) -> Split:
    """Read evaluation data. No data set trains on a document of it, not even on one that `max_tokens` leaves out."""
    text = read_text(spec, tokenizer, token)
    read = text.read
    by_key = {document.key: document for document in read.items}
    chosen = [by_key[key] for key in _drawn(by_key, seed, len(by_key), max_tokens)]
    held_out = {document.text_key for document in read.items}
    return Split(spec, text.where, read, text.skipped_files, [], chosen, held_out, by_tokens=False)


def _split_documents(
    documents: list[Document], by_key: dict[bytes, Document], seed: int, fraction: float, max_tokens: float
) -> tuple[list[Document], list[Document]]:
    """Return the documents to train on and those held out. Copies are held out once, and then not trained on."""
    held = _drawn(by_key, seed, min(max(1, round(fraction * len(by_key))), len(by_key) - 1), max_tokens)
    chosen = set(held)
    return [document for document in documents if document.key not in chosen], [by_key[key] for key in held]


def _drawn(by_key: dict[bytes, Document], seed: int, wanted: int, max_tokens: float) -> list[bytes]:
    """Return the keys of `wanted` documents, or of fewer that have at most `max_tokens` together.

    A longer document is drawn only if all are so long, because most of it would not be used.
    """
    ranked = sorted(by_key, key=lambda key: hashlib.sha256(f"{seed} ".encode() + key).digest())
    fitting = (key for key in ranked if len(by_key[key]) <= max_tokens)
    first = next(fitting, None) or min(ranked, key=lambda key: len(by_key[key]))
    drawn, tokens = [first], len(by_key[first])
    for key in [key for key in ranked if key != first][: wanted - 1]:
        tokens += len(by_key[key])
        if tokens > max_tokens:
            break
        drawn.append(key)
    return drawn


def _split_tokens(
    where: str, documents: list[Document], fraction: float, max_tokens: float
) -> tuple[list[Document], list[Document]]:
    """Return the first tokens of each copy of the only document to train on, and its last tokens held out."""
    one = documents[0]
    cut = max(0, len(one) - int(min(max(2, round(fraction * len(one))), max_tokens)))
    parts = Document(one.ids[:cut], one.learned[:cut]), Document(one.ids[cut:], one.learned[cut:])
    if not all(part.learned[1:].any() for part in parts):
        raise UsageError(
            f"{where}: has one document (of {len(one)} tokens) and its last tokens cannot be held out, because one "
            "of the two halves would have nothing to learn; give at least two documents"
        )
    return [parts[0]] * len(documents), [parts[1]]
