"""Data to blocks: what is read, what is refused, what is learned, and what is held out."""

import bz2
import csv
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets.exceptions import DatasetNotFoundError

from dylora_moe.base.tiny import byte_tokenizer
from dylora_moe.data.blocks import data_fingerprint
from dylora_moe.data.documents import read_documents
from dylora_moe.data.packing import COLUMNS
from dylora_moe.data.python_texts import python_sources
from dylora_moe.data.sources import DataSpec, read_rows
from dylora_moe.errors import UsageError

from ..support.data import BLOCK, CHATML, EOS, PAD, blocks_of, chat_tokenizer, pieces_of, write_rows

GEMMA_LIKE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
# Without a generation prompt, as Llama 2; and with the last answer written otherwise than the others, as Qwen3.
LLAMA2_LIKE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} <|im_end|>{% endif %}{% endfor %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BACKWARDS = "{% for m in messages | reverse %}{{ m['content'] }}<|im_end|>{% endfor %}"
CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]


def texts(n, start=0):
    return [{"text": f"document {i} " + "abcdefghij"[i % 10] * (i % 37)} for i in range(start, start + n)]


def pairs(n=24, **columns):
    """Rows with the same keys, different by a number, so that there is more than one block of them."""
    return [{name: f"{text} {i}" for name, text in columns.items()} for i in range(n)]


# --- sources ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "source", "weight", "name"),
    [
        ("a.jsonl", "a.jsonl", 1.0, "a"),
        ("dir/a.b.jsonl=2.5", "dir/a.b.jsonl", 2.5, "a.b"),
        ("org/name-x:config@main=3", "org/name-x:config@main", 3.0, "name-x"),
        ("dätä ✓.txt", "dätä ✓.txt", 1.0, "dätä ✓"),
        ("da\u0308ta.tsv.gz", "da\u0308ta.tsv.gz", 1.0, "däta"),
        ("a\x1b[2J\n::error::\udcff.jsonl", "a\x1b[2J\n::error::\udcff.jsonl", 1.0, "a-[2J-::error::-"),
    ],
)
def test_parse(text, source, weight, name):
    spec = DataSpec.parse(text)
    assert (spec.source, spec.weight, spec.name) == (source, weight, name)


@pytest.mark.parametrize("last", [42, ["a", "b"], None])
def test_a_value_of_another_kind_far_behind_changes_no_other_row(tmp_path, last):
    """`datasets` would expect what the first 10 MB of a file have, and write the rest as JSON where it differs."""
    text = "First line.\nSecond line. " + "x" * 20_000
    rows = [{"prompt": "Question", "completion": text, "system": None} for _ in range(600)]
    path = write_rows(tmp_path / "large.jsonl", [*rows, {"prompt": "Last", "completion": last, "system": "Be brief"}])
    found = read_rows(str(path), None).dataset
    assert len(found) == 601 and set(found[:600]["completion"]) == {text} and found[600]["system"] == "Be brief"


def test_chats_with_columns_of_their_source_are_read(tmp_path):
    row = {"id": "1", "source": "web", "model": "m", "system_prompt": "Be brief", "messages": CHAT}
    assert read_rows(str(write_rows(tmp_path / "chats.jsonl", [row, row])), None).dataset[1]["id"] == "1"


@pytest.mark.parametrize("content", ["Hello, you,Hi there\nWho?,Me\n", "Who?,Me,\nWhat?,It,\n", "Who?,Me\na,b,c\n"])
def test_a_row_of_a_csv_file_with_more_fields_than_the_header(tmp_path, content):
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\n" + content)
    with pytest.raises(UsageError, match=r"a\.csv: cannot be read as csv: .*fields"):
        blocks_of(path)


