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

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, interleave_datasets

from ..errors import UsageError
from .documents import Document, read_documents
from .packing import COLUMNS, Packed, as_dataset, pack
from .sources import DataSpec, read_rows

HASH_ROWS = 1024
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
        packed = pack(documents, block_size, pad)
        if not len(packed.rows):
            raise UsageError(
                f"{spec.source}: no block of {block_size} tokens has anything to learn in it; give longer answers "
                "or a larger "
                "block size"
            )
        held = pack(split.evaluation, block_size, pad)
        train.append(as_dataset(packed.shuffled(seed), number))
        evaluation[name] = as_dataset(held.rows[:max_eval_blocks])
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


def _stats(name, spec, split: _Split, documents, packed: Packed, held: Packed, max_eval_blocks) -> dict[str, Any]:
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
