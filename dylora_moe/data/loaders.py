"""Data files to rows, by the loaders of `datasets`.

Files are read into memory through a temporary cache, so that nothing is left beside them. In it they are links with
plain names, because `datasets` and fsspec find a meaning in some characters of a path: `a::b.jsonl`, `a[1].jsonl`.
"""

from __future__ import annotations

import codecs
import errno
import glob
import json
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pandas
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.json.json import JsonConfig
from datasets.table import CastError

from ..errors import UsageError
from .schemas import READ_COLUMNS, plain_name
from .text_files import COMPRESSED, content_of, ending

# The endings, and what a file with such an ending holds.
LOADERS = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "tsv"}
SEPARATORS = {"csv": ",", "tsv": "\t"}
NO_ROWS = "corresponds to no data"  # in the message of `datasets` for a file without rows: [], or only a header
AT_ONCE = 1 << 31  # bytes of a JSON file
CAUSE_CHARACTERS = 300
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NULL_LINE = re.compile(rb"\n\s*null\s*(?:\n|$)")


def load_files(paths: list[Path], kind: str, where: str) -> Dataset:
    """Load files of one kind without converting their texts: 007 in a csv file is not a number, None no missing value.

    Raises:
        UsageError: naming the first file that cannot be read, or not together with the first one.
    """
    with tempfile.TemporaryDirectory(prefix="dylora_data_") as cache, _quiet_datasets():
        files = {_linked(path, Path(cache, f"{number:06}")): path for number, path in enumerate(paths)}
        load = partial(_load, kind, files, cache)
        for path in paths if kind == "json" else ():
            _refuse_null_rows(path)
        try:
            rows = load(list(files))
            return _without_times(rows, paths) if kind == "json" else rows
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # what the loaders raise for bad content is not documented
            if NO_ROWS in str(error):
                return Dataset.from_dict({})
            full = next((one for one in causes(error) if isinstance(one, OSError) and one.errno in FULL), None)
            if full is not None:
                raise UsageError(
                    f"{where}: cannot be read through the temporary folder {cache} ({full.strerror}); make room there, "
                    "or set TMPDIR to another folder"
                ) from error
            raise UsageError(_problem(load, files, kind, where, error)) from error


def _refuse_null_rows(path: Path) -> None:
    """Raise UsageError if a row of a JSON file is null. pyarrow 26 crashes where a block of rows begins with one."""
    content = content_of(path).removeprefix(codecs.BOM_UTF8).lstrip()
    if not (NULL_LINE.search(content) or content.startswith(b"null") or (content[:1] == b"[" and b"null" in content)):
        return
    try:
        values = list(_json_values(content.decode()))
    except (ValueError, RecursionError):  # it is no JSON, which the loader says
        return
    rows = [row for value in values for row in (value if isinstance(value, list) else [value])]
    if None in rows:
        raise UsageError(f"{path}, row {rows.index(None) + 1}: expected an object, found null; remove the row")


def _linked(path: Path, link: Path) -> str:
    """Make a link to a file, with its ending, and return a pattern that finds it."""
    compressed = path.suffix.lower() if path.suffix.lower() in COMPRESSED else ""
    link = link.with_name(f"{link.name}{ending(path)}{compressed}")
    try:
        link.symlink_to(path.absolute())
    except OSError:  # Windows lets not everybody make links
        return glob.escape(str(path.absolute()))
    return glob.escape(str(link))


def _load(kind: str, paths: dict[str, Path], cache: str, files: list[str]) -> Dataset:
    """Load files, which are patterns with their paths in `paths`."""
    options: dict[str, Any] = {"data_files": files, "split": "train", "cache_dir": cache, "keep_in_memory": True}
    if kind == "json":
        # What `datasets` finds in the first part of a file it expects in the others, and makes it of what is there.
        options["chunksize"] = AT_ONCE
        if "parse_agent_traces" in JsonConfig.__dataclass_fields__:
            options["parse_agent_traces"] = False
    if kind not in SEPARATORS:
        return datasets.load_dataset(kind, **options)
    separator = SEPARATORS[kind]
    headers = [pandas.read_csv(paths[file], nrows=0, sep=separator).columns for file in files]
    texts = Features(dict.fromkeys([name for header in headers for name in header], Value("string")))
    options |= {"features": texts, "keep_default_na": False, "index_col": False, "sep": separator}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Length of header or names", pandas.errors.ParserWarning)
        try:
            rows = datasets.load_dataset("csv", **options)
        except DatasetGenerationError as error:
            if isinstance(causes(error)[-1], pandas.errors.ParserWarning):
                raise ValueError(
                    "a row has more fields than the header; quote fields in which there is a separator"
                ) from None
            raise
    if kind == "tsv":
        _refuse_swallowed_rows(rows)
    return rows


def _refuse_swallowed_rows(rows: Dataset) -> None:
    """Raise ValueError if a quotation mark has made one field of several rows, as of `"b` up to the next such field."""
    for name in rows.column_names:
        column = rows.data.column(name)
        both = pc.and_(pc.match_substring(column, "\t"), pc.match_substring(column, "\n"))
        if pc.any(both).as_py():
            row = pc.index(both, True).as_py() + 1
            raise ValueError(
                f"row {row} holds tabs and line ends in {name}: a quotation mark at the beginning of a field makes one "
                'field of all up to the next one; double the quotation marks of such a text, and put it into "..."'
            )


def _problem(
    load: Callable[[list[str]], Dataset], files: dict[str, Path], kind: str, where: str, error: Exception
) -> str:
    """Say which file cannot be read, and why. `datasets` does not say it: it is found by reading them again."""
    first, *others = files
    attempts = [[first]] + [some for other in others for some in ([other], [first, other])] if others else []
    for attempt in attempts:
        try:
            load(attempt)
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as of_attempt:
            where, error = str(files[attempt[-1]]), of_attempt
            if len(attempt) == 2:
                return (
                    f"{where}: cannot be read together with {files[first].name}: {innermost_cause(error)}; give both "
                    "the same columns, or give each a --data of its own"
                )
            break
    return (
        f"{where}: cannot be read as {kind}: {innermost_cause(error)}; check that the content is what the ending says"
    )


def _has_times(feature: object) -> bool:
    """Return whether `datasets` has read texts as times, as it does if all of a column or a key look like times."""
    if isinstance(feature, Value):
        return feature.dtype.startswith(("timestamp", "date", "time"))
    if isinstance(feature, List):
        return _has_times(feature.feature)
    return isinstance(feature, dict) and any(_has_times(value) for value in feature.values())


def _without_times(rows: Dataset, paths: list[Path]) -> Dataset:
    """Replace columns that `datasets` has read as times, from which the texts cannot be restored, by those texts."""
    times = [name for name in rows.column_names if plain_name(name) in READ_COLUMNS and _has_times(rows.features[name])]
    if not times:
        return rows
    written: list[Any] = []
    for path in paths:
        for value in _json_values(content_of(path).decode("utf-8-sig")):
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


def causes(error: BaseException) -> list[BaseException]:
    """Return an exception and its causes, the innermost last."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return chain


def innermost_cause(error: BaseException) -> str:
    """Return the innermost message, which says what is wrong; `datasets` wraps it."""
    innermost = causes(error)[-1]
    if isinstance(innermost, CastError):
        innermost = ValueError(innermost.details())
    text = " ".join(str(innermost).split()) or type(innermost).__name__
    return text if len(text) <= CAUSE_CHARACTERS else text[:CAUSE_CHARACTERS] + " ..."
