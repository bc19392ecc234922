"""A checkpoint that came through the Hub: its links lead into the cache alone, and what is beside it is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dylora_moe.checkpoint import formats
from dylora_moe.checkpoint.read import load_mixture
from dylora_moe.checkpoint.verify import find_problems, open_checkpoint
from dylora_moe.cli.main import main
from dylora_moe.store import run_folder
from dylora_moe.store.manifest import manifest_problems

from ..support.hub_folders import add_what_the_hub_adds, in_hub_cache
from ..support.mutations import files_of, rewrite_manifest, save_sound, tiny_mixture
from ..support.tiny import tiny_base

ROUTER = formats.ROUTER


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return save_sound(tmp_path_factory.mktemp("run") / "checkpoint-5")


@pytest.fixture
def sound(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkpoint-5"))


def same_tensors(folder: Path) -> bool:
    one, other = tiny_mixture(), load_mixture(folder, tiny_base())
    pairs = zip(one.trained_parameters().values(), other.trained_parameters().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# ---- what is beside ----


def test_what_the_hub_adds_is_named_and_does_no_harm(sound, tmp_path, capsys):
    names = add_what_the_hub_adds(sound)
    assert main(["verify", str(sound), "--json", str(tmp_path / "json")]) == 0
    out = capsys.readouterr().out
    assert "complete and sound, step 5" in out
    line = ", ".join(names).replace(".git/HEAD, .git/objects/0d/4b", ".git")
    assert f"  beside the checkpoint's files, not read: {line}\n" in out
    result = json.loads((tmp_path / "json").read_text())
    assert result["beside"] == names
    assert result["files"] == len(files_of(sound)) - len(names)
    assert same_tensors(sound)
    assert run_folder.latest(sound.parent).path == sound
    for name in ("tokenizer.json", ".gitignore", ".DS_Store"):
        (sound / name).touch()
    (sound / ".cache/huggingface/empty").mkdir()
    assert find_problems(sound) == []
    rewrite_manifest(sound)  # it may list them as well
    assert find_problems(sound) == []


def link_to_passwd(path: Path) -> None:
    path.symlink_to("/etc/passwd")


BESIDE = {
    "README.md a folder": ("README.md", Path.mkdir),
    "README.md a link": ("README.md", link_to_passwd),
    "README.md deep inside": ("peft_adapters/README.md", Path.touch),
    "a tokenizer that is none": ("tokenizer.bin.safetensors", Path.touch),
    "weights for a tokenizer": ("tokenizer.safetensors", Path.touch),
    "another cache": (".cache/other", Path.mkdir),
    "a file for the cache": (".cache", Path.touch),
    "a link in the cache": (".cache/huggingface/x", link_to_passwd),
    "a FIFO in the cache": (".cache/huggingface/x", os.mkfifo),
    "a merged model in the cache": (".cache/huggingface/model.safetensors", Path.touch),
    "another file with the templates": ("additional_chat_templates/x.bin", Path.touch),
    "the desktop's file a folder": (".DS_Store", Path.mkdir),
    "a git repository deep inside": ("peft_adapters/.git", Path.mkdir),
    "a link in a git repository": (".git/x", link_to_passwd),
    "a merged model in a git repository": (".git/model.safetensors", Path.touch),
}


@pytest.mark.parametrize("case", BESIDE)
def test_what_may_not_be_beside_is_refused(sound, case):
    name, make = BESIDE[case]
    (sound / name).parent.mkdir(parents=True, exist_ok=True)
    make(sound / name)
    (problem,) = find_problems(sound)
    assert name in problem
    if not case.startswith("a merged model"):
        assert any(name in problem for problem in manifest_problems(sound))


# ---- the links of the cache ----


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("under", ["", "checkpoint-5"])
def test_the_links_of_the_hubs_cache_are_followed(original, tmp_path, shared, under):
    shutil.copytree(original, tmp_path / "repo" / under, dirs_exist_ok=True)
    (tmp_path / "repo/README.md").write_text("of the repository")
    (tmp_path / "home").symlink_to(tmp_path)  # the cache may be reached by a link
    folder = in_hub_cache(tmp_path / "repo", tmp_path / "home/cache", shared=shared) / under
    assert find_problems(folder) == []
    assert open_checkpoint(folder).config.step == 5
    sizes = run_folder.file_sizes(folder)
    assert {name: sizes[name] for name in files_of(original)} == run_folder.file_sizes(original)
    assert same_tensors(folder)
    if under:
        assert run_folder.latest(folder.parent).path == folder


def relink(change: Callable[[Path, Path], None]) -> Callable[[Path], None]:
    """Replace the link of the router: change(link, its blob)."""

    def spoil(snapshot: Path) -> None:
        link = snapshot / ROUTER
        blob = link.parent / os.readlink(link)
        link.unlink()
        change(link, Path(os.path.normpath(blob)))

    return spoil


def outside(link: Path, blob: Path) -> None:
    shutil.copyfile(blob, blob.parents[2] / "elsewhere")
    link.symlink_to("../../../elsewhere")


def other_repository(link: Path, blob: Path) -> None:
    other = blob.parents[2] / "models--org--other/blobs"
    other.mkdir(parents=True)
    shutil.copyfile(blob, other / blob.name)
    link.symlink_to(f"../../../models--org--other/blobs/{blob.name}")


def out_of_the_blobs(link: Path, blob: Path) -> None:
    shutil.copyfile(blob, blob.parents[1] / "secret")
    link.symlink_to("../../blobs/../secret")


def below_the_blobs(link: Path, blob: Path) -> None:
    (blob.parent / "deep").mkdir()
    shutil.copyfile(blob, blob.parent / "deep/router")
    link.symlink_to("../../blobs/deep/router")


def a_blob_that_is_a_link(link: Path, blob: Path) -> None:
    outside(link, blob)
    blob.unlink()
    blob.symlink_to("../../elsewhere")
    link.unlink()
    link.symlink_to(f"../../blobs/{blob.name}")


def a_shared_blob_of_no_store(link: Path, blob: Path) -> None:
    place = blob.parents[2] / "blobs" / "other"
    place.mkdir(parents=True)
    shutil.move(blob, place / blob.name)
    blob.symlink_to(f"../../blobs/other/{blob.name}")
    link.symlink_to(f"../../blobs/{blob.name}")


def another_way(link: Path, blob: Path) -> None:
    link.symlink_to(f"../../../{blob.parents[1].name}/blobs/{blob.name}")


def a_loop(link: Path, blob: Path) -> None:
    blob.unlink()
    blob.symlink_to(blob.name)
    link.symlink_to(f"../../blobs/{blob.name}")


LINKS = {
    "elsewhere": relink(outside),
    "/etc/passwd": relink(lambda link, blob: link.symlink_to("/etc/passwd")),
    "absolute": relink(lambda link, blob: link.symlink_to(blob)),
    "another repository": relink(other_repository),
    "out of the blobs": relink(out_of_the_blobs),
    "below the blobs": relink(below_the_blobs),
    "to the blobs": relink(lambda link, blob: link.symlink_to("../../blobs")),
    "to nothing": relink(lambda link, blob: link.symlink_to("../../blobs/nothing")),
    "a blob that is a link": relink(a_blob_that_is_a_link),
    "a shared blob of no store": relink(a_shared_blob_of_no_store),
    "by another way": relink(another_way),
    "within the snapshot": relink(lambda link, blob: link.symlink_to("skill_library.safetensors")),
    "a loop": relink(a_loop),
}


@pytest.mark.parametrize("case", LINKS)
def test_links_to_anywhere_else_are_refused(original, tmp_path, case):
    """Though most of them lead to the right content."""
    folder = in_hub_cache(original, tmp_path / "cache")
    LINKS[case](folder)
    (problem,) = find_problems(folder)
    assert problem.startswith(f"{ROUTER}: expected a file of ")
    assert "found a symbolic link" in problem


def test_links_are_followed_in_a_cache_only(original, tmp_path):
    folder = in_hub_cache(original, tmp_path / "cache")
    blobs = folder.parents[1] / "blobs"
    blobs.rename(tmp_path / "moved")
    blobs.symlink_to(tmp_path / "moved")
    assert len(find_problems(folder)) > 5
    folder = in_hub_cache(original, tmp_path / "other", name="run")
    assert len(find_problems(folder)) > 5
