"""The names and limits that several rooms share."""

from __future__ import annotations

MIB = 1 << 20

MAX_EXPERTS = 1024
MAX_SEED = (1 << 32) - 1  # numpy's, which the Trainer seeds too

IGNORED_LABEL = -100

EXPERT_PREFIX = "expert_"
NO_EXPERT = -1

NEW, IMMATURE, MATURE = "new", "immature", "mature"


def expert_name(index: int) -> str:
    return f"{EXPERT_PREFIX}{index}"


STATES = (NEW, IMMATURE, MATURE)