def test_a_stray_quotation_mark_in_a_tsv_file(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('prompt\tcompletion\na\t"b\nc\td\ne\t"f\ng\th\n')
    with pytest.raises(UsageError, match="row 1 holds tabs and line ends in completion: a quotation mark"):
        blocks_of(path)


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf", "two", ""])
def test_bad_weight(weight):
    with pytest.raises(UsageError, match=r"weight.* must be a"):
        DataSpec.parse(f"a.jsonl={weight}")


def test_existing_path_with_equals_sign_is_taken_whole(tmp_path):
    path = write_rows(tmp_path / "lr=2.jsonl", texts(40))
    assert DataSpec.parse(str(path)) == DataSpec(str(path), 1.0)
    assert DataSpec.parse(f"{path}=3") == DataSpec(str(path), 3.0)


def test_names_are_unique(tmp_path):
    for folder in ("x", "y", "z"):
        (tmp_path / folder).mkdir()
    files = [write_rows(tmp_path / d / "a.jsonl", texts(40, i * 100)) for i, d in enumerate("xy")]
    blocks = blocks_of(*files, write_rows(tmp_path / "z" / "a-2.jsonl", texts(40, 500)))
    assert list(blocks.evaluation) == ["a", "a-3", "a-2"]


COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def write_kind(path, rows):
    table, suffix = datasets.Dataset.from_list(rows), path.suffix.lower()
    if suffix in COMPRESS:
        plain = write_kind(path.with_suffix(""), rows)
        path.write_bytes(COMPRESS[suffix](plain.read_bytes()))
        plain.unlink()
    elif suffix == ".parquet":
        table.to_parquet(path)
    elif suffix in (".csv", ".tsv"):
        table.to_csv(path, index=False, sep="," if suffix == ".csv" else "\t")
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        write_rows(path, rows)
    return path


SUFFIXES = [".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".jsonl.gz", ".csv.gz", ".TSV.GZ"]
SUFFIXES += [".jsonl.bz2", ".csv.xz"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("as_folder", [False, True])
def test_every_kind_of_file_gives_the_same_blocks(tmp_path, suffix, as_folder):
    (tmp_path / "d[1]").mkdir()
    path = write_kind(tmp_path / "d[1]" / f"a{suffix}", texts(40))
    (tmp_path / "d[1]" / "README.md").write_text("not data")
    expected = data_fingerprint(blocks_of(write_rows(tmp_path / "b.jsonl", texts(40))))
    assert data_fingerprint(blocks_of(path.parent if as_folder else path)) == expected


def test_saved_folder_and_its_train_split(tmp_path):
    both = datasets.DatasetDict(
        {"test": datasets.Dataset.from_list(texts(9, 900)), "train": datasets.Dataset.from_list(texts(40))}
    )
    both.save_to_disk(tmp_path / "saved")
    expected = data_fingerprint(blocks_of(write_rows(tmp_path / "b.jsonl", texts(40))))
    assert data_fingerprint(blocks_of(tmp_path / "saved")) == expected


def test_test_files_of_a_folder_are_not_trained_on(tmp_path):
    write_rows(tmp_path / "train-0.jsonl", texts(40))
    for name in ("test", "notes"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": "SECRET"}] * 9)
    (tmp_path / "about.txt").write_text("SECRET")
    blocks = blocks_of(tmp_path)
    assert not any("SECRET" in text for text, _ in pieces_of(blocks.train))
    assert blocks.sources[0].skipped_files == 3


def test_texts_beside_data_files_are_counted_and_told(tmp_path):
    for name in ("main.py", "util.py", "README.md"):
        (tmp_path / name).write_text("a line\n" * 9)
    write_rows(tmp_path / "index.jsonl", texts(40))
    assert blocks_of(tmp_path).sources[0].skipped_files == 2
    (tmp_path / "index.jsonl").rename(tmp_path / "hidden")
    (tmp_path / "package.json").write_text('{"name": "x", "version": "1"}')
    with pytest.raises(
        UsageError, match=r"none that can be trained on; found name, version.*\n(.*\n)*Of this folder, only"
    ):
        blocks_of(tmp_path)


def test_folder_of_texts_is_a_document_per_file(tmp_path):
    for i, suffix in enumerate([".py", ".md", ".txt", ".h"]):
        (tmp_path / f"f{i}{suffix}").write_text(f"line {i}\nline\n" * 9)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\xff")
    (tmp_path / ".hidden").write_text("hidden")
    (source,) = blocks_of(tmp_path).sources
    assert (source.documents, source.skipped_files, source.schema) == (4, 1, "text")


def test_one_text_file_is_one_document_split_by_tokens(tmp_path):
    text = "".join(f"{i}," for i in range(500))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    blocks = blocks_of(tmp_path / "a.txt")
    held = [text for text, _ in pieces_of(blocks.evaluation["a"])]
    assert text + "<eos>" == "".join(
        sorted((t for t, _ in pieces_of(blocks.train)), key=text.index) + sorted(held, key=(text + "<eos>").index)
    )
    assert blocks.sources[0].eval_tokens == round(0.05 * (len(text) + 1))


@pytest.mark.parametrize(
    "name", ["a::b.jsonl", "a*[1]?.jsonl", "a#%20\n\x1b&'.csv", "http:a.parquet", b"a\xff.jsonl.gz"]
)
def test_a_file_of_any_name_is_read(tmp_path, name):
    write_rows(tmp_path / "a.jsonl", [{"text": "another"}])  # which a pattern would find
    path = write_kind(Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + os.fsencode(name))), texts(40))
    assert read_rows(str(path)).dataset["text"][:] == [row["text"] for row in texts(40)]


def test_any_text_file_is_read_by_its_name(tmp_path):
    for name in ("x.md", "x.py", "LICENSE", "x.rst.gz"):
        content = f"The text of {name}. ".encode() * 20
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        assert read_rows(str(tmp_path / name)).dataset["text"][:] == [content.decode()]


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"text": "b", "more": 1},
            r"d/b\.jsonl: cannot be read together with a\.jsonl: there are 1 new columns .*more",
        ),
        ({"text": ["x"]}, r"d/b\.jsonl: cannot be read together with a\.jsonl: Couldn't cast"),
        (None, r"d/b\.jsonl: cannot be read as json: "),
    ],
)
def test_the_file_of_a_folder_that_cannot_be_read_is_named(tmp_path, second, message):
    (tmp_path / "d").mkdir()
    for name in "abc":
        write_rows(tmp_path / "d" / f"{name}.jsonl", [{"text": "a"}, {"text": "b"}])
    assert len(read_rows(str(tmp_path / "d")).dataset) == 6
    if second is None:
        (tmp_path / "d/b.jsonl").write_text('{"text": "a"}\n{"te')
    else:
        write_rows(tmp_path / "d/b.jsonl", [second])
    with pytest.raises(UsageError, match=message):
        read_rows(str(tmp_path / "d"))


def test_pointers_of_git_lfs_in_folders(tmp_path):
    (tmp_path / "a.md").write_text("a text")
    assert len(read_rows(str(tmp_path)).dataset) == 1
    (tmp_path / "b.md").write_bytes(LFS)
    with pytest.raises(UsageError, match=r"b\.md: is a Git LFS pointer, .*git lfs pull"):
        read_rows(str(tmp_path))
    datasets.Dataset.from_list(texts(3)).save_to_disk(tmp_path / "saved")
    next((tmp_path / "saved").glob("*.arrow")).write_bytes(LFS)
    with pytest.raises(UsageError, match=r"\.arrow: is a Git LFS pointer"):
        read_rows(str(tmp_path / "saved"))


