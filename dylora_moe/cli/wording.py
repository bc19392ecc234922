"""How several commands word the same thing."""

from __future__ import annotations


def experts_line(config: dict) -> str:
    """As "4 experts (3 mature, 1 new)"."""
    states = states_of(config)
    if not states:
        return "experts unknown"
    if len(set(states)) == 1:
        counts = states[0]
    else:
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states), key=states.index))
    return f"{count_of(states, 'expert')} ({counts})"


def states_of(config: dict) -> list[str]:
    return [expert["state"] for expert in config.get("experts", [])]


def count_of(items: list, what: str) -> str:
    return f"{len(items)} {what}{'' if len(items) == 1 else 's'}"
