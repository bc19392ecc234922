"""Data sets to training and evaluation blocks: reading, holding out, packing and mixing.

    blocks = load_blocks([DataSpec.parse("code.jsonl=2"), DataSpec.parse("prose/")], tokenizer, block_size=512, seed=0)
    Trainer(train_dataset=blocks.train, eval_dataset=blocks.evaluation, data_collator=BlockCollator(), ...)

**Holding out**: of each data set, the documents whose hash with the seed is smallest are held out for evaluation. This
does not depend on the other data sets, and no data set trains on a document that another one holds out. If a data set
has only one document (or copies of one), its last tokens are held out. With evaluation data of its own, nothing is held
out, and no data set trains on a document of it.

**Mixing**: "equal": each block is drawn from a data set with a probability proportional to the weight of the data set,
whatever its size, until every block of every data set has been drawn. Smaller data sets are repeated meanwhile.
"proportional": each block once, and those of a data set of twice the smallest weight twice.

Packing is described in packing.py; with `packed=False`, each document has a block of its own. How a model keeps the
documents of a block apart is described in stages/batches.py.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets, interleave_datasets

from ..errors import UsageError, counted
from .documents import Document, check_vocabulary
from .held_out import Split, read_evaluation, split_text
from .packing import COLUMNS, PADDED_COLUMNS, Packed, as_dataset, pack
from .sources import DataSpec
from .texts import Divide, Trains, divided, read_text

EVAL_FRACTION = 0.05
HELD_OUT_BLOCKS = 64  # the most per data set
HASH_ROWS = 1024
MOST_REPETITIONS = 1000  # of a block, on average, until every block has been drawn


@dataclass(frozen=True)
class SourceStats:
    """What became of one data set, in numbers of documents, tokens and blocks."""

    name: str
    source: str
    weight: float
    schema: str
    unused_columns: tuple[str, ...]
    unread: tuple[str, ...]  # parts of chats that nothing reads: fields of messages, tools, messages of a role
    documents: int  # for training, held out and withheld
    skipped_rows: int  # without text, or without an answer to learn
    skipped_files: int  # of other splits, or of a kind that is not read
    unlabelled_turns: int  # answers of chats that are not learned, because the chat template hides where they are
    held_out_documents: int
    withheld_documents: int  # not trained on, because another data set holds them out
    tokens: int  # of the training documents
    dropped_tokens: int  # of them, in pieces where nothing is learned
    blocks: int  # different training blocks
    padding_tokens: int
    sampled_blocks: int  # drawn for the mixture; more than `blocks` if they are repeated
    eval_tokens: int
    eval_blocks: int


@dataclass(frozen=True)
class TokenBlocks:
    """Training blocks, and the held-out blocks of each data set or those of the evaluation data.

    Each row has `input_ids`, `labels` and `position_ids`, lists of `block_size` integers; training rows have `source`,
    the index of their data set, as well. A label is at the position of
    its own token, because the model shifts them. It is -100 where nothing is learned: in prompts, in padding, and at
    the first token of each piece. Blocks that are not packed have an `attention_mask` instead of `position_ids`.
    """

    train: Dataset
    evaluation: dict[str, Dataset]
    sources: tuple[SourceStats, ...]
    block_size: int

    @property
    def train_tokens(self) -> int:
        """The tokens of all training documents, each document counted once."""
        return sum(source.tokens for source in self.sources)

    @property
    def padding_share(self) -> float:
        """The part of all tokens of the training blocks that is padding, each block counted once."""
        blocks = sum(source.blocks for source in self.sources)
        return sum(source.padding_tokens for source in self.sources) / max(1, blocks * self.block_size)


def load_blocks(
    specs: Sequence[DataSpec],
    tokenizer: Any,
    *,
    block_size: int,
    seed: int,
    mixing: str = "equal",
    eval_specs: Sequence[DataSpec] = (),
    eval_fraction: float = EVAL_FRACTION,
    max_eval_blocks: int | None = None,
    packed: bool = True,
    vocabulary: int | None = None,
    token: str | None = None,
    divide: Divide | None = None,
    trains: Trains = lambda index: True,
) -> TokenBlocks:
    """Read, split, pack and mix data sets. The same arguments and files give the same blocks.

    Args:
        block_size: the number of tokens of a block.
        seed: of the split, the order of the blocks and the mixture.
        mixing: "equal" or "proportional", see above.
        eval_specs: evaluation data. If there is any, nothing is held out.
        eval_fraction: the part of each data set's documents to hold out, at least one document.
        max_eval_blocks: per data set; by default 64 held-out ones, and all of the evaluation data.
        packed: whether documents share a block. A model that lets them see each other needs `packed=False`.
        vocabulary: the number of tokens that the model knows. Documents with others are refused.
        token: of the hub.
        divide: divides data sets by their documents. The parts of `name` are `name-1`, `name-2`, ...
        trains: asked once all are divided; the mixture has no block of the others, whose held-out part is evaluated.

    Raises:
        UsageError: if an argument, a source or its content is unusable.
    """
    _check_arguments(specs, block_size, seed, eval_fraction, max_eval_blocks)
    fraction = 0.0 if eval_specs else eval_fraction
    most = max_eval_blocks or (None if eval_specs else HELD_OUT_BLOCKS)
    most_tokens = math.inf if most is None else most * block_size
    texts = [read_text(spec, tokenizer, token) for spec in specs]
    if divide is not None:
        texts = divided(texts, divide, shared=mixing == "equal")
    trained = [index for index in range(len(texts)) if trains(index)]
    splits = [split_text(text, seed, fraction, most_tokens) for text in texts]
    names, eval_names = (_unique_names([each.name for each in some]) for some in (texts, eval_specs))
    tests = [read_evaluation(spec, tokenizer, token, seed, most_tokens) for spec in eval_specs]
    if vocabulary is not None:
        for split in [*splits, *tests]:
            check_vocabulary(split.read.items, tokenizer, vocabulary, split.spec.source)
    held_out = set().union(*(split.held_out for split in [*splits, *tests]))
    layout = _Layout(block_size, _padding(tokenizer, vocabulary), packed)
    parts = [_pack_split(split, held_out, layout, most, index in trained) for index, split in enumerate(splits)]
    mixed = _mixed(parts, trained, layout, seed, mixing)
    evaluation = {name: layout.as_dataset(part.evaluation) for name, part in zip(names, parts, strict=True)}
    if eval_specs:
        evaluation = dict(zip(eval_names, (layout.evaluation(split, most) for split in tests), strict=True))
    return TokenBlocks(mixed, evaluation, _stats(parts, names, mixed), block_size)


def load_evaluation(
    specs: Sequence[DataSpec],
    tokenizer: Any,
    *,
    block_size: int,
    most: int | None = None,
    packed: bool = True,
    vocabulary: int | None = None,
) -> dict[str, Dataset]:
    """Read data sets on which nothing is trained, as `load_blocks` reads its evaluation data.

    Args:
        most: blocks of each data set; by default all.

    Returns:
        Their blocks by name.

    Raises:
        UsageError: as `load_blocks`, and if a data set has nothing to predict.
    """
    most_tokens = math.inf if most is None else most * block_size
    layout, found = _Layout(block_size, _padding(tokenizer, vocabulary), packed), []
    for spec in specs:
        split = read_evaluation(spec, tokenizer, None, 0, most_tokens)
        if vocabulary is not None:
            check_vocabulary(split.read.items, tokenizer, vocabulary, spec.source)
        found.append(layout.evaluation(split, most))
        if not len(found[-1]):
            raise UsageError(f"{spec.source}: no block of {block_size} tokens has anything to predict in it")
    return dict(zip(_unique_names([spec.name for spec in specs]), found, strict=True))


def data_fingerprint(blocks: TokenBlocks) -> str:
    """Return a SHA-256 over the training blocks in their order, the same on every machine."""
    digest = hashlib.sha256(f"{blocks.block_size} {len(blocks.train)}".encode())
    columns = COLUMNS if COLUMNS[-1] in blocks.train.column_names else PADDED_COLUMNS
    table = blocks.train.select_columns(list(columns)).with_format("arrow")
    for rows in table.iter(HASH_ROWS):
        for name in columns:
            for chunk in rows[name].chunks:
                digest.update(chunk.flatten().to_numpy().astype("<i4").tobytes())
            digest.update(name.encode())
    return digest.hexdigest()


def _check_arguments(
    specs: Sequence[DataSpec], block_size: int, seed: int, eval_fraction: float, max_eval_blocks: int | None
) -> None:
    if not specs:
        raise UsageError("no data: expected at least one data set; give --data NAME_OR_PATH")
    if block_size < 2:
        raise UsageError(f"the block size must be at least 2 tokens, got {block_size}: a token needs one before it")
    if not 0 < eval_fraction < 1:
        raise UsageError(f"the held-out fraction must be above 0 and below 1, got {eval_fraction:g}; 0.05 is usual")
    if max_eval_blocks is not None and max_eval_blocks < 1:
        raise UsageError(f"at least 1 evaluation block per data set is needed, got {max_eval_blocks}")
    if seed < 0:
        raise UsageError(f"the seed must not be negative, got {seed}")


def _padding(tokenizer: Any, vocabulary: int | None) -> int:
    """Return the id of padding: one that the model knows. It is never learned, so that any will do."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(i for i in ids if i is not None and (vocabulary is None or i < vocabulary))