@pytest.mark.parametrize(
    "source",
    [
        "./a",
        "../a.jsonl",
        "/no/where",
        "~/none.txt",
        "a/b/c",
        "org/name.jsonl",
        "x.csv",
        "d/f.parq",
        "x.md",
        "x.tsv.gz",
    ],
)
def test_missing_path_is_not_downloaded(source, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("went to the hub"))
    with pytest.raises(UsageError, match="no such file or folder"):
        blocks_of(source)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
BAD_FILES = {
    "empty": ("a.jsonl", b"", r"a\.jsonl: is empty \(0 bytes\)"),
    "bad json": ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl: cannot be read as json: .*parse error"),
    "binary json": ("a.jsonl", bytes(range(256)) * 9, r"a\.jsonl: cannot be read as json"),
    "not parquet": ("a.parquet", b"text", r"a\.parquet: cannot be read as parquet: .*footer"),
    "blank lines": ("a.jsonl", b"\n\n", r"a\.jsonl: holds no rows"),
    "empty list": ("a.json", b"[]", r"a\.json: holds no rows"),
    "a header alone": ("a.csv", b"text\n", r"a\.csv: holds no rows"),
    "binary text": ("a.txt", b"a\0b", r"a\.txt: is not UTF-8 text"),
    "latin-1 text": ("a.txt", b"caf\xe9", r"a\.txt: is not UTF-8 text"),
    "no kind of file": ("a.xyz", b"x\0", r"a\.xyz: is not UTF-8 text; .*Other files that are read end in \.jsonl"),
    "blank texts": ("a.jsonl", b'{"text": " "}\n{"text": null}\n', r"a\.jsonl: all 2 row\(s\) are without text"),
    "one short": ("a.txt", b"short", r"a\.txt: has \d+ tokens to train on in 1 document, one block needs 64"),
    "git lfs": ("a.jsonl", LFS, r"a\.jsonl: is a Git LFS pointer, .*git lfs pull"),
    "git lfs text": ("a.md", LFS, r"a\.md: is a Git LFS pointer"),
    "git lfs gzip": ("a.csv.gz", LFS, r"a\.csv\.gz: is a Git LFS pointer"),
    "half a gzip": ("a.txt.gz", gzip.compress(b"x" * 999)[:-9], r"a\.txt\.gz: is not a whole compressed file"),
    "half a bz2": ("a.txt.bz2", bz2.compress(b"x" * 999)[:-9], r"a\.txt\.bz2: is not a whole compressed file"),
    "half an xz": ("a.txt.xz", lzma.compress(b"x" * 999)[:-9], r"a\.txt\.xz: is not a whole compressed file"),
    "no bz2": ("a.txt.bz2", b"x" * 99, r"a\.txt\.bz2: is not a whole compressed file"),
    "zstd": ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", r"a\.jsonl\.zst: expected .*\.xz, found \.zst; .* `zstd -d`"),
    "an archive": ("a.tar.gz", gzip.compress(b"x"), r"a\.tar\.gz: expected .*, found \.tar; .* `tar xf`"),
    "no gzip": ("a.jsonl.gz", b'{"text": "x"}\n', r"a\.jsonl\.gz: is not a whole compressed file"),
    "a null at the beginning": (
        "a.jsonl",
        b'\n null\n{"text": "x"}\n',
        r"a\.jsonl, row 1: expected an object, found null",
    ),
    "a null behind": ("a.jsonl", b'{"text": "x"}\nnull\n', r"a\.jsonl, row 2: expected an object, found null"),
    "a null in a list": ("a.json", b'[{"text": "x"}, null]', r"a\.json, row 2: expected an object, found null"),
    "schema": ("a.jsonl", b'{"words": "x", "id": 1}\n', r"found id, words; rename them to one of:\n  - messages"),
    "type": ("a.jsonl", b'{"text": ["x"]}\n', r"a\.jsonl, row 1: the column text must hold text, found list"),
    "role": (
        "a.jsonl",
        b'{"messages": [{"role": "boss", "content": "x"}]}\n',
        r"row 1, message 1: the role must .*'boss'",
    ),
    "latin-1 json": ("a.jsonl", b'{"text": "caf\xe9"}\n' * 3, r"a\.jsonl: is not UTF-8 text; convert it to UTF-8"),
    "fractions": ("a.jsonl", b'{"text": 13}\n{"text": 0.5}\n', r"row 1: the column text must hold text, found float"),
    "two schemas": (
        "a.jsonl",
        b'{"messages": [{"role": "user", "content": "x"}], "id": 1}\n{"text": "x"}\n',
        r"a\.jsonl, row 2: has nothing in messages, .* but something in text; expected rows of one kind",
    ),
    "no answer": ("a.jsonl", b'{"messages": [{"role": "user", "content": "x"}]}\n', r"without an answer to learn"),
}


WRITTEN = ["00014", "26", "None", "NA", "null", "1e16", "2.50", "True", "2020-01-05", "2020-01-05 10:00:00", "a,b"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "chat.jsonl", "two.jsonl"])
def test_texts_are_learned_as_they_are_written(tmp_path, kind):
    """Each in a column of its own kind, where a reader may think of numbers, times or gaps, and all in one."""
    tokenizer = byte_tokenizer()
    for number, answers in enumerate([WRITTEN, *([text] * 6 for text in WRITTEN)]):
        path = tmp_path / f"{number}.{kind}"
        rows = [{"question": f"q{i}", "answer": text} for i, text in enumerate(answers)]
        if kind == "csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, ["question", "answer"])
                writer.writeheader()
                writer.writerows([*rows, {"question": "nothing", "answer": ""}])
        elif kind == "json":
            path.write_text(json.dumps(rows))
        elif kind == "chat.jsonl":
            names = ("user", "question"), ("assistant", "answer")
            write_rows(
                path, [{"messages": [{"role": role, "content": row[name]} for role, name in names]} for row in rows]
            )
        else:  # the columns of later rows need not be those of the first
            write_rows(
                path, [*rows, {"question": "nothing", "answer": None, "note": "x"}][:: -1 if "two" in kind else 1]
            )
        read = read_documents(read_rows(str(path)).dataset, tokenizer, str(path))
        learned = [tokenizer.decode(document.ids[document.learned]) for document in read.items]
        assert sorted(learned) == sorted(f"{text}<eos>" for text in answers)


