"""Does novelty tell known skills from new ones? Five skills, and data sets of some forty other kinds of text.

python -m benchmarks.novelty
python -m benchmarks.novelty --json benchmarks/results/novelty.json

The text is what this machine has: Python and its packages, C and C++ headers, man pages, message catalogs in many
languages, and what else is below /usr/share. A data set has six documents; those of a skill are documents that it was
not collected from. A kind of which there are fewer documents is left out. Each data set is judged as
`train.py --grow` judges it, then once more by each skill alone; then it is shown which ones are divided, and whether a
run that grows sees that two of its data sets are of one new kind.
"""

from __future__ import annotations

import argparse
import fnmatch
import gettext
import gzip
import os
import random
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dylora_moe import DyLoRAMoE, MoELoraConfig, NoveltyDetector, SkillLibrary
from dylora_moe.base.find import find_base
from dylora_moe.base.load import load_tokenizer
from dylora_moe.base.preserve import fresh_base
from dylora_moe.data.documents import Document
from dylora_moe.skills.features import collect, evenly, read_states
from dylora_moe.skills.library import Skill
from dylora_moe.skills.novelty import Metric, Verdict
from dylora_moe.skills.sizes import MOST_STATES, SampleSizes
from dylora_moe.stages.growth import Judge, windows_to_judge

from . import common, models
from .common import Result

SITE, STDLIB = sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"]
ROOTS = ("/usr/share", "/usr/include", "/usr/lib/git-core", "/etc/init.d", "/var/lib/dpkg/info", SITE, STDLIB)
MOST_BYTES = 3 << 20  # of a file that is looked at
CHARACTERS = (1500, 8000)  # of a document: the fewest, and the most
SET = 6  # documents of a data set
AGAIN = 8  # new kinds of which a run has two data sets
TRAINED, HELD_OUT = 60, 2 * SET  # documents of a skill
ASKED = 0.95  # 38 of 40
NEW = "new"
PROSE = "English prose"
MIXED = (  # a skill, and a kind that is none
    ("Python", "SQL"), ("Python", "JavaScript"), (PROSE, "messages in de"), ("C headers", "JavaScript"),
    ("C++ headers", "SQL"), ("man pages", "reStructuredText"),
)  # fmt: skip
SKILLS = {
    "Python": (f"{SITE}/transformers/*.py", f"{SITE}/peft/*.py", f"{STDLIB}/asyncio/*.py"),
    "C headers": ("/usr/include/[a-b]*.h", "/usr/include/[d-z]*.h"),
    "C++ headers": ("/usr/include/c++/*",),
    "man pages": ("/usr/share/man/man[1235678]/*.gz",),
}
OTHERS = {
    "shell": ("/usr/share/bash-completion/completions/*", "/usr/lib/git-core/git-*.sh", "/etc/init.d/*"),
    "Perl": ("/usr/share/perl*.pm",),
    "licences": ("/usr/share/common-licenses/*", "/usr/share/doc/*/copyright"),
    "changelogs": ("*/changelog*.gz",),
    "locale definitions": ("/usr/share/i18n/locales/*",),
    "character maps": ("/usr/share/i18n/charmaps/*.gz",),
    "lists of files": ("/var/lib/dpkg/info/*.list",),
    "CUDA": ("*.cuh", "*.cu"),
    "patches": ("*.patch", "*.diff"),
    "TeX": ("*.tex", "*.texi"),
    "Fortran": ("*.f90", "*.f"),
    **{kind: (f"*.{ending}",) for kind, ending in (
        ("HTML", "html"), ("XML", "xml"), ("JSON", "json"), ("YAML", "yaml"), ("CSS", "css"), ("JavaScript", "js"),
        ("CMake", "cmake"), ("Vim script", "vim"), ("M4", "m4"), ("PHP", "php"), ("Tcl", "tcl"), ("SVG", "svg"),
        ("SQL", "sql"), ("CSV", "csv"), ("reStructuredText", "rst"), ("roff macros", "tmac"), ("Cython", "pyx"),
        ("Markdown", "md"), ("checksums", "md5sums"), ("font metrics", "afm"), ("Emacs Lisp", "el"), ("Ruby", "rb"),
        ("library symbols", "symbols"),
    )},
}  # fmt: skip
LANGUAGES = ("de", "fr", "ru", "ja", "zh_CN", "pl", "cs", "tr", "es", "it", "uk", "ko")
CATALOGS = "/usr/share/locale/{}/LC_MESSAGES/*.mo"


