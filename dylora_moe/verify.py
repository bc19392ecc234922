"""Everything that can be wrong with a checkpoint folder, found without torch, without unpickling, in bounded memory.

Compared are the manifest with the files (commit.py), and then the files with each other: config.json, the adapters'
configs and tensors, the router, the skill library, the probe and the training state.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from . import commit, formats
from .errors import UsageError
from .tensorfile import FileProblem, TensorInfo, read_header, read_json, scan_float32

MAX_EXPERTS = 1024
MAX_FILES = 8 * MAX_EXPERTS
STATES = ("new", "immature", "mature")
SAVE_AGAIN = "restore the file from a copy, or save the checkpoint again"
TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass
class Contents:
    """What a folder holds, as far as it could be read, and what is wrong with it."""

    folder: Path
    files: dict[str, os.stat_result] = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        return sum(info.st_size for info in self.files.values())

    def report(self, name: str, text: str) -> None:
        self.problems.append(f"{name}: {text}")

    def read(self, name: str, reader: Callable) -> object | None:
        """`reader` of one file; None where it is missing (which the file set reports) or unreadable (reported here)."""
        if name not in self.files:
            return None
        try:
            return reader(self.folder / name)
        except (FileProblem, OSError) as error:
            self.report(name, f"{error}; {SAVE_AGAIN}")
            return None


def verify(folder: str | Path) -> list[str]:
    """Every problem of a checkpoint folder, sorted; empty where it is complete and sound.

    Raises:
        UsageError: where there is no folder of that name.
    """
    return inspect(folder).problems


def inspect(folder: str | Path) -> Contents:
    """As `verify`, with the file sizes and the config."""
    folder = Path(folder)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise UsageError(
            f"{folder}: expected a checkpoint folder, found {found}; name a folder like RUN/checkpoint-100"
        )
    contents = Contents(folder)
    contents.problems.extend(commit.manifest_problems(folder))
    _walk(contents)
    _check_pollution(contents)
    contents.config = _check_config(contents)
    if contents.config:
        _check_file_set(contents)
        _check_experts(contents)
        _check_router(contents)
        _check_probe(contents)
    _check_skills(contents)
    _check_training(contents)
    contents.problems = sorted(set(contents.problems))
    return contents


def inspect_config(folder: str | Path) -> dict:
    """The config of a checkpoint where all that others rely on is there and right, otherwise an empty dict."""
    contents = Contents(Path(folder))
    _walk(contents)
    return _check_config(contents)


# ---- files ----


def _walk(contents: Contents) -> None:
    pending = [""]
    seen = 0
    while pending:
        prefix = pending.pop()
        try:
            entries = sorted(os.scandir(contents.folder / prefix), key=lambda entry: entry.name)
        except OSError as error:
            contents.report(prefix or ".", f"cannot be listed ({error.strerror})")
            continue
        for entry in entries:
            seen += 1
            if seen > MAX_FILES:
                contents.report(".", f"holds more than {MAX_FILES} files and folders, which no checkpoint does")
                return
            name = prefix + entry.name
            try:
                info = entry.stat(follow_symlinks=False)
            except OSError as error:
                contents.report(name, f"cannot be read ({error.strerror})")
                continue
            if stat.S_ISDIR(info.st_mode):
                pending.append(name + "/")
            elif stat.S_ISREG(info.st_mode):
                contents.files[name] = info
            else:
                kind = "a symbolic link" if stat.S_ISLNK(info.st_mode) else "not a regular file"
                contents.report(
                    name, f"is {kind}; a checkpoint holds regular files only; replace it by the file itself"
                )


def _check_pollution(contents: Contents) -> None:
    for name in contents.files:
        if formats.is_merged_model(PurePosixPath(name).name):
            contents.problems.append(f"Found merged model file: {name}")


def _check_file_set(contents: Contents) -> None:
    config = contents.config
    expected = {formats.CONFIG, formats.ROUTER, formats.SKILLS, formats.MANIFEST}
    for index in range(config["num_experts"]):
        folder = adapter_folder(contents.files, f"expert_{index}")
        expected |= {f"{folder}/{formats.ADAPTER_CONFIG}", f"{folder}/{formats.ADAPTER_WEIGHTS}"}
    if config.get("probe"):
        expected.add(formats.PROBE)
    training = {n for n in contents.files if is_training_file(n)}
    if training:
        expected |= training | set(formats.TRAINING_FILES)
        if not any(formats.RNG_STATE.fullmatch(name) for name in training):
            expected.add("rng_state.pth")
    for name in sorted(expected - set(contents.files)):
        contents.report(name, f"is missing; {SAVE_AGAIN}")
    for name in sorted(set(contents.files) - expected):
        if not formats.is_merged_model(PurePosixPath(name).name):
            hint = (
                "it is from before manifests; load and save again" if "." in name and _is_legacy(name) else "remove it"
            )
            contents.report(name, f"does not belong to a checkpoint of {config['num_experts']} experts; {hint}")


def _is_legacy(name: str) -> bool:
    return PurePosixPath(name).name in (formats.LEGACY_ROUTER, formats.LEGACY_ADAPTER_WEIGHTS)


def is_training_file(name: str) -> bool:
    return name in (*formats.TRAINING_FILES, formats.SCALER) or formats.RNG_STATE.fullmatch(name) is not None


def adapter_folder(files, name: str) -> str:
    """Where an expert's files are: nested as PEFT nests them, or flat where only that is there."""
    nested, flat = formats.expert_folder(name), f"{formats.ADAPTERS}/{name}"
    has_flat = any(f"{flat}/{leaf}" in files for leaf in (formats.ADAPTER_CONFIG, formats.ADAPTER_WEIGHTS))
    has_nested = any(f"{nested}/{leaf}" in files for leaf in (formats.ADAPTER_CONFIG, formats.ADAPTER_WEIGHTS))
    return flat if has_flat and not has_nested else nested


