"""Data sets for tests: written to files, read into blocks, and read back out of the blocks."""

from __future__ import annotations

import json
from itertools import pairwise

from dylora_moe.base.tiny import byte_tokenizer
from dylora_moe.data.blocks import load_blocks
from dylora_moe.data.sources import DataSpec

BLOCK = 64
EOS, PAD = 256, 257
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_tokenizer(template=CHATML, eos="<|im_end|>"):
    tokenizer = byte_tokenizer()
    tokenizer.split_special_tokens = False
    tokenizer.backend_tokenizer.encode_special_tokens = False
    tokenizer.add_special_tokens(
        {"bos_token": "<bos>", "eos_token": eos, "additional_special_tokens": ["<|im_start|>"]}
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = template
    return tokenizer


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def blocks_of(*specs, tokenizer=None, **changes):
    arguments = {"block_size": BLOCK, "seed": 0, **changes}
    return load_blocks([DataSpec.parse(str(s)) for s in specs], tokenizer or byte_tokenizer(), **arguments)


def pieces_of(dataset, tokenizer=None):
    """(text, learned text) of each piece in the blocks, padding left out."""
    tokenizer = tokenizer or byte_tokenizer()
    found = []
    for row in dataset:
        starts = [i for i, p in enumerate(row["position_ids"]) if p == 0] + [len(row["position_ids"])]
        for start, end in pairwise(starts):
            ids, labels = row["input_ids"][start:end], row["labels"][start:end]
            if ids[0] != tokenizer.pad_token_id:
                assert all(label in (-100, i) for i, label in zip(ids, labels, strict=True))
                found.append((tokenizer.decode(ids), tokenizer.decode([i for i in labels if i != -100])))
    return found
