"""The words that tell one skill's text from the others'."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

WORD = re.compile(r"\b[^\W\d_]\w{1,29}\b")  # begins with a letter; longer runs are no words


def telling_words(texts_by_skill: Mapping[str, Iterable[str]], count: int) -> dict[str, list[str]]:
    """Return the most telling words of each skill: those that its text has more often than the others' text.

    Words are ranked by the log-odds ratio with an informative Dirichlet prior, divided by its standard deviation: with
    y_i of n_i words of this skill, y_j of n_j words of all others, and the prior a_w = y_i + y_j, of sum a,

        delta = log((y_i + a_w) / (n_i + a - y_i - a_w)) - log((y_j + a_w) / (n_j + a - y_j - a_w))
        z = delta / sqrt(1 / (y_i + a_w) + 1 / (y_j + a_w))

    Monroe, Colaresi and Quinn, "Fightin' Words", Political Analysis 16 (2008), equations 16, 19 and 22.

    Args:
        texts_by_skill: Texts by the name of their skill. Each is read once.
        count: The most words to return for each skill.

    Returns:
        Lower-case words by skill, the most telling one first; fewer than `count`, or none, where a skill has no more
        that it uses more often than the others do, as where it is the only one.
    """
    counts = {skill: Counter(words(texts)) for skill, texts in texts_by_skill.items()}
    pooled = sum(counts.values(), Counter[str]())
    return {skill: _ranked(here, pooled)[:count] for skill, here in counts.items()}


def words(texts: Iterable[str]) -> Iterable[str]:
    """Yield the words of texts, in lower case."""
    return (word.lower() for text in texts for word in WORD.findall(text))


def _ranked(here: Counter[str], pooled: Counter[str]) -> list[str]:
    total, size = pooled.total(), here.total()
    scores = {}
    for word, mine in here.items():
        prior = pooled[word]
        one, other = mine + prior, 2 * prior - mine  # y_i + a_w, and y_j + a_w
        rest, other_rest = size + total - one, 2 * total - size - other
        if other_rest and rest:
            delta = math.log(one / rest) - math.log(other / other_rest)
            scores[word] = delta / math.sqrt(1 / one + 1 / other)
    telling = (word for word, score in scores.items() if score > 1e-9)
    return sorted(telling, key=lambda word: (-scores[word], word))