# ---- config.json ----


def _check_config(contents: Contents) -> dict:
    """The config where all that the other checks rely on is there and right, otherwise an empty dict."""
    if formats.CONFIG not in contents.files:
        contents.report(formats.CONFIG, f"is missing; {SAVE_AGAIN}")
        return {}
    config = contents.read(formats.CONFIG, read_json)
    if config is None:
        return {}
    if not isinstance(config, dict):
        contents.report(formats.CONFIG, f"expected a JSON object, found {type(config).__name__}; {SAVE_AGAIN}")
        return {}
    before = len(contents.problems)
    for path, expected, right in _CONFIG_RULES:
        value = _get(config, path)
        if not right(value):
            contents.report(formats.CONFIG, f"{path}: expected {expected}, found {_short(value)}; {SAVE_AGAIN}")
    if len(contents.problems) > before:
        return {}
    experts, n = config["experts"], config["num_experts"]
    if len(experts) != n:
        contents.report(formats.CONFIG, f"num_experts is {n}, but {len(experts)} experts are listed; {SAVE_AGAIN}")
    for index, expert in enumerate(experts):
        for key, expected, right in _EXPERT_RULES:
            value = expert.get(key) if isinstance(expert, dict) else None
            if not right(value):
                where = f"experts[{index}].{key}"
                contents.report(formats.CONFIG, f"{where}: expected {expected}, found {_short(value)}; {SAVE_AGAIN}")
        if isinstance(expert, dict) and expert.get("name") != f"expert_{index}":
            found = _short(expert.get("name"))
            contents.report(
                formats.CONFIG, f"experts[{index}].name: expected 'expert_{index}', found {found}; {SAVE_AGAIN}"
            )
    return config if len(contents.problems) == before else {}


def _natural(value: object, least: int = 0, most: int = 1 << 48) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _texts(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) and v for v in value)


