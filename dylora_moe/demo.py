"""What `train.py --demo` trains: a tiny model with a tokenizer of bytes, on this machine's own Python. No network."""

from __future__ import annotations

import json
from pathlib import Path

from .errors import UsageError

BASE = "base"
BASE_SEED = 0


def prepare(args) -> None:
    """Fill in `args.model` and `args.data`, unless they are given, with files in the run folder.

    What is there from an earlier start of the same run is used as it is.
    """
    folder = Path(args.output_dir)
    if args.model_is_default:
        args.model, args.weights = str(folder / BASE), "pretrained"
        if not (folder / BASE / "config.json").is_file():
            _write_base(folder / BASE)
    if not args.data:
        sources = {"code": _code(), "prose": _prose()}
        args.data = [str(_write_texts(folder / f"{name}.jsonl", texts)) for name, texts in sources.items()]


def _write_base(folder: Path) -> None:
    """A Llama of 0.4 million parameters with seeded random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

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
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with seeded(BASE_SEED):
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
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


def _write_texts(path: Path, texts: list[str]) -> Path:
    if not path.exists():
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        partial.replace(path)
    return path
