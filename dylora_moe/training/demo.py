"""What `train.py --demo` trains: a tiny model with a tokenizer of bytes, on this machine's own Python. No network."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from ..base.preserve import seeded
from ..data.text_files import files_in, text_of
from ..errors import UsageError

BASE = "base"
BASE_SEED = 0
TEXTS = {"code": "code.jsonl", "prose": "prose.jsonl"}
FILES = (BASE, *TEXTS.values(), ".base.partial", ".texts.partial")
SETTINGS = {
    "experts": 2, "lora_r": 8, "lora_alpha": 16, "targets": ["all-linear"], "block_size": 128, "batch_size": 8,
    "max_steps": 60, "save_steps": 30, "learning_rate": 1e-2, "device": "cpu",
}  # fmt: skip


def write(args) -> None:
    """Write the base model and the texts into the run folder, unless they are given or there already."""
    folder = Path(args.output_dir)
    if args.model_is_default and not (folder / BASE).is_dir():
        _write_base(folder / ".base.partial")
        (folder / ".base.partial").rename(folder / BASE)
    if not args.data:
        for name, read in (("code", _code), ("prose", _prose)):
            if not (folder / TEXTS[name]).exists():
                _write_texts(folder / ".texts.partial", read())
                (folder / ".texts.partial").rename(folder / TEXTS[name])


def fill_in(args) -> None:
    """Set `args.model` and `args.data`, unless they are given, to what `write` has written."""
    folder = Path(args.output_dir)
    if args.model_is_default:
        args.model, args.weights = str(folder / BASE), "pretrained"
    args.data = args.data or [str(folder / name) for name in TEXTS.values()]


def _write_base(folder: Path) -> None:
    """A Llama of 0.4 million parameters with seeded random weights, large enough for LoRA to make something of them."""

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
    """The help texts that come with Python."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UsageError("this Python has no pydoc_data, which the demo trains on; pass --data") from None
    return [topics[name] for name in sorted(topics)]


def _write_texts(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")


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


# --- the demo's data -------------------------------------------------------------------------------------------------


def python_sources(max_bytes: int = 1_000_000, max_file_bytes: int = 50_000) -> list[str]:
    """Sources of this Python's standard library: text that is on every machine, for a demo without downloads.

    In the order of their paths, files above `max_file_bytes` left out, until `max_bytes` are reached: the same on
    every run with the same Python.
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
