"""What is measured of a skill, and the texts that its words are taken from."""

from __future__ import annotations

from datasets import Dataset

from dylora_moe.base.tiny import byte_tokenizer
from dylora_moe.stages.measure import texts_of


def test_special_tokens_and_padding_are_no_text():
    tokenizer = byte_tokenizer()
    end, pad = [tokenizer.eos_token_id], [tokenizer.pad_token_id] * 3
    rows = Dataset.from_dict(
        {"input_ids": [[*b"one text", *end, *b"another", *end, *pad], [*b"and a third one...", *end]]}
    )
    assert list(texts_of(rows, tokenizer)) == ["one text", "another", "and a third one..."]
    alone = {"input_ids": [[*b"text", *end, *b"not attended"]], "attention_mask": [[1] * 5 + [0] * 12]}
    assert list(texts_of(Dataset.from_dict(alone), tokenizer)) == ["text"]
