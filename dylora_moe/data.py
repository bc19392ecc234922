"""Data sets to blocks of tokens of one length, in which documents do not see each other.

    blocks = load_blocks([DataSpec.parse("code.jsonl=2"), DataSpec.parse("prose/")], tokenizer, block_size=512, seed=0)
    Trainer(train_dataset=blocks.train, eval_dataset=blocks.evaluation, data_collator=BlockCollator(), ...)

**Held out**: per data set, before any mixing, by document: those whose hash with the seed is smallest. What one data
set holds out does not depend on the others; a document that any of them holds out is in no training block. A data set
of a single document (or of copies of one) holds out its last tokens.

**Packing**: documents longer than a block are cut into pieces of one block; the rest, and all shorter documents, are
never cut but put together by best-fit decreasing (https://arxiv.org/abs/2404.10830), and what stays free is padding
without labels. Each piece counts its positions from 0. Pieces in which nothing is learned are dropped, and counted.

**Keeping documents apart**: Transformers (5.20 and 5.23: `masking_utils.find_packed_sequence_indices`) masks a
document from the next by the positions that begin again, on two conditions: no `attention_mask`, not even one of ones,
and no cache. With the default `use_cache=True` documents silently see each other outside gradient checkpointing, so
the collator emits `use_cache=False`. An explicit 4D mask is worse: it replaces the sliding windows of Qwen2 and
Mistral, a boolean one is added as a number by eager attention, a float one must have the base's dtype. Flash attention
sees the positions for batches of one row only. `check_documents_apart` proves it on the model at hand.

**Mixing**: every block is drawn from a data set with a probability proportional to its weight, whatever the data set's
size, until each has been seen in full; smaller ones are repeated meanwhile.
"""

from __future__ import annotations

import bisect
import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, interleave_datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .cross_entropy import IGNORED_LABEL
from .data_documents import Document, read_documents
from .data_sources import DataSpec, python_sources, read_rows
from .errors import UsageError

__all__ = [
    "BlockCollator",
    "DataSpec",
    "SourceStats",
    "TokenBlocks",
    "byte_tokenizer",
    "check_documents_apart",
    "data_fingerprint",
    "load_blocks",
    "python_sources",
]

COLUMNS = ("input_ids", "labels", "position_ids")
HASH_ROWS = 1024
LEAK_TOLERANCE = 1e-4
MOST_REPETITIONS = 1000  # of a block, on average, before every block has been seen


@dataclass(frozen=True)
class SourceStats:
    """What became of one data set. `documents` are those trained on, held out and withheld; tokens are of documents."""

    name: str
    source: str
    weight: float
    schema: str
    unused_columns: tuple[str, ...]
    documents: int
    skipped_rows: int  # without text, or without an answer to learn
    skipped_files: int  # of other splits, or not of the kind that is read
    unlabelled_turns: int  # answers in a chat that its template does not let us find
    held_out_documents: int
    withheld_documents: int  # not trained on because another data set holds them out
    tokens: int  # in training documents
    dropped_tokens: int  # of them, in pieces where nothing is learned
    blocks: int  # different training blocks
    padding_tokens: int
    sampled_blocks: int  # blocks of it in the mixture; repeated where above `blocks`
    eval_tokens: int
    eval_blocks: int


@dataclass(frozen=True)
class TokenBlocks:
    """Training blocks, and held-out blocks by data set.

    Each row has `input_ids`, `labels` and `position_ids`, lists of `block_size` ints. A label stands at its own token
    (the model shifts) and is -100 where nothing is learned: prompts, padding, and the first token of each piece.
    """

    train: Dataset
    evaluation: dict[str, Dataset]
    sources: tuple[SourceStats, ...]
    block_size: int

    @property
    def train_tokens(self) -> int:
        """Tokens of the training documents, each counted once."""
        return sum(source.tokens for source in self.sources)