_CONFIG_RULES = (
    ("model_type", repr(formats.MODEL_TYPE), lambda v: v == formats.MODEL_TYPE),
    ("format_version", str(formats.FORMAT_VERSION), lambda v: v == formats.FORMAT_VERSION and not isinstance(v, bool)),
    ("num_experts", f"1 to {MAX_EXPERTS}", lambda v: _natural(v, 1, MAX_EXPERTS)),
    ("experts", "a list", lambda v: isinstance(v, list)),
    ("step", "a whole number", _natural),
    ("probe", "true or false", lambda v: isinstance(v, bool)),
    ("base_model.name", "a text", lambda v: v is None or isinstance(v, str)),
    ("base_model.dtype", "a text", lambda v: isinstance(v, str)),
    ("base_model.architecture.fingerprint", "a SHA-256", lambda v: isinstance(v, str) and len(v) == 64),
    ("router.hidden_size", "a positive whole number", lambda v: _natural(v, 1)),
    ("router.temperature", "a positive number", lambda v: _number(v) and v > 0),
    ("router.top_k", "null or a positive whole number", lambda v: v is None or _natural(v, 1)),
    ("router.balance_coefficient", "a number of at least 0", lambda v: _number(v) and v >= 0),
)
_EXPERT_RULES = (
    ("r", "a positive whole number", lambda v: _natural(v, 1)),
    ("lora_alpha", "a positive number", lambda v: _number(v) and v > 0),
    ("use_rslora", "true or false", lambda v: isinstance(v, bool)),
    ("target_modules", "a list of names", _texts),
    ("state", " or ".join(STATES), lambda v: v in STATES),
    ("tensors", "a positive even number", lambda v: _natural(v, 2) and v % 2 == 0),
    ("parameters", "a positive whole number", lambda v: _natural(v, 1)),
)


def _get(config: dict, path: str) -> object:
    value: object = config
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---- experts and router ----


def _check_experts(contents: Contents) -> None:
    shapes: dict[str, tuple[str, tuple[int, int]]] = {}
    for index, expert in enumerate(contents.config["experts"]):
        folder = adapter_folder(contents.files, f"expert_{index}")
        _check_adapter_config(contents, f"{folder}/{formats.ADAPTER_CONFIG}", expert)
        _check_adapter(contents, f"{folder}/{formats.ADAPTER_WEIGHTS}", expert, shapes)


def _check_adapter_config(contents: Contents, name: str, expert: dict) -> None:
    found = contents.read(name, read_json)
    if found is None:
        return
    if not isinstance(found, dict):
        contents.report(name, f"expected a JSON object, found {type(found).__name__}; {SAVE_AGAIN}")
        return
    expected = {
        "peft_type": "LORA",
        "r": expert["r"],
        "lora_alpha": expert["lora_alpha"],
        "use_rslora": expert["use_rslora"],
        "bias": "none",
        "use_dora": False,
    }
    for key, value in expected.items():
        if found.get(key) != value or isinstance(found.get(key), bool) != isinstance(value, bool):
            where = f"{key}: expected {value!r} as in {formats.CONFIG}"
            contents.report(name, f"{where}, found {_short(found.get(key))}; {SAVE_AGAIN}")
    targets = found.get("target_modules")
    if not _texts(targets) or sorted(targets) != sorted(expert["target_modules"]):
        where = f"target_modules: expected {_short(sorted(expert['target_modules']))} as in {formats.CONFIG}"
        contents.report(name, f"{where}, found {_short(targets)}; {SAVE_AGAIN}")
    for key in ("rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication", "auto_mapping"):
        if found.get(key):
            contents.report(name, f"{key}: expected none in an expert, found {_short(found[key])}; {SAVE_AGAIN}")


