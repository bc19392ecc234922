"""Rows 10 and 21 to 34 of docs/reliability.md: what is wrong with a checkpoint is found, manifest rewritten or not.

Each case spoils a sound checkpoint and names the file, and words, that the problem must have.
"""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import socket
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from dylora_moe.checkpoint import formats
from dylora_moe.checkpoint.probe import changed_tensors, probe_difference, read_probe
from dylora_moe.checkpoint.read import load_into, load_mixture
from dylora_moe.checkpoint.safetensors_file import MAX_JSON_BYTES
from dylora_moe.checkpoint.verify import find_problems, inspect_files, open_checkpoint
from dylora_moe.checkpoint.verify_config import inspect_config
from dylora_moe.checkpoint.write import save_checkpoint
from dylora_moe.cli.main import main
from dylora_moe.errors import CheckpointError, UsageError
from dylora_moe.store import run_folder
from dylora_moe.store.manifest import MANIFEST
from dylora_moe.training import training_state

from ..support.mutations import (
    ADAPTER_0,
    ADAPTER_1,
    CONFIG_0,
    CONFIG_1,
    edit_header,
    edit_json,
    edit_tensors,
    files_of,
    make_flat,
    rewrite_manifest,
    save_mixed,
    save_sound,
    swap,
    tiny_mixture,
)
from ..support.tiny import tiny_base

ROOT = Path(__file__).parents[2]
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = save_sound(tmp_path_factory.mktemp("run") / "checkpoint-5")
    assert find_problems(folder) == []
    return folder


@pytest.fixture
def sound(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkpoint-5"))


def found(folder: Path, *words: str) -> list[str]:
    """The problems; one of them has all the words."""
    problems = find_problems(folder)
    assert problems == sorted(set(problems))
    assert any(all(word in problem for word in words) for problem in problems), (words, problems)
    for problem in problems:
        assert problem.isprintable()
        assert problem.count("; ") >= 1, f"no remedy: {problem}"
        assert "report this as a bug" not in problem
    return problems


# ---- row 10: while training goes on ----


@pytest.mark.parametrize("check", ["check_config", "_check_file_set", "_check_training"])
def test_row_10_one_that_is_rotated_away_meanwhile_has_no_problems_but_is_gone(sound, monkeypatch, check, capsys):
    """Neither its loss nor what is in its place by then says anything of the checkpoint that was named."""
    real = pkgutil.resolve_name(f"dylora_moe.checkpoint.verify.{check}")

    def late(contents, *args):
        if sound.is_dir():
            sound.rename(sound.with_name(".dylora-trash-1-0000000a"))
        return real(contents, *args)

    monkeypatch.setattr(f"dylora_moe.checkpoint.verify.{check}", late)
    assert main(["verify", str(sound)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{sound} is not there, or was removed meanwhile (by rotation?): list the run folder again" in err


ROTATING = """
import os, shutil, sys, time
sys.path.insert(0, sys.argv[1])
from dylora_moe.store.publish import staged
from dylora_moe.store.run_folder import rotate
from pathlib import Path
os.fsync = lambda descriptor: None
run, enough, *sources = map(Path, sys.argv[2:])
step = 1
while not enough.exists():
    step += 1
    time.sleep(min(0.05 * 1.05**step, 2))  # the slower, the longer it takes a busy machine to read one
    with staged(run / f"checkpoint-{step}") as folder:
        shutil.copytree(sources[step % 2], folder, dirs_exist_ok=True, ignore=lambda *_: ["manifest.json"])
    rotate(run, 1)
"""


def test_row_10_what_verify_and_load_see_while_another_process_saves_and_rotates(tmp_path):
    models = [tiny_mixture(seed=seed) for seed in (0, 1)]
    sources = [save_sound(tmp_path / f"source-{i}", model) for i, model in enumerate(models)]
    run, enough = tmp_path / "run", tmp_path / "enough"
    shutil.copytree(sources[1], run / "checkpoint-1")
    command = [sys.executable, "-c", ROTATING, str(ROOT), str(run), str(enough), *map(str, sources)]
    writer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    verified, loaded = set(), set()
    while writer.poll() is None:
        if len(loaded) > 3:
            enough.touch()
        newest = run_folder.latest(run)
        assert newest is not None
        try:
            assert find_problems(newest.path) == []
            verified.add(newest.step)
            model = load_mixture(newest.path, tiny_base())
        except UsageError:  # that it is gone, and nothing else
            assert not newest.path.exists()
            continue
        expected = models[newest.step % 2].state_dict()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
        loaded.add(newest.step)
    assert writer.wait() == 0, writer.communicate()[1]
    assert len(run_folder.checkpoints(run)) == 1
    assert len(verified) > 3 and len(loaded) > 3, "too little was seen"


# ---- row 21: damage ----


def test_row_21_any_file_missing_or_empty_is_one_problem(sound, original):
    for name in files_of(original):
        for damage in (Path.unlink, partial(Path.write_bytes, data=b"")):
            damage(sound / name)
            problems = found(sound, f"{name}: ")
            if name != MANIFEST and damage is Path.unlink:
                assert sum(p.startswith(f"{name}: ") for p in problems) == 1, problems
            shutil.copy(original / name, sound / name)
    assert find_problems(sound) == []


def test_row_21_any_file_missing_or_empty_behind_a_rewritten_manifest(sound, original):
    for name in files_of(original).keys() - {MANIFEST}:
        for damage in (Path.unlink, partial(Path.write_bytes, data=b"")):
            damage(sound / name)
            rewrite_manifest(sound)
            found(sound, f"{name}: ", "expected")
            shutil.copy(original / name, sound / name)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.3, 0.99, 1.0])
def test_row_21_any_file_truncated_or_with_one_bit_flipped(sound, original, part):
    for name, data in files_of(original).items():
        at = min(int(part * len(data)), len(data) - 1)
        for spoiled in (data[:at].rstrip()[:-1], data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]):
            (sound / name).write_bytes(spoiled)
            problems = find_problems(sound)
            assert problems
            if name != MANIFEST:
                assert any(problem.startswith(f"{name}: ") for problem in problems), (name, problems)
        (sound / name).write_bytes(data)