def load_blocks(
    specs: Sequence[DataSpec],
    tokenizer: Any,
    *,
    block_size: int,
    seed: int,
    eval_fraction: float = 0.05,
    max_eval_blocks: int = 64,
    token: str | None = None,
) -> TokenBlocks:
    """Reads, splits, packs and mixes. The same arguments and files give the same blocks.

    Args:
        block_size: tokens per block.
        seed: of the split, the order of the blocks and the mixture.
        eval_fraction: of each data set's documents, at least one, held out.
        max_eval_blocks: documents beyond these many blocks per data set are trained on instead.
        token: of the hub.

    Raises:
        UsageError: for whatever is wrong with an argument, a source or its content.
    """
    _check_arguments(specs, block_size, seed, eval_fraction, max_eval_blocks)
    names = _unique_names([spec.name for spec in specs])
    splits = [_read_split(spec, tokenizer, token, seed, eval_fraction, max_eval_blocks * block_size) for spec in specs]
    held_out = set().union(*(split.held_out for split in splits))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    train, evaluation, stats = [], {}, []
    for number, (name, spec, split) in enumerate(zip(names, specs, splits, strict=True)):
        documents = [d for d in split.train if d.text_key not in held_out]
        _check_enough(spec.source, documents, len(split.train), block_size)
        packed = _pack(documents, block_size, pad)
        if not len(packed.rows):
            raise UsageError(
                f"{spec.source}: no block of {block_size} tokens has anything to learn in it; give longer answers "
                "or a larger "
                "block size"
            )
        held = _pack(split.evaluation, block_size, pad)
        train.append(_dataset(packed.shuffled(seed), number))
        evaluation[name] = _dataset(held.rows[:max_eval_blocks])
        stats.append(_stats(name, spec, split, documents, packed, held, max_eval_blocks))
    mixed, drawn = _mix(train, [spec.weight for spec in specs], seed)
    sources = tuple(SourceStats(**one, sampled_blocks=count) for one, count in zip(stats, drawn, strict=True))
    return TokenBlocks(mixed, evaluation, sources, block_size)


def data_fingerprint(blocks: TokenBlocks) -> str:
    """SHA-256 over the training blocks in their order: the same wherever the same training would take place."""
    digest = hashlib.sha256(f"{blocks.block_size} {len(blocks.train)}".encode())
    table = blocks.train.select_columns(list(COLUMNS)).with_format("arrow")
    for start in range(0, len(blocks.train), HASH_ROWS):
        rows = table[start : start + HASH_ROWS]
        for name in COLUMNS:
            for chunk in rows[name].chunks:
                digest.update(chunk.flatten().to_numpy().astype("<i4").tobytes())
            digest.update(name.encode())
    return digest.hexdigest()


