"""Documents to blocks of one length.

Documents that are longer than a block are cut into pieces of one block. The last pieces, and all shorter documents, are
never cut: they are put together by best-fit decreasing (https://arxiv.org/abs/2404.10830), and the rest of a block is
padding without labels. The positions of each piece begin at 0, by which the model keeps the pieces apart. Pieces in
which nothing is learned are dropped, and their tokens counted.

For a model that does not keep them apart, each piece has a block of its own, with an attention mask that leaves out the
padding behind it.
"""

from __future__ import annotations

import bisect
import random
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ..constants import IGNORED_LABEL
from .documents import Document

COLUMNS = ("input_ids", "labels", "position_ids")  # of packed blocks
PADDED_COLUMNS = ("input_ids", "labels", "attention_mask")  # of blocks of one document each


@dataclass(frozen=True)
class Packed:
    """Blocks; packed ones are sorted by the lengths of their first pieces."""

    rows: np.ndarray  # (blocks, 3, block_size) int32, in the order of COLUMNS or PADDED_COLUMNS
    padding: int  # tokens of padding
    dropped: int  # tokens of the dropped pieces

    def shuffled(self, seed: int) -> np.ndarray:
        """Return the rows in an order drawn by `random`, which stays the same in later versions, unlike numpy's."""
        order = list(range(len(self.rows)))
        random.Random(seed).shuffle(order)
        return self.rows[order]


def pack(documents: list[Document], block_size: int, pad: int, *, alone: bool = False) -> Packed:
    """Pack documents into blocks of `block_size` tokens, with `pad` as the id of padding.

    Args:
        alone: whether each piece of a document has a block of its own, as in PADDED_COLUMNS.
    """
    pieces = [
        Document(document.ids[start : start + block_size], document.learned[start : start + block_size])
        for document in documents
        for start in range(0, len(document), block_size)
    ]
    kept = [piece for piece in pieces if piece.learned[1:].any()]
    bins = [[i] for i in range(len(kept))] if alone else _best_fit([len(piece) for piece in kept], block_size)
    rows = np.empty((len(bins), len(COLUMNS), block_size), dtype=np.int32)
    for row, members in zip(rows, bins, strict=True):
        _fill(row, [kept[member] for member in members], pad)
        if alone:
            row[2] = np.arange(block_size) < len(kept[members[0]])  # the attention mask
    tokens = sum(len(piece) for piece in kept)
    return Packed(rows, len(bins) * block_size - tokens, sum(len(piece) for piece in pieces) - tokens)


def _fill(row: np.ndarray, pieces: list[Document], pad: int) -> None:
    ids, labels, positions = row  # each (block_size,)
    end = 0
    for piece in pieces:
        start, end = end, end + len(piece)
        ids[start:end] = piece.ids
        labels[start:end] = np.where(piece.learned, piece.ids, IGNORED_LABEL)
        labels[start] = IGNORED_LABEL  # it does not follow from the document before
        positions[start:end] = np.arange(len(piece))
    ids[end:] = pad
    labels[end:] = IGNORED_LABEL
    positions[end:] = np.arange(len(ids) - end)


def _best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Return bins of indices of `lengths`: the longest first, each put into the fullest bin with enough room."""
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room that is left -> the bins with that much room
    rooms: list[int] = []  # the keys of by_room, sorted
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = bisect.bisect_left(rooms, lengths[index])
        if place == len(rooms):
            number, left = len(bins), room
            bins.append([])
        else:
            left = rooms[place]
            number = by_room[left].pop()
            if not by_room[left]:
                del by_room[left], rooms[place]
        bins[number].append(index)
        left -= lengths[index]
        if left:
            if left not in by_room:
                bisect.insort(rooms, left)
            by_room.setdefault(left, []).append(number)
    return bins


def as_dataset(rows: np.ndarray, names: tuple[str, ...], source: int | None = None) -> Dataset:
    """Make a data set in memory of rows (blocks, 3, block_size), with a column `source` if that is given."""
    blocks, _, size = rows.shape
    columns: dict[str, pa.Array] = {
        name: pa.ListArray.from_arrays(
            pa.array(np.arange(blocks + 1) * size, type=pa.int32()), pa.array(rows[:, i].reshape(-1))
        )
        for i, name in enumerate(names)
    }
    if source is not None:
        columns["source"] = pa.array(np.full(blocks, source, dtype=np.int32))
    return Dataset(pa.table(columns))
