"""`dylora-moe convert`: the experts of a checkpoint of DyLoRA-MoE 0.2.1 in a new checkpoint of this version."""

from __future__ import annotations

import argparse
import os
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from ...checkpoint import formats
from ...checkpoint.config import BESIDE, encode
from ...checkpoint.findings import Contents, natural
from ...checkpoint.verify import checkpoint_folder, inspect_files
from ...constants import MAX_EXPERTS
from ...errors import CheckpointError, UsageError
from ...store.files import explained
from ...store.manifest import file_digest, held_still, manifest_problems
from ...store.publish import staged
from ...system import command_line
from ...system.command_line import PASS_MARK, PASSED, say
from ..output import add_json_flag, people, write_json
from ..wording import experts_line, states_of

GATE_SIZE = 1e-3  # of the logits that a token's embedding gets
NOTE = (
    "Its experts are those of the old one, byte for byte. Its router is new and has learned nothing: for every token, "
    "all experts have nearly the same weight until the router is trained. There is no probe, no skill and no training "
    "state in it."
)


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", metavar="OLD", type=command_line.path)
    parser.add_argument("new", metavar="NEW", type=command_line.path)
    add_json_flag(parser)


def run(args: Namespace) -> int:
    old, new = checkpoint_folder(args.old), Path(args.new)
    if os.path.lexists(new):
        raise UsageError(f"{new} exists already: name a new folder")
    if new.resolve().is_relative_to(old.resolve()):
        raise UsageError(f"{new} is inside the old checkpoint, which stays as it is: name a folder elsewhere")
    with held_still(old):
        contents = _convert(old, new)
    say(f"{PASS_MARK} {new}: converted from {old}, {experts_line(contents.config)}", people(args))
    say(f"  {NOTE}", people(args))
    value = {"old": str(old), "checkpoint": str(new), "total_bytes": contents.total_bytes}
    write_json(args, value | {"states": states_of(contents.config)})
    return PASSED


def _convert(old: Path, new: Path) -> Contents:
    digests = {}

    def digest(path: Path, size: int) -> tuple[int, str]:
        name = path.relative_to(old).as_posix()
        digests[name] = file_digest(path, size)
        return digests[name]

    if problems := manifest_problems(old, digest):
        raise CheckpointError(old, problems)
    config = _new_config(old, new)
    with staged(new) as folder:
        if folder is None:
            raise UsageError(f"{new} exists already: name a new folder")
        with explained("write the checkpoint", new):
            shutil.copytree(old / formats.ADAPTERS, folder / formats.ADAPTERS, copy_function=shutil.copyfile)
            _write_rest(folder, config)
        contents = inspect_files(folder)
        copied = [name for name in contents.files if name in digests and name.startswith(f"{formats.ADAPTERS}/")]
        problems = contents.problems + [
            f"{name}: expected the bytes of the old checkpoint, found others; convert it again"
            for name in copied
            if file_digest(folder / name, digests[name][0]) != digests[name]
        ]
        if problems:
            raise CheckpointError(old, problems)
    return contents


def _new_config(old: Path, new: Path) -> dict[str, Any]:
    """Return the content of config.json in the version of today, which is checked after it has been written."""
    contents = Contents(old)
    contents.walk()
    found = contents.read_object(formats.CONFIG) or {}
    version, base, router = found.get("format_version"), _object(found, "base_model"), _object(found, "router")
    if version == formats.FORMAT_VERSION:
        raise UsageError(f"{old} has format version {version} already: there is nothing to convert")
    count: Any = found.get("num_experts")
    width: Any = router.get("hidden_size")
    room = contents.files[formats.ROUTER].st_size // 4 if formats.ROUTER in contents.files else 0
    architecture = _object(base, "architecture")
    if version != formats.OLD_VERSION:
        contents.expect(formats.CONFIG, "format_version", formats.OLD_VERSION, repr(version))
    elif not (natural(count, 1, MAX_EXPERTS) and natural(width, 1) and count * width <= room):
        contents.expect(formats.CONFIG, "", f"the sizes of {formats.ROUTER}", f"{count!r} experts, width {width!r}")
    if contents.problems:
        raise CheckpointError(old, contents.problems)
    if str(base.get("name")).startswith(BESIDE) and new.resolve().parent != old.resolve().parent:
        raise UsageError(f"{old} names a base model in its own run folder: name a new folder in {old.resolve().parent}")
    # Imports torch, which the other commands do without.
    from ...mixture.config import RouterConfig

    # The average of all experts is closest to how they were trained; the best two of a fresh router would be any two.
    router = {key: router.get(key) for key in ("temperature", "balance_coefficient")} | {"top_k": count}
    router |= {"width": width, "decay": RouterConfig.decay, "prior_tokens": RouterConfig.prior_tokens}
    base = base | {"architecture": architecture | {"settings": None}, "quantization": None}
    changes = {"format_version": formats.FORMAT_VERSION, "probe": False, "router": router, "base_model": base}
    return found | changes


def _object(found: dict[str, Any], key: str) -> dict[str, Any]:
    value = found.get(key)
    return value if isinstance(value, dict) else {}


def _write_rest(folder: Path, config: dict[str, Any]) -> None:
    # As above.
    from ...skills.library import SkillLibrary

    count, width = config["num_experts"], config["router"]["width"]
    gate = np.random.default_rng(0).standard_normal((count, width), dtype=np.float32) * (GATE_SIZE / width**0.5)
    zeros = np.zeros(count, np.float32)
    router = {formats.GATE: gate.astype(np.float32), formats.GATE_BIAS: zeros, formats.PRIOR: zeros.copy()}
    (folder / formats.ROUTER).write_bytes(save(router, metadata={"format": "pt"}))
    SkillLibrary().save(folder / formats.SKILLS)
    (folder / formats.CONFIG).write_bytes(encode(config))
