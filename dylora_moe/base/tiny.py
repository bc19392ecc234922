"""A tiny base model with a tokenizer of bytes, for the demo and for tests: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .preserve import seeded
from .quiet import quiet

SEED = 0


def write_tiny_base(folder: Path) -> None:
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
    with seeded(SEED):
        model = LlamaForCausalLM(config)
    with quiet():
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)


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
