"""How much of a skill is kept. Imports no torch: the validators need it as well."""

from __future__ import annotations

from typing import NamedTuple

NAME_BYTES = 32  # the most of a skill's name in UTF-8
NO_LOSS = -1.0  # the loss that is not known, in files
MOST_FEATURES, LEAST_FEATURES = 1024, 64
MOST_STATES, LEAST_STATES = 96, 16
SHARE = 10  # a skill takes at most one part in so many of its expert's bytes
ROW_BYTES = 16  # of a row beside its values: key, scale and count


class SampleSizes(NamedTuple):
    """The most rows that are kept of a skill."""

    features: int = MOST_FEATURES
    states: int = MOST_STATES


def sample_sizes(expert_bytes: int, width: int, state_width: int | None = None) -> SampleSizes:
    """Return how many rows of a skill take at most a tenth of an expert's bytes, within the limits above.

    Args:
        width: of the input embeddings.
        state_width: of the last hidden states, if it is another one.
    """
    room = expert_bytes // SHARE
    features = room * 3 // 4 // (width + ROW_BYTES)
    states = room // 4 // ((state_width or width) + ROW_BYTES)
    return SampleSizes(min(max(features, LEAST_FEATURES), MOST_FEATURES), min(max(states, LEAST_STATES), MOST_STATES))
