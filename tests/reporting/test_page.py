"""report.html, as a parser of HTML and a reader see it. test_browser.py looks at it in a browser."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from dylora_moe.reporting import page
from dylora_moe.reporting.charts import Scale, spread, thinned
from dylora_moe.reporting.results import Decision, Example, Results
from dylora_moe.reporting.sections import curves, forgetting, last_changes
from dylora_moe.reporting.sentences import decision_words, summary

from ..support.results import joint, sample, unmeasured

SECTIONS = ["summary", "losses", "forgetting", "curves", "usage", "confidence", "examples", "novelty", "words"]
VOID = {"meta", "br", "input", "img", "link", "hr"}
EMPTY = replace(sample(1, 0), stages=[], skills=[], examples=[])
LARGE = sample(64, 40)
LARGE = replace(
    LARGE,
    skills=[replace(skill, words=["w" * 30] * 12, data=["d" * 120] * 3) for skill in LARGE.skills],
    examples=[replace(example, tokens=example.tokens * 40) for example in LARGE.examples],
)
RUNS = {
    "four": sample(),
    "one skill": sample(1, 0),
    "joint": joint(),
    "not measured": unmeasured(),
    "64 experts": LARGE,
    "empty": EMPTY,
}


class Page(HTMLParser):
    """What a page is made of, and what is wrong with it."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.problems: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        self.problems += [f"{tag} is not closed" for tag in self._open]
        self.text = "".join(self.words)

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self.ids += [value for key, value in attributes if key == "id"]

    def handle_endtag(self, tag):
        if not self._open or self._open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")

    def handle_data(self, data):
        if "style" not in self._open:
            self.words.append(data)


def faults(text: str) -> list[str]:
    """What a self-contained, well-formed page of the right size must not have."""
    found = Page(text)
    problems = list(found.problems)
    problems += [f"<{tag}>" for tag in found.tags if tag in ("script", "img", "link", "iframe", "object", "use", "a")]
    problems += [key for key, _ in found.attributes if key.startswith("on") or key in ("src", "href", "srcset")]
    problems += re.findall(r"@import|url\(", text)
    problems += [f"{len(text.encode())} bytes"] if len(text.encode()) > page.MAX_BYTES else []
    problems += [f"{one} twice" for one in set(found.ids) if found.ids.count(one) > 1]
    problems += [f"no section {name}" for name in SECTIONS if name not in found.ids]
    problems += [] if found.tags.count("h1") == found.tags.count("title") == 1 else ["headings"]
    problems += [] if found.tags.count("caption") == found.tags.count("table") else ["captions"]
    return problems + ([] if ("lang", "en") in found.attributes else ["no language"])


@pytest.mark.parametrize("name", RUNS)
def test_the_page_is_sound(name):
    text = page.render(RUNS[name])
    assert faults(text) == []
    assert "None" not in Page(text).text
    assert page.render(RUNS[name]) == text


def test_faults_are_seen():
    text = page.render(sample(2))
    for good, bad, fault in [
        ("</section>", "", "</main> closes nothing"),
        ("<main>", "<main><script>1</script>", "<script>"),
        ("<main>", '<main><b onclick="x">y</b>', "onclick"),
        ("<main>", '<main><b src="https://x">y</b>', "src"),
        ("<style>", "<style>@import 'x';", "@import"),
        ("<main>", "<main>" + "x" * page.MAX_BYTES, "bytes"),
        ('id="usage"', 'id="other"', "no section usage"),
        ('lang="en"', "", "no language"),
        ("<caption>", "<!--", "captions"),
    ]:
        assert good in text
        assert fault in " ".join(faults(text.replace(good, bad))), fault


EVIL = '</script></style><img onerror="x()">{{ 7 * 7 }}&lt;\x00\u202e\ud800\x1b'


def test_text_of_others_stays_text():
    old = sample(2)
    stages = [
        replace(
            stage,
            skills=[EVIL],
            curves={EVIL: [(1, 2.0)]},
            evaluation=dict.fromkeys([EVIL], next(iter(stage.evaluation.values()))),
            novelty=[Decision(EVIL, 1, False, EVIL, 1.0, 0.5, 1, 1)],
        )
        for stage in old.stages
    ]
    skills = [replace(old.skills[0], name=EVIL, words=[EVIL], data=[EVIL])]
    examples = [Example(EVIL, [EVIL], [(EVIL, [0.5, 0.5]), ("\n\tx", [0.1, 0.9])])]
    named = replace(old, base_model=EVIL, versions={EVIL: EVIL})
    text = page.render(replace(named, stages=stages, skills=skills, examples=examples))
    assert faults(text) == []
    shown = Page(text).text
    visible = EVIL[:-4] + "\\x00\\u202e\\ud800\\x1b"
    assert shown.count(visible) >= 12
    assert not set("\x00\u202e\x1b") & set(text) and text.encode()


# ---- what it says ----


def said(results: Results) -> str:
    return " ".join(summary(results)).replace("\u00a0", " ")


def test_the_summary_says_what_was_learned_and_forgotten():
    text = said(sample())
    assert "4 experts on it learned 4 skills: python, prose, c-headers and man-pages." in text
    assert "fell from 2.735 nats per token without experts to 2.485 with them (−9.1 %)" in text
    assert text.endswith("Forgotten since they were learned, by the rise of the loss: prose (+0.9 %).")