def _check_adapter(contents: Contents, name: str, expert: dict, shapes: dict) -> None:
    header = contents.read(name, read_header)
    if header is None:
        return
    tensors: dict[str, TensorInfo] = header[1]
    pairs: dict[str, dict[str, TensorInfo]] = {}
    foreign = []
    for tensor, info in tensors.items():
        match = TENSOR_NAME.fullmatch(tensor)
        if match is None or not any(_is_target(match["module"], t) for t in expert["target_modules"]):
            foreign.append(tensor)
            continue
        pairs.setdefault(match["module"], {})[match["side"]] = info
        if info.dtype != "F32":
            contents.report(name, f"tensor {tensor}: expected dtype F32, found {info.dtype}; {SAVE_AGAIN}")
    for tensor in sorted(foreign)[:10]:
        contents.report(name, f"tensor {tensor[:200]} does not belong to {expert['name']}; {SAVE_AGAIN}")
    if len(foreign) > 10:
        contents.report(name, f"... and {len(foreign) - 10} more tensors that do not belong to {expert['name']}")
    if len(tensors) != expert["tensors"]:
        contents.report(name, f"expected {expert['tensors']} tensors, found {len(tensors)}; {SAVE_AGAIN}")
    found = sum(math.prod(info.shape) for info in tensors.values())
    if found != expert["parameters"]:
        contents.report(name, f"expected {expert['parameters']} parameters, found {found}; {SAVE_AGAIN}")
    for module, pair in pairs.items():
        _check_pair(contents, name, expert, module, pair, shapes)
    _check_values(contents, name, expert, tensors)


def _check_pair(contents: Contents, name: str, expert: dict, module: str, pair: dict, shapes: dict) -> None:
    for side in "AB":
        if side not in pair:
            contents.report(name, f"tensor base_model.model.{module}.lora_{side}.weight is missing; {SAVE_AGAIN}")
    if len(pair) < 2:
        return
    a, b = pair["A"].shape, pair["B"].shape
    for side, shape, rank_at in (("A", a, 0), ("B", b, 1)):
        if len(shape) != 2 or shape[rank_at] != expert["r"]:
            wanted = f"({expert['r']}, d_in)" if side == "A" else f"(d_out, {expert['r']})"
            tensor = f"base_model.model.{module}.lora_{side}.weight"
            contents.report(name, f"tensor {tensor}: expected shape {wanted}, found {shape}; {SAVE_AGAIN}")
            return
    size = (a[1], b[0])
    other, known = shapes.setdefault(module, (expert["name"], size))
    if known != size:
        what = f"{module} maps {size[0]} to {size[1]} here and {known[0]} to {known[1]} in {other}"
        contents.report(name, f"{what}; they are of different base models; {SAVE_AGAIN}")


def _check_values(contents: Contents, name: str, expert: dict, tensors: dict[str, TensorInfo]) -> None:
    trained = False
    scanned = contents.read(name, lambda path: list(scan_float32(path, tensors)))
    if scanned is None:
        return
    for tensor, finite, nonzero in scanned:
        if not finite:
            contents.report(
                name, f"tensor {tensor} holds NaN or Inf, expected finite numbers; go back to a checkpoint before"
            )
        is_b = tensor.endswith(".lora_B.weight")
        trained = trained or (is_b and nonzero)
        if not is_b and not nonzero:
            contents.report(name, f"tensor {tensor} is all zero, so that it can have no effect; {SAVE_AGAIN}")
    if not trained and expert["state"] != "new":
        text = f"{expert['name']} is {expert['state']}, but every lora_B is zero: it would load without effect"
        contents.report(name, f"{text}; {SAVE_AGAIN}")
    if trained and expert["state"] == "new":
        contents.report(
            name, f"{expert['name']} is new, expected every lora_B to be zero, found trained ones; {SAVE_AGAIN}"
        )