@pytest.mark.parametrize(
    "content",
    [
        '{"text": "2024-01-01", "note": "a\u2028b\u0085c"}\n{"text": "2024-01-02", "note": "x"}\n',
        '{\n "text": "2024-01-01",\n "created": "2024-01-01T00:00:00"\n}\n\n{\n "text": "2024-01-02"}',
        '["2024-01-01", "2024-01-02"]',
    ],
    ids=["separators that are none", "objects over lines", "a list of texts"],
)
def test_texts_like_times_in_every_form_of_json(tmp_path, content):
    (tmp_path / "a.json").write_text(content, encoding="utf-8")
    rows = read_rows(str(tmp_path / "a.json")).dataset
    assert rows["text"][:] == ["2024-01-01", "2024-01-02"]


def test_times_that_are_not_read_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("dylora_moe.data.loaders._json_values", lambda *_: pytest.fail("read again"))
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write_rows(tmp_path / "a.jsonl", [{"messages": chat, "created": "2024-01-01"}] * 3)
    assert len(read_rows(str(path)).dataset) == 3


def test_what_another_kind_of_rows_would_read_is_not_decoded():
    rows = datasets.Dataset.from_dict(
        {"question": ["a"], "answer": ["b"], "text": [""], "picture": [{"path": "none.png", "bytes": b"x"}]},
        features=datasets.Features(
            {name: datasets.Value("string") for name in ("question", "answer", "text")} | {"picture": datasets.Image()}
        ),
    )
    assert len(read_documents(rows, byte_tokenizer(), "x").items) == 1
    nothing = datasets.Dataset.from_dict({"text": ["abc", ""], "answer": [1.0, float("nan")]})
    assert read_documents(nothing, byte_tokenizer(), "x").skipped_rows == 1


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(tmp_path, case):
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message):
        blocks_of(tmp_path / name)


def test_a_part_that_is_too_small_is_told_from_its_data_set(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "x" * 200}] * 5 + [{"text": "short"}])
    with pytest.raises(UsageError, match=r"a\.jsonl \(part 2 of the 2 that it was divided into\): has 4 tokens"):
        blocks_of(path, divide=lambda sources, data: [[int(len(d) < 100) for d in data[0]]])


def test_unreadable_file(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "a.jsonl", texts(3))
    monkeypatch.setattr(Path, "open", lambda *a, **k: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    with pytest.raises(UsageError, match=r"a\.jsonl: cannot be read \(Permission denied\); check its permissions"):
        blocks_of(path)


def test_a_full_temporary_folder_is_not_the_fault_of_the_data(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise datasets.exceptions.DatasetGenerationError("wrapped") from OSError(28, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UsageError, match=r"through the temporary folder .* \(No space left on device\); .* TMPDIR"):
        read_rows(str(write_rows(tmp_path / "a.jsonl", texts(3))))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    for path in (tmp_path / "a.jsonl", "/dev/zero"):
        with pytest.raises(UsageError, match="expected a file or a folder, found a pipe or a device"):
            blocks_of(path)


def test_folders_without_documents_or_of_several_kinds(tmp_path):
    with pytest.raises(UsageError, match="has no data files"):
        blocks_of(tmp_path)
    write_rows(tmp_path / "a.jsonl", texts(3))
    (tmp_path / "b.csv").write_text("text\nx\n")
    with pytest.raises(UsageError, match=r"several kinds \(csv, json\).*\n  - a\.jsonl\n  - b\.csv"):
        blocks_of(tmp_path)
    (tmp_path / "b.csv").rename(tmp_path / "pictures.zip")
    assert len(read_rows(str(tmp_path)).dataset) == 3
    (tmp_path / "b.jsonl.zst").write_bytes(b"x")
    with pytest.raises(UsageError, match=r"b\.jsonl\.zst: expected a data file"):
        blocks_of(tmp_path)


def test_weights_that_are_too_far_apart(tmp_path):
    one, other = (write_rows(tmp_path / name, texts(60)) for name in ("a.jsonl", "b.jsonl"))
    with pytest.raises(UsageError, match=r"the weights 1, 1e-06 are too far apart: until all [\d,]+ blocks"):
        blocks_of(one, f"{other}=1e-6")
    assert blocks_of(one, f"{other}=0.1").sources[0].sampled_blocks > 5 * blocks_of(one).sources[0].blocks


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 1}, "block size must be at least 2"),
        ({"eval_fraction": 0.0}, "fraction must be above 0"),
        ({"eval_fraction": 1.0}, "fraction must be above 0"),
        ({"max_eval_blocks": 0}, "at least 1 evaluation block"),
        ({"seed": -1}, "seed must not be negative"),
    ],
)
def test_bad_arguments(changes, message):
    with pytest.raises(UsageError, match=message):
        blocks_of("a.jsonl", **changes)
    with pytest.raises(UsageError, match="at least one data set"):
        blocks_of()


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: what `answer` holds is returned or raised, `calls` holds the arguments."""
    state = {"calls": [], "answer": None}

    def load_dataset(*args, **kwargs):
        state["calls"].append((args, kwargs))
        if isinstance(state["answer"], Exception):
            raise state["answer"]
        return state["answer"]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("dylora_moe.data.sources.hub_answers", lambda: True)
    return state


def test_hub_arguments_and_train_split(hub):
    hub["answer"] = datasets.DatasetDict(
        {"test": datasets.Dataset.from_list([{"text": "SECRET"}]), "train": datasets.Dataset.from_list(texts(40))}
    )
    blocks = blocks_of("org/name:english@v2=2", token="hf_x")
    assert hub["calls"] == [(("org/name", "english"), {"revision": "v2", "token": "hf_x"})]
    assert not any("SECRET" in text for text, _ in pieces_of(blocks.train))


def test_hub_single_split_is_used_and_several_are_named(hub):
    table = datasets.Dataset.from_list(texts(40))
    hub["answer"] = datasets.DatasetDict({"test": table})
    assert blocks_of("org/name").sources[0].documents == 40
    hub["answer"] = datasets.DatasetDict({"b": table, "a": table})
    with pytest.raises(UsageError, match="no split named train but several others: a, b"):
        blocks_of("org/name")


class GatedRepoError(Exception):
    """As huggingface_hub raises it; it is recognised by its name, which moved between versions."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("Couldn't reach 'x/y' on the Hub"), "cannot be reached: Couldn't.*give a local file"),
        (DatasetNotFoundError("Dataset 'x/y' doesn't exist on the Hub"), "no such data set.*HF_TOKEN.*local file"),
        (DatasetNotFoundError("Dataset 'x/y' is a gated dataset on the Hub."), "is gated.*HF_TOKEN"),
        (GatedRepoError("401 Client Error"), "is gated.*HF_TOKEN"),
        (ValueError("Config name is missing. Please pick one among: ['a', 'b']"), r"\['a', 'b'\].*x/y:CONFIG"),
        (RuntimeError("Dataset scripts are no longer supported, but found y.py"), "own code.*never done"),
        (OSError("403 Forbidden"), "refuses access.*HF_TOKEN"),
        (KeyError("odd"), "cannot be read from the hub: 'odd'"),
    ],
)
def test_hub_errors(hub, error, message):
    hub["answer"] = error
    with pytest.raises(UsageError, match=message):
        blocks_of("x/y")