def test_the_summary_says_when_nothing_was_forgotten_or_known():
    results = sample()
    kept = [
        replace(stage, evaluation={n: replace(loss, routed=loss.own) for n, loss in stage.evaluation.items()})
        for stage in results.stages
    ]
    assert "Nothing was forgotten: no skill's loss rose by more than 0.5 %" in said(replace(results, stages=kept))
    assert "orgotten" not in said(sample(3, 0)) + said(unmeasured())
    assert "Nothing was held out" in said(unmeasured())
    worse = [
        replace(stage, evaluation={n: replace(loss, base=2.0) for n, loss in stage.evaluation.items()})
        for stage in results.stages
    ]
    assert "The experts do not help with python, prose, c-headers and man-pages." in said(
        replace(results, stages=worse)
    )


def test_a_skill_that_is_trained_again_is_compared_with_its_last_training():
    results = sample(2, 2)
    first, second, third = replace(results.stages[1], kind="train"), results.stages[2], results.stages[2]
    losses = [replace(first.evaluation["python"], routed=loss) for loss in (2.0, 1.5, 1.8)]
    stages = [
        replace(stage, skills=skills, evaluation={"python": loss})
        for stage, skills, loss in zip((first, second, third), (["python"], ["python"], []), losses, strict=True)
    ]
    rows = forgetting(replace(results, stages=stages))
    assert [(row[0].loss, row[0].change) for row in rows] == [(2.0, None), (1.5, None), (None, 1.8 / 1.5 - 1)]
    assert last_changes(replace(results, stages=stages)) == {"python": 1.8 / 1.5 - 1}
    assert last_changes(replace(results, stages=stages[:2])) == {}


def test_stages_whose_steps_begin_at_0_again_follow_one_another():
    results = sample(3, 2)
    again = [results.stages[0]]
    for stage in results.stages[1:]:
        moved = {name: [(step - stage.first_step, loss) for step, loss in some] for name, some in stage.curves.items()}
        last = stage.last_step - stage.first_step
        again.append(replace(stage, first_step=0, last_step=last, curves=moved))
    assert curves(replace(results, stages=again)) == curves(results)
    assert said(replace(results, stages=again)) == said(results) and "Training took 720 steps in 3 stages" in said(
        results
    )


def test_decisions_in_words():
    new = Decision("a", 512, False, "b", 18.25, 12.1, 40, 0)
    assert decision_words(new).endswith(
        "the nearest skill is b, at a distance of 18.25, beyond the threshold of 12.10."
    )
    mixed = replace(new, known=True, distance=7.0, documents_known=1200)
    assert decision_words(mixed).startswith("It is known: the nearest skill is b, at a distance of 7.00, within ")
    assert decision_words(mixed).endswith("It is mixed: 40 documents would be new, 1,200 known.")
    first = replace(new, nearest=None, distance=None)
    assert decision_words(first) == "It is new: there was no skill to compare it with."


def test_numbers_and_tokens_are_there():
    text = page.render(sample())
    shown = Page(text).text.replace("\u00a0", " ")
    for wanted in ("2.612", "−9.9 %", "92 %", "+0.9 %", "21.25", "import, self, return", "data/prose.jsonl"):
        assert wanted in shown, wanted
    assert 'data-w="0: 35\u00a0%, 1: 22\u00a0%, 2: 22\u00a0%">def</span>' in text
    switch = Page(text).text.rpartition("show the weights")[2]
    assert re.search(r"0def area.*1\w+ is an", switch, re.S)  # the text that changes its skill has both numbers


# ---- charts ----


@pytest.mark.parametrize("values", [[], [2.0], [2.0, 2.0], [0.0], [1e15, -1e15], [2.0, 2.0 + 1e-15], [0.1, 0.7]])
def test_every_scale_has_ticks_inside(values):
    scale = Scale.around(values)
    ticks = [scale.at(tick) for tick in scale.ticks(5)]
    assert 1 <= len(ticks) <= 5 and ticks == sorted(ticks)
    assert all(-0.1 <= tick <= 100.1 for tick in ticks)
    assert all(0 <= scale.at(value) <= 100 for value in values)


def test_lines_are_thinned_to_means_and_marks_are_spread():
    assert thinned([(3, 5.0), (1, 1.0), (2, None), (4, 7.0), (2, 3.0)], 2) == [(1.5, 2.0), (3.5, 6.0)]
    assert thinned([], 5) == thinned([(1, None)], 5) == []
    assert spread([50, 50, 0, 100], 8) == [50, 58, 0, 100]
    assert spread([99, 99.5, 100], 8) == [84, 92, 100]


# ---- colours ----


def luminance(colour: str) -> float:
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def too_faint(text: str) -> list[str]:
    """Pairs of text and background whose contrast is below 4.5 (WCAG 2, level AA), in light and dark colours."""
    problems = []
    blocks = re.findall(r":root \{(.*?)\}", text, re.S)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
        tints = [name for name in colours if name[0] == "t"] + ["paper"]
        pairs = [(word, tint) for word in ("ink", "soft") for tint in tints]
        for word, ground in pairs + [(f"e{number}", "paper") for number in range(6)]:
            one, other = sorted((luminance(colours[word]), luminance(colours[ground])))
            if (other + 0.05) / (one + 0.05) < 4.5:
                problems.append(f"{word} on {ground}")
    return problems


def test_every_colour_can_be_read():
    text = page.render(EMPTY)
    assert too_faint(text) == []
    assert too_faint(text.replace("--soft: #5d5a52", "--soft: #9d9a92"))
