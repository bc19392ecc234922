"""Data sets as they are read, and parts of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from .documents import Document, Documents, read_documents
from .sources import DataSpec, read_rows

# The sources of data sets and their documents -> the label of each document. Each label makes a part of its data set.
Divide = Callable[[list[str], list[list[Document]]], list[list[int]]]
Trains = Callable[[int], bool]  # the index of a data set or a part, in their order -> whether it is trained on


@dataclass(frozen=True)
class Text:
    """A data set as it was read, or a part of one."""

    name: str
    spec: DataSpec
    read: Documents
    skipped_files: int
    part: str = ""  # of a part: which one it is, for messages

    @property
    def where(self) -> str:
        """What it is called in messages."""
        return f"{self.spec.source}{self.part}"


def read_text(spec: DataSpec, tokenizer: Any, token: str | None) -> Text:
    """Read a data set. Raises UsageError if it cannot be read."""
    rows = read_rows(spec.source, token)
    return Text(spec.name, spec, read_documents(rows.dataset, tokenizer, spec.source), rows.skipped_files)


def divided(texts: list[Text], divide: Divide, *, shared: bool) -> list[Text]:
    """Divide data sets by the label of each document.

    Args:
        shared: whether each part has the weight of its share of the tokens, rather than that of the whole data set.
    """
    found = []
    labels = divide([text.spec.source for text in texts], [text.read.items for text in texts])
    for text, own in zip(texts, labels, strict=True):
        total = sum(map(len, text.read.items))
        parts = sorted(set(own))
        for number, label in enumerate(parts, 1):
            items = [item for item, its in zip(text.read.items, own, strict=True) if its == label]
            read, skipped_files = replace(text.read, items=items), text.skipped_files
            if number > 1:  # what was not read is told once
                read = replace(read, skipped_rows=0, unlabelled_turns=0, unused_columns=[], unread=[])
                skipped_files = 0
            share = sum(map(len, items)) / total if shared else 1.0
            spec = replace(text.spec, weight=text.spec.weight * share)
            name = f"{text.name}-{number}" if len(parts) > 1 else text.name
            part = f" (part {number} of the {len(parts)} that it was divided into)" if len(parts) > 1 else ""
            found.append(Text(name, spec, read, skipped_files, part))
    return found