@pytest.mark.parametrize("name", [ADAPTER_0, "router.safetensors", "skill_library.safetensors", "probe.safetensors",
                                  "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json", CONFIG_1,
                                  "trainer_state.json"])  # fmt: skip
def test_row_21_truncated_behind_a_rewritten_manifest(sound, name):
    data = (sound / name).read_bytes()
    for size in (1, len(data) // 3, len(data) - 3):
        (sound / name).write_bytes(data[:size])
        rewrite_manifest(sound)
        found(sound, f"{name}: ", "expected")


# ---- rows 22 to 30: contents, with a manifest that agrees ----


def rewritten(change):
    def spoil(folder: Path) -> None:
        change(folder)
        rewrite_manifest(folder)

    return spoil


def config(**changes):
    return lambda folder: edit_json(folder / formats.CONFIG, lambda found: found.update(changes))


def inside(path: str, value: object, name: str = formats.CONFIG):
    def change(found: dict) -> None:
        *parents, last = path.split(".")
        for key in parents:
            found = found[int(key) if key.isdigit() else key]
        found[last] = value

    return lambda folder: edit_json(folder / name, change)


def expert(key: str, value: object, index: int = 0):
    return inside(f"experts.{index}.{key}", value)


def adapter(key: str, value: object):
    return inside(key, value, CONFIG_0)


def tensors(name: str, change):
    return lambda folder: edit_tensors(folder / name, change)


def put(name: str, key: str, value: torch.Tensor):
    return tensors(name, lambda t: t.update({key: value}))


def at(name: str, key: str, index: int, value: float):
    return tensors(name, lambda t: t[key].view(-1).__setitem__(index, value))


def facts(**changes):
    def change(header: dict) -> None:
        probe = json.loads(header["__metadata__"]["probe"]) | changes
        header["__metadata__"]["probe"] = json.dumps(probe)

    return lambda folder: edit_header(folder / formats.PROBE, change)


def both(*changes):
    return lambda folder: [change(folder) for change in changes]


def write(name: str, data: bytes = b"{}"):
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return change


def remove(name: str):
    return lambda folder: shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def every(key: str):
    """A change of each B (or A) of an adapter."""
    return lambda change: lambda t: [t.update({k: change(v)}) for k, v in t.items() if f"lora_{key}" in k]


def of_65_rows(library: dict) -> None:
    found = {
        "rows": torch.tensor([65, 0]),
        "keys": torch.arange(65),
        "scales": torch.ones(65),
        "counts": torch.ones(65),
    }
    found |= {"values": torch.ones(65, 32, dtype=torch.int8)}
    library.update({f"features.{part}": tensor for part, tensor in found.items()})


TRAINER = formats.TRAINER_STATE
ROUTER, SKILLS, PROBE = formats.ROUTER, formats.SKILLS, formats.PROBE
GATE, NAMES, VECTORS = formats.GATE, "names", "embeddings"
FIVE = ["k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
CASES = {
    # row 22: a file too many, stale, or left from another save
    "22 a stray file": (write("notes.txt"), "notes.txt", "expected no such file"),
    "22 an expert too many": (
        write("peft_adapters/expert_2/expert_2/adapter_model.safetensors"), "expert_2", "2 experts"),
    "22 a flat file beside the nested": (
        write("peft_adapters/expert_0/adapter_config.json"), "expert_0/adapter_config.json"),
    "22 trainer state of another step": (inside("global_step", 6, TRAINER), TRAINER, "expected 5", "found 6"),
    "22 config of another step": (config(step=4), TRAINER, "expected 4", "found 5"),
    "22 optimizer without the rest": (both(*map(remove, (formats.SCHEDULER, TRAINER))), formats.SCHEDULER, "nothing"),
    "22 random states of some ranks": (write("rng_state_1.pth"), "rng_state_1.pth", "expected"),
    "22 random state missing": (remove("rng_state.pth"), "rng_state.pth", "nothing"),
    "22 a pickled router beside it": (write("router.pt"), "router.pt", "remove it"),
    "22 a file of another name": (lambda f: (f / ROUTER).rename(f / "gate.safetensors"), "gate.safetensors"),
    # row 23: counts that disagree
    "23 num_experts": (config(num_experts=3), "config.json", "expected 3", "found 2"),
    "23 an expert without its folder": (remove("peft_adapters/expert_1"), ADAPTER_1, "nothing"),
    "23 router of three": (put(ROUTER, GATE, torch.ones(3, 32)), "router", "(2, 32)", "(3, 32)"),
    "23 router of another width": (put(ROUTER, GATE, torch.ones(2, 16)), "router", "(2, 16)"),
    "23 width": (inside("router.width", 16), ROUTER, "(2, 16)", "(2, 32)"),
    "23 probe of three": (tensors(PROBE, lambda t: t.update(experts=torch.ones(3, 16, 32))), "probe", "(3, "),
    "23 skill of a third expert": (at(SKILLS, "experts", 0, 2), "skill_library", "below 2"),
    # row 25: tensors
    "25 tensor missing": (tensors(ADAPTER_0, lambda t: t.pop(A)), ADAPTER_0, A, "nothing"),
    "25 module missing": (tensors(ADAPTER_0, lambda t: [t.pop(A), t.pop(B)]), ADAPTER_0, "24 tensors, found 22"),
    "25 tensor extra": (put(ADAPTER_0, A.replace("q_proj", "x_proj"), torch.ones(4, 32)), ADAPTER_0, "x_proj"),
    "25 tensor renamed": (tensors(ADAPTER_0, lambda t: t.update({A[:-7]: t.pop(A)})), ADAPTER_0, A[:-7]),
    "25 layer renamed": (tensors(ADAPTER_0, lambda t: [t.update({k.replace("s.0", "s.7"): t.pop(k)}) for k in (A, B)]),
                         ADAPTER_0, "names and shapes"),
    "25 shape": (tensors(ADAPTER_0, lambda t: t.update({A: t[A].T})), ADAPTER_0, A, "(4, d_in)", "(32, 4)"),
    "25 one dimension": (tensors(ADAPTER_0, lambda t: t.update({A: t[A].flatten()})), ADAPTER_0, A, "(128,)"),
    "25 empty": (put(ADAPTER_0, A, torch.ones(4, 0)), ADAPTER_0, A, "(4, 0)"),
    "25 dtype": (tensors(ADAPTER_0, lambda t: t.update({A: t[A].half()})), ADAPTER_0, A, "F32", "F16"),
    "25 dtype of the same size": (lambda f: edit_header(f / ADAPTER_0, lambda h: h[A].update(dtype="I32")), A, "I32"),
    "25 NaN": (at(ADAPTER_0, A, 5, float("nan")), ADAPTER_0, A, "NaN"),
    "25 Inf": (at(ADAPTER_1, B, 5, float("inf")), ADAPTER_1, B, "NaN or Inf"),
    "25 NaN in the router": (at(ROUTER, GATE, 0, float("nan")), "router", GATE, "NaN"),
    "25 router zero": (put(ROUTER, GATE, torch.zeros(2, 32)), "router", "zeros only"),
    "25 router tensor renamed": (tensors(ROUTER, lambda t: t.update(w=t.pop(GATE))), "router", "w:"),
    "25 A zero": (put(ADAPTER_0, A, torch.zeros(4, 32)), ADAPTER_0, A, "zeros only"),
    "25 skills of another shape": (put(SKILLS, "losses", torch.ones(3)), "(2,)", "(3,)"),
    "25 skills of another width": (put(SKILLS, "features.values", torch.ones(5, 31, dtype=torch.int8)), "(5, 32)"),
    "25 skills in float32": (put(SKILLS, "states.values", torch.ones(4, 32)), "states.values", "I8", "F32"),
    "25 skill without a name": (put(SKILLS, "names", torch.zeros(2, 32, dtype=torch.uint8)), "UTF-8"),
    "25 skill's name not UTF-8": (at(SKILLS, "names", 0, 255), "skill 0", "UTF-8"),
    "25 skill NaN": (at(SKILLS, "features.scales", 1, float("nan")), "skill_library", "features.scales", "NaN"),
    "25 skill scaled by zero": (at(SKILLS, "states.scales", 1, 0), "skill_library", "states.scales", "above 0"),
    "25 skill of expert -2": (at(SKILLS, "experts", 1, -2), "skill_library", "found -2"),
    "25 skill of a negative loss": (at(SKILLS, "losses", 0, -2), "losses, skill 0", "found -2"),
    "25 skill of negative tokens": (at(SKILLS, "tokens", 1, -2), "tokens, skill 1", "found -2"),
    "25 skill with a row twice": (at(SKILLS, "features.keys", 1, 0), "features.keys, skill 0", "none twice"),
    "25 skill with more rows than there are": (at(SKILLS, "states.rows", 0, 5), "4 in all", "found 5"),
    "25 skill larger than its share": (tensors(SKILLS, of_65_rows), "0 to 64 rows", "found 65"),
    "25 probe NaN": (at(PROBE, "routed", 0, float("nan")), "probe", "routed", "NaN"),
    "25 probe tokens out of range": (at(PROBE, "input_ids", 0, 97), "probe", "input_ids", "found 97"),
    "25 probe columns out of range": (at(PROBE, "vocabulary", 0, -1), "probe", "vocabulary", "found -1"),
    "25 probe without facts": (lambda f: edit_header(f / PROBE, lambda h: h.pop("__metadata__")), "texts for"),
    "25 probe of another dtype": (facts(dtype="bfloat16"), "probe", "expected float32", "bfloat16"),
    "25 probe missing": (remove(PROBE), PROBE, "nothing"),
    "25 probe not announced": (config(probe=False), PROBE, "expected no such file"),
    # row 26: tensors of others
    "26 a base weight": (put(ADAPTER_0, "base_model.model.model.layers.0.self_attn.q_proj.weight", torch.ones(32, 32)),
                         ADAPTER_0, "q_proj.weight", "expert_0 only"),
    "26 a base layer": (put(ADAPTER_0, A.replace("lora_A", "base_layer"), torch.ones(32, 32)), ADAPTER_0, "base_layer"),
    "26 another expert's name": (
        put(ADAPTER_0, A.replace(".weight", ".expert_1.weight"), torch.ones(4, 32)), "expert_1"),
    "26 a module that is no target": (lambda f: edit_tensors(
        f / ADAPTER_0, lambda t: [t.update({k.replace("q_proj", "gate_proj"): t.pop(k)}) for k in (A, B)]),
        ADAPTER_0, "gate_proj"),
    "26 a target without a module": (both(expert("target_modules", FIVE), adapter("target_modules", FIVE)),
                                     ADAPTER_0, "target up_proj", "none"),
    # row 27: adapter configs
    "27 r": (adapter("r", 8), CONFIG_0, "r: expected 4", "found 8"),
    "27 r of all": (both(adapter("r", 8), expert("r", 8)), ADAPTER_0, "(8, d_in)", "(4, 32)"),
    "27 r as a float": (expert("r", 4.0), "config.json", "experts[0].r", "found 4.0"),
    "27 alpha": (adapter("lora_alpha", 16), CONFIG_0, "lora_alpha", "expected 32", "found 16"),
    "27 targets": (adapter("target_modules", ["q_proj"]), CONFIG_0, "target_modules", "'q_proj'"),
    "27 targets by pattern": (adapter("target_modules", ".*_proj"), CONFIG_0, "target_modules", ".*_proj"),
    "27 rslora": (adapter("use_rslora", True), CONFIG_0, "use_rslora", "found True"),
    "27 rslora as a number": (adapter("use_rslora", 0), CONFIG_0, "use_rslora", "found 0"),
    "27 dora": (adapter("use_dora", True), CONFIG_0, "use_dora", "found True"),
    "27 bias": (adapter("bias", "all"), CONFIG_0, "bias", "found 'all'"),
    "27 another method": (adapter("peft_type", "IA3"), CONFIG_0, "peft_type", "'IA3'"),
    "27 ranks by pattern": (adapter("rank_pattern", {"q_proj": 8}), CONFIG_0, "rank_pattern"),
    "27 modules to save": (adapter("modules_to_save", ["lm_head"]), CONFIG_0, "modules_to_save", "lm_head"),
    "27 dropout": (adapter("lora_dropout", 1.5), CONFIG_0, "lora_dropout", "found 1.5"),
    "27 dropout of one expert": (adapter("lora_dropout", 0.5), CONFIG_1, "lora_dropout", "expert_0", "0.05"),
    "27 the layer 0": (adapter("layers_to_transform", 0), CONFIG_0, "layers_to_transform", "found 0"),
    "27 the token 0": (adapter("trainable_token_indices", 0), CONFIG_0, "trainable_token_indices", "found 0"),
    "27 r as a float in the adapter": (adapter("r", 4.0), CONFIG_0, "r: expected 4", "found 4.0"),
    "27 excluded layers that have tensors": (adapter("exclude_modules", ["k_proj"]), ADAPTER_0, "exclude_modules"),
    "27 Arrow": (adapter("arrow_config", {"a": 1}), CONFIG_0, "arrow_config"),
    "27 Megatron": (adapter("megatron_config", {"a": 1}), CONFIG_0, "megatron_config"),
    "27 layers by number": (adapter("layers_to_transform", [0]), CONFIG_0, "layers_to_transform", "[0]"),
    "27 an initialisation of the base": (adapter("init_lora_weights", "pissa"), CONFIG_0, "init_lora_weights", "pissa"),
    "27 another revision": (adapter("revision", "main"), CONFIG_0, "revision", "expected None", "'main'"),
    # row 28: the base model
    "28 another base by name": (
        adapter("base_model_name_or_path", "x/y"), CONFIG_0, "base_model_name_or_path", "'x/y'"),
    "28 experts of other widths": (
        tensors(ADAPTER_1, lambda t: t.update({A: torch.ones(4, 48)})), ADAPTER_1, "(48, 32)"),
    "28 no fingerprint": (inside("base_model.architecture.fingerprint", "x" * 64), "config.json", "a SHA-256"),
    # row 29: merged models; more names in test_formats.py
    "29 model.safetensors": (write("model.safetensors"), "Found merged model file: model.safetensors; "),
    "29 pytorch_model.bin": (write("pytorch_model.bin"), "Found merged model file: pytorch_model.bin; "),
    "29 a shard, deep inside": (
        write("peft_adapters/expert_0/x/model-00001-of-00002.safetensors"), "Found merged model file: p"),
    "29 an index": (write("model.safetensors.index.json"), "Found merged model file: model.safetensors.index.json"),
    "29 GGUF": (write("merged.gguf"), "Found merged model file: merged.gguf"),
    # row 30: without effect
    "30 every B zero": (tensors(ADAPTER_0, every("B")(torch.zeros_like)), ADAPTER_0, "every lora_B zero"),
    "30 a new expert that is trained": (expert("state", "new"), ADAPTER_0, "new expert", "trained"),
    "30 an unknown state": (expert("state", "ripe"), "config.json", "experts[0].state", "'ripe'"),
    # row 34 and what else a config may ask for
    "34 a million experts": (config(num_experts=10**6), "config.json", "1 to 1024", "1000000"),
    "34 experts as true": (config(num_experts=True), "config.json", "num_experts", "True"),
    "34 experts as a float": (config(num_experts=2.0), "config.json", "num_experts", "2.0"),
    "34 a hundred thousand targets": (
        expert("target_modules", [f"p{i:06d}" for i in range(10**5)]), CONFIG_0, "target_modules"),
    "34 a rank without end": (expert("r", 10**15), "config.json", "experts[0].r"),
    "34 auto_map": (config(auto_map={"AutoConfig": "evil.Evil"}), "config.json", "auto_map"),
    "34 auto_map of an adapter": (adapter("auto_map", {"AutoConfig": "evil.Evil"}), CONFIG_0, "auto_map"),
    "34 auto_mapping of an adapter": (adapter("auto_mapping", {"parent_library": "evil"}), CONFIG_0, "auto_mapping"),
    "34 a key missing": (lambda f: edit_json(
        f / "config.json", lambda c: c["base_model"]["architecture"].pop("hidden_size")),
                         "config.json", "architecture.hidden_size", "found nothing"),
    "34 an unknown key": (inside("router.secret", 1), "config.json", "router.secret"),
    "34 another version": (config(format_version=3), "config.json", "format_version: expected 2", "update"),
    "34 version true": (config(format_version=True), "config.json", "format_version", "True"),
    "34 another kind of model": (config(model_type="llama"), "config.json", "'dylora-moe'", "'llama'"),
    "34 temperature 1e999": (inside("router.temperature", float("inf")), "config.json", "router.temperature", "inf"),
    "34 temperature NaN": (inside("router.temperature", float("nan")), "config.json", "router.temperature", "nan"),
    "34 top_k 0": (inside("router.top_k", 0), "config.json", "router.top_k", "found 0"),
    "34 a name of surrogates": (expert("name", "\ud800"), "config.json", "experts[0].name"),
    "34 a name with NUL": (expert("name", "expert_0\0"), "config.json", "experts[0].name"),
    "34 no expert's entry": (inside("experts", [1, 2]), "config.json", "experts[0]", "found 1"),
    "34 no base model": (config(base_model=None), "config.json", "base_model.dtype", "None"),
    "34 digits without end": (write("config.json", b'{"step": ' + b"9" * 100_000 + b"}"), "config.json", "40 digits"),
    "34 a number of many digits": (write("config.json", b'{"step": 1e999}'), "config.json", "step", "inf"),
    "34 nesting without end": (write("config.json", b"[" * 500_000), "config.json", "expected JSON"),
    "34 nested objects": (write(CONFIG_0, b'{"r":' * 100_000), CONFIG_0, "expected JSON"),
    "34 nested in a value": (write("config.json", b'{"step":' + b"[" * 900 + b"]" * 900 + b"}"), "config.json", "step"),
    "34 a key twice": (write("config.json", b'{"step": 1, "step": 1}'), "config.json", "'step' twice"),
    "34 null": (write("config.json", b"null"), "config.json", "JSON object", "NoneType"),
    "34 adapter config null": (write(CONFIG_0, b"null"), CONFIG_0, "JSON object", "NoneType"),
    "34 trainer state null": (write(TRAINER, b"null"), TRAINER, "JSON object", "NoneType"),
    "34 trainer state of lists": (
        inside("stateful_callbacks", {"Saver": {"attributes": []}}, TRAINER), TRAINER, "stateful"),
    "34 not UTF-8": (write("config.json", b'{"\xff": 1}'), "config.json", "UnicodeDecodeError"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_contradiction_is_found_behind_a_rewritten_manifest(case, sound):
    change, *words = CASES[case]
    change(sound)
    assert find_problems(sound), "not even the hashes told"
    rewrite_manifest(sound)
    began = time.monotonic()
    problems = found(sound, *words)
    assert time.monotonic() - began < 20
    model = tiny_mixture(seed=1)
    tensors_before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_into(open_checkpoint(sound), model)
    assert caught.value.problems == problems
    assert all(torch.equal(t, tensors_before[name]) for name, t in model.state_dict().items())


def test_row_24_ten_experts_and_more_are_not_mixed(tmp_path):
    model = tiny_mixture(experts=12, r=1)
    save_checkpoint(tmp_path / "checkpoint-5", model)
    assert find_problems(tmp_path / "checkpoint-5") == []
    loaded = load_mixture(tmp_path / "checkpoint-5", tiny_base())
    for index in range(12):
        for name, tensor in loaded.expert_tensors(index).items():
            assert torch.equal(tensor, model.expert_tensors(index)[name])
    (tmp_path / "checkpoint-5" / formats.expert_folder("expert_1") / formats.ADAPTER_WEIGHTS).unlink()
    (problem,) = find_problems(tmp_path / "checkpoint-5")
    assert problem.startswith(f"{ADAPTER_1}: ")


def other_save(folder: Path) -> Path:
    """A checkpoint of the same run, as it might be: the same shapes, other values."""
    return save_sound(folder.with_name("checkpoint-9"), tiny_mixture(seed=1))


SUBSTITUTIONS = {
    "experts swapped": (lambda f: swap(f / ADAPTER_0, f / ADAPTER_1), ["expert_0", "expert_1"]),
    "an expert left from another save": (lambda f: shutil.copy(other_save(f) / ADAPTER_1, f / ADAPTER_1), ["expert_1"]),
    "a router left from another save": (lambda f: shutil.copy(other_save(f) / ROUTER, f / ROUTER), ["router"]),
    "an expert duplicated": (lambda f: shutil.copy(f / ADAPTER_0, f / ADAPTER_1), ["expert_1"]),
    "one value changed": (at(ADAPTER_0, A, 3, 0.5), ["expert_0"]),
    "one value changed by a rounding": (tensors(ADAPTER_1, lambda t: t[A].view(-1)[:1].mul_(1 + 1e-7)), ["expert_1"]),
    "one matrix negated": (tensors(ADAPTER_1, lambda t: t[B].neg_()), ["expert_1"]),
    "one B zero": (tensors(ADAPTER_1, lambda t: t[B].zero_()), ["expert_1"]),
    "a layer swapped for another": (
        tensors(ADAPTER_0, lambda t: t.update({A: t[A.replace("0", "1", 1)], A.replace("0", "1", 1): t[A]})),
        ["expert_0"],
    ),
    "the gate's rows swapped": (
        tensors("router.safetensors", lambda t: t["gate.weight"].copy_(t["gate.weight"].flip(0))),
        ["router"],
    ),
}


@pytest.mark.parametrize("case", SUBSTITUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_22_25_a_substitution_behind_a_rewritten_manifest_is_found_by_the_probe(case, dtype, tmp_path):
    folder = save_sound(tmp_path / "checkpoint-5", tiny_mixture(dtype=dtype))
    change, changed = SUBSTITUTIONS[case]
    change(folder)
    assert find_problems(folder)
    rewrite_manifest(folder)
    assert find_problems(folder) == []
    model = load_mixture(folder, tiny_base(dtype=dtype))
    probe = read_probe(open_checkpoint(folder))[0]
    assert changed_tensors(model, probe) == changed
    if (dtype, case) != (torch.bfloat16, "one value changed by a rounding"):  # which the logits round away
        assert probe_difference(model, probe).largest > 0


def test_row_22_without_a_manifest_what_is_there_is_looked_at_all_the_same(sound):
    (sound / MANIFEST).unlink()
    at(ADAPTER_0, A, 0, float("nan"))(sound)
    problems = found(sound, ADAPTER_0, "NaN")
    assert problems == found(sound, MANIFEST)


def test_row_29_a_merged_model_is_one_problem_however_large(sound):
    with (sound / "model.safetensors").open("wb") as file:
        file.truncate(5 << 30)
    (problem,) = find_problems(sound)
    assert problem.startswith("Found merged model file: model.safetensors")


# ---- row 31: pickles ----


@pytest.mark.parametrize("rewrite", [False, True])
def test_row_31_a_pickle_in_the_place_of_any_file_is_never_run(sound, original, tmp_path, rewrite):
    bomb = b"cposix\nsystem\n(S'touch %s'\ntR." % os.fsencode(tmp_path / "PWNED")
    for name in files_of(original):
        (sound / name).write_bytes(bomb)
        if rewrite and name != MANIFEST:
            rewrite_manifest(sound)
        found(sound, f"{name}: ")
        with pytest.raises(CheckpointError):
            load_mixture(sound, tiny_base())
        shutil.copy(original / name, sound / name)
        shutil.copy(original / MANIFEST, sound / MANIFEST)
    assert not (tmp_path / "PWNED").exists()


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_row_31_a_pickle_inside_a_file_of_torch_is_not_run_either(sound, tmp_path, name):
    """The archive is as it should be, and so is the manifest: only who unpickles it finds out."""
    torch.save(Bomb(tmp_path / "PWNED"), sound / name)
    rewrite_manifest(sound)
    assert find_problems(sound) == []
    load_mixture(sound, tiny_base())
    with pytest.raises(CheckpointError, match=rf"{name}: cannot be read as tensors only"):
        training_state.read_tensors(sound, name)
    assert not (tmp_path / "PWNED").exists()
    torch.load(sound / name, weights_only=False)
    assert (tmp_path / "PWNED").exists()  # a bomb it is


# ---- row 33: what is no file ----


@pytest.mark.parametrize("rewrite", [False, True])
@pytest.mark.parametrize("kind", ["folder", "link inside", "link outside", "dangling link", "fifo", "socket", "device"])
def test_row_33_something_else_in_the_place_of_any_file(sound, original, kind, rewrite):
    for name in files_of(original):
        path = sound / name
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            with socket.socket(socket.AF_UNIX) as server:
                here = os.getcwd()
                os.chdir(path.parent)  # the name of a socket is short
                server.bind(path.name)
                os.chdir(here)
        elif kind == "device":
            try:
                os.mknod(path, 0o020666, os.makedev(1, 5))  # /dev/zero
            except PermissionError:
                pytest.skip("devices are made by root only")
        else:
            inside, outside = sound / formats.ROUTER, original / name
            path.symlink_to({"link inside": inside, "link outside": outside}.get(kind, "nothing"))
        if rewrite and name != MANIFEST:
            rewrite_manifest(sound)
        found(sound, f"{name}: ")
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        shutil.copy(original / name, path)
        shutil.copy(original / MANIFEST, sound / MANIFEST)


def test_row_33_a_linked_folder_is_not_entered(sound, original):
    shutil.rmtree(sound / formats.ADAPTERS)
    (sound / formats.ADAPTERS).symlink_to(original / formats.ADAPTERS)
    found(sound, f"{formats.ADAPTERS}: ", "symbolic link")
    rewrite_manifest(sound)
    found(sound, f"{formats.ADAPTERS}: ", "symbolic link")


def test_row_33_a_link_is_called_a_link_before_there_is_a_manifest(sound):
    (sound / MANIFEST).unlink()
    assert inspect_files(sound).problems == []
    (sound / "gate").symlink_to(formats.ROUTER)
    (problem,) = inspect_files(sound).problems
    assert problem.startswith("gate: expected a regular file, found a symbolic link")


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", ".", "", "a//b", "a\0b", "\ud800", "manifest.json"]
)
def test_row_33_names_in_the_manifest_that_lead_elsewhere(sound, name):
    (sound.parent / "x").write_bytes(b"")
    edit_json(sound / MANIFEST, lambda m: m["files"].update({name: {"bytes": 0, "sha256": "0" * 64}}))
    found(sound, "expected")


def test_row_33_files_of_strange_names(sound):
    for name in (b"bad-\xff", b"new\nline", b"tab\t", "\u202etxt.exe".encode()):
        path = os.path.join(os.fsencode(sound), name)
        Path(os.fsdecode(path)).write_bytes(b"")
        problems = find_problems(sound)
        assert len(problems) == 1
        assert problems[0].isprintable()
        os.unlink(path)


def test_row_33_an_unreadable_file_or_folder(sound):
    """As a user who is not root; in a child process, since root may read everything."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    for path in [sound, *sound.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    for parent in list(sound.parents)[:-1]:
        if parent.stat().st_uid == os.getuid() and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o001)
    for name in (formats.ROUTER, formats.CONFIG, MANIFEST, ADAPTER_0, formats.ADAPTERS):
        before = (sound / name).stat().st_mode
        (sound / name).chmod(0)
        problems = in_child(lambda: find_problems(sound))
        (sound / name).chmod(before)
        assert problems
        assert any(name in problem for problem in problems), problems
    sound.chmod(0)
    assert any("Permission denied" in problem for problem in in_child(lambda: find_problems(sound)))
    sound.chmod(0o755)
    sound.parent.chmod(0)
    try:
        assert "expected a checkpoint folder" in in_child(lambda: find_problems(sound))
    finally:
        sound.parent.chmod(0o755)


def in_child(function):
    """What the function returns, or the text of its UsageError, in a child process of an ordinary user."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            answer = function()
        except UsageError as error:
            answer = str(error)
        except BaseException as error:
            answer = repr(error)
        os.write(sender, json.dumps(answer).encode())
        os._exit(0)
    os.close(sender)
    with os.fdopen(receiver) as file:
        answer = file.read()
    os.waitpid(child, 0)
    return json.loads(answer)


# ---- rows 32 and 34: bounded time, memory and reach ----


def test_row_32_terabytes_that_are_not_there(sound):
    """Sparse files in every place, with a manifest that agrees: within seconds, and in little memory."""
    size = 1 << 40

    def entry(name: str, **changes) -> None:
        edit_json(sound / MANIFEST, lambda m: m["files"][name].update(changes))

    for name in (ADAPTER_0, formats.ROUTER, formats.OPTIMIZER, formats.CONFIG, TRAINER):
        with (sound / name).open("r+b") as file:
            file.truncate(size)
        entry(name, bytes=size)
    header = {"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    with (sound / ADAPTER_1).open("r+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    entry(ADAPTER_1, bytes=8 + len(text) + size)
    problems, seconds, peak = measured(sound)
    for name in (ADAPTER_0, ADAPTER_1, formats.ROUTER, formats.OPTIMIZER, formats.CONFIG):
        assert any(problem.startswith(f"{name}: ") for problem in problems), name
    assert seconds < 10
    assert peak < 300 << 20


HEAVY = {
    "lists": b"[" + b"[]," * 5_000_000 + b"[]]",
    "objects": b"[" + b"{}," * 5_000_000 + b"{}]",
    "texts": b"[" + b'"ab",' * 3_000_000 + b'"ab"]',
    "numbers": b"[" + b"300," * 4_000_000 + b"300]",
    "keys": b"{" + b",".join(b'"%07d":0' % i for i in range(1_300_000)) + b"}",
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=() if k == "objects" else pytest.mark.slow) for k in HEAVY])
def test_row_32_the_heaviest_json_stays_below_two_gigabytes(sound, kind):
    data = HEAVY[kind][:MAX_JSON_BYTES]
    for name in (formats.CONFIG, CONFIG_0, CONFIG_1, TRAINER):
        (sound / name).write_bytes(data)
    for name in (ADAPTER_0, ADAPTER_1, formats.ROUTER):
        (sound / name).write_bytes(len(data).to_bytes(8, "little") + data)
    rewrite_manifest(sound)
    problems, seconds, peak = measured(sound)
    assert problems
    assert seconds < 60
    assert peak < 2 << 30


def measured(folder: Path) -> tuple[list[str], float, int]:
    """The problems, the seconds and the peak memory of a child process that verifies a folder."""
    code = """
        import json, sys, time
        from dylora_moe.checkpoint.verify import find_problems
        began = time.monotonic()
        problems = find_problems(sys.argv[1])
        assert "torch" not in sys.modules
        seconds = time.monotonic() - began
        from dylora_moe.system.machine import peak_memory
        print(json.dumps([problems, seconds, peak_memory()]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))


def test_row_33_files_without_end(sound, monkeypatch):
    monkeypatch.setattr("dylora_moe.checkpoint.findings.MAX_FILES", 100)
    for index in range(200):
        (sound / f"f{index}").touch()
    found(sound, ".: ", "at most 100 files")


def test_row_34_a_missing_base_folder_is_no_download(sound, tmp_path, monkeypatch):
    missing = str(tmp_path / "models/gone")
    inside("base_model.name", missing)(sound)
    for name in (CONFIG_0, CONFIG_1):
        inside("base_model_name_or_path", missing, name)(sound)
    rewrite_manifest(sound)
    assert find_problems(sound) == []
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("reached for the network"))
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("reached for the network"))
    with pytest.raises(UsageError, match="gone"):
        load_mixture(sound)


def test_only_a_folder_is_verified(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for name, found_there in (("file", "a file"), ("nothing", "nothing"), ("loop", ""), ("x" * 5000, ""), ("a\0b", "")):
        with pytest.raises(UsageError, match=f"expected a checkpoint folder, found {found_there}"):
            find_problems(tmp_path / name)


def test_an_empty_folder_is_no_checkpoint(tmp_path):
    (tmp_path / "empty").mkdir()
    found(tmp_path / "empty", MANIFEST)


def test_a_folder_around_checkpoints_names_the_one_to_give(tmp_path, original):
    newest = shutil.copytree(original, tmp_path / "checkpoint-7")
    with pytest.raises(UsageError, match=f"is a run folder: name its newest checkpoint,\\s+{newest}$"):
        find_problems(tmp_path)
    (newest / MANIFEST).unlink()
    with pytest.raises(UsageError, match=f"is a run folder without a complete checkpoint:\\s+- {newest.name}: "):
        find_problems(tmp_path)
    alone = shutil.copytree(original, tmp_path / "out" / formats.CHECKPOINT)
    with pytest.raises(UsageError, match=f"the checkpoint is in it,\\s+{alone}$"):
        find_problems(alone.parent)


@pytest.mark.parametrize("name", ["checkpoint", "checkpoint-3"])
@pytest.mark.parametrize("is_folder", [False, True])
def test_a_damaged_checkpoint_is_no_run_folder_whatever_lies_in_it(sound, original, name, is_folder):
    (sound / MANIFEST).unlink()
    if is_folder:
        shutil.copytree(original, sound / name)
    else:
        (sound / name).write_text("")
    problems = found(sound, MANIFEST)
    assert any(problem.startswith(name) for problem in problems), problems


def test_a_link_to_a_checkpoint_may_be_named(original, tmp_path):
    (tmp_path / "best").symlink_to(original)
    assert find_problems(tmp_path / "best") == []


# ---- what passes ----


def test_flat_and_mixed_forms_pass(sound, tmp_path):
    make_flat(sound, "expert_1")
    rewrite_manifest(sound)
    assert find_problems(sound) == []
    assert find_problems(save_mixed(tmp_path / "checkpoint-6")) == []


def test_a_checkpoint_without_training_files_passes(tmp_path):
    assert find_problems(save_sound(tmp_path / "checkpoint-5", training=False)) == []


def test_the_random_states_of_several_processes_pass(sound):
    (sound / "rng_state.pth").rename(sound / "rng_state_0.pth")
    shutil.copy(sound / "rng_state_0.pth", sound / "rng_state_1.pth")
    rewrite_manifest(sound)
    assert find_problems(sound) == []
    (sound / "rng_state_0.pth").unlink()
    rewrite_manifest(sound)
    found(sound, "rng_state_0.pth", "nothing")


def test_a_log_of_a_very_long_run_passes(sound):
    entries = [{"loss": 1.0, "learning_rate": 1e-4, "grad_norm": float("nan"), "step": step} for step in range(250_000)]
    inside("log_history", entries, TRAINER)(sound)
    rewrite_manifest(sound)
    assert (sound / TRAINER).stat().st_size > MAX_JSON_BYTES
    assert find_problems(sound) == []


def test_verify_never_changes_a_folder(sound):
    def state() -> dict:
        return {p: (p.lstat().st_mtime_ns, p.lstat().st_ino, p.lstat().st_mode) for p in [sound, *sound.rglob("*")]}

    before, contents = state(), files_of(sound)
    find_problems(sound)
    assert (state(), files_of(sound)) == (before, contents)


def test_the_config_alone_can_be_had(sound, tmp_path):
    assert inspect_config(sound).num_experts == 2
    (sound / formats.ROUTER).unlink()
    assert inspect_config(sound).num_experts == 2
    config(num_experts=3)(sound)
    assert inspect_config(sound) is None
    assert inspect_config(tmp_path) is None


def test_what_nobody_thought_of_is_a_problem_not_a_traceback(sound, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("dylora_moe.checkpoint.verify.check_router", fail)
    (problem,) = find_problems(sound)
    assert "ZeroDivisionError" in problem
    assert "report this as a bug" in problem