def _check_enough(where: str, documents: list[Document], before: int, block_size: int) -> None:
    if not documents:
        raise UsageError(
            f"{where}: nothing is left to train on: another data set, or --eval-data, holds out the same "
            f"{counted(before, 'document')}; leave one of the two out"
        )
    tokens = sum(len(document) for document in documents)
    if tokens < block_size:
        raise UsageError(
            f"{where}: has {counted(tokens, 'token')} to train on in {counted(len(documents), 'document')}, one block "
            f"needs {block_size}; give more data or a smaller block size"
        )


def _unique_names(names: list[str]) -> list[str]:
    """Number equal names: `a`, `a`, `b` become `a`, `a-2`, `b`. No new name is equal to a given one."""
    unique: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in unique or (number > 1 and candidate in names):
            number += 1
            candidate = f"{name}-{number}"
        unique.append(candidate)
    return unique


@dataclass(frozen=True)
class _Part:
    """The blocks of one data set."""

    split: Split
    documents: list[Document]  # to train on
    train: Packed
    evaluation: np.ndarray  # (blocks, 3, block_size)

    def stats(self, name: str, sampled_blocks: int) -> SourceStats:
        split, read = self.split, self.split.read
        return SourceStats(
            name=name,
            source=split.spec.source,
            weight=split.spec.weight,
            schema=read.schema,
            unused_columns=tuple(read.unused_columns),
            unread=tuple(read.unread),
            documents=len(read.items),
            skipped_rows=read.skipped_rows,
            skipped_files=split.skipped_files,
            unlabelled_turns=read.unlabelled_turns,
            held_out_documents=0 if split.by_tokens else len(read.items) - len(split.train),
            withheld_documents=len(split.train) - len(self.documents),
            tokens=sum(len(document) for document in self.documents),
            dropped_tokens=self.train.dropped,
            blocks=len(self.train.rows),
            padding_tokens=self.train.padding,
            sampled_blocks=sampled_blocks,
            eval_tokens=sum(len(document) for document in split.evaluation),
            eval_blocks=len(self.evaluation),
        )


