"""The names and limits that several rooms share."""

from __future__ import annotations

MODEL_TYPE = "dylora-moe"  # in config.json, by which the Auto classes of Transformers know a mixture

MIB = 1 << 20

MAX_EXPERTS = 1024
MAX_SEED = (1 << 32) - 1  # the largest seed of numpy, which the Trainer seeds too

IGNORED_LABEL = -100  # of tokens that the cross-entropy leaves out

BITSANDBYTES = ("load_in_", "bnb_4bit_", "llm_int8_")  # begin the arguments of BitsAndBytesConfig

EXPERT_PREFIX = "expert_"
NO_EXPERT = -1  # the index of "no expert" in files

NEW, IMMATURE, MATURE = "new", "immature", "mature"
STATES = (NEW, IMMATURE, MATURE)  # of an expert


def expert_name(index: int) -> str:
    """Return the name of an expert as an adapter of PEFT: "expert_0", ..."""
    return f"{EXPERT_PREFIX}{index}"
