"""The three scripts as a user calls them: flags, lines, exit codes, and what is left behind."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from xml.etree import ElementTree

import pytest
import torch

from dylora_moe import DyLoRAMoE
from dylora_moe.base.find import find_base
from dylora_moe.checkpoint.read import read_skills
from dylora_moe.checkpoint.tensors import expert_tensors
from dylora_moe.checkpoint.write import save_checkpoint
from dylora_moe.errors import UsageError
from dylora_moe.store.lock import writer_lock
from dylora_moe.system import interrupts
from dylora_moe.validation import subject, workspace
from dylora_moe.validation.saved import fill_experts
from train import PeftCheckpointCallback

from ..support import scripts
from ..support.hub_folders import in_hub_cache
from ..support.saving import python
from ..support.scripts import (
    EXPERT_0,
    EXPERT_1,
    FULL_LINES,
    MINIMAL_LINES,
    copy_of,
    edit_tensors,
    full,
    minimal,
    quick,
    run,
)
from ..support.tiny import tiny_base


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_base("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def saved(tiny, tmp_path_factory):
    """A checkpoint of two experts, with its probe."""
    folder = tmp_path_factory.mktemp("saved")
    assert full.main(["--model", str(tiny), "--output-dir", str(folder)]) == 0
    return folder / "checkpoint"


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """The temporary folder of the scripts, empty after every test but those that keep something."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield folder
    assert [path for path in folder.glob("dylora*") if not (path / "kept").exists()] == []


# ---- what passes ----


def test_quick(capsys):
    outcome = run(quick, capsys)
    assert outcome.code == 0
    assert outcome.lines[-4:] == [
        "✓ PASS: peft",
        "✓ PASS: safetensors",
        "✓ PASS: structure",
        "✓ ALL QUICK TESTS PASSED",
    ]


@pytest.mark.parametrize(("flags", "expected"), [((), "False"), (("--dtype", "float32"), "True")])
def test_the_files_of_a_checkpoint_are_checked_without_torch(saved, flags, expected):
    """Importing torch takes longer than reading two gigabytes."""
    argv = ["--checkpoint", str(saved), *flags]
    code = f"import sys, test_checkpoint_minimal as t; print(t.main({argv!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=scripts.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"0 {expected}"


def test_minimal(capsys, tiny):
    outcome = run(minimal, capsys, "--model", tiny)
    assert outcome.code == 0
    assert outcome.lines[-6:-2] == MINIMAL_LINES
    assert outcome.lines[-2] == ""
    assert re.fullmatch(r"Total checkpoint size: \d+\.\d MB", outcome.lines[-1])
    headings = [line for line in outcome.lines if line.startswith("TEST")]
    assert headings == ["TEST: Save Checkpoint", "TEST: Verify Checkpoint Structure", "TEST: Checkpoint Size"]


def test_full(capsys, tiny):
    outcome = run(full, capsys, "--model", tiny, "--experts", 3)
    assert outcome.code == 0
    assert outcome.lines[0] == f"loading {tiny} (pretrained weights)"
    assert outcome.lines[-8:-2] == FULL_LINES
    assert [line for line in outcome.lines if line.startswith("TEST")] == [
        "TEST 1: Save Checkpoint",
        "TEST 2: Verify Checkpoint Structure",
        "TEST 3: Load Checkpoint",
        "TEST 4: Output Consistency",
        "TEST 5: Checkpoint Size",
    ]
    controls = re.findall(r"negative control, (\S+) spoiled: differs by", outcome.out)
    assert controls == ["expert_0", "expert_1", "expert_2", "router"]


@pytest.mark.parametrize("architecture", ["gemma", "gpt2", "gpt_neox", "opt", "qwen2"])
def test_full_on_other_architectures(capsys, tmp_path, architecture):
    tiny_base(architecture).save_pretrained(tmp_path / "model")
    assert run(full, capsys, "--model", tmp_path / "model").code == 0


def test_full_with_one_expert_has_no_router_to_spoil(capsys, tiny):
    outcome = run(full, capsys, "--model", tiny, "--experts", 1)
    assert outcome.code == 0
    assert "negative control, router spoiled: not applicable" in outcome.out


def test_full_with_more_experts_than_fit_one_pass(capsys, tiny):
    assert run(full, capsys, "--model", tiny, "--experts", 11, "--lora-r", 2).code == 0


def test_config_alone_is_enough(capsys, tiny, tmp_path):
    folder = tmp_path / "config-only"
    folder.mkdir()
    (folder / "config.json").write_bytes((tiny / "config.json").read_bytes())
    assert run(minimal, capsys, "--model", folder).code == 0
    outcome = run(full, capsys, "--model", folder)
    assert outcome.code == 0
    assert "random weights of the same architecture are used" in outcome.out


