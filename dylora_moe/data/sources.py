"""Sources of documents: a file, a folder or a data set of the Hugging Face hub, read as a `datasets.Dataset` of rows.

| source | rows |
|---|---|
| `FILE.jsonl`, `.json`, `.parquet`, `.csv` | the rows of the file |
| `FILE.txt` | one row with the text of the file in the column `text` |
| a folder with files of one of the kinds above | their rows; with `train` and `test` files those of `train` |
| any other folder | one row per text file in it, in the order of the paths |
| a folder written by `save_to_disk` | what was saved |
| `NAME`, `ORG/NAME`, with `:CONFIG`, `@REVISION` | the rows of a data set of the hub; its code is never run |

Local files are read into memory through a temporary cache, so that nothing is left beside them.
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pandas
from datasets import Dataset, DatasetDict, Features, List, Value

from ..errors import UsageError, listed
from .schemas import READ_COLUMNS
from .text_files import files_in, text_of

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
DATA_SUFFIXES = (*LOADERS, ".txt")
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
MESSAGE_TEXTS = ("content", "value", "text")  # keys of the messages of a chat
HELD_OUT_WORDS = {"test", "validation", "valid", "val", "dev", "eval", "evaluation"}
HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^@]+))?(@(?P<revision>.+))?")
NO_ROWS = "corresponds to no data"  # in the message of `datasets` for a file without rows: [], or only a header
HUB_PROBE_SECONDS = 3.0
CAUSE_CHARACTERS = 300


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
        """A short name for metrics, of [A-Za-z0-9_-]: the name of the file, the folder or the data set of the hub."""
        path = Path(os.path.expanduser(self.source))
        if path.is_dir():
            short = path.resolve().name
        elif looks_like_a_path(self.source) or path.exists():
            short = path.stem
        else:
            short = re.split("[:@]", self.source)[0].split("/")[-1]
        return re.sub(r"[^A-Za-z0-9_-]+", "-", short).strip("-") or "data"


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
    suffix = Path(source).suffix
    return suffix.lower() in DATA_SUFFIXES or ("/" in source and re.fullmatch(r"\.[A-Za-z]{2,8}", suffix) is not None)


def _read_file(path: Path) -> Rows:
    _check_readable(path)
    suffix = path.suffix.lower()
    if suffix in LOADERS:
        return Rows(_load([path], LOADERS[suffix], str(path)))
    if suffix != ".txt":
        raise UsageError(
            f"{path}: a data file must end in {', '.join(DATA_SUFFIXES)}, found {path.suffix or 'no ending'}"
        )
    text = text_of(path)
    if text is None:
        raise UsageError(f"{path}: is not UTF-8 text; convert it to UTF-8, or give the file that was meant")
    return Rows(Dataset.from_dict({"text": [text]}))


def _check_readable(path: Path) -> None:
    try:
        with path.open("rb") as file:
            empty = not file.read(1)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror or error}); check its permissions") from error
    if empty:
        raise UsageError(f"{path}: is empty (0 bytes); expected documents")


def _load(paths: list[Path], loader: str, where: str) -> Dataset:
    """Load files without converting their texts: 007 in a csv file is not a number, and None not a missing value."""
    with tempfile.TemporaryDirectory(prefix="dylora_data_") as cache, _quiet_datasets():
        load = partial(
            datasets.load_dataset,
            loader,
            data_files=[glob.escape(str(path.absolute())) for path in paths],
            split="train",
            cache_dir=cache,
            keep_in_memory=True,
        )
        try:
            if loader == "csv":
                columns = dict.fromkeys(name for path in paths for name in pandas.read_csv(path, nrows=0).columns)
                texts = Features(dict.fromkeys(columns, Value("string")))
                return load(features=texts, keep_default_na=False)
            rows = load()
            return _without_times(rows, paths) if loader == "json" else rows
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # what the loaders raise for bad content is not documented
            if NO_ROWS in str(error):
                return Dataset.from_dict({})
            raise UsageError(
                f"{where}: cannot be read as {loader}: {_cause(error)}; check that the content is what the ending says"
            ) from error


def _has_times(feature: object) -> bool:
    """Return whether `datasets` has read texts as times, as it does if all of a column look like times."""
    if isinstance(feature, Value):
        return feature.dtype.startswith(("timestamp", "date", "time"))
    if isinstance(feature, List):
        return _has_times(feature.feature)
    return isinstance(feature, dict) and any(_has_times(feature[name]) for name in MESSAGE_TEXTS if name in feature)


def _without_times(rows: Dataset, paths: list[Path]) -> Dataset:
    """Replace columns that `datasets` has read as times, from which the texts cannot be restored, by those texts."""
    times = [name for name in READ_COLUMNS if name in rows.column_names and _has_times(rows.features[name])]
    if not times:
        return rows
    written: list[Any] = []
    for path in paths:
        for value in _json_values(path.read_text(encoding="utf-8-sig")):
            written += value if isinstance(value, list) else [value]
    written = [value if isinstance(value, dict) else {"text": value} for value in written]
    if len(written) != len(rows):
        raise ValueError(f"{len(rows)} rows were found, and {len(written)} where texts look like times")
    columns = [{name: row.get(name) for name in times} for row in written]
    texts = Dataset.from_list(columns)
    return datasets.concatenate_datasets([rows.remove_columns(times), texts], axis=1)


def _json_values(content: str) -> Iterator[object]:
    """Yield the JSON values of a text one after the other, whether on lines of their own or not."""
    decoder, something, at = json.JSONDecoder(), re.compile(r"[^ \t\r\n]"), 0
    while match := something.search(content, at):
        value, at = decoder.raw_decode(content, match.start())
        yield value


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Suppress progress bars and log lines of `datasets`. Our errors say what they would."""
    bars = not datasets.are_progress_bars_disabled()
    level = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def _chain(error: BaseException) -> list[BaseException]:
    """Return an exception and its causes, the innermost last."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


def _cause(error: BaseException) -> str:
    """Return the innermost message, which says what is wrong; `datasets` wraps it."""
    innermost = _chain(error)[-1]
    text = " ".join(str(innermost).split()) or type(innermost).__name__
    return text if len(text) <= CAUSE_CHARACTERS else text[:CAUSE_CHARACTERS] + " ..."


def _read_folder(folder: Path) -> Rows:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return Rows(_read_saved(folder))
    files = list(files_in(folder))
    data = [file for file in files if file.suffix.lower() in LOADERS and file.name not in NOT_DATA]
    if not data:
        return _read_texts(folder, files)
    kinds = sorted({LOADERS[file.suffix.lower()] for file in data})
    if len(kinds) > 1:
        raise UsageError(
            f"{folder}: has data files of several kinds ({', '.join(kinds)}); name one of the files, "
            f"or leave one kind in the folder:\n{listed([str(file.relative_to(folder)) for file in data])}"
        )
    used = _training_files(folder, data)
    for file in used:
        _check_readable(file)
    texts = [file for file in files if file.suffix.lower() == ".txt"]
    return Rows(_load(used, kinds[0], str(folder)), skipped_files=len(data) - len(used) + len(texts))


def _read_saved(folder: Path) -> Dataset:
    try:
        return _pick_split(datasets.load_from_disk(str(folder), keep_in_memory=True), str(folder))
    except (MemoryError, UsageError):
        raise
    except Exception as error:  # as in _load
        raise UsageError(
            f"{folder}: looks like a folder of save_to_disk, but cannot be read: {_cause(error)}; save it again"
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
    texts = []
    for file in files:
        try:
            texts.append(text_of(file))
        except OSError as error:
            raise UsageError(f"{file}: cannot be read ({error.strerror or error}); check its permissions") from error
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
    kinds = {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}
    said = " ".join(str(one) for one in _chain(error))
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
    return f"{source}: {problem}: {_cause(error)}; {remedy}"


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
