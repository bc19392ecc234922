"""What a save writes, what a load reads, and that neither leaves a trace where it fails."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from dylora_moe import DyLoRAMoE
from dylora_moe.base.find import find_base
from dylora_moe.base.load import load_base
from dylora_moe.base.preserve import generation_text
from dylora_moe.checkpoint import formats
from dylora_moe.checkpoint import tensors as checkpoint_tensors
from dylora_moe.checkpoint.probe import (
    changed_tensors,
    make_probe,
    probe_difference,
    probe_facts,
    read_probe,
)
from dylora_moe.checkpoint.read import build_mixture, load_into, load_mixture, read_skills
from dylora_moe.checkpoint.tensors import expert_tensors
from dylora_moe.checkpoint.verify import find_problems, inspect_checkpoint, open_checkpoint
from dylora_moe.checkpoint.write import export_expert, save_checkpoint
from dylora_moe.errors import CheckpointError, UsageError
from dylora_moe.mixture.config import MoELoraConfig, RouterConfig
from dylora_moe.skills.library import Skill, SkillLibrary
from dylora_moe.store import run_folder
from dylora_moe.store.lock import LOCK
from dylora_moe.store.manifest import FolderGone
from dylora_moe.validation.reloaded import stock_peft_logits

from ..support.faults import full_disk, run_with_fault
from ..support.mutations import (
    ADAPTER_0,
    ADAPTER_1,
    CONFIG_0,
    CONFIG_1,
    edit_json,
    edit_tensors,
    files_of,
    make_flat,
    rewrite_manifest,
    save_mixed,
    save_sound,
    tiny_mixture,
    training_files,
    two_skills,
)
from ..support.tiny import ARCHITECTURES, random_ids, randomise, tiny_base

ROOT = Path(__file__).parents[2]
FILES = {ADAPTER_0, ADAPTER_1, CONFIG_0, CONFIG_1, "config.json", "manifest.json", "router.safetensors"}
FILES |= {"probe.safetensors", "skill_library.safetensors"}
TRAINING = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def tensors(model: DyLoRAMoE) -> dict[str, torch.Tensor]:
    found = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return {name: tensor for name, tensor in found.items() if name != "_extra_state"}  # which are mature


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# ---- writing ----


def test_the_exact_set_of_files(tmp_path):
    assert set(files_of(save_sound(tmp_path / "a", training=False))) == FILES
    assert set(files_of(save_sound(tmp_path / "b"))) == FILES | TRAINING
    assert {p.name for p in tmp_path.iterdir()} == {"a", "b", LOCK}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_adapters_are_those_that_peft_writes_and_reads(kind, tmp_path):
    model = tiny_mixture(kind)
    save_checkpoint(tmp_path / "ours", model)
    model.peft_model.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ids = random_ids(1, 9)
    plain = LoraConfig().to_dict()
    for index, name in enumerate(("expert_0", "expert_1")):
        ours, theirs = tmp_path / "ours" / formats.expert_folder(name), tmp_path / "theirs" / name
        found, expected = load_file(ours / formats.ADAPTER_WEIGHTS), load_file(theirs / formats.ADAPTER_WEIGHTS)
        assert equal(found, expected)
        assert all(found[key].dtype == expected[key].dtype == torch.float32 for key in expected)
        assert (ours / formats.ADAPTER_WEIGHTS).read_bytes() == (theirs / formats.ADAPTER_WEIGHTS).read_bytes()
        config, stock = (json.loads((f / formats.ADAPTER_CONFIG).read_text()) for f in (ours, theirs))
        left_out = plain.keys() - config.keys() - {"peft_version"}
        assert {name: stock[name] for name in left_out} == {name: plain[name] for name in left_out}
        shared = {name: stock[name] for name in config}
        assert {**config, "target_modules": set(config["target_modules"])} == {
            **shared,
            "target_modules": set(shared["target_modules"]),
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            stock_model = PeftModel.from_pretrained(tiny_base(kind), ours).eval()
        with torch.no_grad():
            assert (stock_model(ids).logits - model(ids, expert=index).logits).abs().max() < 1e-5
    logits = list(stock_peft_logits(open_checkpoint(tmp_path / "ours"), tiny_base(kind), ids))
    assert (logits[1] - model(ids, expert=1).logits[0]).abs().max() < 1e-5


def test_bytes_depend_on_the_model_alone(tmp_path):
    """Not on the hash seed, the folder, the time or the process."""
    code = (
        "import sys, pathlib; from tests.support.mutations import save_sound, tiny_mixture; "
        "save_sound(pathlib.Path(sys.argv[1]), tiny_mixture('gpt2'), training=False)"
    )
    there = tmp_path / "folder" / "checkpoint-1"
    there.parent.mkdir()
    seed = str(hash("any") % 1000)  # another one than this process has
    command = [sys.executable, "-c", code, str(there)]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        here = files_of(save_sound(tmp_path / "here", tiny_mixture("gpt2"), training=False))
    finally:
        torch.set_num_threads(before)
    assert files_of(there) == here
    for name, data in here.items():
        assert os.fsencode(tmp_path) not in data and os.fsencode(os.getcwd()) not in data, name


def test_two_saves_of_one_model_are_equal_to_the_byte(tmp_path):
    model = tiny_mixture()
    assert files_of(save_sound(tmp_path / "a", model)) == files_of(save_sound(tmp_path / "b", model))


def test_configs_are_sorted_and_name_the_base(tmp_path):
    model = tiny_mixture()
    model.base.config._name_or_path, model.base_revision = "someone/model", "0123abc"
    save_checkpoint(tmp_path / "a", model, step=7)
    for name in (CONFIG_0, "config.json"):
        text = (tmp_path / "a" / name).read_text()
        assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    adapter = json.loads((tmp_path / "a" / CONFIG_0).read_text())
    assert (adapter["base_model_name_or_path"], adapter["revision"]) == ("someone/model", "0123abc")
    assert adapter["target_modules"] == sorted(adapter["target_modules"])
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert (config["base_model"]["name"], config["base_model"]["revision"]) == ("someone/model", "0123abc")
    assert (config["step"], config["num_experts"]) == (7, 2)
    assert load_mixture(tmp_path / "a", tiny_base()).base_revision == "0123abc"


def test_every_file_follows_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        folder = save_sound(tmp_path / "a")
        exported = export_expert(tiny_mixture(), 0, tmp_path / "exported")
    finally:
        os.umask(before)
    for path in (*folder.rglob("*"), *exported.rglob("*")):
        assert path.stat().st_mode & 0o777 == (0o750 if path.is_dir() else 0o640), path


@pytest.mark.parametrize("training", [True, False])
def test_row_11_a_save_leaves_the_model_as_found(training, tmp_path):
    model = tiny_mixture(experts=3)
    model.train(training)
    next(model.base.children()).eval()  # not all modules in one mode
    model.peft_model.set_adapter("expert_1")
    model.peft_model.base_model.set_adapter(["expert_2"])
    for index, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, float(index)) if index % 3 == 0 else None

    def state() -> list:
        return [
            [module.training for module in model.modules()],
            [p.requires_grad for p in model.parameters()],
            [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
            [p.data_ptr() for p in model.parameters()],
            [p._version for p in model.parameters()],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            list(model.peft_model.active_adapters),
            model.expert_states,
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
        ]

    before, values = state(), tensors(model)
    save_checkpoint(tmp_path / "a", model, step=1, skills=two_skills())
    assert state() == before
    assert equal(values, tensors(model))


def test_all_experts_in_one_walk_are_those_one_by_one():
    configs = [MoELoraConfig(r=r, target_modules=targets) for r, targets in ((1, ["q_proj"]), (3, "all-linear"))]
    model = tiny_mixture(experts=configs)
    for index, found in enumerate(expert_tensors(model)):
        expected = model.expert_tensors(index)
        assert list(found) == list(expected)
        assert all(found[name] is expected[name] for name in expected)


def test_a_published_checkpoint_is_left_and_nothing_is_computed(tmp_path, monkeypatch):
    folder = save_sound(tmp_path / "a")
    before = files_of(folder)
    monkeypatch.setattr("dylora_moe.checkpoint.write.make_probe", lambda *_: pytest.fail("a forward pass for nothing"))
    with pytest.raises(UsageError, match=r"nothing was saved: .* is a checkpoint already, .* choose another folder"):
        save_checkpoint(folder, tiny_mixture(seed=1))
    assert files_of(folder) == before


def test_what_verify_would_refuse_is_not_published(tmp_path):
    model = tiny_mixture()
    with torch.no_grad():
        model.expert_tensors(1)[A][0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"expert_1/adapter_model.safetensors: tensor .*q_proj.lora_A.weight.* NaN"):
        save_checkpoint(tmp_path / "a", model)
    skills = SkillLibrary()
    skills.add(Skill("Rust", expert=7))
    with pytest.raises(UsageError, match="below 2, found 7"):
        save_checkpoint(tmp_path / "a", tiny_mixture(), skills=skills)
    with pytest.raises(UsageError, match=r"scheduler.pt: expected in this checkpoint"):
        save_checkpoint(tmp_path / "a", tiny_mixture(), training_files=lambda f: torch.save({}, f / formats.OPTIMIZER))
    assert list(tmp_path.iterdir()) == []


WRITTEN = [ADAPTER_0, ADAPTER_1, CONFIG_1, "router.safetensors", "skill_library.safetensors", "probe.safetensors"]


@pytest.mark.parametrize("name", [*WRITTEN, "config.json"])
def test_rows_3_6_a_file_that_cannot_be_written_is_named_and_nothing_is_published(tmp_path, monkeypatch, name):
    save_sound(tmp_path / "checkpoint-1")
    before, model = files_of(tmp_path), tiny_mixture(seed=1)
    values = tensors(model)
    full_disk(monkeypatch, name)
    with pytest.raises(UsageError) as caught:
        save_checkpoint(tmp_path / "checkpoint-2", model)
    assert re.fullmatch(
        rf"cannot write {tmp_path}/\.dylora-staging-\S+/{re.escape(name)}: No space left on device \(ENOSPC\); "
        "free space on that disk, or choose another output folder",
        str(caught.value),
    )
    assert files_of(tmp_path) == before
    assert equal(tensors(model), values)


def test_native_writers_that_fail_are_usage_errors(tmp_path):
    def missing_folder(folder: Path) -> None:
        torch.save({}, folder / "gone" / formats.OPTIMIZER)

    def full_disk(folder: Path) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: No space left on device\nmore")

    with pytest.raises((UsageError, RuntimeError)):
        save_checkpoint(tmp_path / "a", tiny_mixture(), training_files=missing_folder)
    with pytest.raises(UsageError, match="free space on that disk"):
        save_checkpoint(tmp_path / "a", tiny_mixture(), training_files=full_disk)
    with pytest.raises(RuntimeError, match="a bug"):
        save_checkpoint(tmp_path / "a", tiny_mixture(), training_files=lambda _: exec("raise RuntimeError('a bug')"))
    assert not (tmp_path / "a").exists()


def codegemma(experts: int) -> DyLoRAMoE:
    source, weights = find_base("google/codegemma-2b", weights="none")
    base = load_base(source, weights)
    return DyLoRAMoE(base, experts)


def test_what_is_not_adapters_is_small_on_codegemma(tmp_path):
    model = codegemma(2)
    folder, skills = tmp_path / "a", SkillLibrary()
    for index, name in enumerate(("python", "prose")):  # of no data, as in the scripts
        skills.add(Skill(name, index))
    save_checkpoint(folder, model, skills=skills)
    contents = inspect_checkpoint(folder)
    assert contents.problems == []
    weights = sum(info.st_size for name, info in contents.files.items() if name.endswith(formats.ADAPTER_WEIGHTS))
    probe = make_probe(tiny_mixture())[0]
    probe_bytes = sum(tensor.nbytes for tensor in probe.values()) + 1200  # header and facts
    assert contents.total_bytes - weights + probe_bytes < 30 * 1024
    inside = sum(t.nbytes for i in range(2) for t in model.expert_tensors(i).values())
    assert contents.total_bytes + probe_bytes - inside < 0.01 * contents.total_bytes
    assert round(contents.total_bytes / (1 << 20), 1) == 28.2
    assert not (folder / formats.PROBE).exists()


def test_an_expert_is_exported_flat(tmp_path):
    model = tiny_mixture()
    folder = export_expert(model, 1, tmp_path / "new" / "expert")
    assert set(files_of(folder)) == {formats.ADAPTER_CONFIG, formats.ADAPTER_WEIGHTS}
    assert [p.name for p in folder.parent.iterdir()] == ["expert"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        stock = PeftModel.from_pretrained(tiny_base(), folder).eval()
    ids = random_ids(1, 9)
    with torch.no_grad():
        assert (stock(ids).logits - model(ids, expert=1).logits).abs().max() < 1e-5
    before = files_of(folder)
    with pytest.raises(UsageError, match="exists already"):
        export_expert(model, 0, folder)
    assert files_of(folder) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot export to"):
        export_expert(model, 0, tmp_path / "file" / "x")


def test_an_export_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed, rename = set(), Path.rename

    def renamed(source, target):
        assert {path.stat().st_ino for path in (source, *source.rglob("*"))} <= flushed
        return rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(Path, "rename", renamed)
    export_expert(tiny_mixture(), 0, tmp_path / "one")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert tmp_path.stat().st_ino in flushed


# ---- reading ----


def test_load_gives_the_same_bits(tmp_path):
    model = tiny_mixture(experts=3, trained=(0, 2))
    model.mark_mature([0])
    save_checkpoint(tmp_path / "a", model, skills=two_skills())
    loaded = load_mixture(tmp_path / "a", tiny_base(), label_smoothing=0.1)
    assert equal(tensors(loaded), tensors(model))
    assert loaded.expert_states == model.expert_states == ["mature", "new", "immature"]
    assert loaded.router.config == model.router.config
    assert loaded.label_smoothing == 0.1
    probe, facts = read_probe(open_checkpoint(tmp_path / "a"))
    assert facts == probe_facts(loaded)
    assert probe_difference(loaded, probe).largest == 0
    assert changed_tensors(loaded, probe) == []
    skills = read_skills(open_checkpoint(tmp_path / "a"))
    assert [(skill.name, skill.expert, skill.loss) for skill in skills] == [("Python", 0, 1.5), ("prose ✓", None, None)]
    for name in ("features", "states"):
        read, saved = (getattr(library["Python"], name).tensors() for library in (skills, two_skills()))
        assert len(read[0]) and all(map(torch.equal, read, saved))
    assert files_of(save_again(tmp_path / "b", loaded)) == files_of(tmp_path / "a")


def test_a_generation_config_that_has_changed_is_kept(tmp_path):
    model = tiny_mixture("llama", 2)
    model.save_checkpoint(tmp_path / "same")
    assert not (tmp_path / "same" / formats.GENERATION).exists()
    model.generation_config.repetition_penalty, model.generation_config.eos_token_id = 1.25, [3, 5]
    model.save_checkpoint(tmp_path / "own")
    assert find_problems(tmp_path / "own") == []
    assert json.loads((tmp_path / "own" / formats.GENERATION).read_text())["eos_token_id"] == [3, 5]
    for made in (load_mixture(tmp_path / "own", tiny_base("llama")), model.collapse()):
        assert generation_text(made.base) == generation_text(model.base)
        assert (save_again(tmp_path / f"again-{made.num_experts}", made) / formats.GENERATION).read_bytes() == (
            tmp_path / "own" / formats.GENERATION
        ).read_bytes()


@pytest.mark.parametrize(("name", "value"), [("max_new_tokens", 0), ("stop_strings", {"a"})])
def test_a_generation_config_that_could_not_be_read_again_is_left_out(tmp_path, name, value):
    model = tiny_mixture("llama", 2)
    setattr(model.generation_config, name, value)
    with pytest.warns(UserWarning, match="has no generation_config: it could not be read again"):
        model.save_checkpoint(tmp_path / "own")
    assert load_mixture(tmp_path / "own", tiny_base("llama")).num_experts == 2
    DyLoRAMoE(model.fresh_base(), 2)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[1]", "expected a JSON object, found list"),
        ("{", "generation_config.json"),
        ('{"max_new_tokens": -1}', "max_new_tokens"),
        ('{"watermarking_config": 3}', "generation_config.json"),
    ],
)
def test_a_generation_config_that_cannot_be_used_is_refused(tmp_path, content, problem):
    model = tiny_mixture("llama", 2)
    model.generation_config.repetition_penalty = 1.25
    model.save_checkpoint(tmp_path / "own")
    (tmp_path / "own" / formats.GENERATION).write_text(content)
    rewrite_manifest(tmp_path / "own")
    with pytest.raises(CheckpointError, match=re.escape(problem)):
        load_mixture(tmp_path / "own", tiny_base("llama"))


def save_again(target: Path, model: DyLoRAMoE) -> Path:
    save_checkpoint(target, model, skills=two_skills())
    return target


def test_a_router_that_is_read_keeps_what_it_was_fitted_for(tmp_path):
    there, here = tiny_mixture(), tiny_mixture(seed=1)
    there.router.config = RouterConfig(decay=0.9, prior_tokens=3.0, temperature=2.0)
    here.router.config = RouterConfig(temperature=0.5)
    save_checkpoint(tmp_path / "a", there, skills=two_skills())
    load_into(open_checkpoint(tmp_path / "a"), here)
    assert here.router.config == RouterConfig(decay=0.9, prior_tokens=3.0, temperature=0.5)


def test_load_into_a_mixture_of_the_same_shape(tmp_path):
    model, other = tiny_mixture(), tiny_mixture(seed=1)
    model.mark_mature()
    save_checkpoint(tmp_path / "a", model, skills=two_skills())
    trainable = [p.requires_grad for p in other.parameters()]
    skills = load_into(open_checkpoint(tmp_path / "a"), other)
    assert equal(tensors(other), tensors(model))
    assert other.expert_states == ["mature", "mature"]
    assert [p.requires_grad for p in other.parameters()] == trainable
    assert len(skills) == 2


def test_the_flat_form_is_read(tmp_path):
    model = tiny_mixture()
    folder = save_sound(tmp_path / "a", model)
    make_flat(folder, "expert_0")
    rewrite_manifest(folder)
    assert equal(tensors(load_mixture(folder, tiny_base())), tensors(model))
    logits = list(stock_peft_logits(open_checkpoint(folder), tiny_base(), random_ids(1, 5)))
    assert len(logits) == 2
    assert load_mixture(save_mixed(tmp_path / "b"), tiny_base()).num_experts == 3


def test_the_probe_is_two_passes_and_none_without_base_weights(tmp_path, monkeypatch):
    model = tiny_mixture(experts=5)
    passes = []
    model.base.lm_head.register_forward_hook(lambda *_: passes.append(1))
    tensors_there, _ = make_probe(model)
    assert len(passes) == 2
    assert {name: tuple(t.shape) for name, t in tensors_there.items()} == {
        "input_ids": (1, 16),
        "vocabulary": (32,),
        "routed": (16, 32),
        "experts": (5, 16, 32),
        "sha256": (6, 32),
    }
    for index in range(5):
        alone = model(tensors_there["input_ids"], expert=index).logits[0][:, tensors_there["vocabulary"]]
        assert (alone - tensors_there["experts"][index]).abs().max() < 1e-5
    assert (
        model(tensors_there["input_ids"]).logits[0][:, tensors_there["vocabulary"]] - tensors_there["routed"]
    ).abs().max() < 1e-5
    with pytest.raises(CheckpointError, match="of 2 experts"):
        probe_difference(tiny_mixture(), tensors_there)


def test_a_base_that_overflows_has_no_probe(tmp_path):
    model = tiny_mixture(dtype=torch.float16)
    with torch.no_grad():
        model.base.lm_head.weight.fill_(60000)
    save_checkpoint(tmp_path / "a", model)
    assert read_probe(open_checkpoint(tmp_path / "a")) is None
    assert find_problems(tmp_path / "a") == []


# ---- what fails touches nothing ----

FAULTS = {
    "a bit flipped": lambda f: (f / ADAPTER_1).write_bytes((f / ADAPTER_1).read_bytes()[:-1] + b"\x7f"),
    "a file missing": lambda f: (f / "router.safetensors").unlink(),
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "a layer renamed, forged": lambda f: forged(
        f, lambda t: [t.update({k.replace("layers.0", "layers.9"): t.pop(k)}) for k in list(t) if "layers.0" in k]
    ),
    "experts of another base, forged": lambda f: forged(f, lambda t: t.update({k: v[:, :16] for k, v in t.items()})),
}


def forged(folder: Path, change) -> None:
    """As who knows the format would: config.json and the manifest agree with the changed tensors."""
    from dylora_moe.checkpoint.safetensors_file import read_header
    from dylora_moe.checkpoint.verify_tensors import layout

    for index, name in enumerate((ADAPTER_0, ADAPTER_1)):
        edit_tensors(folder / name, change)
        shapes = [(key, info.shape) for key, info in read_header(folder / name)[1].items()]
        parameters = sum(a[0] * a[1] for _, a in shapes)
        edit_json(
            folder / formats.CONFIG,
            lambda c, i=index, s=shapes, p=parameters: c["experts"][i].update(
                layout=layout(s), parameters=p, tensors=len(s)
            ),
        )
    rewrite_manifest(folder)


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_changes_where_a_checkpoint_does_not_fit(fault, tmp_path):
    folder = save_sound(tmp_path / "a")
    FAULTS[fault](folder)
    model, base = tiny_mixture(seed=1), tiny_base()
    before, base_before = tensors(model), describe_base(base)
    with pytest.raises(CheckpointError) as caught:
        load_into(open_checkpoint(folder), model)
    assert caught.value.problems == sorted(caught.value.problems)
    assert equal(tensors(model), before)
    assert model.expert_states == ["immature", "immature"]
    with pytest.raises(CheckpointError):
        load_mixture(folder, base)
    assert describe_base(base) == base_before


def test_what_an_adapter_config_says_beside_the_expert_is_not_read(tmp_path):
    """PEFT would fail on these, and none of them tells anything of a plain LoRA."""
    folder = save_sound(tmp_path / "a")
    odd = {"alpha_pattern": None, "loftq_config": 3, "megatron_core": 7, "qalora_group_size": "x", "peft_version": []}
    edit_json(folder / CONFIG_0, lambda config: config.update(odd))
    rewrite_manifest(folder)
    assert find_problems(folder) == []
    assert equal(tensors(load_mixture(folder, tiny_base())), tensors(tiny_mixture()))


def test_targets_that_this_base_lacks_are_a_problem_of_the_checkpoint(tmp_path):
    folder = save_sound(tmp_path / "a")

    def renamed(found: dict) -> None:
        found.update({key.replace("q_proj", "x_proj"): found.pop(key) for key in list(found) if "q_proj" in key})

    targets = ["k_proj", "o_proj", "v_proj", "x_proj"]
    for index, name in enumerate((CONFIG_0, CONFIG_1)):
        edit_json(folder / name, lambda config: config.update(target_modules=targets))
        edit_json(folder / "config.json", lambda c, i=index: c["experts"][i].update(target_modules=targets))
    forged(folder, renamed)
    assert find_problems(folder) == []
    base = tiny_base()
    before = describe_base(base)
    with pytest.raises(CheckpointError, match="x_proj"):
        load_mixture(folder, base)
    assert describe_base(base) == before
    with pytest.raises(UsageError, match="label smoothing"):
        load_mixture(save_sound(tmp_path / "b"), base, label_smoothing=1.0)


def describe_base(base) -> list:
    ids = random_ids(1, 7)
    return [
        [(name, type(module), module.training) for name, module in base.named_modules()],
        [(name, p.requires_grad, p.data_ptr(), p.sum().item()) for name, p in base.named_parameters()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in base.modules()],
        hasattr(base, "peft_config"),
        base(ids).logits.sum().item(),
    ]


@pytest.mark.parametrize("other", ["gemma", "other dims", "other rope"])
def test_row_28_another_base_names_both(other, tmp_path):
    folder = save_sound(tmp_path / "a")
    base = tiny_base("gemma") if other == "gemma" else tiny_base() if other == "other rope" else wider_base()
    if other == "other rope":
        base.config.rope_parameters["rope_theta"] *= 50
    before = describe_base(base)
    for read in (load_mixture, lambda path, base: build_mixture(open_checkpoint(path), base)):
        with pytest.raises(CheckpointError) as caught:
            read(folder, base)
        expected = {
            "gemma": "model_type: llama there, gemma here",
            "other dims": "intermediate_size: 48 there, 64 here",
            "other rope": "rope_parameters.rope_theta: 10000.0 there, 500000.0 here",
        }[other]
        assert str(caught.value).startswith(f"{folder} does not fit this base model:\n")
        assert expected in str(caught.value)
    assert describe_base(base) == before
    model = DyLoRAMoE(base, 2, lora=MoELoraConfig(r=4))
    values = tensors(model)
    with pytest.raises(CheckpointError, match=expected):
        load_into(open_checkpoint(folder), model)
    assert equal(tensors(model), values)


def wider_base():
    from transformers import LlamaForCausalLM

    config = tiny_base().config
    config.intermediate_size = 64
    return LlamaForCausalLM(config).eval()


def test_a_mixture_of_another_shape_is_refused_with_every_difference(tmp_path):
    folder = save_sound(tmp_path / "a")
    model = tiny_mixture(experts=3, r=2)
    before = tensors(model)
    with pytest.raises(CheckpointError) as caught:
        load_into(open_checkpoint(folder), model)
    assert str(caught.value).startswith(f"{folder} is of another mixture than this model:\n")
    assert "has 2 experts, the model has 3" in str(caught.value)
    assert "expert_1 has r 4, in the model it is 2" in str(caught.value)
    assert equal(tensors(model), before)


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [
        (ADAPTER_1, CheckpointError, f"{ADAPTER_1}: expected to read it, found"),
        (".", FolderGone, "was removed meanwhile"),
    ],
)
def test_row_10_what_goes_while_it_is_read_is_an_error_that_touches_nothing(tmp_path, monkeypatch, what, error, text):
    folder = save_sound(tmp_path / "a")
    model, base = tiny_mixture(seed=1), tiny_base()
    before, base_before = tensors(model), describe_base(base)
    real = load_file

    def gone(path):
        (folder / what).rename(tmp_path / "gone")
        return real(path)

    monkeypatch.setattr("dylora_moe.checkpoint.read.load_file", gone)
    with pytest.raises(error, match=text):
        load_into(open_checkpoint(folder), model)
    assert equal(tensors(model), before)
    (tmp_path / "gone").rename(folder / what)
    with pytest.raises(error, match=text):
        load_mixture(folder, base)
    assert describe_base(base) == base_before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mixture_that_was_cast_as_a_whole_is_saved_in_float32(tmp_path, dtype):
    model = tiny_mixture().to(dtype)
    save_checkpoint(tmp_path / "a", model)
    assert find_problems(tmp_path / "a") == []
    loaded = load_mixture(tmp_path / "a", tiny_base(dtype=dtype))
    there, here = ({name: tensor.float() for name, tensor in tensors(m).items()} for m in (model, loaded))
    assert equal(there, here)
    assert all(tensor.dtype == torch.float32 for tensor in loaded.expert_tensors(0).values())
    model.export_expert(1, tmp_path / "one")
    with pytest.raises(UsageError, match="is in float64, experts and router are saved in float32"):
        save_checkpoint(tmp_path / "b", model.double())
    assert not (tmp_path / "b").exists()


def test_a_base_in_float64(tmp_path):
    tiny_base(dtype=torch.float64).save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    model = randomise(DyLoRAMoE(base, 2))
    save_checkpoint(tmp_path / "a", model)
    loaded = load_mixture(tmp_path / "a")
    assert loaded.base.dtype == torch.float64
    assert torch.equal(loaded(random_ids(1, 5)).logits, model(random_ids(1, 5)).logits)


def test_an_expert_that_is_not_finite_is_not_exported(tmp_path):
    model = tiny_mixture()
    with torch.no_grad():
        next(iter(model.expert_tensors(1).values()))[0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"expert_1 cannot be exported: .*lora_A\.weight has numbers"):
        model.export_expert(1, tmp_path / "one")
    with pytest.raises(UsageError, match="expert must be None or 0 to 1"):
        model.export_expert(None, tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


def test_what_is_given_in_vain_is_said(tmp_path):
    model = tiny_mixture()
    assert model.save_checkpoint(tmp_path / "a", step=np.int64(3)) == tmp_path / "a"
    assert json.loads((tmp_path / "a" / "config.json").read_text())["step"] == 3
    with pytest.raises(UsageError, match="dtype, token: of a base model that is to be loaded"):
        DyLoRAMoE.from_checkpoint(tmp_path / "a", tiny_base(), token="x", dtype="float32")


def test_a_base_with_adapters_is_not_the_fault_of_the_checkpoint(tmp_path):
    model = tiny_mixture()
    save_checkpoint(tmp_path / "a", model)
    with pytest.raises(UsageError, match="without adapters, got LlamaForCausalLM with LoRA layers in it"):
        load_mixture(tmp_path / "a", model.base)


# ---- faults at every operation of a full save ----


@pytest.fixture(scope="module")
def saving(tmp_path_factory):
    """(run folder with checkpoint-1, a mixture, a function that saves it as checkpoint-2), in memory where there is."""
    model = tiny_mixture(r=2)
    run = tmp_path_factory.mktemp("run")
    save_checkpoint(run / "checkpoint-1", tiny_mixture(r=2, seed=1), step=5, training_files=training_files)
    sound = files_of(run / "checkpoint-1")

    def save(ack) -> None:
        before = tensors(model)
        try:
            save_checkpoint(run / "checkpoint-2", model, step=5, skills=two_skills(), training_files=training_files)
            ack("saved")
        finally:
            ack(f"untouched {equal(before, tensors(model)) and model.training is False}")

    return run, sound, model, save


STRIDES = {"kill": 6, "half-kill": 3, "ENOSPC": 6, "half-ENOSPC": 3, "EIO": 12}
EVERY = [pytest.param(mode, 1, marks=pytest.mark.slow) for mode in STRIDES]


@pytest.mark.parametrize(("mode", "stride"), [*STRIDES.items(), *EVERY])
def test_rows_1_3_4_a_full_save_with_a_fault_at_every_operation(mode, stride, saving, monkeypatch):
    """At every few operations unless slow tests are run; tests/store/test_publish.py covers all of the protocol."""
    run, sound, model, save = saving
    monkeypatch.setattr("dylora_moe.store.files.WORKERS", 1)  # the operations in one order
    for k in itertools.count(1 + stride // 2, stride):
        outcome = run_with_fault(save, k, mode, writers=[(torch, "save"), (checkpoint_tensors, "save_file")])
        assert files_of(run / "checkpoint-1") == sound, k
        newest = run_folder.latest(run)
        if "saved" in outcome.acks:
            assert newest.step == 2, (k, outcome)
        elif not outcome.killed:
            assert outcome.error.startswith("UsageError"), (k, outcome)
            assert outcome.acks == ["untouched True"], (k, outcome)
            assert newest.step == 1, (k, outcome)
            assert {p.name for p in run.iterdir()} <= {"checkpoint-1", LOCK}, (k, outcome)
        assert find_problems(newest.path) == [], (k, outcome)
        if newest.step == 2 and (outcome.killed or not outcome.fired):
            loaded = load_mixture(newest.path, tiny_base())
            assert equal(tensors(loaded), tensors(model)), k
        shutil.rmtree(run / "checkpoint-2", ignore_errors=True)
        if not outcome.fired:
            break
    print(f"{mode}: faults at {(k - 1) // stride} operations")
    assert k > 3 * stride
