"""The words that tell skills apart."""

from __future__ import annotations

import math

from dylora_moe.reporting.words import telling_words

CODE = ["def area(r): return r", "def side(x): return x"]
PROSE = ["the area of the circle", "the side of the square"]


def test_the_most_telling_words_come_first():
    found = telling_words({"code": CODE, "prose": iter(PROSE)}, 2)
    assert found == {"code": ["def", "return"], "prose": ["the", "of"]}  # not area and side, which both have


def test_a_score_by_hand():
    """One word, by the equations: y_i = 3 of 4 here, 1 of 4 there, and the prior is their sum, 4 of 8."""
    delta = math.log((3 + 4) / (4 + 8 - 3 - 4)) - math.log((1 + 4) / (4 + 8 - 1 - 4))
    assert delta > 0
    assert telling_words({"a": ["xx xx xx yy"], "b": ["xx yy yy yy"]}, 9) == {"a": ["xx"], "b": ["yy"]}


def test_frequent_evidence_counts_more_than_a_rare_word():
    texts = {"a": ["common " * 30 + "filler " * 100 + "once"], "b": ["common " * 10 + "filler " * 100]}
    assert telling_words(texts, 2)["a"] == ["common", "once"]


def test_without_others_no_word_is_telling():
    assert telling_words({"only": CODE}, 5) == {"only": []}
    assert telling_words({"one": [""], "other": []}, 5) == {"one": [], "other": []}


def test_numbers_and_very_long_runs_are_no_words():
    found = telling_words({"a": ["1234 x_1 " + "z" * 31], "b": ["other words"]}, 5)
    assert found["a"] == ["x_1"]