@pytest.mark.parametrize("experts, size", [(2, "28.2"), (4, "56.4")])
def test_minimal_with_the_default_model(capsys, experts, size):
    outcome = run(minimal, capsys, "--experts", experts)
    assert outcome.code == 0
    assert outcome.lines[-1] == f"Total checkpoint size: {size} MB"


def test_full_with_the_defaults(capsys, tmp_path):
    outcome = run(full, capsys, "--json", tmp_path / "result.json", "--junit", tmp_path / "result.xml")
    assert outcome.code == 0
    assert outcome.lines[-8:-2] == FULL_LINES
    assert outcome.lines[-1] == "Total checkpoint size: 28.2 MB"
    suites = ElementTree.parse(tmp_path / "result.xml").getroot()
    assert (suites.get("tests"), suites.get("failures"), suites.get("errors")) == ("5", "0", "0")
    consistency = json.loads((tmp_path / "result.json").read_text())["checks"][3]["measures"]
    assert consistency["max_abs_diff"] == 0
    assert consistency["max_abs_diff_per_expert"] == [0, 0]


# ---- flags ----


@pytest.mark.parametrize("spelling", ["--keep-checkpoint", "--keep_checkpoint"])
def test_kept(capsys, tiny, temporary, spelling):
    assert run(minimal, capsys, "--model", tiny, spelling, "--lora_r", 4, "--lora-alpha", 8).code == 0
    (folder,) = temporary.glob("dylora_checkpoint_minimal_*")
    config = json.loads((folder / "checkpoint" / "config.json").read_text())
    assert [(expert["r"], expert["lora_alpha"]) for expert in config["experts"]] == [(4, 8), (4, 8)]
    (folder / "kept").touch()


def test_output_dir(capsys, tiny, tmp_path):
    where = tmp_path / "a" / "b"
    assert run(minimal, capsys, "--model", tiny, "--output-dir", where).code == 0
    assert (where / "checkpoint" / "manifest.json").exists()
    before = {path: path.stat().st_mtime_ns for path in where.rglob("*")}
    outcome = run(minimal, capsys, "--model", tiny, "--output_dir", where)
    assert outcome.code == 2
    assert "exists already" in outcome.err
    assert {path: path.stat().st_mtime_ns for path in where.rglob("*")} == before


