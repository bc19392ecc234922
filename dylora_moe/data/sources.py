"""Sources of documents: a file, a folder or a data set of the Hugging Face hub, read as a `datasets.Dataset` of rows.

| source | rows |
|---|---|
| `FILE.jsonl`, `.ndjson`, `.json`, `.parquet`, `.csv`, `.tsv` | the rows of the file |
| any other file with text in UTF-8 | one row with the text of the file in the column `text` |
| a compressed file, with `.gz`, `.bz2` or `.xz` after its ending | what is in it |
| a folder with files of one of the kinds above | their rows; with `train` and `test` files those of `train` |
| any other folder | one row per text file in it, in the order of the paths |
| a folder written by `save_to_disk` | what was saved |
| `NAME`, `ORG/NAME`, with `:CONFIG`, `@REVISION` | the rows of a data set of the hub; its code is never run |
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

import datasets
import huggingface_hub
from datasets import Dataset, DatasetDict

from ..errors import UsageError, counted, listed
from .loaders import LOADERS, causes, innermost_cause, load_files
from .schemas import detect_schema, plain_name
from .text_files import check_readable, ending, files_in, refuse_compression, stem, text_of

DATA_SUFFIXES = (*LOADERS, ".txt")
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
HELD_OUT_WORDS = {"test", "validation", "valid", "val", "dev", "eval", "evaluation"}
HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^@]+))?(@(?P<revision>.+))?")
HUB_PROBE_SECONDS = 3.0


@dataclass(frozen=True)
class DataSpec:
    """One `--data SOURCE[=WEIGHT]`. A source that contains `=` is not divided if a file of that name exists."""

    source: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.source.strip():
            raise UsageError(
                "--data: the name or path of a data set is empty; expected NAME_OR_PATH or NAME_OR_PATH=WEIGHT"
            )
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise UsageError(
                f"--data {self.source}: the weight must be a finite number above 0, got {self.weight:g}; "
                "to leave a data set out, leave out its --data"
            )

    @classmethod
    def parse(cls, text: str) -> DataSpec:
        """Parse the value of `--data`. Raises UsageError."""
        if "=" not in text or Path(os.path.expanduser(text)).exists():
            return cls(text)
        source, _, weight = text.rpartition("=")
        try:
            return cls(source, float(weight))
        except ValueError as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(
                f"--data {text}: the weight after '=' must be a number, got {weight!r}; "
                "where the '=' belongs to a path, there is no such file or folder"
            ) from error

    @property
    def name(self) -> str:
        """A short name for people and metrics: that of the file, the folder or the data set of the hub.

        It has printable characters only: others, such as line breaks, are replaced by "-".
        """
        path = Path(os.path.expanduser(self.source))
        if path.is_dir():
            short = path.resolve().name
        elif looks_like_a_path(self.source) or path.exists():
            short = stem(path)
        else:
            short = re.split("[:@]", self.source)[0].split("/")[-1]
        short = unicodedata.normalize("NFC", short)  # macOS writes an umlaut as two characters
        return "".join(c if c.isprintable() else "-" for c in short).strip() or "data"


@dataclass(frozen=True)
class Rows:
    """The rows of a source, and how many of its files were not read (of other splits or kinds)."""

    dataset: Dataset
    skipped_files: int = 0


def read_rows(source: str, token: str | None = None) -> Rows:
    """Read the rows of a source. Raises UsageError if it cannot be read or has no rows."""
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        rows = _read_folder(path)
    elif path.exists():
        rows = _read_file(path)
    elif looks_like_a_path(source):
        raise UsageError(
            f"{source}: no such file or folder (looked for {path.absolute()}); check the path. "
            "A hub data set whose name looks like a path can be given as NAME@main"
        )
    else:
        rows = Rows(_read_hub(source, token))
    if len(rows.dataset) == 0:
        raise UsageError(f"{source}: holds no rows; expected at least two documents")
    return rows


def looks_like_a_path(source: str) -> bool:
    """Return whether a source that does not exist was meant as a path: a typing error must not become a download."""
    if source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1:
        return True
    suffix = ending(Path(source))
    if suffix in DATA_SUFFIXES:
        return True
    return re.search("[:@]", source) is None and re.fullmatch(r"\.[a-z]{2,8}", suffix) is not None


def _read_file(path: Path) -> Rows:
    refuse_compression(path)
    check_readable(path)
    suffix = ending(path)
    if suffix in LOADERS:
        return Rows(load_files([path], LOADERS[suffix], str(path)))
    text = text_of(path)
    if text is None:
        raise UsageError(
            f"{path}: is not UTF-8 text; convert it to UTF-8. Other files that are read end in {', '.join(LOADERS)}"
        )
    return Rows(Dataset.from_dict({"text": [text]}))


def _read_folder(folder: Path) -> Rows:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return Rows(_read_saved(folder))
    files = list(files_in(folder))
    for file in files:
        if ending(file.with_suffix("")) in DATA_SUFFIXES:  # of `a.jsonl.zst`, but not of `a.png`
            refuse_compression(file)
    data = [file for file in files if ending(file) in LOADERS and file.name not in NOT_DATA]
    if not data:
        return _read_texts(folder, files)
    kinds = sorted({LOADERS[ending(file)] for file in data})
    if len(kinds) > 1:
        raise UsageError(
            f"{folder}: has data files of several kinds ({', '.join(kinds)}); name one of the files, "
            f"or leave one kind in the folder:\n{listed([str(file.relative_to(folder)) for file in data])}"
        )
    used = _training_files(folder, data)
    for file in used:
        check_readable(file)
    left = [file for file in set(files).difference(used) if not _is_about_data(file)]
    rows = load_files(used, kinds[0], str(folder))
    try:
        detect_schema([*map(plain_name, rows.column_names)], str(folder))
    except UsageError as error:
        if not left:
            raise
        raise UsageError(
            f"{error}\nOf this folder, only its data files were read, and {counted(len(left), 'other file')} left out; "
            "to train on those, move the data files out of it"
        ) from None
    return Rows(rows, skipped_files=len(left))


def _is_about_data(file: Path) -> bool:
    """Return whether a file in a folder of data is about the data, by its name."""
    return file.name in NOT_DATA or file.stem.upper() in ("README", "LICENSE")


def _read_saved(folder: Path) -> Dataset:
    for file in folder.rglob("*.arrow"):
        check_readable(file)
    try:
        return _pick_split(datasets.load_from_disk(str(folder), keep_in_memory=True), str(folder))
    except (MemoryError, UsageError):
        raise
    except Exception as error:  # as in load_files
        raise UsageError(
            f"{folder}: looks like a folder of save_to_disk, but cannot be read: {innermost_cause(error)}; "
            "save it again"
        ) from error


def _training_files(folder: Path, files: list[Path]) -> list[Path]:
    """Return the files named after `train`, else those not named after a held-out split, else all."""

    def words(file: Path) -> set[str]:
        return set(re.split(r"[^a-z]+", str(file.relative_to(folder)).lower()))

    return (
        [file for file in files if "train" in words(file)]
        or [file for file in files if not words(file) & HELD_OUT_WORDS]
        or files
    )


def _read_texts(folder: Path, files: list[Path]) -> Rows:
    texts = [text_of(file) for file in files]
    found = [text for text in texts if text is not None]
    if not found:
        raise UsageError(
            f"{folder}: has no data files ({', '.join(DATA_SUFFIXES)}) and no text files; "
            f"found {len(files)} other file(s). Give a folder with documents"
        )
    return Rows(Dataset.from_dict({"text": found}), skipped_files=len(texts) - len(found))


def hub_answers() -> bool:
    """Return whether the hub can be reached. `datasets` itself would try for more than twenty seconds."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return True  # `datasets` looks in the cache alone
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_PROBE_SECONDS)
    except Exception:  # of httpx or requests, whichever this version of huggingface_hub uses
        return False
    return True