def test_unreachable_hub_is_not_asked(hub, monkeypatch):
    monkeypatch.setattr("dylora_moe.data.sources.hub_answers", lambda: False)
    with pytest.raises(UsageError, match=r"hub cannot be reached.*HF_HUB_OFFLINE=1"):
        blocks_of("x/y")
    with pytest.raises(UsageError, match="neither a file or folder that exists nor a hub name"):
        blocks_of("what is this")
    assert not hub["calls"]


# --- what is learned -------------------------------------------------------------------------------------------------


def documents_of(tmp_path, rows, tokenizer):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    blocks = blocks_of(path, tokenizer=tokenizer, block_size=256)
    found = dict(pieces_of(blocks.train, tokenizer) + pieces_of(blocks.evaluation["rows"], tokenizer))
    assert len(found) == len(rows)
    return found, blocks.sources[0]


def test_text_is_learned_whole_with_one_eos(tmp_path):
    found, source = documents_of(tmp_path, pairs(text="Grüße 😀"), byte_tokenizer())
    assert found["Grüße 😀 3<eos>"] == "rüße 😀 3<eos>"  # nothing stands before the first token
    assert source.schema == "text"


@pytest.mark.parametrize(
    ("columns", "text", "learned"),
    [
        ({"instruction": "Do", "output": "Done"}, "### User:\nDo 3\n\n### Assistant:\nDone 3<eos>", "Done 3<eos>"),
        (
            {"instruction": "Do", "input": "this", "response": "Done"},
            "### User:\nDo 3\n\nthis 3\n\n### Assistant:\nDone 3<eos>",
            "Done 3<eos>",
        ),
        (
            {"system_prompt": "Be", "question": "Q", "answer": "A"},
            "### System:\nBe 3\n\n### User:\nQ 3\n\n### Assistant:\nA 3<eos>",
            "A 3<eos>",
        ),
        (
            {"context": "C", "question": "Q", "answer": "A"},
            "### User:\nQ 3\n\nC 3\n\n### Assistant:\nA 3<eos>",
            "A 3<eos>",
        ),
        ({"prompt": "Say", "completion": " yes"}, "Say 3 yes 3<eos>", " yes 3<eos>"),
        ({"input": "Q", "output": "A"}, "### User:\nQ 3\n\n### Assistant:\nA 3<eos>", "A 3<eos>"),
        ({"Instruction": "Q", " RESPONSE ": "A"}, "### User:\nQ 3\n\n### Assistant:\nA 3<eos>", "A 3<eos>"),
        ({"query": "Q", "response": "A", "Query": "x"}, "### User:\nQ 3\n\n### Assistant:\nA 3<eos>", "A 3<eos>"),
        (
            {"system": "Be", "prompt": "Q", "completion": "A"},
            "### System:\nBe 3\n\n### User:\nQ 3\n\n### Assistant:\nA 3<eos>",
            "A 3<eos>",
        ),
    ],
)
def test_pairs_without_a_chat_template(tmp_path, columns, text, learned):
    found, _ = documents_of(tmp_path, pairs(**columns), byte_tokenizer())
    assert found[text] == learned