class BlockCollator:
    """Rows to `input_ids`, `labels` and `position_ids`, (B, block_size) int64, and `use_cache=False`; no attention
    mask.

    The last two are what keeps the documents of a block apart; see the head of this module. The Trainer must not
    remove the positions: `remove_unused_columns=False`.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        missing = sorted(set(COLUMNS) - set(rows[0]))
        if missing:
            raise ValueError(
                f"rows without {', '.join(missing)}: documents would not be kept apart; train with "
                "remove_unused_columns=False"
            )
        batch: dict[str, Any] = {name: torch.tensor([row[name] for row in rows]) for name in COLUMNS}
        batch["use_cache"] = False
        return batch


def check_documents_apart(model: torch.nn.Module) -> None:
    """Raises `UsageError` where this model, with its attention, lets a document of a block see the one before it.

    Two blocks of two documents, of which only the first differ, go through the model: the second documents' logits
    must agree. Needs a vocabulary of 8 tokens, 12 positions, and nothing of the data.
    """
    device = next(model.parameters()).device
    second = [1, 3, 5, 7, 2, 6]
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, *second], [7, 6, 2, 1, 0, 3, *second]], device=device)  # (2, 12)
    positions = torch.arange(6, device=device).repeat(2, 2)  # (2, 12)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 6:].float()  # (2, 6, V)
    finally:
        model.train(training)
    leak = (logits[0] - logits[1]).abs().max().item() / max(logits.abs().max().item(), 1e-12)
    if not leak <= LEAK_TOLERANCE:
        config = getattr(model, "config", None)
        raise UsageError(
            f"{type(model).__name__} ({getattr(config, 'model_type', 'unknown architecture')}, attention "
            f"{getattr(config, '_attn_implementation', 'unknown')}): documents packed into one block see each other "
            "(the logits of "
            f"the second change by {leak:.1e} with the first, expected at most {LEAK_TOLERANCE:.0e}); "
            "use the attention implementation sdpa or eager, or a base model that takes position_ids"
        )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer made without files: a token per byte, whose id is the byte, `<eos>` (256) and `<pad>` (257).

    Any text comes back as it was, also text that spells `<eos>`.
    """
    letters = _byte_letters()
    core = Tokenizer(models.BPE(vocab={letters[byte]: byte for byte in range(256)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        pad_token="<pad>",
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _byte_letters() -> dict[int, str]:
    """The letter by which the ByteLevel pre-tokenizer writes a byte: itself if printable, else the next above 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


# --- arguments -------------------------------------------------------------------------------------------------------


def _check_arguments(specs, block_size, seed, eval_fraction, max_eval_blocks) -> None:
    if not specs:
        raise UsageError("no data: expected at least one data set; give --data NAME_OR_PATH")
    if block_size < 2:
        raise UsageError(f"the block size must be at least 2 tokens, got {block_size}: a token needs one before it")
    if not 0 < eval_fraction < 1:
        raise UsageError(f"the held-out fraction must be above 0 and below 1, got {eval_fraction:g}; 0.05 is usual")
    if max_eval_blocks < 1:
        raise UsageError(f"at least 1 held-out block per data set is needed, got {max_eval_blocks}")
    if seed < 0:
        raise UsageError(f"the seed must not be negative, got {seed}")


def _check_enough(source: str, documents: list[Document], before: int, block_size: int) -> None:
    if not documents:
        raise UsageError(
            f"{source}: all of its {before} training document(s) are held out by another data set; leave one of the "
            "two out"
        )
    tokens = sum(len(document) for document in documents)
    if tokens < block_size:
        raise UsageError(
            f"{source}: has {tokens} token(s) to train on in {len(documents)} document(s), one block needs "
            f"{block_size}; "
            "give more data or a smaller block size"
        )


def _unique_names(names: list[str]) -> list[str]:
    """`a`, `a`, `b` become `a`, `a-2`, `b`; names that are there already are not made a second time."""
    unique: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in unique or (number > 1 and candidate in names):
            number += 1
            candidate = f"{name}-{number}"
        unique.append(candidate)
    return unique


# --- the split -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Split:
    train: list[Document]
    evaluation: list[Document]
    held_out: set[bytes]  # text keys; of a document split by tokens too, so that no other data set trains on all of it
    by_tokens: bool
    documents: int
    schema: str
    unused_columns: list[str]
    skipped_rows: int
    skipped_files: int
    unlabelled_turns: int


def _read_split(spec: DataSpec, tokenizer, token, seed: int, fraction: float, max_tokens: int) -> _Split:
    rows = read_rows(spec.source, token)
    read = read_documents(rows.dataset, tokenizer, spec.source)
    by_key = {document.key: document for document in read.items}
    by_tokens = len(by_key) == 1
    if by_tokens:
        train, evaluation = _split_tokens(spec.source, read.items, fraction, max_tokens)
        held_out = {document.text_key for document in by_key.values()}
    else:
        train, evaluation = _split_documents(read.items, by_key, seed, fraction, max_tokens)
        held_out = {document.text_key for document in evaluation}
    return _Split(
        train,
        evaluation,
        held_out,
        by_tokens,
        len(read.items),
        read.schema,
        read.unused_columns,
        read.skipped_rows,
        rows.skipped_files,
        read.unlabelled_turns,
    )


def _split_documents(documents, by_key, seed, fraction, max_tokens) -> tuple[list[Document], list[Document]]:
    """Copies of a held-out document are neither trained on nor held out twice.

    A document of more than `max_tokens` is not held out where another can be: most of it would be for nothing.
    """
    ranked = sorted(by_key, key=lambda key: hashlib.sha256(f"{seed} ".encode() + key).digest())
    wanted = min(max(1, round(fraction * len(ranked))), len(ranked) - 1)
    fitting = (key for key in ranked if len(by_key[key]) <= max_tokens)
    first = next(fitting, None) or min(ranked, key=lambda key: len(by_key[key]))
    held, tokens = [first], len(by_key[first])
    for key in [key for key in ranked if key != first][: wanted - 1]:
        tokens += len(by_key[key])
        if tokens > max_tokens:
            break
        held.append(key)
    chosen = set(held)
    return [document for document in documents if document.key not in chosen], [by_key[key] for key in held]


def _split_tokens(source, documents, fraction, max_tokens) -> tuple[list[Document], list[Document]]:
    one = documents[0]
    cut = len(one) - min(max(2, round(fraction * len(one))), max_tokens)
    parts = [Document(one.ids[part], one.learned[part]) for part in (slice(0, max(cut, 0)), slice(max(cut, 0), None))]
    if not all(part.learned[1:].any() for part in parts):
        raise UsageError(
            f"{source}: has one document (of {len(one)} tokens) and its last tokens cannot be held out, because one "
            "of the two "
            "parts would have nothing to learn; give at least two documents"
        )
    return [parts[0]] * len(documents), [parts[1]]


# --- packing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Packed:
    rows: np.ndarray  # (blocks, 3, block_size) int32, in the order of COLUMNS
    padding: int
    dropped: int

    def shuffled(self, seed: int) -> np.ndarray:
        """Packing sorts by length; `random` keeps its promise of the same order in later versions, numpy makes none."""
        order = list(range(len(self.rows)))
        random.Random(seed).shuffle(order)
        return self.rows[order]


def _pack(documents: list[Document], block_size: int, pad: int) -> _Packed:
    pieces = [
        Document(document.ids[start : start + block_size], document.learned[start : start + block_size])
        for document in documents
        for start in range(0, len(document), block_size)
    ]
    kept = [piece for piece in pieces if piece.learned[1:].any()]
    bins = _best_fit([len(piece) for piece in kept], block_size)
    rows = np.empty((len(bins), len(COLUMNS), block_size), dtype=np.int32)
    for row, members in zip(rows, bins, strict=True):
        _fill(row, [kept[member] for member in members], pad)
    tokens = sum(len(piece) for piece in kept)
    return _Packed(rows, len(bins) * block_size - tokens, sum(len(piece) for piece in pieces) - tokens)


def _fill(row: np.ndarray, pieces: list[Document], pad: int) -> None:
    ids, labels, positions = row  # each (block_size,)
    end = 0
    for piece in pieces:
        start, end = end, end + len(piece)
        ids[start:end] = piece.ids
        labels[start:end] = np.where(piece.learned, piece.ids, IGNORED_LABEL)
        labels[start] = IGNORED_LABEL  # or the document before would be taught to go on with this one
        positions[start:end] = np.arange(len(piece))
    ids[end:] = pad
    labels[end:] = IGNORED_LABEL
    positions[end:] = np.arange(len(ids) - end)


def _best_fit(lengths: list[int], room: int) -> list[list[int]]:
    """Bins of indices: the longest first, each into the fullest bin that still takes it."""
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> bins with that much
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


def _dataset(rows: np.ndarray, source: int | None = None) -> Dataset:
    """Rows (blocks, 3, block_size) as a data set in memory, 12 bytes per token."""
    blocks, _, size = rows.shape
    columns: dict[str, pa.Array] = {
        name: pa.ListArray.from_arrays(
            pa.array(np.arange(blocks + 1) * size, type=pa.int32()), pa.array(rows[:, i].reshape(-1))
        )
        for i, name in enumerate(COLUMNS)
    }
    if source is not None:
        columns["source"] = pa.array(np.full(blocks, source, dtype=np.int32))
    return Dataset(pa.table(columns))


# --- mixing ----------------------------------------------------------------------------------------------------------


def _mix(parts: list[Dataset], weights: list[float], seed: int) -> tuple[Dataset, list[int]]:
    """The mixture, and how many of its blocks each part gave."""
    mixed = parts[0]
    if len(parts) > 1:
        shares = [weight / sum(weights) for weight in weights]
        needed = max(len(part) / share for part, share in zip(parts, shares, strict=True))
        if needed > MOST_REPETITIONS * sum(map(len, parts)):
            raise UsageError(
                f"--data: the weights {', '.join(f'{weight:g}' for weight in weights)} are too far apart: until all "
                f"{sum(map(len, parts)):,} blocks have been seen, {needed:,.0f} would be drawn; "
                "give less different ones"
            )
        mixed = interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")
    drawn = np.bincount(np.asarray(mixed["source"]), minlength=len(parts)).tolist()
    return mixed.remove_columns("source"), drawn


def _stats(name, spec, split: _Split, documents, packed: _Packed, held: _Packed, max_eval_blocks) -> dict[str, Any]:
    return {
        "name": name,
        "source": spec.source,
        "weight": spec.weight,
        "schema": split.schema,
        "unused_columns": tuple(split.unused_columns),
        "documents": split.documents,
        "skipped_rows": split.skipped_rows,
        "skipped_files": split.skipped_files,
        "unlabelled_turns": split.unlabelled_turns,
        "held_out_documents": 0 if split.by_tokens else split.documents - len(split.train),
        "withheld_documents": len(split.train) - len(documents),
        "tokens": sum(len(document) for document in documents),
        "dropped_tokens": packed.dropped,
        "blocks": len(packed.rows),
        "padding_tokens": packed.padding,
        "eval_tokens": sum(len(document) for document in split.evaluation),
        "eval_blocks": min(len(held.rows), max_eval_blocks),
    }
