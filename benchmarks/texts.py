"""Real texts that many machines have, as skills: two pairs of them share most of their words.

python -m benchmarks.texts     what this machine has of each, and what is missing
"""

from __future__ import annotations

import gzip
import hashlib
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

MAX_FILE_BYTES = 300_000
PER_FOLDER = 40  # files, so that one large package is not the whole of a skill
DOCUMENT = 8_000  # characters, from a place that the document's hash chooses
HELD_OUT = 5  # one document of this many is never trained on
SHORTEST = 1_000  # characters
INCLUDE = Path("/usr/include")
CPP = re.compile(r"^\s*(namespace\b|template\s*<|class\s+\w+|using\s)|std::|extern \"C\+\+\"", re.MULTILINE)


@dataclass(frozen=True)
class Corpus:
    """The documents of one skill. No held-out document is trained on."""

    train: list[str]
    held_out: list[str]


# ---- where they come from ----


def python_code() -> Iterator[tuple[str, str]]:
    folder = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "pydoc_data", "encodings", "idlelib"}
    return _read(folder, [path for path in folder.rglob("*.py") if not left_out & set(path.parts)])


def python_reference() -> Iterator[tuple[str, str]]:
    """English prose: the pages of Python's reference that `help()` shows, cut where one is long."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name in sorted(topics):
        for start in range(0, len(topics[name]), DOCUMENT):
            yield name, topics[name][start : start + DOCUMENT]


def manual_pages() -> Iterator[tuple[str, str]]:
    """English prose: the manual pages, without the commands of their formatter."""
    folder = Path("/usr/share/man")
    paths = [path for section in "1235678" for path in folder.glob(f"man{section}/*.gz") if "gcloud" not in path.name]
    for name, text in _read(folder, paths, per_folder=MOST):
        text = re.sub(r"^\.\\\".*\n|^'.*\n", "", text, flags=re.MULTILINE)  # comments
        text = re.sub(r"^\.(?:S[HS])\s+(.*)$", r"\n\1\n", text, flags=re.MULTILINE)  # headings
        text = re.sub(r"^\.(?:[BI]|[BIR]{2}|SM|SB)\s+(.*)$", r"\1", text, flags=re.MULTILINE)  # fonts
        text = re.sub(r"^\..*\n", "", text, flags=re.MULTILINE)
        text = re.sub(r"\\f[A-Z]|\\f\(..|\\f\[.*?\]|\\&|\\/|\\,|\\[|^]", "", text)
        text = re.sub(r"\\\(aq|\\\[aq\]|\\\(cq", "'", re.sub(r"\\(?:-|\(en|\(hy)", "-", text))
        yield name, text.replace("\\e", "\\").replace("\\ ", " ").replace('"', "")


def c_headers() -> Iterator[tuple[str, str]]:
    """C, not C++: what the C library, the kernel and other libraries declare."""
    paths = [path for path in INCLUDE.rglob("*.h") if "c++" not in path.parts and "archs" not in path.parts]
    return ((name, text) for name, text in _read(INCLUDE, paths) if not CPP.search(text))


def cpp_headers() -> Iterator[tuple[str, str]]:
    folder = INCLUDE / "c++"
    return _read(folder, [path for path in folder.rglob("*") if path.is_file()], per_folder=MOST)


SOURCES: dict[str, Callable[[], Iterator[tuple[str, str]]]] = {
    "python": python_code,
    "reference": python_reference,
    "manual": manual_pages,
    "c": c_headers,
    "cpp": cpp_headers,
}
PLACES = {
    "python": "Python's standard library",
    "reference": "pydoc_data.topics, which some builds of Python lack",
    "manual": "/usr/share/man (Debian's small images leave it out)",
    "c": "/usr/include (packages libc6-dev, linux-libc-dev)",
    "cpp": "/usr/include/c++ (package libstdc++-dev)",
}
PAIRS = (("c", "cpp"), ("reference", "manual"))  # that share most of their words
ENOUGH, MOST = 40, 400  # documents


def _read(root: Path, paths: list[Path], per_folder: int = PER_FOLDER) -> Iterator[tuple[str, str]]:
    """(name, text) of the files, in an order that no folder decides, at most so many of each folder below root."""
    taken: Counter[str] = Counter()
    for path in sorted(paths, key=lambda path: _hash(str(path.relative_to(root)))):
        parts = path.relative_to(root).parts
        if taken[parts[0]] >= per_folder or path.is_symlink() or path.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            text = data.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        taken[parts[0]] += 1
        yield str(Path(*parts)), text


# ---- documents ----


def corpus(kind: str) -> Corpus:
    """The documents of a skill; which of them are held out depends on their names alone."""
    documents: list[tuple[str, str]] = []
    seen = set()
    for name, text in SOURCES[kind]():
        if len(text) < SHORTEST or _hash(text[:SHORTEST]) in seen:
            continue
        seen.add(_hash(text[:SHORTEST]))
        start = _hash(text) % (len(text) - DOCUMENT) if len(text) > DOCUMENT else 0
        start = text.find("\n", start) + 1 if start else 0
        documents.append((name, text[start : start + DOCUMENT]))
        if len(documents) == MOST:
            break
    names = sorted({name for name, _ in documents}, key=_hash)
    held_out = set(names[: len(names) // HELD_OUT])
    parts: tuple[list[str], list[str]] = ([], [])
    for name, text in documents:
        parts[name in held_out].append(text)
    return Corpus(*parts)


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def available(kinds: Iterable[str] = tuple(SOURCES)) -> tuple[dict[str, Corpus], list[str]]:
    """The skills of this machine, and a line for each that is missing."""
    found, missing = {}, []
    for kind in kinds:
        documents = corpus(kind)
        if len(documents.train) + len(documents.held_out) < ENOUGH:
            missing.append(f"{kind} is missing: it is read from {PLACES[kind]}")
        else:
            found[kind] = documents
    return found, missing


def rows(documents: list[str], tokenizer, length: int, count: int, seed: int = 0) -> torch.Tensor:
    """(count, length) int64: pieces of documents, each of another one while there are any.

    A document shorter than `length` tokens is left out.
    """
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = []
    while len(found) < count:
        before = len(found)
        for index in torch.randperm(len(documents), generator=generator).tolist():
            ids = tokenizer(documents[index], add_special_tokens=False)["input_ids"]
            if len(ids) >= length:
                start = int(torch.randint(len(ids) - length + 1, (1,), generator=generator))
                found.append(ids[start : start + length])
            if len(found) == count:
                break
        if len(found) == before:
            raise ValueError(f"no document has {length} tokens")
    return torch.tensor(found)


def main() -> int:
    found, missing = available()
    for kind, documents in found.items():
        size = sum(map(len, documents.train))
        print(f"{kind}: {len(documents.train)} documents, {size:,} characters; held out {len(documents.held_out)}")
    print("\n".join(missing))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