def main(argv: Sequence[str] | None = None) -> int:
    return common.run("novelty", __doc__, measure, argv, models.add_model_flags)


def measure(args: argparse.Namespace, result: Result) -> None:
    result.settings["threads"] = common.fix_threads()
    base = models.base_of(args, result.settings)
    model = DyLoRAMoE(fresh_base(base), 2, lora=MoELoraConfig(r=4))
    tokenize = _tokenizer(args, base)
    known, new = texts([f"{STDLIB}/asyncio"] if args.quick else ROOTS)
    library = SkillLibrary()
    sizes = SampleSizes(64, 16 if args.quick else MOST_STATES)
    for name, documents in known.items():
        kept = documents[HELD_OUT:]
        found = collect(model, [{"input_ids": tokenize(text)} for text in kept], sizes)
        library.update(Skill(name, tokens=found.tokens, features=found.features, states=found.states), sizes)
    check([skill.states.rows().double() for skill in library], result)
    chosen = [(name, name, d[i : i + SET]) for name, d in known.items() for i in (0, SET)]
    chosen += [(kind, NEW, d[:SET]) for kind, d in new.items() if len(d) >= SET]
    sets = [data_set(model, kind, wanted, list(map(tokenize, d))) for kind, wanted, d in chosen]
    judge(NoveltyDetector(model, library), sets, result)
    judge_alone(model, library, sets, result)
    divide(NoveltyDetector(model, library), sets, result)
    enough = [kind for kind, documents in new.items() if len(documents) == 2 * SET]
    some = [enough[i] for i in evenly(len(enough), 2 if args.quick else AGAIN)]
    halves = {kind: [list(map(tokenize, new[kind][i : i + SET])) for i in (0, SET)] for kind in some}
    again(model, library, halves, result)


@dataclass(frozen=True)
class DataSet:
    """Documents of one kind, and what they should be taken for: "new" or a skill.

    Args:
        states: by which they are judged together.
    """

    kind: str
    wanted: str
    documents: list[list[int]]
    states: torch.Tensor


def data_set(model: DyLoRAMoE, kind: str, wanted: str, documents: list[list[int]]) -> DataSet:
    return DataSet(kind, wanted, documents, read_states(model, windows_to_judge(kind, documents)))


def check(groups: list[torch.Tensor], result: Result) -> None:
    """The distances against NumPy, with the covariance row by row as in the paper."""
    within = np.concatenate([(group - group.mean(0)).numpy() for group in groups])  # (K, H)
    covariance = within.T @ within / len(within)
    target = np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    noise = sum(np.square(np.outer(row, row) - covariance).sum() for row in within) / len(within) ** 2
    share = min(1.0, noise / np.square(covariance - target).sum())
    shrunk = share * target + (1 - share) * covariance
    apart = (groups[0] - groups[-1].mean(0)).numpy()  # (K of the first, H)
    expected = np.sqrt((apart * np.linalg.solve(shrunk, apart.T).T).sum(1))
    off = np.abs(Metric(groups).distances(groups[0])[:, -1].numpy() / expected - 1).max()
    result.check("distances to the last skill against NumPy, relative", float(off), 1e-3)


