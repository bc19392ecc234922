"""Good checkpoints of tiny models, and ways to spoil them: bytes, sizes, names, tensors, JSON.

spoil = draw(mutations())            # a Hypothesis strategy
what = spoil(folder)                 # mutates the folder, says what it did; None where it changed nothing
rewrite_manifest(folder)             # as a forger would, who knows the format
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dylora_moe import DyLoRAMoE
from dylora_moe.base.preserve import seeded
from dylora_moe.checkpoint import formats
from dylora_moe.checkpoint.write import save_checkpoint
from dylora_moe.mixture.config import MoELoraConfig, RouterConfig
from dylora_moe.skills.library import Skill, SkillLibrary
from dylora_moe.skills.samples import Sample
from dylora_moe.store.manifest import MANIFEST

from .tiny import tiny_base

ADAPTER_0, ADAPTER_1 = (f"{formats.expert_folder(f'expert_{i}')}/{formats.ADAPTER_WEIGHTS}" for i in (0, 1))
CONFIG_0, CONFIG_1 = (f"{formats.expert_folder(f'expert_{i}')}/{formats.ADAPTER_CONFIG}" for i in (0, 1))

# ---- good ones ----


def tiny_mixture(kind: str = "llama", experts=2, *, r: int = 4, seed: int = 0, trained=None, **options) -> DyLoRAMoE:
    """Experts with seeded B that is not zero, as if trained; `trained` names those that are, by default all.

    Args:
        options: `dtype` of the base, and `router`.
    """
    base = tiny_base(kind, dtype=options.pop("dtype", torch.float32))
    with seeded(seed):
        lora = MoELoraConfig(r=r) if isinstance(experts, int) else None
        model = DyLoRAMoE(base, experts, lora=lora, **options)
        for index in range(model.num_experts) if trained is None else trained:
            for name, tensor in model.expert_tensors(index).items():
                if name.endswith("lora_B.weight"):
                    torch.nn.init.uniform_(tensor, -0.2, 0.2)
    return model


def two_skills() -> SkillLibrary:
    """One skill with both samples, and one of which nothing is known."""
    skills, generator = SkillLibrary(), torch.Generator().manual_seed(0)
    samples = [
        Sample.of(torch.arange(rows), torch.randn(rows, 32, generator=generator), torch.full((rows,), 3.0))
        for rows in (5, 4)
    ]
    skills.add(Skill("Python", 0, tokens=640, loss=1.5, features=samples[0], states=samples[1]))
    skills.add(Skill("prose ✓"))
    return skills


def training_files(folder: Path, step: int = 5) -> None:
    """What training leaves, small, in the same formats."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([("weight", weight)])
    weight.grad = torch.ones(3)
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / formats.OPTIMIZER)
    torch.save({"last_epoch": step, "_last_lr": [0.1]}, folder / formats.SCHEDULER)
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    state = {
        "global_step": step,
        "train_batch_size": 4,
        "max_steps": 10,
        "log_history": [{"loss": float("nan"), "step": step}],
    }
    state |= {
        "best_global_step": None,
        "stateful_callbacks": {"Saver": {"args": {}, "attributes": {"run": {"seed": 0}}}},
    }
    (folder / formats.TRAINER_STATE).write_text(json.dumps(state))


def save_sound(target: Path, model: DyLoRAMoE | None = None, *, training: bool = True) -> Path:
    """A checkpoint with everything in it, of step 5."""
    model = model or tiny_mixture()
    model.mark_mature()
    files = training_files if training else None
    assert save_checkpoint(target, model, step=5, skills=two_skills(), training_files=files)
    return target


def save_mixed(target: Path) -> Path:
    """Three experts of other ranks and targets, one of them new; flat, without a probe or training files."""
    configs = [
        MoELoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]),
        MoELoraConfig(r=3, lora_alpha=8, use_rslora=True, target_modules=["down_proj", "v_proj"]),
        MoELoraConfig(r=4, target_modules="all-linear"),
    ]
    model = tiny_mixture(experts=configs, trained=(0, 1), router=RouterConfig(0.5, 1, 0.0))
    save_checkpoint(target, model, step=5)
    for index in range(3):
        make_flat(target, f"expert_{index}")
    (target / formats.PROBE).unlink()
    edit_json(target / formats.CONFIG, lambda config: config.update(probe=False))
    rewrite_manifest(target)
    return target