def test_same_seed_same_bytes(capsys, tiny, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(minimal, capsys, "--model", tiny, "--seed", seed, "--output-dir", tmp_path / name).code == 0
    one, same, other = ((tmp_path / name / "checkpoint" / EXPERT_0).read_bytes() for name in "abc")
    assert one == same != other


@pytest.mark.parametrize(
    "flags, text",
    [
        (["--experts", "0"], "--experts: expected a whole number from 1 to 1024, got 0"),
        (["--experts", "-1"], "--experts: expected a whole number from 1 to 1024, got -1"),
        (["--experts", "1000000"], "--experts: expected a whole number from 1 to 1024, got 1000000"),
        (["--experts", "two"], "--experts: expected a whole number from 1 to 1024, got 'two'"),
        (["--lora-r", "0"], "--lora-r: expected a whole number of at least 1, got 0"),
        (["--lora-alpha", "nan"], "--lora-alpha: expected a number above 0, got nan"),
        (["--max-size-mb", "-3"], "--max-size-mb"),
        (["--max-size-mb", "1e308"], "--max-size-mb"),
        (["--seed", "-1"], "--seed"),
        (["--model", ""], "--model: expected a value, got an empty one"),
        (["--model", "/no/such/folder"], "There is no file or folder '/no/such/folder'"),
        (["--model", __file__], "is a file but not a .gguf model"),
        (["--model", "nosuch/thing"], "export HF_TOKEN=your_token"),
        (["--weights", "real"], "--weights: invalid choice"),
        (["--dtype", "foo"], "Unknown dtype 'foo'"),
        (["--device", "foo"], "Unknown device 'foo'"),
        (["--nosuch"], "unrecognized arguments: --nosuch"),
        (["rubbish"], "unrecognized arguments: rubbish"),
        (["--json", "/no/such/folder/x.json"], "expected a file in a folder that can be written to"),
        (["--junit", "/no/such/folder/x.xml"], "--junit /no/such/folder/x.xml: expected a file in a folder"),
        (["--checkpoint", "/no/such/folder"], "expected a checkpoint folder, found nothing"),
        (["--checkpoint", __file__], "expected a checkpoint folder, found a file"),
        (["--checkpoint", ".", "--keep-checkpoint"], "do not go with it"),
        (["--checkpoint", "~nosuch/x"], "expected a checkpoint folder, found nothing"),
        (["--model", "~nosuch/x"], "There is no file or folder '~nosuch/x'"),
        (["--output-dir", __file__], "expected a folder, found a file"),
    ],
)
@pytest.mark.parametrize("script", [minimal, full], ids=["minimal", "save_load"])
def test_bad_input(capsys, script, flags, text):
    outcome = run(script, capsys, *flags)
    assert outcome.code == 2
    assert text in outcome.err
    assert outcome.err.startswith("✗ ")
    assert "Traceback" not in outcome.err
    assert outcome.out == ""


def test_full_needs_weights(capsys, tiny):
    outcome = run(full, capsys, "--weights", "none", "--model", tiny, "--experts", 4)
    assert outcome.code == 2
    assert f"python test_checkpoint_minimal.py --experts 4 --model {tiny}" in outcome.err


def test_pretrained_offline_gives_the_remedy(capsys):
    outcome = run(full, capsys, "--weights", "pretrained")
    assert outcome.code == 2
    assert "export HF_TOKEN=your_token" in outcome.err


# ---- too little of something ----


@pytest.mark.parametrize("script, cheaper", [(full, "minimal"), (minimal, "quick")])
def test_too_little_memory(capsys, tiny, monkeypatch, script, cheaper):
    monkeypatch.setattr("dylora_moe.system.machine.available_memory", lambda: 1 << 10)
    outcome = run(script, capsys, "--model", tiny)
    assert outcome.code == 2
    assert re.search(r"needs about [\d.]+ MB, and 0.0 MB are available", outcome.err)
    assert f"python test_checkpoint_{cheaper}.py" in outcome.err


def test_memory_for_logits_grows_with_the_experts_of_one_pass(tiny):
    source, _ = find_base(str(tiny), weights="none")
    one, two, eight, nine = (subject.base_bytes(source, "random", "float32", n) for n in (1, 2, 8, 9))
    assert two - one == (eight - two) / 6 > 0 and nine == eight
    assert subject.base_bytes(source, "none", "float32", 8) == 0


def test_the_memory_of_a_gpu_is_not_that_of_the_machine(tiny, monkeypatch):
    source, _ = find_base(str(tiny), weights="none")
    assert subject.base_bytes(source, "random", "float32", 2, "auto") > 0
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert subject.base_bytes(source, "random", "float32", 2, "auto") == 0


def test_too_little_disk(capsys, tiny, monkeypatch):
    monkeypatch.setattr("dylora_moe.system.machine.free_disk", lambda path: 1 << 10)
    for script in (minimal, full, quick):
        outcome = run(script, capsys, *([] if script is quick else ["--model", tiny]))
        assert outcome.code == 2
        assert re.search(r"needs about [\d.]+ MB, and 0.0 MB are free", outcome.err)


def test_no_temporary_folder(capsys, tiny, monkeypatch):
    def none():
        raise FileNotFoundError(2, "No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    for script in (minimal, full, quick):
        outcome = run(script, capsys, *([] if script is quick else ["--model", tiny]))
        assert outcome.code == 2
        assert "set TMPDIR" in outcome.err


def test_disk_that_fills_up(capsys, tiny, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("dylora_moe.checkpoint.write.write_files", full_disk)
    outcome = run(minimal, capsys, "--model", tiny)
    assert outcome.code == 2
    assert "No space left on device" in outcome.err


def test_out_of_memory(capsys, tiny, monkeypatch):
    def too_much(*args, **kwargs):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr("dylora_moe.checkpoint.write.write_files", too_much)
    outcome = run(full, capsys, "--model", tiny)
    assert outcome.code == 2
    assert "not enough memory" in outcome.err


def test_a_mistake_of_ours_is_not_a_failed_check(capsys, tiny, monkeypatch):
    monkeypatch.setattr("dylora_moe.checkpoint.write.write_files", lambda *args, **kwargs: 1 / 0)
    outcome = run(minimal, capsys, "--model", tiny)
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert "unexpected ZeroDivisionError" in outcome.err


# ---- a checkpoint that is there ----


def test_existing_checkpoint(capsys, saved):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in saved.rglob("*")}
    outcome = run(full, capsys, "--checkpoint", saved)
    assert outcome.code == 0
    assert outcome.verdicts() == FULL_LINES[1:]
    assert "probe: differs by 0 (tolerance 0, on the machine that saved it)" in outcome.out
    outcome = run(minimal, capsys, "--checkpoint", saved)
    assert outcome.code == 0
    assert outcome.verdicts() == MINIMAL_LINES[1:]
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in saved.rglob("*")} == before


def test_the_probe_of_dense_random_weights_holds_for_the_compact_ones(capsys, tiny, tmp_path):
    """As training with --weights random leaves it: the same base weights, multiplied by in another way."""
    (tmp_path / "config-only").mkdir()
    (tmp_path / "config-only" / "config.json").write_bytes((tiny / "config.json").read_bytes())
    model = DyLoRAMoE.from_base(tmp_path / "config-only", 2, weights="random")
    fill_experts(model, 0)
    save_checkpoint(tmp_path / "saved", model)
    outcome = run(full, capsys, "--checkpoint", tmp_path / "saved", "--json", tmp_path / "json")
    assert outcome.code == 0
    assert "(tolerance 0.001, on another machine or device, or computed in another way)" in outcome.out
    assert json.loads((tmp_path / "json").read_text())["checks"][2]["measures"]["max_abs_diff_probe"] < 1e-4
    edit_tensors(tmp_path / "saved" / EXPERT_0, zero_b)
    scripts.rewrite_manifest(tmp_path / "saved")
    assert "✗ probe: expert_0 differs by" in run(full, capsys, "--checkpoint", tmp_path / "saved").out


def test_existing_checkpoint_without_probe(capsys, tiny, tmp_path):
    assert run(minimal, capsys, "--model", tiny, "--output-dir", tmp_path / "out").code == 0
    outcome = run(full, capsys, "--checkpoint", tmp_path / "out" / "checkpoint", "--json", tmp_path / "json")
    assert outcome.code == 0
    assert "probe: none in this checkpoint" in outcome.out
    measures = json.loads((tmp_path / "json").read_text())["checks"][2]["measures"]
    assert measures["max_abs_diff"] is None
    assert measures["max_abs_diff_stock_peft"] == [0, 0]


def test_run_folder_names_its_newest_checkpoint(capsys, saved, tmp_path):
    for script in (minimal, full):
        folder = tmp_path / script.__name__
        newest = scripts.copy_of(saved, folder)
        outcome = run(script, capsys, "--checkpoint", folder)
        assert outcome.code == 2
        assert str(newest) in outcome.err
        outcome = run(script, capsys, "--checkpoint", saved.parent)
        assert outcome.code == 2
        assert str(saved) in outcome.err


def test_run_folder_of_incomplete_checkpoints(capsys, saved, tmp_path):
    (copy_of(saved, tmp_path) / "manifest.json").unlink()
    outcome = run(minimal, capsys, "--checkpoint", tmp_path)
    assert outcome.code == 2
    assert "without a complete checkpoint" in outcome.err
    assert "checkpoint-7: " in outcome.err


@pytest.mark.parametrize("flags", [["--experts", 3], ["--lora-r", 8], ["--lora-alpha", 1]])
def test_flags_that_contradict_the_checkpoint(capsys, saved, flags):
    for script in (minimal, full):
        outcome = run(script, capsys, "--checkpoint", saved, *flags)
        assert outcome.code == 2
        assert f"{flags[0]} {flags[1]} contradicts" in outcome.err


def test_another_model_than_the_checkpoint_was_trained_on(capsys, saved, tmp_path):
    tiny_base("gemma").save_pretrained(tmp_path / "gemma")
    for script in (minimal, full):
        outcome = run(script, capsys, "--checkpoint", saved, "--model", tmp_path / "gemma")
        assert outcome.code == 2
        assert "is not what the checkpoint was trained on" in outcome.err


def test_other_weights_than_the_checkpoint_was_trained_on(capsys, saved, tmp_path):
    tiny_base("llama", seed=1).save_pretrained(tmp_path / "other")
    outcome = run(full, capsys, "--checkpoint", saved, "--model", tmp_path / "other")
    assert outcome.code == 1
    assert outcome.failed() == ["consistency"]
    assert "✗ probe: was computed with other base weights" in outcome.out
    outcome = run(full, capsys, "--checkpoint", saved, "--weights", "random")
    assert outcome.code == 0
    assert "not checked under random weights" in outcome.out


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.down_proj.weight"])
def test_one_row_of_the_base_that_changed_in_place_is_seen(capsys, saved, tiny, tmp_path, name):
    """Whether or not the logits of the probe show it."""
    shutil.copytree(tiny, tmp_path / "base")
    edit_tensors(tmp_path / "base" / "model.safetensors", lambda tensors: tensors[name][1].mul_(-3))
    outcome = run(full, capsys, "--checkpoint", saved, "--model", tmp_path / "base")
    assert outcome.failed() == ["consistency"]
    assert "✗ probe: was computed with other base weights" in outcome.out


def test_a_base_whose_config_changed_in_place_is_refused(capsys, tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "base")
    assert run(full, capsys, "--model", tmp_path / "base", "--output-dir", tmp_path / "out").code == 0
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] *= 50
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    outcome = run(full, capsys, "--checkpoint", tmp_path / "out" / "checkpoint")
    assert outcome.code == 2
    assert "(rope_parameters.rope_theta: 10000.0 there, 500000.0 here): restore it" in outcome.err


