"""Results of a run that never was: numbers by formulas, the same each time."""

from __future__ import annotations

from dataclasses import replace

from dylora_moe.reporting.results import Decision, Example, Results, SkillEntry, SkillLoss, StageResult

NAMES = ("python", "prose", "c-headers", "man-pages", "sql", "german", "logs", "tex")
WORDS = ("import self return", "which attribute statement", "define extern pyobject", "synopsis option see")
CODE = "def area(radius):\n    return 3.14159 * radius ** 2\n\nprint(area(2))\n"
PROSE = "A class definition is an executable statement. The inheritance list usually gives a list of base classes."


def name(number: int) -> str:
    return NAMES[number] if number < len(NAMES) else f"skill-{number}"


def sample(skills: int = 4, grown: int = 1) -> Results:
    """Results of a specialised run with a stage for all but the last `grown` skills, and one for each of those."""
    first = skills - grown
    stages = [_stage(0, list(range(first)), first)]
    stages += [_stage(number, [first + number - 1], first + number) for number in range(1, grown + 1)]
    entries = [_entry(number, skills) for number in range(skills)]
    versions = {"dylora-moe": "0.3.0", "torch": "2.14.1"}
    examples = [_example(f"held-out {name(i % skills)}", [i % skills], skills) for i in range(min(skills, 3))]
    examples += [_example("a text that changes", [0, 1 % skills], skills)]
    step, parameters = stages[-1].last_step, {"base": 134_515_008, "experts": 921_600 * skills, "router": 577 * skills}
    return Results(
        step, f"checkpoint-{step}", None, "HuggingFaceTB/SmolLM2-135M", parameters, "specialised", skills, versions,
        stages, entries, examples,
    )  # fmt: skip


def joint() -> Results:
    results = sample(3, 0)
    stages = [
        replace(stage, evaluation={n: replace(loss, own=None) for n, loss in stage.evaluation.items()})
        for stage in results.stages
    ]
    skills = [replace(skill, expert=None, confidence=[], usage=[0.4, 0.35, 0.25]) for skill in results.skills]
    return replace(results, route="joint", stages=stages, skills=skills)


def unmeasured() -> Results:
    """Results of a run that held nothing out."""
    results = sample(2, 1)
    stages = [replace(stage, evaluation={}) for stage in results.stages]
    skills = [replace(skill, usage=[], confidence=[]) for skill in results.skills]
    return replace(results, stages=stages, skills=skills, examples=[])


def _stage(number: int, trained: list[int], known: int) -> StageResult:
    start = 240 * number
    curves = {
        name(skill): [
            (start + step, 2.9 - 0.08 * skill + 1.2 / (1 + step / 30) + _noise(skill, step))
            for step in range(60 * (not number), 240, 4)
        ]
        for skill in trained
    }
    if number == 0:
        curves = {
            "trunk": [(step, 3.1 + 1.4 / (1 + step / 12) + _noise(99, step)) for step in range(0, 60, 2)]
        } | curves
    evaluation = {name(skill): _loss(skill, number, skill in trained, known) for skill in range(known)}
    novelty = [Decision(name(s), 512, False, name(0), 18.25 + s, 12.1, 40, 0) for s in trained] if number else []
    if number:
        novelty.append(Decision("more-python", 2048, True, name(0), 7.5, 12.1, 3, 120))
    return StageResult(
        "grow" if number else "train", start, start + 240, [name(s) for s in trained], curves, evaluation, novelty
    )


def _noise(skill: int, step: int) -> float:
    return ((skill * 7919 + step * 104729) % 1000 - 500) / 5000


def _loss(skill: int, stage: int, is_new: bool, known: int) -> SkillLoss:
    base = 2.9 - 0.11 * (skill % 8)
    own = base * (0.9 + 0.004 * (skill % 5))
    routed = own * (1.001 if is_new else 1.001 + (0.009 if skill == 1 else -0.0004) * stage)
    return SkillLoss(base, routed, own, own * 1.02, (skill + 1) % known)


def _entry(number: int, experts: int) -> SkillEntry:
    usage = [0.08 / max(experts - 1, 1)] * experts
    usage[number] = 1 - sum(usage) + usage[number]
    usage = usage if experts > 1 else [1.0]
    confidence = [(position, 1 - 0.75 / (1 + position / (4 + number))) for position in range(0, 128, 4)]
    words = WORDS[number % len(WORDS)].split()
    return SkillEntry(
        name(number), number, 120_000 + 7 * number, words, usage, confidence, [f"data/{name(number)}.jsonl"]
    )


def _example(title: str, skills: list[int], experts: int) -> Example:
    tokens = []
    for place, skill in enumerate(skills):
        text = PROSE if skill else CODE
        for number, word in enumerate(_split(text)):
            own = 0.95 - 0.6 / (1 + number / 2)
            weights = [(1 - own) / max(experts - 1, 1)] * experts
            last = skills[place - 1] if place and number < 4 else skill
            weights[last] = own if experts > 1 else 1.0
            tokens.append((word, weights))
    return Example(title, [name(skill) for skill in skills], tokens)


def _split(text: str) -> list[str]:
    """Parts of at most four characters, as a tokenizer makes them."""
    parts: list[str] = []
    for character in text:
        if parts and len(parts[-1]) < 4 and character.isalpha():
            parts[-1] += character
        else:
            parts.append(character)
    return parts