def judge(detector: NoveltyDetector, sets: list[DataSet], result: Result) -> None:
    note = "Distance to the nearest skill, relative to its threshold: above 1 is new."
    table = result.table("novelty", "Known or new?", ["kind", "right", "taken for", "nearest", "relative"], note)
    right = 0
    for each in sets:
        verdict = detector.judge(each.states)
        found = verdict.skill if verdict.known else NEW
        right += found == each.wanted
        table.add(each.kind, common.MARKS[found == each.wanted], found, verdict.skill, _relative(verdict))
    result.claim(f"{right} of {len(sets)} data sets are judged right", right / len(sets), ASKED, "", at_least=True)


def judge_alone(model: DyLoRAMoE, library: SkillLibrary, sets: list[DataSet], result: Result) -> None:
    """Judge by a library of one skill, for each of them."""
    title = "Known or new, with one skill only?"
    table = result.table("alone", title, ["skill", "right", "its own sets", "nearest others", "judged wrongly"])
    right = 0
    for skill in library:
        alone = SkillLibrary()
        alone.add(skill)
        detector = NoveltyDetector(model, alone)
        verdicts = [(each, detector.judge(each.states)) for each in sets]
        wrong = [each.kind for each, verdict in verdicts if verdict.known != (each.wanted == skill.name)]
        right += len(sets) - len(wrong)
        own = ", ".join(_relative(verdict) for each, verdict in verdicts if each.wanted == skill.name)
        others = sorted((float(_relative(verdict)), each.kind) for each, verdict in verdicts if each.kind != skill.name)
        nearest = ", ".join(f"{kind} {relative:.2f}" for relative, kind in others[:2])
        table.add(skill.name, f"{len(sets) - len(wrong)} of {len(sets)}", own, nearest, ", ".join(wrong))
    share = right / len(library) / len(sets)
    result.claim("with one skill only, judged right", share, ASKED, "", at_least=True)