def make_flat(folder: Path, name: str) -> None:
    nested = folder / formats.expert_folder(name)
    for path in list(nested.iterdir()):
        path.rename(nested.parent / path.name)
    nested.rmdir()


# ---- tools ----


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of every regular file, by relative POSIX path."""
    found = (p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(found)}


def rewrite_manifest(folder: Path) -> None:
    """Make the manifest agree with whatever is there, as a forger would."""
    files = files_of(folder)
    files.pop(MANIFEST, None)
    entries = {name: {"bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in files.items()}
    path = folder / MANIFEST
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.write_text(json.dumps({"format_version": 1, "files": entries}, indent=1))


def edit_json(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_tensors(path: Path, change: Callable[[dict], object]) -> None:
    """Change the tensors by name; the metadata stays."""
    raw = path.read_bytes()
    metadata = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]).get("__metadata__")
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata)


def edit_header(path: Path, change: Callable[[dict], object], padding: int = 0) -> None:
    """Change the JSON header of a safetensors file and nothing else."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :] + bytes(padding))


def swap(a: Path, b: Path) -> None:
    spare = a.with_name("spare")
    a.rename(spare)
    b.rename(a)
    spare.rename(b)


# ---- mutations ----

HOSTILE_VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 10**6, 10**39, 0.5, 1e308, float("inf"), float("nan"), "", "expert_1", "new",
    "\ud800", "a\0b", "../..", "/etc/passwd", [], {}, [[]], ["q_proj"], ["q_proj", 3], {"a": {}}, "x" * 10_000,
)  # fmt: skip
Mutation = Callable[[Path], object]


@st.composite
def mutations(draw, names: tuple[str, ...]) -> Mutation:
    """One change of a checkpoint that has these files."""
    name = draw(st.sampled_from(names))
    family = draw(st.sampled_from(("bytes", "bytes", "files", "tensors", "tensors", "json", "json")))
    if family == "tensors":
        name = draw(st.sampled_from([n for n in names if n.endswith(".safetensors")]))
        return partial(
            _tensors, name, draw(st.sampled_from(TENSOR_CHANGES)), draw(st.integers(0, 1 << 16)), draw(_value)
        )
    if family == "json":
        name = draw(st.sampled_from([n for n in names if n.endswith(".json")]))
        change = draw(st.sampled_from(("set", "set", "set", "delete", "add", "rename")))
        return partial(_json, name, change, draw(st.integers(0, 1 << 16)), draw(st.sampled_from(HOSTILE_VALUES)))
    if family == "files":
        other = draw(st.sampled_from(names))
        return partial(_files, name, other, draw(st.sampled_from(FILE_CHANGES)))
    change = draw(st.sampled_from(("flip", "insert", "delete", "truncate", "extend", "overwrite", "header")))
    return partial(
        _bytes, name, change, draw(st.floats(0, 1, exclude_max=True)), draw(st.binary(min_size=1, max_size=64))
    )


_value = st.sampled_from((1e-3, -1.0, 100.0, float("nan"), float("inf"), 1e-38))


def _bytes(name: str, change: str, where: float, data: bytes, folder: Path) -> object:
    path = folder / name
    raw = path.read_bytes()
    at = int(where * len(raw))
    if change == "header":  # the first bytes decide how the rest is read
        at = int(where * min(len(raw), 9))
        change = "overwrite"
    if change == "flip":
        new = raw[:at] + bytes([raw[at] ^ (data[0] or 1)]) + raw[at + 1 :]
    else:
        new = {
            "insert": raw[:at] + data + raw[at:],
            "delete": raw[:at] + raw[at + len(data) :],
            "truncate": raw[:at],
            "extend": raw + data,
            "overwrite": raw[:at] + data + raw[at + len(data) :],
        }[change]
    path.write_bytes(new)
    return None if new == raw or _same_manifest(name, raw, new) else f"{change} at byte {at} of {name}"