def test_experts_of_little_effect_are_seen(capsys, tiny, tmp_path):
    """As after the first steps of a run: spoiling them changes less than the tolerance, but more than loading."""
    model = DyLoRAMoE.from_base(str(tiny), 2)
    with torch.no_grad():
        for index in range(2):
            for name, tensor in model.expert_tensors(index).items():
                if name.endswith("lora_B.weight"):
                    tensor.normal_(std=1e-7)
    model.save_checkpoint(tmp_path / "young")
    outcome = run(full, capsys, "--checkpoint", tmp_path / "young")
    assert outcome.code == 0, outcome.out
    changes = [float(text) for text in re.findall(r"expert_. spoiled: differs by ([^ ]+)$", outcome.out, re.MULTILINE)]
    assert len(changes) == 2 and all(0 < change < 1e-5 for change in changes)


def test_another_dtype_than_the_probe(capsys, saved):
    outcome = run(full, capsys, "--checkpoint", saved, "--dtype", "bfloat16")
    assert outcome.code == 0
    assert "probe: was computed in float32, this base is in bfloat16; not checked" in outcome.out


def test_pollution(capsys, saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    (folder / "model.safetensors").write_bytes(bytes(3 << 20))
    for script in (minimal, full):
        outcome = run(script, capsys, "--checkpoint", folder, "--max-size-mb", 2)
        assert outcome.code == 1
        assert "✗ Found merged model file: model.safetensors" in outcome.lines
        assert outcome.lines[-1] == "Total checkpoint size: 3.1 MB"
        assert "size" in outcome.failed()


def test_a_checkpoint_without_manifest_and_router(capsys, saved, tmp_path):
    folder = copy_of(saved, tmp_path)
    (folder / "manifest.json").unlink()
    (folder / "router.safetensors").rename(folder / "router.pt")
    outcome = run(full, capsys, "--checkpoint", folder)
    assert outcome.code == 1
    assert outcome.failed() == ["structure", "load", "consistency"]
    assert re.search(r"✗ .*manifest", outcome.out)
    assert re.search(r"✗ router.safetensors: .*found nothing", outcome.out)


@pytest.mark.parametrize(
    "late", ["dylora_moe.checkpoint.read.load_file", "dylora_moe.validation.reloaded.stock_peft_logits"]
)
def test_a_checkpoint_that_is_rotated_away_meanwhile(capsys, saved, tmp_path, monkeypatch, late):
    """Whatever was found in it by then is no verdict on it."""
    folder, real = copy_of(saved, tmp_path), pkgutil.resolve_name(late)

    def rotated_meanwhile(*args, **kwargs):
        if folder.exists():
            folder.rename(tmp_path / ".dylora-trash-1-0000000a")
        return real(*args, **kwargs)

    monkeypatch.setattr(late, rotated_meanwhile)
    outcome = run(full, capsys, "--checkpoint", folder)
    assert outcome.code == 2
    assert (
        outcome.err == f"✗ {folder} is not there, or was removed meanwhile (by rotation?): list the run folder again\n"
    )
    assert outcome.failed() == []


@pytest.mark.parametrize("name", [EXPERT_0, "router.safetensors", "skill_library.safetensors", "probe.safetensors"])
def test_a_pickle_in_the_place_of_a_file_is_not_unpickled(capsys, saved, tmp_path, name):
    folder = copy_of(saved, tmp_path)
    (folder / name).write_bytes(b"cposix\nsystem\n(S'touch %s'\ntR." % os.fsencode(tmp_path / "PWNED"))
    scripts.rewrite_manifest(folder)
    for script in (minimal, full):
        outcome = run(script, capsys, "--checkpoint", folder)
        assert outcome.code == 1
        assert outcome.failed()[0] == "structure"
        assert re.search(rf"✗ {re.escape(name)}: ", outcome.out)
    assert not (tmp_path / "PWNED").exists()


def test_a_base_model_that_is_no_longer_there_is_not_looked_for_elsewhere(capsys, tmp_path, monkeypatch):
    base = tmp_path / "tiny"
    tiny_base("llama").save_pretrained(base)
    assert run(full, capsys, "--model", base, "--output-dir", tmp_path / "out").code == 0
    base.rename(tmp_path / "elsewhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("reached for the network"))
    outcome = run(full, capsys, "--checkpoint", tmp_path / "out" / "checkpoint")
    assert outcome.code == 2
    assert f"There is no file or folder '{base}'" in outcome.err
    assert "say with --model where that model is now" in outcome.err
    assert (
        run(full, capsys, "--checkpoint", tmp_path / "out" / "checkpoint", "--model", tmp_path / "elsewhere").code == 0
    )
    assert run(minimal, capsys, "--checkpoint", tmp_path / "out" / "checkpoint").code == 0  # which needs none


def test_incomplete_checkpoint(capsys, tmp_path):
    for script in (minimal, full):
        outcome = run(script, capsys, "--checkpoint", tmp_path)
        assert outcome.code == 1
        assert "structure" in outcome.failed()


# ---- one tensor changed ----


def first(tensors: dict, side: str = "A") -> str:
    return next(name for name in sorted(tensors) if name.endswith(f"lora_{side}.weight"))


def nudge(tensors: dict) -> None:
    tensors[first(tensors)][0, 0] += 1e-3


def zero_b(tensors: dict) -> None:
    tensors[first(tensors, "B")].zero_()


def swap_layers(tensors: dict) -> None:
    one, other = [name for name in sorted(tensors) if name.endswith("q_proj.lora_B.weight")][:2]
    tensors[one], tensors[other] = tensors[other], tensors[one]


def remove(tensors: dict) -> None:
    del tensors[first(tensors)]


def reshape(tensors: dict) -> None:
    tensors[first(tensors)] = tensors[first(tensors)][:-1].contiguous()


def gate_nudge(tensors: dict) -> None:
    tensors["gate.weight"][1] *= 1.5


def gate_rows(tensors: dict) -> None:
    tensors["gate.weight"] = tensors["gate.weight"].flip(0).contiguous()


def gate_zero(tensors: dict) -> None:
    tensors["gate.weight"].zero_()


def gate_renamed(tensors: dict) -> None:
    tensors["other.weight"] = tensors.pop("gate.weight")


CHANGES = [
    (EXPERT_0, nudge), (EXPERT_1, nudge), (EXPERT_1, zero_b), (EXPERT_0, swap_layers), (EXPERT_1, remove),
    (EXPERT_0, reshape), ("router.safetensors", gate_nudge), ("router.safetensors", gate_rows),
    ("router.safetensors", gate_zero), ("router.safetensors", gate_renamed),
]  # fmt: skip
SEEN_IN_STRUCTURE = (remove, reshape, gate_zero, gate_renamed)


@pytest.mark.parametrize("name, change", CHANGES, ids=[f"{change.__name__}-{name[-30:]}" for name, change in CHANGES])
def test_one_tensor_changed(capsys, saved, tmp_path, name, change):
    folder = copy_of(saved, tmp_path)
    edit_tensors(folder / name, change)
    for script in (minimal, full):
        outcome = run(script, capsys, "--checkpoint", folder)
        assert outcome.code == 1
        assert outcome.failed()[0] == "structure"
        assert re.search(rf"✗ {re.escape(name)}", outcome.out)
    scripts.rewrite_manifest(folder)
    outcome = run(full, capsys, "--checkpoint", folder)
    assert outcome.code == 1
    assert outcome.failed()[0] == ("structure" if change in SEEN_IN_STRUCTURE else "consistency")
    owner = "router" if name.startswith("router") else name.split("/")[1]
    assert re.search(rf"✗ (probe: the tensors of {owner}|{re.escape(name)})", outcome.out)
    assert (run(minimal, capsys, "--checkpoint", folder).code == 1) == (change in SEEN_IN_STRUCTURE)


def test_experts_swapped_and_doubled(capsys, saved, tmp_path):
    for number, double in enumerate((False, True)):
        folder = copy_of(saved, tmp_path / str(number))
        one, other = (folder / EXPERT_0).read_bytes(), (folder / EXPERT_1).read_bytes()
        (folder / EXPERT_1).write_bytes(one)
        if not double:
            (folder / EXPERT_0).write_bytes(other)
        scripts.rewrite_manifest(folder)
        outcome = run(full, capsys, "--checkpoint", folder)
        assert outcome.code == 1
        assert outcome.failed() == ["consistency"]
        assert "✗ probe: the tensors of expert_1 are not to the bit those that were saved" in outcome.out
        outcome = run(full, capsys, "--checkpoint", folder, "--weights", "random")
        assert outcome.failed() == ["consistency"]
        assert "✗ probe: the tensors of expert_1 are not to the bit those that were saved" in outcome.out


# ---- the code below is broken: each check must see it ----


def test_save_sees_an_expert_written_twice(capsys, tiny, monkeypatch):
    tensors = expert_tensors
    monkeypatch.setattr(
        "dylora_moe.checkpoint.write.expert_tensors", lambda model: [tensors(model)[0]] * model.num_experts
    )
    for script in (minimal, full):
        outcome = run(script, capsys, "--model", tiny)
        assert outcome.code == 1
        assert outcome.failed()[0] == "save"
        assert re.search(r"✗ .*expert_1.*on disk is not the one in memory", outcome.out)


def test_save_sees_a_missing_router(capsys, tiny, monkeypatch):
    on_save = PeftCheckpointCallback.on_save

    def without_router(self, args, state, control, **kwargs):
        on_save(self, args, state, control, **kwargs)
        os.unlink(os.path.join(args.output_dir, self.name, "router.safetensors"))

    monkeypatch.setattr(PeftCheckpointCallback, "on_save", without_router)
    outcome = run(minimal, capsys, "--model", tiny)
    assert outcome.code == 1
    assert outcome.failed() == ["save", "structure"]
    assert re.search(r"✗ router.safetensors: cannot be read back", outcome.out)


def test_save_sees_that_nothing_was_written(capsys, tiny, monkeypatch):
    monkeypatch.setattr(PeftCheckpointCallback, "on_save", lambda self, *args, **kwargs: None)
    outcome = run(full, capsys, "--model", tiny)
    assert outcome.code == 1
    assert outcome.failed() == ["save", "structure", "load", "consistency", "size"]


def test_save_sees_a_model_that_is_left_changed(capsys, tiny, monkeypatch):
    on_save = PeftCheckpointCallback.on_save

    def with_a_side_effect(self, *args, model, **kwargs):
        on_save(self, *args, model=model, **kwargs)
        model.peft_model.set_adapter("expert_0")

    monkeypatch.setattr(PeftCheckpointCallback, "on_save", with_a_side_effect)
    outcome = run(minimal, capsys, "--model", tiny)
    assert outcome.failed() == ["save"]
    assert "✗ saving changed the model" in outcome.out


def test_load_sees_that_nothing_was_loaded(capsys, tiny, saved, monkeypatch):
    monkeypatch.setattr("dylora_moe.validation.reloaded.load_into", lambda checkpoint, model: read_skills(checkpoint))
    outcome = run(full, capsys, "--model", tiny)
    assert outcome.code == 1
    assert outcome.failed() == ["load", "consistency"]
    assert "✗ loading made no difference (0)" in outcome.out
    assert run(full, capsys, "--checkpoint", saved).failed() == ["load", "consistency"]


def test_consistency_sees_an_expert_that_is_not_used(capsys, tiny, monkeypatch):
    from dylora_moe.mixture.routed_linear import RoutedLinear

    forward = RoutedLinear._add_one
    monkeypatch.setattr(RoutedLinear, "_add_one", lambda self, y, x, name: forward(self, y, x, "expert_0"))
    outcome = run(full, capsys, "--model", tiny)
    assert outcome.failed() == ["consistency"]
    assert "✗ expert_1: stock PEFT computes logits that differ" in outcome.out


def test_consistency_sees_a_control_that_has_no_effect(capsys, tiny, monkeypatch):
    from contextlib import nullcontext

    monkeypatch.setattr("dylora_moe.validation.reloaded._negated", lambda tensors: nullcontext())
    outcome = run(full, capsys, "--model", tiny)
    assert outcome.failed() == ["consistency"]
    assert "✗ spoiling router was not seen (0): this comparison could not fail" in outcome.out


def test_quick_sees_a_broken_installation(capsys, monkeypatch):
    import peft

    monkeypatch.setattr(peft, "inject_adapter_in_model", lambda config, module: module)
    outcome = run(quick, capsys)
    assert outcome.code == 1
    assert outcome.verdicts() == ["✗ FAIL: peft", "✓ PASS: safetensors", "✓ PASS: structure", "✗ SOME TESTS FAILED"]
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "install the tested versions" in run(quick, capsys).out


# ---- JSON and GitHub ----


def test_json(capsys, tiny, tmp_path):
    path = tmp_path / "result.json"
    assert run(full, capsys, "--model", tiny, "--json", path).code == 0
    result = json.loads(path.read_text())
    assert list(result) == [
        "script", "passed", "exit_code", "error", "model", "weights", "experts", "checkpoint", "total_bytes", "seconds",
        "peak_memory_bytes", "checks",
    ]  # fmt: skip
    assert result["script"] == "save_load"
    assert (result["passed"], result["exit_code"], result["error"]) == (True, 0, None)
    assert (result["model"], result["weights"], result["experts"]) == (str(tiny), "pretrained", 2)
    assert result["checkpoint"] is None
    assert [check["name"] for check in result["checks"]] == ["save", "structure", "load", "consistency", "size"]
    assert all(list(check) == ["name", "passed", "seconds", "problems", "measures"] for check in result["checks"])
    measures = result["checks"][3]["measures"]
    assert (measures["max_abs_diff"], measures["max_abs_diff_per_expert"]) == (0, [0, 0])
    assert measures["max_abs_diff_before_load"] > 1e-3
    assert all(measures["spoiled"][name] > 1e-3 for name in ("expert_0", "expert_1", "router"))
    assert result["total_bytes"] == result["checks"][4]["measures"]["total_bytes"]


@pytest.mark.parametrize("name", ["config.json", "new.json", "peft_adapters/expert_0/x.json"])
def test_json_never_goes_into_a_checkpoint(capsys, saved, tmp_path, name):
    folder = copy_of(saved, tmp_path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for script in (minimal, full, quick):
        for more in ([], ["--nosuch"]):  # an error is written there as well
            outcome = run(script, capsys, "--json", folder / name, *more)
            assert outcome.code == 2
            assert "lies in a checkpoint" in outcome.err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_manifest_of_something_else_does_not_make_a_checkpoint(capsys, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    assert run(quick, capsys, "--json", tmp_path / "result.json").code == 0
    assert (tmp_path / "result.json").exists()


def test_json_to_standard_output(capsys, tiny, tmp_path):
    outcome = run(minimal, capsys, "--model", tiny, "--json", "-", "--output-dir", tmp_path / "out")
    result = json.loads(outcome.out)
    assert result["weights"] == "none"
    assert result["checkpoint"] == str(tmp_path / "out" / "checkpoint")
    assert "✓ ALL TESTS PASSED" in outcome.err


def test_json_of_what_could_not_run(capsys):
    outcome = run(minimal, capsys, "--experts", "two", "--json", "-")
    result = json.loads(outcome.out)
    assert (outcome.code, result["exit_code"], result["passed"], result["checks"]) == (2, 2, False, [])
    assert "got 'two'" in result["error"]


def test_github(capsys, saved, tmp_path, monkeypatch):
    summary = tmp_path / "summary"
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    folder = copy_of(saved, tmp_path)
    (folder / "router.safetensors").unlink()
    outcome = run(minimal, capsys, "--checkpoint", folder)
    assert outcome.code == 1
    assert re.search(r"^::error title=minimal structure::router.safetensors: .*found", outcome.out, re.MULTILINE)
    assert "| structure | ✗ FAIL |" in summary.read_text()
    run(minimal, capsys, "--experts", 0)
    assert "could not run" in summary.read_text()


# ---- as processes ----


def process(*args: object, **options) -> subprocess.Popen:
    environment = os.environ | options.pop("env", {})
    command = [sys.executable, *(str(arg) for arg in args)]
    return subprocess.Popen(command, stdout=-1, stderr=-1, env=environment, **options)


def test_from_another_folder_in_a_plain_locale(tiny, tmp_path):
    env = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    script = scripts.ROOT / "test_checkpoint_minimal.py"
    out, err = process(script, "--model", tiny, cwd=tmp_path, env=env).communicate()
    assert "✓ ALL TESTS PASSED" in out.decode("utf-8")
    assert err == b""


@pytest.mark.slow
def test_a_closed_pipe_changes_nothing(tiny):
    child = process(scripts.ROOT / "test_checkpoint_minimal.py", "--model", tiny)
    child.stdout.close()
    assert child.stderr.read() == b""
    assert child.wait() == 0


@pytest.mark.parametrize(
    "sent, code, text",
    [
        ([signal.SIGINT], 130, "interrupted"),
        pytest.param([signal.SIGINT] * 2, 130, "interrupted", marks=pytest.mark.slow),
        pytest.param([signal.SIGTERM], 143, "terminated", marks=pytest.mark.slow),
    ],
)
def test_stopped(tiny, temporary, tmp_path, sent, code, text):
    child = process(scripts.ROOT / "test_checkpoint_save_load.py", "--model", tiny, "--experts", 300, "--lora-r", 1,
                    "--json", tmp_path / "json")  # fmt: skip
    deadline = time.monotonic() + 120
    while not list(temporary.glob("dylora*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    for number in sent:
        child.send_signal(number)
        time.sleep(0.05)
    err = child.communicate()[1].decode()
    assert child.returncode == code
    assert err == f"✗ {text}\n"
    result = json.loads((tmp_path / "json").read_text())
    assert (result["exit_code"], result["error"], result["checkpoint"]) == (code, text, None)


def test_what_an_impatient_user_left_is_removed_at_exit(temporary, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt), workspace.temporary("dylora_x_") as folder:
            pass
    assert folder.exists()
    workspace._remove_what_is_left()
    assert not folder.exists()
    workspace._temporary.clear()


def test_an_early_signal_leaves_the_lock_of_another_process(tmp_path, monkeypatch):
    """It takes the lock while this one is about to look at the folder."""
    holders = []

    def overtaken(folder):
        holders.append(python("with writer_lock(sys.argv[1]): print('holding', flush=True); sys.stdin.read()", folder))
        assert holders[0].stdout.readline() == "holding\n"
        raise interrupts.Interrupted(signal.SIGTERM)

    monkeypatch.setattr("dylora_moe.store.run_folder.make_run_dir", overtaken)
    with pytest.raises(interrupts.Interrupted), workspace.output_folder(tmp_path):
        pytest.fail("must not be entered")
    with pytest.raises(UsageError, match=rf"another process .*\(process {holders[0].pid} on"), writer_lock(tmp_path):
        pytest.fail("a second writer got in")
    holders[0].communicate()


# ---- a checkpoint that came through the Hub ----


@pytest.mark.parametrize("through", ["a download", "the cache"])
def test_a_checkpoint_that_came_through_the_hub(capsys, saved, tmp_path, through):
    folder = copy_of(saved, tmp_path)
    (folder / "README.md").write_text("of the Hub")
    if through == "the cache":
        folder = in_hub_cache(folder, tmp_path / "cache")
    outcome = run(full, capsys, "--checkpoint", folder)
    assert outcome.verdicts() == FULL_LINES[1:], outcome.out
    assert "beside the checkpoint's files, not read: README.md" in outcome.out
    total = outcome.lines[-1]
    assert run(minimal, capsys, "--checkpoint", saved).lines[-1] == total  # of the content, not of the links