def divide(detector: NoveltyDetector, sets: list[DataSet], result: Result) -> None:
    """Which data sets are divided: those of two kinds should be, those of one should not."""
    columns = ["data set", "right", "divided into", "in the wrong part", "documents known", "new"]
    table = result.table("divided", "Is a data set divided?", columns)
    by_kind = {each.kind: each for each in reversed(sets)}  # the first one of each kind
    pairs = [(by_kind[one], by_kind[other]) for one, other in MIXED if {one, other} <= set(by_kind)]
    mixed_in = {other for _, other in MIXED}
    pure = [each for each in by_kind.values() if each.wanted != NEW or each.kind in mixed_in]
    right = 0
    for parts in [*((each,) for each in pure), *pairs]:
        judge = Judge(detector)
        (labels,) = judge(["data"], [documents_of([ids for each in parts for ids in each.documents])])
        ok = len(judge.decisions) == len(parts)
        right += ok
        sizes, wrong = "-", "-"
        if len(judge.decisions) == 2:
            sizes = f"{labels.count(0)} + {labels.count(1)}"
            wrong = str(sum(label != i // SET for i, label in enumerate(labels)))
        known, new = (sum(getattr(d, f"documents_{kind}") for d in judge.decisions) for kind in ("known", "new"))
        table.add(" and ".join(each.kind for each in parts), common.MARKS[ok], sizes, wrong, str(known), str(new))
    share = right / (len(pure) + len(pairs))
    result.claim("data sets are divided where they should be", share, ASKED, "", at_least=True)


def again(model: DyLoRAMoE, library: SkillLibrary, halves: dict[str, list[list[list[int]]]], result: Result) -> None:
    """Judge in one run two data sets of each new kind, and one of the next kind, which is neither."""
    right, rows, kinds = 0, [], list(halves)
    for kind, then in zip(kinds, kinds[1:] + kinds[:1], strict=True):
        judge = Judge(NoveltyDetector(model, library))
        data = [documents_of(documents) for documents in (*halves[kind], halves[then][0])]
        judge([kind, "once more", "then"], data)
        if judge.parts or judge.decisions[0].known:
            continue
        _, *later = judge.decisions
        found = [str(decision.nearest) if decision.known else NEW for decision in later]
        ok = [found[0] == kind, found[1] != kind]
        right += sum(ok)
        relative = [f"{(decision.distance or 0) / (decision.threshold or 1):.2f}" for decision in later]
        rows.append([kind, common.MARKS[all(ok)], found[0], relative[0], then, found[1], relative[1]])
    if not rows:  # a tiny model takes no text for new
        return
    columns = ["kind", "right", "once more", "relative", "then", "taken for", "relative"]
    note = "Kinds that are taken for known ones are left out. The distance is relative to the threshold, as above."
    table = result.table("again", "Known from the data set before?", columns, note)
    for row in rows:
        table.add(*row)
    text = f"{right} of {2 * len(rows)} later data sets of a run are judged right"
    result.claim(text, right / (2 * len(rows)), ASKED, "", at_least=True)


def documents_of(texts: list[list[int]]) -> list[Document]:
    return [Document(np.array(ids, np.int32), np.ones(len(ids), bool)) for ids in texts]


def _relative(verdict: Verdict) -> str:
    return f"{verdict.distance / verdict.threshold:.2f}"


# ---- text ----


def texts(roots: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The documents of each skill and of each other kind, the same on the same machine."""
    paths = sorted(_files(roots))
    known: dict[str, list[str]] = {PROSE: _prose()}
    known |= {kind: list(_read(paths, patterns, TRAINED + HELD_OUT)) for kind, patterns in SKILLS.items()}
    new = {kind: list(_read(paths, patterns, 2 * SET)) for kind, patterns in OTHERS.items()}
    new |= {f"messages in {code}": _messages(paths, code) for code in LANGUAGES}
    return {kind: found for kind, found in known.items() if len(found) > HELD_OUT}, new


def _files(roots: Sequence[str]) -> Iterator[str]:
    for root in roots:
        for folder, _, names in os.walk(root):
            yield from (os.path.join(folder, name) for name in names)


def _read(paths: list[str], patterns: Sequence[str], most: int) -> Iterator[str]:
    """Yield the beginnings of at most `most` files."""
    found = sorted({path for pattern in patterns for path in fnmatch.filter(paths, pattern)})
    random.Random(0).shuffle(found)
    for path in found:
        text = _text(Path(path))
        if text is not None and len(text) >= CHARACTERS[0]:
            yield text[: CHARACTERS[1]]
            most -= 1
            if not most:
                return


def _text(path: Path) -> str | None:
    try:
        if path.stat().st_size > MOST_BYTES:
            return None
        raw = path.read_bytes()
        return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
    except (OSError, ValueError, EOFError):
        return None


def _prose() -> list[str]:
    from pydoc_data.topics import topics

    found = [text[: CHARACTERS[1]] for _, text in sorted(topics.items()) if len(text) >= CHARACTERS[0]]
    random.Random(0).shuffle(found)
    return found[: TRAINED + HELD_OUT]


def _messages(paths: list[str], code: str) -> list[str]:
    """Translated messages of programs, in one document for each program."""
    found = []
    for path in fnmatch.filter(paths, CATALOGS.format(code))[:12]:
        with open(path, "rb") as file:
            catalog: dict[Any, str] = vars(gettext.GNUTranslations(file))["_catalog"]
        text = "\n".join(message for original, message in catalog.items() if original)
        found += [text[: CHARACTERS[1]]] if len(text) >= CHARACTERS[0] else []
    return found


def _tokenizer(args: argparse.Namespace, base: Any) -> Callable[[str], list[int]]:
    if args.quick:  # the tiny model knows bytes
        return lambda text: list(text.encode())[:512]
    name = base.config._name_or_path
    path = models.gguf_file() if name == models.CPU_MODEL else None
    return partial(_ids, load_tokenizer(find_base(str(path or name), weights="none")[0]))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text).input_ids


if __name__ == "__main__":
    raise SystemExit(main())