def _check_router(contents: Contents) -> None:
    header = contents.read(formats.ROUTER, read_header)
    if header is None:
        return
    n, hidden = contents.config["num_experts"], contents.config["router"]["hidden_size"]
    _check_tensors(contents, formats.ROUTER, header[1], {formats.GATE: ("F32", (n, hidden))}, f"for {n} experts")
    values = contents.read(formats.ROUTER, lambda path: list(scan_float32(path, header[1]))) or []
    for tensor, finite, nonzero in values:
        if not finite:
            contents.report(formats.ROUTER, f"tensor {tensor} holds NaN or Inf, expected finite numbers; {SAVE_AGAIN}")
        if not nonzero:
            contents.report(formats.ROUTER, f"tensor {tensor} is all zero: it would not route; {SAVE_AGAIN}")


def _check_tensors(contents: Contents, name: str, found: dict[str, TensorInfo], expected: dict, why: str) -> None:
    for tensor in sorted(set(expected) - set(found)):
        contents.report(name, f"tensor {tensor} is missing; {SAVE_AGAIN}")
    for tensor in sorted(set(found) - set(expected))[:10]:
        contents.report(name, f"tensor {tensor[:200]} does not belong here; {SAVE_AGAIN}")
    for tensor in sorted(set(found) & set(expected)):
        dtype, shape = expected[tensor]
        info = found[tensor]
        if info.dtype != dtype:
            contents.report(name, f"tensor {tensor}: expected dtype {dtype}, found {info.dtype}; {SAVE_AGAIN}")
        if info.shape != shape:
            contents.report(name, f"tensor {tensor}: expected shape {shape} {why}, found {info.shape}; {SAVE_AGAIN}")


# ---- the rest ----


def _check_skills(contents: Contents) -> None:
    header = contents.read(formats.SKILLS, read_header)
    if header is None:
        return
    rows = header[1]["names"].shape[0] if "names" in header[1] and header[1]["names"].shape else 0
    expected = {"names": ("U8", (rows, 32)), "embeddings": ("F32", (rows, 64)), "experts": ("I64", (rows,))}
    _check_tensors(contents, formats.SKILLS, header[1], expected, f"for {rows} skills")
    for tensor, finite, _ in contents.read(formats.SKILLS, lambda path: list(scan_float32(path, header[1]))) or []:
        if not finite:
            contents.report(formats.SKILLS, f"tensor {tensor} holds NaN or Inf, expected finite numbers; {SAVE_AGAIN}")


def _check_probe(contents: Contents) -> None:
    header = contents.read(formats.PROBE, read_header)
    if header is None:
        return
    n = contents.config["num_experts"]
    size = header[1]["vocabulary"].shape if "vocabulary" in header[1] else (32,)
    size = size[0] if len(size) == 1 else 32
    expected = {
        "input_ids": ("I64", (1, 16)),
        "vocabulary": ("I64", (size,)),
        "routed": ("F32", (16, size)),
        "experts": ("F32", (n, 16, size)),
    }
    _check_tensors(contents, formats.PROBE, header[1], expected, f"for {n} experts")
    for tensor, finite, _ in contents.read(formats.PROBE, lambda path: list(scan_float32(path, header[1]))) or []:
        if not finite:
            contents.report(formats.PROBE, f"tensor {tensor} holds NaN or Inf, expected finite numbers; {SAVE_AGAIN}")


def _check_training(contents: Contents) -> None:
    state = contents.read(formats.TRAINER_STATE, read_json)
    if state is not None:
        step = state.get("global_step") if isinstance(state, dict) else None
        if not _natural(step):
            contents.report(
                formats.TRAINER_STATE, f"expected a whole number as global_step, found {_short(step)}; {SAVE_AGAIN}"
            )
        elif contents.config and step != contents.config["step"]:
            text = f"is of step {step}, but {formats.CONFIG} of step {contents.config['step']}: they are of two saves"
            contents.report(formats.TRAINER_STATE, f"{text}; {SAVE_AGAIN}")
    for name, info in contents.files.items():
        if is_training_file(name) and info.st_size == 0:
            contents.report(name, f"is empty; {SAVE_AGAIN}")


def _is_target(module: str, target: str) -> bool:
    return module == target or module.endswith(f".{target}")