def _same_manifest(name: str, before: bytes, after: bytes) -> bool:
    """Whether it is the manifest, and says the same with other white space."""
    try:
        return name == MANIFEST and json.loads(before) == json.loads(after)
    except ValueError:
        return False


FILE_CHANGES = (
    "remove", "empty", "swap", "copy", "rename", "move up", "add", "folder", "symlink", "hardlink", "fifo", "pickle",
)  # fmt: skip


def _files(name: str, other: str, change: str, folder: Path) -> object:
    path, second = folder / name, folder / other
    if change in ("swap", "copy") and path.read_bytes() == second.read_bytes():
        return None
    if change == "remove":
        path.unlink()
    elif change == "empty":
        path.write_bytes(b"")
    elif change == "swap":
        swap(path, second)
    elif change == "copy":
        shutil.copy(second, path)
    elif change == "rename":
        path.rename(path.with_name("x" + path.name))
    elif change == "move up":
        if path.parent == folder:
            return None
        path.rename(path.parent.parent / f"up-{path.name}")
    elif change == "add":
        shutil.copy(path, path.with_name(f"model-{path.name}"))
    elif change == "pickle":
        path.write_bytes(b"cos\nsystem\n(S'touch PWNED'\ntR.")
    else:
        path.unlink()
        if change == "folder":
            path.mkdir()
        elif change == "symlink":
            path.symlink_to(second)
        elif change == "hardlink":
            if name == other:
                return f"remove {name}"
            os.link(second, path)
            return f"hardlink {name} to {other}" if path.read_bytes() else None
        else:
            os.mkfifo(path)
    return f"{change} {name} ({other})"


TENSOR_CHANGES = (
    "perturb",
    "fill",
    "zero",
    "transpose",
    "float16",
    "float64",
    "int64",
    "rename",
    "remove",
    "add",
    "swap",
)


def _tensors(name: str, change: str, pick: int, value: float, folder: Path) -> object:
    def edit(tensors: dict) -> None:
        keys = sorted(tensors)
        key, other = keys[pick % len(keys)], keys[(pick // 7) % len(keys)]
        tensor = tensors[key]
        if change == "perturb":
            flat = tensor.view(-1)
            if len(flat):
                flat[pick % len(flat)] += torch.tensor(value).nan_to_num(7).to(tensor.dtype) or 1
        elif change == "fill":
            tensors[key] = torch.full(tensor.shape, value).to(tensor.dtype)
        elif change == "zero":
            tensor.zero_()
        elif change == "transpose":
            tensors[key] = tensor.t() if tensor.dim() == 2 else tensor.unsqueeze(0)
        elif change in ("float16", "float64", "int64"):
            tensors[key] = tensor.to(getattr(torch, change))
        elif change == "rename":
            tensors[key.replace("layers.0", "layers.9") if "layers.0" in key else key + "_"] = tensors.pop(key)
        elif change == "remove":
            del tensors[key]
        elif change == "add":
            tensors[key + ".extra"] = tensor.clone()
        else:
            tensors[key], tensors[other] = tensors[other], tensors[key]

    before = (folder / name).read_bytes()
    edit_tensors(folder / name, edit)
    return None if (folder / name).read_bytes() == before else f"{change} a tensor of {name}"


def _json(name: str, change: str, pick: int, value: object, folder: Path) -> object:
    tree = json.loads((folder / name).read_text())
    before = json.dumps(tree)
    places: list[tuple[object, object]] = []

    def visit(node: object) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            visit(node[key])

    visit(tree)
    node, key = places[pick % len(places)]
    if change == "set":
        node[key] = value
    elif change == "delete":
        del node[key]
    elif isinstance(node, dict):
        node[f"{key}_" if change == "rename" else "auto_map"] = node.pop(key) if change == "rename" else value
    else:
        node.append(value)
    text = json.dumps(tree)
    (folder / name).write_text(text)
    return None if text == before else f"{change} {key} in {name} to {value!r:.60}"
