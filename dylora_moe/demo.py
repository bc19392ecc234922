"""What `train.py --demo` trains: a tiny model with a tokenizer of bytes, on this machine's own Python. No network."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import UsageError

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
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from .data import byte_tokenizer
    from .model import seeded

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
    from .data import python_sources

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