def test_chat_without_a_template_ends_every_answer(tmp_path):
    rows = [{"messages": [*CHAT, {"role": "user", "content": f"unanswered {i}"}][: 4 + i % 2]} for i in range(2)]
    rows += [{"messages": [{**CHAT[0], "content": f"Hi {i}"}, *CHAT[1:]]} for i in range(9)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    pieces = dict(pieces_of(blocks_of(path, block_size=256).train))
    text = "### User:\nHi 3\n\n### Assistant:\nHello<eos>\n\n### User:\n2+2?\n\n### Assistant:\n4<eos>"
    assert pieces[text] == "Hello<eos>4<eos>"
    assert not any("unanswered" in text for text in pieces)


def chats(n=12):
    return [{"messages": [{**CHAT[0], "content": f"Hi {i}"}, *CHAT[1:]]} for i in range(n)]


CHATML_TEXT = (
    "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi 3<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>"
)


def test_chat_template_labels_answers_and_their_end_tokens(tmp_path):
    found, source = documents_of(tmp_path, chats(), chat_tokenizer())
    assert found[CHATML_TEXT] == "Hello<|im_end|>4<|im_end|>"  # the end token is EOS: not doubled
    assert (source.schema, source.unlabelled_turns) == ("chat", 0)
    found, _ = documents_of(tmp_path, chats(), chat_tokenizer(eos="<eos>"))
    assert found[CHATML_TEXT + "<eos>"] == "Hello<|im_end|>4<|im_end|><eos>"


def test_question_without_an_answer_is_left_out(tmp_path):
    rows = [{"messages": [*row["messages"], {"role": "user", "content": "unanswered"}]} for row in chats()]
    found, _ = documents_of(tmp_path, rows, chat_tokenizer(eos="<eos>"))
    assert found[CHATML_TEXT + "<eos>"] == "Hello<|im_end|>4<|im_end|><eos>"


def test_sharegpt_is_read_as_messages(tmp_path):
    names = {"user": "human", "assistant": "gpt"}
    rows = [
        {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]]}
        for row in chats()
    ]
    found, _ = documents_of(tmp_path, rows, chat_tokenizer())
    assert found[CHATML_TEXT] == "Hello<|im_end|>4<|im_end|>"


def test_pairs_are_rendered_by_the_chat_template(tmp_path):
    found, _ = documents_of(tmp_path, pairs(prompt="Say", completion="yes"), chat_tokenizer())
    (text,) = (text for text in found if "Say 3<" in text)
    assert text.endswith("<|im_start|>user\nSay 3<|im_end|>\n<|im_start|>assistant\nyes 3<|im_end|>")
    assert found[text] == "yes 3<|im_end|>"


def test_template_without_system_role_gets_it_before_the_users_words(tmp_path):
    rows = [{"messages": [{"role": "system", "content": "Be"}, *row["messages"]]} for row in chats()]
    found, _ = documents_of(tmp_path, rows, chat_tokenizer(GEMMA_LIKE))
    text = next(text for text in found if "Hi 3" in text)
    assert text.startswith("<bos><|im_start|>user\nBe\n\nHi 3<|im_end|>")  # one BOS
    assert found[text] == "Hello<|im_end|>4<|im_end|>"


def test_template_without_generation_prompt(tmp_path):
    found, _ = documents_of(tmp_path, chats(), chat_tokenizer(LLAMA2_LIKE))
    text = "[INST] Hi 3 [/INST] Hello <|im_end|>[INST] 2+2? [/INST] 4 <|im_end|>"
    assert found[text] == "Hello <|im_end|>4 <|im_end|>"


def test_answer_that_the_template_rewrites_is_left_unlabelled_and_counted(tmp_path):
    found, source = documents_of(tmp_path, chats(), chat_tokenizer(THINKING))
    assert set(found.values()) == {"<think></think>4<|im_end|>"}
    assert source.unlabelled_turns == 12


def test_template_that_hides_the_answers_is_refused(tmp_path):
    with pytest.raises(UsageError, match="row 1: the answer cannot be found in what the tokenizer's chat template"):
        documents_of(tmp_path, chats(), chat_tokenizer(BACKWARDS))


def test_chat_that_the_template_refuses_is_named(tmp_path):
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UsageError, match=r"row 1: .*refuses this chat \(roles: user, assistant.*roles must alternate"):
        documents_of(tmp_path, chats(), chat_tokenizer(template))


def test_date_in_a_template_does_not_change_the_tokens(tmp_path):
    found, _ = documents_of(tmp_path, chats(), chat_tokenizer("\n{{ strftime_now('%d %b %Y') }}" + CHATML))
    assert all(text.startswith("\n26 Jul 2024<|im_start|>") for text in found)