def _read_hub(source: str, token: str | None) -> Dataset:
    match = HUB_NAME.fullmatch(source)
    if match is None:
        raise UsageError(
            f"{source}: is neither a file or folder that exists nor a hub name; "
            "expected a path, or NAME or ORG/NAME with :CONFIG and @REVISION where needed"
        )
    if not hub_answers():
        raise UsageError(
            f"{source}: no such file or folder, and the Hugging Face hub cannot be reached to look for it there; give "
            "a local file or folder, check the network, or set HF_HUB_OFFLINE=1 if the data set is in the local cache"
        )
    try:
        loaded = datasets.load_dataset(match["name"], match["config"], revision=match["revision"], token=token)
    except MemoryError:
        raise
    except Exception as error:  # of the hub, the network or the files of the data set
        raise UsageError(_hub_problem(source, error)) from error
    return _pick_split(loaded, source)


def _hub_problem(source: str, error: Exception) -> str:
    """Say what went wrong and what to do. `datasets` reports a gated data set as one that was not found."""
    kinds = {kind.__name__ for one in causes(error) for kind in type(one).__mro__}
    said = " ".join(str(one) for one in causes(error))
    if "GatedRepoError" in kinds or re.search(r"\bgated\b", said):
        problem = "the data set is gated"
        remedy = (
            "accept its terms on the hub, then set HF_TOKEN (or --hf-token) to a token that may read it, or give a "
            "local file"
        )
    elif kinds & {"DatasetNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError"}:
        problem = "no such file or folder, and no such data set on the hub"
        remedy = "check the spelling, set HF_TOKEN if it is private, or give a local file"
    elif kinds & {"ConnectionError", "OfflineModeIsEnabled", "TransportError", "RequestException"}:
        problem, remedy = "the Hugging Face hub cannot be reached", "check the network, or give a local file"
    elif re.search(r"\b40[13]\b", said):
        problem, remedy = "the hub refuses access", "set HF_TOKEN to a token that may read it, or give a local file"
    elif "Config name is missing" in said or re.search("BuilderConfig .* not found", said):
        problem, remedy = "a configuration must be named", f"give it as {source.split(':')[0]}:CONFIG"
    elif "scripts are no longer supported" in said:
        problem, remedy = "needs its own code to be run, which is never done", "export it to a local file first"
    else:
        problem, remedy = "cannot be read from the hub", "try again, or give a local file"
    return f"{source}: {problem}: {innermost_cause(error)}; {remedy}"


def _pick_split(loaded: Dataset | DatasetDict, where: str) -> Dataset:
    if isinstance(loaded, Dataset):
        return loaded
    if "train" in loaded:
        return loaded["train"]
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise UsageError(
        f"{where}: has no split named train but several others: {', '.join(sorted(map(str, loaded)))}; "
        "save the one that is meant to a local file and give that"
    )
