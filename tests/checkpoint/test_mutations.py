"""Whole checkpoints, spoiled at random: never a pass that is not earned, never a traceback, never a hang.

DYLORA_MUTATIONS=2000 python -m pytest tests/test_mutations.py       as many mutations, drawn anew
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from dylora_moe import DyLoRAMoE
from dylora_moe.checkpoint import formats
from dylora_moe.checkpoint.probe import changed_tensors, probe_difference, read_probe
from dylora_moe.checkpoint.read import load_mixture
from dylora_moe.checkpoint.verify import find_problems, open_checkpoint
from dylora_moe.checkpoint.write import save_checkpoint
from dylora_moe.errors import CheckpointError, shown
from dylora_moe.mixture.config import MoELoraConfig, RouterConfig
from dylora_moe.store.manifest import MANIFEST

from ..support.mutations import (
    files_of,
    make_flat,
    mutations,
    rewrite_manifest,
    save_mixed,
    save_sound,
    tiny_mixture,
    two_skills,
)
from ..support.mutations import training_files as write_training_files
from ..support.tiny import ARCHITECTURES, tiny_base

COUNT = int(os.environ.get("DYLORA_MUTATIONS", 0))
MUTATED = settings(
    max_examples=COUNT or 240,
    derandomize=not COUNT,
    database=None,
    deadline=timedelta(seconds=10),
    suppress_health_check=list(HealthCheck),
)
GOOD = 200  # of which the first 25 are not marked slow


@dataclass
class Original:
    """A sound checkpoint, the names of its files, and the tensors that it loads to."""

    folder: Path
    names: tuple[str, ...]
    tensors: dict[str, torch.Tensor] = field(repr=False)


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> list[Original]:
    """One with everything, and one flat and mixed without a probe."""
    run = tmp_path_factory.mktemp("run")
    found = []
    for folder in (save_sound(run / "checkpoint-5"), save_mixed(run / "checkpoint-6")):
        assert find_problems(folder) == []
        found.append(Original(folder, tuple(files_of(folder)), tensors_of(load_mixture(folder, tiny_base()))))
    return found


def tensors_of(model: DyLoRAMoE) -> dict[str, torch.Tensor]:
    experts = {f"{i} {k}": t for i in range(model.num_experts) for k, t in model.expert_tensors(i).items()}
    return {key: t.detach().clone() for key, t in (experts | {"gate": model.router.gate.weight}).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(a[key].shape == b[key].shape and torch.equal(a[key], b[key]) for key in a)


def check_texts(problems: list[str], folder: Path, names: tuple[str, ...]) -> None:
    """Each names a file that was, is or ought to be there, in text that any terminal shows; none is an accident."""
    known = {".", *names, MANIFEST, formats.PROBE, *listed_in_manifest(folder)}
    known |= {p.relative_to(folder).as_posix() for p in folder.rglob("*")}
    for problem in problems:
        name = problem.removeprefix("Found merged model file: ")
        assert name.partition(": ")[0] in known or name.partition("; ")[0] in known, problem
        assert problem.isprintable() and len(problem) < 3000, problem
        assert "report this as a bug" not in problem, problem
    assert problems == sorted(set(problems))


def listed_in_manifest(folder: Path) -> list[str]:
    if not (folder / MANIFEST).is_file():  # a FIFO would be waited for
        return []
    try:
        return [shown(name) for name in json.loads((folder / MANIFEST).read_bytes())["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


@MUTATED
@given(st.data())
def test_row_35_a_mutated_checkpoint_never_passes_undeserved(originals, tmp_path_factory, data):
    original = originals[data.draw(st.integers(0, len(originals) - 1))]
    spoil, rewrite = data.draw(mutations(original.names)), data.draw(st.booleans())
    folder = tmp_path_factory.getbasetemp() / "mutated"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(original.folder, folder)
    what = spoil(folder)
    if what is None:
        event("changed nothing")
        return
    if rewrite:
        rewrite_manifest(folder)
    began = time.monotonic()
    problems = find_problems(folder)
    assert time.monotonic() - began < 5
    event("refused by verify" if problems else "passed verify")
    check_texts(problems, folder, original.names)
    assert not (folder / "PWNED").exists() and not Path("PWNED").exists()
    if problems:
        return
    assert rewrite or what.startswith("hardlink"), what
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            model = load_mixture(folder, tiny_base())
        except CheckpointError:
            event("refused by load")
            return
    if same(tensors_of(model), original.tensors):
        event("loads to the same tensors")
        return
    probe = read_probe(open_checkpoint(folder))
    if probe is not None:
        assert changed_tensors(model, probe[0]), what
        event("found by the probe")


# ---- no false alarm ----


def good_mixture(number: int) -> DyLoRAMoE:
    """The number-th of a series that goes through architectures, ranks, targets, experts, dtypes and states."""
    kind = ARCHITECTURES[number % 5]
    inside = {"gpt2": ["c_attn", "c_fc"], "gpt_neox": ["query_key_value", "dense_h_to_4h"]}
    lists = [None, "all-linear", inside.get(kind, ["q_proj", "down_proj"])]
    count = (1, 2, 3, 2, 12, 1, 4, 2, 11, 5)[number % 10]
    experts = []
    for index in range(count):
        config = {"r": 1 + (number + index * (number % 3)) % 7, "lora_alpha": (1, 16, 0.5)[number % 3]}
        config["target_modules"] = lists[(number // 5 + index * (number % 2)) % 3]
        experts.append(MoELoraConfig(**config, use_rslora=number % 4 == 1, lora_dropout=(0.0, 0.05)[number % 2]))
    trained = range(count) if number % 3 else range(0, count, 2)
    router = RouterConfig((1.0, 0.3)[number % 2], (None, 1, 3)[number % 3], (0.01, 0)[number % 2])
    dtype = (torch.float32, torch.bfloat16, torch.float16)[number % 3]
    return tiny_mixture(kind, experts, seed=number, trained=trained, router=router, dtype=dtype)


STARTS = [pytest.param(start, marks=pytest.mark.slow if start else ()) for start in range(0, GOOD, 25)]


@pytest.mark.parametrize("start", STARTS)
def test_good_checkpoints_verify_and_load_to_the_same_bits(start, tmp_path):
    for number in range(start, start + 25):
        model = good_mixture(number)
        if number % 4:
            model.mark_mature()
        folder = tmp_path / f"checkpoint-{number}"
        save_checkpoint(
            folder,
            model,
            step=5,
            skills=two_skills() if number % 2 else None,
            training_files=write_training_files if number % 3 == 0 else None,
        )
        if number % 4 == 2:
            for index in range(0, model.num_experts, 1 + number % 3):
                make_flat(folder, f"expert_{index}")
            rewrite_manifest(folder)
        assert find_problems(folder) == [], number
        base = tiny_base(ARCHITECTURES[number % 5], dtype=next(model.base.parameters()).dtype)
        loaded = load_mixture(folder, base)
        assert same(tensors_of(loaded), tensors_of(model)), number
        assert loaded.expert_states == model.expert_states, number
        probe = read_probe(open_checkpoint(folder))
        assert probe is None or probe_difference(loaded, probe[0]).largest == 0, number
        shutil.rmtree(folder)