def test_bos_once_where_the_tokenizer_adds_it(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = chat_tokenizer(eos="<eos>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A", None, [("<bos>", bos)])
    rows = [*pairs(text="x"), *pairs(text="<bos>y")]
    found, _ = documents_of(tmp_path, rows, tokenizer)
    assert found["<bos>x 3<eos>"] == "x 3<eos>"
    assert found["<bos>y 3<eos>"] == "y 3<eos>"


def test_eos_is_learned_where_it_is_also_the_padding(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    row = blocks_of(write_rows(tmp_path / "a.jsonl", texts(40)), tokenizer=tokenizer).train[0]
    ends = [label for i, label in zip(row["input_ids"], row["labels"], strict=True) if i == EOS and label == EOS]
    assert len(ends) == sum(p == 0 for p in row["position_ids"]) - (row["labels"][-1] == -100)


def test_tokens_that_the_model_does_not_know(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.split_special_tokens = False
    tokenizer.backend_tokenizer.encode_special_tokens = False
    tokenizer.add_tokens(["<call>"], special_tokens=True)
    new = tokenizer.convert_tokens_to_ids("<call>")
    rows = [{"text": row["text"] + "<call>" * (i < 3)} for i, row in enumerate(texts(40))]
    path = write_rows(tmp_path / "a.jsonl", rows)
    assert blocks_of(path, tokenizer=tokenizer, vocabulary=new + 1).sources[0].documents == 40
    message = (
        rf"a\.jsonl: the tokenizer makes 1 token\(s\), in 3 document\(s\), .* ends at id {new - 1}:\n"
        rf"  - '<call>' \(id {new}\)\n.*resize_token_embeddings"
    )
    with pytest.raises(UsageError, match=message):
        blocks_of(path, tokenizer=tokenizer, vocabulary=new)


@pytest.mark.parametrize("packed", [True, False])
def test_padding_that_the_model_does_not_know_is_replaced(tmp_path, packed):
    path = write_rows(tmp_path / "a.jsonl", texts(40))
    known = np.asarray(blocks_of(path, packed=packed, vocabulary=PAD + 1).train["input_ids"])
    assert known.max() == PAD
    replaced = blocks_of(path, packed=packed, vocabulary=PAD).train  # the last id that is known is EOS
    ids, labels = np.asarray(replaced["input_ids"]), np.asarray(replaced["labels"])
    assert np.array_equal(ids, np.where(known == PAD, EOS, known))
    assert (labels[known == PAD] == -100).all()


def test_tokenizer_without_eos(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UsageError, match="no end-of-sequence token"):
        blocks_of(write_rows(tmp_path / "a.jsonl", texts(40)), tokenizer=tokenizer)


# --- packing ---------------------------------------------------------------------------------------------------------


def test_blocks_are_full_and_lose_nothing(tmp_path):
    rows = [*texts(60), {"text": "long " * 50}]
    blocks = blocks_of(write_rows(tmp_path / "a.jsonl", rows))
    (source,) = blocks.sources
    ids = np.asarray(blocks.train["input_ids"])
    assert ids.shape == (source.blocks, BLOCK) == np.asarray(blocks.train["labels"]).shape
    assert (ids != PAD).sum() + source.dropped_tokens == source.tokens == blocks.train_tokens
    assert (ids == PAD).sum() == source.padding_tokens < 3 * BLOCK
    whole = [text for text, _ in pieces_of(blocks.train)] + [text for text, _ in pieces_of(blocks.evaluation["a"])]
    assert all(
        row["text"] + "<eos>" in whole for row in texts(60) if len(row["text"]) < BLOCK
    )  # short ones are never cut


def test_blocks_are_not_in_the_order_of_packing(tmp_path):
    blocks = blocks_of(write_rows(tmp_path / "a.jsonl", texts(60)))
    first = [row["position_ids"].index(0, 1) for row in blocks.train]  # the first piece's length: the block's longest
    assert first != sorted(first, reverse=True)


def test_no_label_crosses_into_a_document_or_stands_on_padding(tmp_path):
    rows = [*texts(60), *pairs(9, text="longer than a block, so that its rest is packed with others" * 2)]
    for row in blocks_of(write_rows(tmp_path / "a.jsonl", rows)).train:
        for i, label, position in zip(row["input_ids"], row["labels"], row["position_ids"], strict=True):
            assert label == (-100 if position == 0 or i == PAD else i)


def test_pieces_without_labels_are_dropped_and_counted(tmp_path):
    rows = [{"prompt": "p" * 3 * BLOCK + str(i), "completion": "c" * BLOCK} for i in range(3)]
    blocks = blocks_of(write_rows(tmp_path / "a.jsonl", rows))
    assert blocks.sources[0].dropped_tokens == 2 * 3 * BLOCK
    assert all(any(label != -100 for label in row["labels"]) for row in blocks.train)


def test_blocks_of_one_document_each(tmp_path):
    rows = [*texts(60), {"text": "x" * (2 * BLOCK + 9)}]
    blocks = blocks_of(write_rows(tmp_path / "a.jsonl", rows), packed=False)
    (source,) = blocks.sources
    assert source.blocks == len(blocks.train) == source.documents - source.held_out_documents + 2
    for row in blocks.train:
        ids, labels, mask = (np.asarray(row[name]) for name in ("input_ids", "labels", "attention_mask"))
        length = mask.sum()
        assert (mask[:length] == 1).all() and (ids[length:] == PAD).all() and PAD not in ids[:length]
        assert labels[0] == -100 and (labels[1:length] == ids[1:length]).all() and (labels[length:] == -100).all()
    assert blocks.padding_share == 1 - np.asarray(blocks.train["attention_mask"]).mean()
    packed = blocks_of(tmp_path / "a.jsonl")
    assert blocks.train_tokens == packed.train_tokens and blocks.padding_share > packed.padding_share


# --- held out --------------------------------------------------------------------------------------------------------


def test_nothing_held_out_is_trained_on(tmp_path):
    rows = texts(60) + texts(30) + texts(10)  # with copies
    blocks = blocks_of(write_rows(tmp_path / "a.jsonl", rows), eval_fraction=0.2)
    held = {text for text, _ in pieces_of(blocks.evaluation["a"])}
    assert len(held) == 12 and not held & {text for text, _ in pieces_of(blocks.train)}
    (source,) = blocks.sources
    assert source.held_out_documents == sum(row["text"] + "<eos>" in held for row in rows) > 12


def test_split_is_independent_of_other_data_sets(tmp_path):
    first = write_rows(tmp_path / "a.jsonl", texts(60))
    second = write_rows(tmp_path / "b.jsonl", texts(60, 30))  # half of it is the first's
    alone, both = (blocks_of(*files, eval_fraction=0.2) for files in [(first,), (second, first)])
    assert both.evaluation["a"].to_dict() == alone.evaluation["a"].to_dict()
    assert blocks_of(first, seed=1, eval_fraction=0.2).evaluation["a"].to_dict() != alone.evaluation["a"].to_dict()
    held = {text for dataset in both.evaluation.values() for text, _ in pieces_of(dataset)}
    assert not held & {text for text, _ in pieces_of(both.train)}
    assert sum(source.withheld_documents for source in both.sources) > 0


def test_what_is_held_out_as_text_is_not_trained_on_as_an_answer(tmp_path):
    as_text = write_rows(tmp_path / "a.jsonl", texts(60))
    halves = [(row["text"][:9], row["text"][9:]) for row in texts(60)]
    as_pairs = write_rows(tmp_path / "b.jsonl", [{"prompt": one, "completion": two} for one, two in halves if two])
    blocks = blocks_of(as_text, as_pairs, eval_fraction=0.2)
    held = {text for dataset in blocks.evaluation.values() for text, _ in pieces_of(dataset)}
    assert len(held) > 12
    assert not held & {text for text, _ in pieces_of(blocks.train)}


@pytest.mark.parametrize("seed", range(8))
def test_a_document_that_is_too_long_to_evaluate_on_is_trained_on(tmp_path, seed):
    rows = [{"text": "novel " * 600}, {"text": "saga " * 500}, {"text": "short story"}]
    blocks = blocks_of(write_rows(tmp_path / "a.jsonl", rows), seed=seed, max_eval_blocks=2)
    assert [text for text, _ in pieces_of(blocks.evaluation["a"])] == ["short story<eos>"]
    path = write_rows(tmp_path / "b.jsonl", rows[:2])
    assert blocks_of(path, seed=seed, max_eval_blocks=2).sources[0].tokens == 3601, "the shorter one is held out"


def test_document_split_by_tokens_is_not_trained_on_whole_elsewhere(tmp_path):
    text = "".join(f"{i}," for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    others = write_rows(tmp_path / "b.jsonl", [*texts(40), {"text": text}])
    blocks = blocks_of(tmp_path / "a.txt", others)
    assert not any("199," in piece for piece, _ in pieces_of(blocks.train))


def test_at_least_one_document_and_at_most_the_blocks_allowed(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", texts(100))
    assert blocks_of(path, eval_fraction=0.0001).sources[0].held_out_documents == 1
    few = blocks_of(path, eval_fraction=0.9, max_eval_blocks=2).sources[0]
    assert 1 < few.held_out_documents < 12 and few.eval_blocks <= 2
    assert few.tokens + few.eval_tokens == sum(len(row["text"]) + 1 for row in texts(100))


# --- mixing ----------------------------------------------------------------------------------------------------------


def test_weights_are_the_shares_of_blocks(tmp_path):
    files = [write_rows(tmp_path / f"{name}.jsonl", texts(400, 1000 * i)) for i, name in enumerate("ab")]
    blocks = blocks_of(f"{files[0]}=3", files[1])
    counts = [source.sampled_blocks for source in blocks.sources]
    assert sum(counts) == len(blocks.train)
    assert counts[0] / sum(counts) == pytest.approx(0.75, abs=0.07)
    assert all(source.sampled_blocks >= source.blocks for source in blocks.sources)
    assert blocks.train.column_names == [*COLUMNS, "source"]


FINGERPRINT = """
import sys
from dylora_moe.data.blocks import data_fingerprint, load_blocks
from dylora_moe.data.sources import DataSpec
from dylora_moe.base.tiny import byte_tokenizer
print(data_fingerprint(load_blocks([DataSpec(s) for s in sys.argv[1:]], byte_tokenizer(), block_size=64, seed=3)))
"""


def test_same_blocks_in_another_process_and_nothing_left_behind(tmp_path):
    files = [write_rows(tmp_path / f"{name}.jsonl", texts(50, 1000 * i)) for i, name in enumerate("ab")]
    for folder in ("cwd", "home"):
        (tmp_path / folder).mkdir()
    places = {"HOME": str(tmp_path / "home"), "HF_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "home")}
    root = str(Path(__file__).parents[2])
    ran = subprocess.run(
        [sys.executable, "-c", FINGERPRINT, *map(str, files)],
        cwd=tmp_path / "cwd",
        env={**os.environ, **places, "PYTHONHASHSEED": "7", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == data_fingerprint(blocks_of(*files, seed=3))
    left = [path.relative_to(tmp_path) for folder in ("cwd", "home") for path in (tmp_path / folder).rglob("*")]
    assert [path for path in left if path.suffix in (".arrow", ".jsonl", ".lock")] == []
    assert not list((tmp_path / "cwd").iterdir()) and {p.name for p in tmp_path.iterdir()} == {
        "a.jsonl",
        "b.jsonl",
        "cwd",
        "home",
    }


def test_fingerprint_sees_content_order_and_nothing_else(tmp_path):
    rows = texts(60)
    first = data_fingerprint(blocks_of(write_rows(tmp_path / "a.jsonl", rows)))
    assert data_fingerprint(blocks_of(write_rows(tmp_path / "other.jsonl", rows))) == first
    assert data_fingerprint(blocks_of(tmp_path / "a.jsonl", seed=1)) != first
    alone = data_fingerprint(blocks_of(tmp_path / "a.jsonl", packed=False))
    assert alone == data_fingerprint(blocks_of(tmp_path / "other.jsonl", packed=False)) != first
    rows[5] = {"text": rows[5]["text"] + "!"}
    assert data_fingerprint(blocks_of(write_rows(tmp_path / "c.jsonl", rows))) != first


# --- the demo --------------------------------------------------------------------------------------------------------


def test_byte_tokenizer_is_lossless():
    tokenizer = byte_tokenizer()
    text = "".join(map(chr, range(0x250))) + " <eos><pad> 日本 😀 a\r\n\t  . 's  \n"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (258, EOS, PAD)


def test_python_sources_are_bounded_and_the_same_each_time():
    sources = python_sources(max_bytes=200_000, max_file_bytes=20_000)
    assert sources == python_sources(max_bytes=200_000, max_file_bytes=20_000)
    assert 150_000 < sum(len(text.encode()) for text in sources) <= 200_000
    assert max(len(text.encode()) for text in sources) <= 20_000
