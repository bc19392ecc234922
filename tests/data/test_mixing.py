"""How data sets are mixed, and what they are evaluated on: a held-out part, or data of its own."""

from __future__ import annotations

from collections import Counter

import pytest

from dylora_moe.base.tiny import byte_tokenizer
from dylora_moe.data.blocks import TokenBlocks, load_blocks
from dylora_moe.data.sources import DataSpec
from dylora_moe.errors import UsageError

from .test_data import BLOCK, pieces_of, texts, write_rows


def blocks_of(*sources: object, evaluation: tuple = (), **changes) -> TokenBlocks:
    specs, eval_specs = ([DataSpec.parse(str(source)) for source in some] for some in (sources, evaluation))
    options = {"block_size": BLOCK, "seed": 0} | changes
    return load_blocks(specs, byte_tokenizer(), eval_specs=eval_specs, **options)


def documents(dataset) -> set[str]:
    return {text.removesuffix("<eos>") for text, _ in pieces_of(dataset)}


@pytest.fixture
def small_and_large(tmp_path):
    return (
        write_rows(tmp_path / "small.jsonl", texts(12)),
        write_rows(tmp_path / "large.jsonl", texts(120, start=1000)),
    )


# ---- mixing ----


def rows_of(blocks: TokenBlocks) -> Counter:
    return Counter(tuple(row) for row in blocks.train["input_ids"])


def test_in_proportion_each_block_is_drawn_once(small_and_large):
    blocks = blocks_of(*small_and_large, mixing="proportional")
    assert [source.sampled_blocks for source in blocks.sources] == [source.blocks for source in blocks.sources]
    assert set(rows_of(blocks).values()) == {1}
    equal = blocks_of(*small_and_large)
    assert rows_of(equal).keys() == rows_of(blocks).keys()
    assert equal.sources[0].sampled_blocks > 3 * equal.sources[0].blocks  # what it spares


def test_in_proportion_the_blocks_of_both_are_mixed_and_the_same_each_time(small_and_large):
    blocks = blocks_of(*small_and_large, mixing="proportional")
    again = blocks_of(*small_and_large, mixing="proportional")
    assert blocks.train["input_ids"] == again.train["input_ids"]
    assert blocks.train["input_ids"] != blocks_of(*small_and_large, mixing="proportional", seed=1).train["input_ids"]
    first = blocks.train[: len(blocks.train) // 2]["input_ids"]
    small = {tuple(row) for row in blocks_of(small_and_large[0]).train["input_ids"]}
    assert 0 < sum(tuple(row) in small for row in first) < len(small)


def test_in_proportion_parts_of_a_data_set_are_not_repeated(small_and_large):
    def divide(sources, data):
        return [[int(number < len(documents) // 10) for number in range(len(documents))] for documents in data]

    blocks = blocks_of(small_and_large[1], mixing="proportional", divide=divide)
    assert len(blocks.sources) == 2 and set(rows_of(blocks).values()) == {1}
    equal = blocks_of(small_and_large[1], divide=divide)
    assert [source.weight for source in equal.sources] == pytest.approx([0.93, 0.07], abs=0.01)


@pytest.mark.parametrize("mixing", ["equal", "proportional"])
def test_what_is_not_trained_on_repeats_nothing_and_may_be_short(small_and_large, tmp_path, mixing):
    small, large = small_and_large
    short = write_rows(tmp_path / "short.jsonl", [{"text": "ab"}, {"text": "cd"}])
    blocks = blocks_of(large, short, small, mixing=mixing, trains=lambda index: index == 2)
    alone = blocks_of(small, mixing=mixing)
    assert rows_of(blocks) == rows_of(alone) and set(blocks.train["source"]) == {2}
    assert [source.sampled_blocks for source in blocks.sources] == [0, 0, len(alone.train)]
    assert blocks.evaluation.keys() == {"large", "short", "small"}
    nothing = blocks_of(large, trains=lambda index: False)
    assert len(nothing.train) == 0 and len(nothing.evaluation["large"])


@pytest.mark.parametrize("weights", [(2, 1), (5, 2), (1, 0.5)])
def test_in_proportion_a_weight_repeats(small_and_large, weights):
    small, large = small_and_large
    blocks = blocks_of(f"{small}={weights[0]}", f"{large}={weights[1]}", mixing="proportional")
    times = weights[0] / weights[1]
    assert blocks.sources[0].sampled_blocks == round(times * blocks.sources[0].blocks)
    assert blocks.sources[1].sampled_blocks == blocks.sources[1].blocks
    assert max(rows_of(blocks).values()) <= -(-times // 1)


def test_weights_that_are_too_far_apart(small_and_large):
    with pytest.raises(UsageError, match="the weights 100000, 1 are too far apart"):
        blocks_of(f"{small_and_large[0]}=100000", small_and_large[1], mixing="proportional")


# ---- evaluation data ----


def test_with_evaluation_data_nothing_is_held_out(tmp_path, small_and_large):
    test = write_rows(tmp_path / "test.jsonl", texts(5, start=5000))
    blocks = blocks_of(*small_and_large, evaluation=(test,))
    assert list(blocks.evaluation) == ["test"]
    assert documents(blocks.evaluation["test"]) == {row["text"] for row in texts(5, start=5000)}
    assert documents(blocks.train) == {row["text"] for row in [*texts(12), *texts(120, start=1000)]}
    assert {source.eval_blocks for source in blocks.sources} == {0}


def test_no_document_of_the_evaluation_data_is_trained_on(tmp_path, small_and_large):
    test = write_rows(tmp_path / "test.jsonl", texts(6))  # half of the small data set
    for most in (None, 1):
        blocks = blocks_of(*small_and_large, evaluation=(test,), max_eval_blocks=most)
        assert documents(blocks.train) & {row["text"] for row in texts(6)} == set()
        assert [source.withheld_documents for source in blocks.sources] == [6, 0]
    assert len(blocks.evaluation["test"]) == 1


def test_evaluation_data_is_bounded_only_if_asked_for(tmp_path, small_and_large):
    test = write_rows(tmp_path / "test.jsonl", texts(400, start=5000))
    all_of_it = blocks_of(small_and_large[0], evaluation=(test,)).evaluation["test"]
    assert len(all_of_it) > 64
    some = blocks_of(small_and_large[0], evaluation=(test,), max_eval_blocks=3).evaluation["test"]
    assert len(some) == 3
    assert documents(some) < documents(all_of_it)
