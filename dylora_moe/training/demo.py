"""What `train.py --demo` trains, without a network: a tiny model with a tokenizer of bytes, on Python's own sources."""

from __future__ import annotations

import json
import sysconfig
from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from ..base.preserve import seeded
from ..data.text_files import files_in, text_of
from ..errors import UsageError
from .settings import TrainSettings

BASE = "base"
BASE_SEED = 0
TEXTS = {"code": "code.jsonl", "prose": "prose.jsonl"}
FILES = (BASE, *TEXTS.values(), ".base.partial", ".texts.partial")


def write(settings: TrainSettings) -> None:
    """Write the base model and the texts into the run folder, except for what is given or already there."""
    folder = Path(settings.output_dir)
    if settings.model is None and not (folder / BASE).is_dir():
        _write_base(folder / ".base.partial")
        (folder / ".base.partial").rename(folder / BASE)
    if not settings.data:
        for name, read in (("code", _code), ("prose", _prose)):
            if not (folder / TEXTS[name]).exists():
                _write_texts(folder / ".texts.partial", read())
                (folder / ".texts.partial").rename(folder / TEXTS[name])


def filled_in(settings: TrainSettings) -> TrainSettings:
    """Return the settings with the model and the data that `write` has written, where none are given."""
    folder = Path(settings.output_dir)
    if settings.model is None:
        settings = replace(settings, model=str(folder / BASE), weights="pretrained")
    return replace(settings, data=settings.data or tuple(str(folder / name) for name in TEXTS.values()))


def _write_base(folder: Path) -> None:
    """Write a Llama of 0.4 million parameters, whose seeded random weights are large enough for LoRA to learn on."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with seeded(BASE_SEED):
        model = LlamaForCausalLM(config)
    folder.mkdir(exist_ok=True)
    tokenizer.save_pretrained(folder)
    logging.disable_progress_bar()
    model.save_pretrained(folder)


def _code() -> list[str]:
    return python_sources(max_bytes=400_000)


def _prose() -> list[str]:
    """Return the help texts that come with Python."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UsageError("this Python has no pydoc_data, which the demo trains on; pass --data") from None
    return [topics[name] for name in sorted(topics)]


def _write_texts(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer without files: one token for each byte, whose id is the byte, `<eos>` (256) and `<pad>` (257).

    Decoding what was encoded gives the same text, even where the text spells `<eos>`.
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
    """Map each byte to the letter of the ByteLevel pre-tokenizer: itself if printable, else the next above 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def python_sources(max_bytes: int = 1_000_000, max_file_bytes: int = 50_000) -> list[str]:
    """Return sources of Python's standard library: text that is on every machine, for a demo without downloads.

    The files are taken in the order of their paths until `max_bytes` are reached; those above `max_file_bytes` are
    left out. The result is the same on every run with the same Python.
    """
    texts, total = [], 0
    folder = Path(sysconfig.get_paths()["stdlib"])
    for file in files_in(folder):
        left_out = {"site-packages", "dist-packages", "test", "tests"} & set(file.relative_to(folder).parts)
        if file.suffix != ".py" or left_out or not 0 < file.stat().st_size <= max_file_bytes:
            continue
        text = text_of(file)
        if text is None:
            continue
        total += len(text.encode())
        if total > max_bytes:
            break
        texts.append(text)
    return texts
