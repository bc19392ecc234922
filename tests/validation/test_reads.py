"""How often the full script reads a checkpoint: each byte is hashed once, each adapter is opened three times."""

from __future__ import annotations

import builtins
import io
import os
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import safetensors.torch

from dylora_moe.checkpoint import probe, verify
from dylora_moe.store.manifest import MANIFEST
from dylora_moe.store.run_folder import file_sizes
from dylora_moe.validation import saved

from ..support.scripts import EXPERT_0, EXPERT_1, full, run
from ..support.tiny import tiny_base

TIMES = 3  # verified; loaded into the fresh instance; loaded by stock PEFT


class Reads:
    """What is opened and hashed in a folder, whoever does it.

    Python's own opens are counted where they all pass, those of safetensors, which are native, at `safe_open`: what
    `load_file` calls, for this package as for PEFT, and what this package imports by itself.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder = folder
        self.opened: Counter[str] = Counter()
        self.hashed: dict[str, list[int]] = defaultdict(list)
        for module, name in (
            (os, "open"), (io, "open"), (builtins, "open"), (safetensors.torch, "safe_open"), (probe, "safe_open"),
            (saved, "safe_open"),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, self.counted(getattr(module, name)))
        monkeypatch.setattr(verify, "scan_file", self.hashing(verify.scan_file, lambda scan: scan.digest[0]))
        monkeypatch.setattr(verify, "file_digest", self.hashing(verify.file_digest, lambda digest: digest[0]))

    def name(self, path: object) -> str | None:
        inside = isinstance(path, str | os.PathLike) and Path(path).is_relative_to(self.folder)
        return Path(path).relative_to(self.folder).as_posix() if inside else None

    def counted(self, real):
        def opened(path, *args, **kwargs):
            if name := self.name(path):
                self.opened[name] += 1
            return real(path, *args, **kwargs)

        return opened

    def hashing(self, real, length):
        def hashed(path, *args):
            result = real(path, *args)
            self.hashed[self.name(path)].append(length(result))
            return result

        return hashed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_base("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("existing", [True, False])
def test_a_checkpoint_is_hashed_once_and_its_adapters_are_opened_three_times(
    existing, capsys, tiny, tmp_path, monkeypatch
):
    """What a save does before it publishes the folder, in its staging folder, does not count."""
    checkpoint = tmp_path / "checkpoint"
    if existing:
        assert full.main(["--model", str(tiny), "--output-dir", str(tmp_path)]) == 0
    reads = Reads(checkpoint, monkeypatch)
    flags = ["--checkpoint", checkpoint] if existing else ["--model", tiny, "--output-dir", tmp_path]
    outcome = run(full, capsys, *flags)
    assert outcome.code == 0, outcome.out
    assert reads.hashed == {name: [size] for name, size in file_sizes(checkpoint).items() if name != MANIFEST}
    assert {name: reads.opened[name] for name in (EXPERT_0, EXPERT_1)} == dict.fromkeys((EXPERT_0, EXPERT_1), TIMES)
