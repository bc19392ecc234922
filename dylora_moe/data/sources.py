"""Where documents come from: a file, a folder or a data set of the Hugging Face hub, as one `datasets.Dataset` of rows.

| source | rows |
|---|---|
| `FILE.jsonl`, `.json`, `.parquet`, `.csv` | the rows of the file |
| `FILE.txt`, or any other text file of a folder | one row per file, in the column `text` |
| a folder with files of one of the kinds above | their rows; of `train` and `test` files only the `train` ones |
| a folder without | one row per text file in it, in the order of the paths |
| a folder written by `save_to_disk` | what was saved |
| `NAME`, `ORG/NAME`, with `:CONFIG`, `@REVISION` | the hub's, by `datasets.load_dataset`; no code of it is run |

What is local is read in memory through a temporary cache, so that nothing is left beside the user's files.
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

import datasets
import huggingface_hub
import pandas
from datasets import Dataset, DatasetDict, Features, List, Value

from ..errors import UsageError, listed
from .documents import READ_COLUMNS
from .text_files import files_in, text_of

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
DATA_SUFFIXES = (*LOADERS, ".txt")
NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
WORDS = ("content", "value", "text")  # of a chat's message
HELD_OUT_WORDS = {"test", "validation", "valid", "val", "dev", "eval", "evaluation"}
HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[^@]+))?(@(?P<revision>.+))?")
NO_ROWS = "corresponds to no data"  # `datasets` of a file that can be read and is empty: [], a header alone
HUB_PROBE_SECONDS = 3.0
CAUSE_CHARACTERS = 300


@dataclass(frozen=True)
class DataSpec:
    """One `--data SOURCE[=WEIGHT]`. A path that itself contains `=` and exists is taken whole."""

    source: str
    weight: float = 1.0

    def __post_init__(self):
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
        """A short name for metrics, of [A-Za-z0-9_-]: that of the file (no ending), the folder or the hub data set."""
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
    """The rows of a source and how many files of it were left out (other splits, or not of the kind that is read)."""

    dataset: Dataset
    skipped_files: int = 0


def read_rows(source: str, token: str | None = None) -> Rows:
    """The rows of a source; `UsageError` for whatever keeps it from being read."""
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
    """Whether a missing source was meant as a path, so that a typing error does not become a download."""
    if source.startswith((".", "/", "~")) or "\\" in source or source.count("/") > 1:
        return True
    suffix = Path(source).suffix
    return suffix.lower() in DATA_SUFFIXES or ("/" in source and re.fullmatch(r"\.[A-Za-z]{2,8}", suffix) is not None)


# --- files -----------------------------------------------------------------------------------------------------------


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
    """What the files hold, texts as they are written there: 007 is no number, and None in a csv file no gap."""
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
        except Exception as error:  # what each loader raises for bad content is not documented, and changes
            if NO_ROWS in str(error):
                return Dataset.from_dict({})
            raise UsageError(
                f"{where}: cannot be read as {loader}: {_cause(error)}; check that the content is what the ending says"
            ) from error


def _has_times(feature: object) -> bool:
    """Whether something was read as a time: what is written like one, in every row of a column."""
    if isinstance(feature, Value):
        return feature.dtype.startswith(("timestamp", "date", "time"))
    if isinstance(feature, List):
        return _has_times(feature.feature)
    return isinstance(feature, dict) and any(_has_times(feature[name]) for name in WORDS if name in feature)


def _without_times(rows: Dataset, paths: list[Path]) -> Dataset:
    """The rows with the texts that `datasets` has read as times, which cannot be turned back into what was written."""
    times = [name for name in READ_COLUMNS if name in rows.column_names and _has_times(rows.features[name])]
    if not times:
        return rows
    written = []
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
    """Those that stand one after the other, on lines of their own or not."""
    decoder, something, at = json.JSONDecoder(), re.compile(r"[^ \t\r\n]"), 0
    while match := something.search(content, at):
        value, at = decoder.raw_decode(content, match.start())
        yield value


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bars and no log lines of `datasets`: a library does not print, and the error says what they say."""
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
    """The error and what it was raised from, innermost last."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


def _cause(error: BaseException) -> str:
    """The innermost message: `datasets` wraps the one that says what is wrong."""
    innermost = _chain(error)[-1]
    text = " ".join(str(innermost).split()) or type(innermost).__name__
    return text if len(text) <= CAUSE_CHARACTERS else text[:CAUSE_CHARACTERS] + " ..."


# --- folders ---------------------------------------------------------------------------------------------------------


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
    except Exception as error:  # see _load
        raise UsageError(
            f"{folder}: looks like a folder of save_to_disk, but cannot be read: {_cause(error)}; save it again"
        ) from error


def _training_files(folder: Path, files: list[Path]) -> list[Path]:
    """Those named `train`; where none is, those not named after a held-out split; where there are only such, all."""

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


# --- the hub ---------------------------------------------------------------------------------------------------------


def hub_answers() -> bool:
    """Whether the hub can be reached. `datasets` itself retries an unreachable hub for more than twenty seconds."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return True  # nothing is asked then: `datasets` looks in the cache
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=HUB_PROBE_SECONDS)
    except Exception:  # of httpx or of requests, as the installed version of huggingface_hub has it
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
            f"{source}: no such file or folder, and the Hugging Face hub cannot be reached to look for it there; "
            "give a "
            "local file or folder, check the network, or set HF_HUB_OFFLINE=1 if the data set is in the local cache"
        )
    try:
        loaded = datasets.load_dataset(match["name"], match["config"], revision=match["revision"], token=token)
    except MemoryError:
        raise
    except Exception as error:  # the hub, the network and the data set's own files each have theirs
        raise UsageError(_hub_problem(source, error)) from error
    return _pick_split(loaded, source)


def _hub_problem(source: str, error: Exception) -> str:
    """What went wrong and what to do. `datasets` reports a gated data set as one that was not found."""
    kinds = {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}
    text = _cause(error)
    said = " ".join(str(one) for one in _chain(error))
    if "GatedRepoError" in kinds or re.search(r"\bgated\b", said):
        return (
            f"{source}: the data set is gated: {text}; accept its terms on the hub, then set HF_TOKEN (or "
            "--hf-token) to a "
            "token that may read it, or give a local file"
        )
    if kinds & {"DatasetNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError"}:
        return (
            f"{source}: no such file or folder, and no such data set on the hub: {text}; check the spelling, set "
            "HF_TOKEN if "
            "it is private, or give a local file"
        )
    if kinds & {"ConnectionError", "OfflineModeIsEnabled", "TransportError", "RequestException"}:
        return f"{source}: the Hugging Face hub cannot be reached: {text}; check the network, or give a local file"
    if re.search(r"\b40[13]\b", said):
        return (
            f"{source}: the hub refuses access: {text}; set HF_TOKEN to a token that may read it, or give a local file"
        )
    if "Config name is missing" in said or re.search("BuilderConfig .* not found", said):
        return f"{source}: a configuration must be named: {text}; give it as {source.split(':')[0]}:CONFIG"
    if "scripts are no longer supported" in said:
        return f"{source}: needs its own code to be run, which is never done: {text}; export it to a local file first"
    return f"{source}: cannot be read from the hub: {text}; try again, or give a local file"


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