@dataclass(frozen=True)
class _Layout:
    """How blocks are made of documents."""

    block_size: int
    pad: int
    packed: bool

    def as_dataset(self, rows: np.ndarray, source: int | None = None) -> Dataset:
        return as_dataset(rows, COLUMNS if self.packed else PADDED_COLUMNS, source)

    def pack(self, documents: list[Document]) -> Packed:
        return pack(documents, self.block_size, self.pad, alone=not self.packed)

    def evaluation(self, split: Split, most: int | None) -> Dataset:
        return self.as_dataset(self.pack(split.evaluation).rows[:most])


def _pack_split(split: Split, held_out: set[bytes], layout: _Layout, most: int | None, trained: bool) -> _Part:
    documents = [document for document in split.train if document.text_key not in held_out]
    if trained and (layout.packed or not documents):
        _check_enough(split.where, documents, len(split.train), layout.block_size)
    train = layout.pack(documents)
    if trained and not len(train.rows):
        raise UsageError(
            f"{split.where}: no block of {layout.block_size} tokens has anything to learn in it; give longer answers "
            "or a larger block size"
        )
    return _Part(split, documents, train, layout.pack(split.evaluation).rows[:most])


def _stats(parts: list[_Part], names: list[str], mixed: Dataset) -> tuple[SourceStats, ...]:
    drawn = np.bincount(np.asarray(mixed["source"], dtype=int), minlength=len(parts)).tolist()
    return tuple(part.stats(name, count) for part, name, count in zip(parts, names, drawn, strict=True))


def _mixed(parts: list[_Part], trained: list[int], layout: _Layout, seed: int, mixing: str) -> Dataset:
    """Return the training blocks: those of the parts of these indices, mixed."""
    if not trained:
        return layout.as_dataset(parts[0].train.rows[:0], 0)
    train = [layout.as_dataset(parts[i].train.shuffled(seed), i) for i in trained]
    return _mix(train, [parts[i].split.spec.weight for i in trained], seed, mixing)


def _mix(parts: list[Dataset], weights: list[float], seed: int, mixing: str) -> Dataset:
    sizes, least = np.array([len(part) for part in parts]), min(weights)
    if mixing == "equal":
        needed = max(size * sum(weights) / weight for size, weight in zip(sizes, weights, strict=True))
    else:
        needed = sum(size * weight / least for size, weight in zip(sizes, weights, strict=True))
    if needed > MOST_REPETITIONS * sum(sizes):
        raise UsageError(
            f"--data: the weights {', '.join(f'{weight:g}' for weight in weights)} are too far apart: until all "
            f"{sum(sizes):,} blocks have been seen, {needed:,.0f} would be drawn; give less different ones"
        )
    if len(parts) == 1:
        return parts[0]
    if mixing == "equal":
        shares = [weight / sum(weights) for weight in weights]
        return interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy="all_exhausted")
    times = [weight / least for weight in weights]
    repeated = [part.select(np.arange(round(n * len(part))) % len(part)) for part, n in zip(parts, times, strict=True)]
    mixed = concatenate_datasets(repeated)
    order = list(range(len(mixed)))
    random.Random(seed).shuffle(order)
    return mixed.select(order)
