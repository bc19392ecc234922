"""The checks of what a checkpoint's tensors say: adapters, router, skill library and probe, against config.json.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from functools import partial
from pathlib import PurePath
from typing import Any

import numpy as np

from ..constants import NEW, NO_EXPERT
from ..skills.sizes import NAME_BYTES, NO_LOSS, SampleSizes, sample_sizes
from ..store.files import FileProblem, parse_json
from . import formats
from .config import BESIDE, CheckpointConfig, ExpertEntry
from .findings import Contents, Rules, SkillFacts, nothing_or, number, short, texts
from .safetensors_file import Scan, TensorInfo, read_array

Size = tuple[int, int]  # of a layer: inputs and outputs
TENSOR_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
MAX_SKILLS = 1 << 16
SAMPLE_PARTS = ("rows", "keys", "scales", "counts")  # without the values, any of which will do
GO_BACK = "go back to a checkpoint before"
FACTS = ("base_weights", "device_type", "dtype", "machine")
# Without effect in a plain LoRA; with another value the tensors would mean something else, or more would be loaded.
_PLAIN: tuple[str, ...] = ("alora_invocation_tokens", "alpha_pattern", "auto_map", "auto_mapping", "layer_replication")
_PLAIN += ("layers_pattern",)
_PLAIN += ("layers_to_transform", "lora_bias", "modules_to_save", "rank_pattern", "target_parameters")
_PLAIN += ("trainable_token_indices", "use_dora", "use_qalora", "arrow_config", "ensure_weight_tying", "kasa_config")
_PLAIN += ("megatron_config", "monteclora_config", "use_bdlora", "velora_config")


# ---- experts ----


def layout(shapes: Iterable[tuple[str, Iterable[int]]]) -> str:
    """Return a SHA-256 over the sorted names and shapes of an expert's tensors."""
    listed = sorted([name, list(shape)] for name, shape in shapes)
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def check_experts(contents: Contents, config: CheckpointConfig) -> None:
    """Check each expert's adapter_config.json and tensors."""
    sizes: dict[str, tuple[str, Size]] = {}
    dropouts: dict[float, str] = {}
    for expert in config.experts:
        folder = formats.adapter_folder(contents.files, expert.name)
        name = f"{folder}/{formats.ADAPTER_CONFIG}"
        found = contents.read_object(name)
        excluded = set() if found is None else _check_adapter_config(contents, config, expert, (name, found), dropouts)
        _check_adapter(contents, f"{folder}/{formats.ADAPTER_WEIGHTS}", expert, sizes, excluded)


def _check_adapter_config(
    contents: Contents,
    config: CheckpointConfig,
    expert: ExpertEntry,
    there: tuple[str, dict[str, Any]],
    dropouts: dict[float, str],
) -> set[str]:
    """Check an adapter_config.json, `there` with its name. Returns the targets that PEFT would leave out."""
    name, found = there
    expected: dict[str, object] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
    expected |= {"revision": config.base_model.revision, "base_model_name_or_path": _stock_name(config, found)}
    expected |= {"r": expert.r, "lora_alpha": expert.lora_alpha, "use_rslora": expert.use_rslora}
    for key, value in expected.items():
        given, kind = found.get(key), int if key == "r" else bool  # PEFT takes no rank of 16.0, and 1 is not true
        if given != value or (type(given) is kind) != (type(value) is kind):
            contents.expect(name, key, f"{value!r}, as in {formats.CONFIG}", short(given))
    targets: Any = found.get("target_modules")
    if not texts(targets) or sorted(targets) != expert.target_modules:
        expected_targets = f"{short(expert.target_modules)}, as in {formats.CONFIG}"
        contents.expect(name, "target_modules", expected_targets, short(targets))
    for key in _PLAIN:
        value = found.get(key)
        if value is not None and value is not False and value not in ([], {}):  # the layer 0 is one
            contents.expect(name, key, "none in an expert", short(value))
    if contents.follow(name, found, _ADAPTER_RULES):
        other = next(iter(dropouts.values()), None)
        dropouts.setdefault(found["lora_dropout"], expert.name)
        if len(dropouts) > 1 and dropouts[found["lora_dropout"]] == expert.name:
            rate = next(iter(dropouts))
            contents.expect(name, "lora_dropout", f"{rate} as of {other}", found["lora_dropout"])
        return set(found.get("exclude_modules") or ())
    return set()


def _stock_name(config: CheckpointConfig, found: dict[str, Any]) -> object:
    """Return the name of the base model that an adapter_config.json should have, given the one that it has.

    Stock PEFT knows no path that is relative to the checkpoint. It gets the absolute one, which grows old if the run
    folder is moved, but goes on ending as the relative one does.
    """
    name, given = config.base_model.name, found.get("base_model_name_or_path")
    if name is None or not name.startswith(BESIDE):
        return name
    inside, parts = PurePath(name).parts[1:], PurePath(given).parts if isinstance(given, str) else ()
    return given if parts and parts[len(parts) - len(inside) :] == inside else name


_ADAPTER_RULES: Rules = (
    ("lora_dropout", "a number from 0 to below 1", lambda v: number(v) and 0 <= v < 1),
    ("fan_in_fan_out", "true or false", lambda v: isinstance(v, bool)),
    ("init_lora_weights", "true, false or 'gaussian'", lambda v: isinstance(v, bool) or v == "gaussian"),
    ("exclude_modules", "a list of names or null", nothing_or(texts)),
)


def _check_adapter(
    contents: Contents, name: str, expert: ExpertEntry, sizes: dict[str, tuple[str, Size]], excluded: set[str]
) -> None:
    scan = contents.scan(name)
    if scan is None:
        return
    tensors = scan.tensors
    targets, used = set(expert.target_modules), set()
    pairs: dict[str, dict[str, TensorInfo]] = {}
    foreign = []
    for tensor, info in tensors.items():
        match = TENSOR_NAME.fullmatch(tensor)
        target = _target(match["module"], targets) if match else None
        if match is None or target is None:
            foreign.append(tensor)
            continue
        used.add(target)
        pairs.setdefault(match["module"], {})[match["side"]] = info
        if info.dtype != "F32":
            contents.expect(name, f"tensor {tensor}", "dtype F32", info.dtype)
    contents.list(name, foreign, lambda t: f"tensor {t}: expected tensors of {expert.name} only, found this one")
    left_out = [module for module in pairs if _target(module, excluded)]
    contents.list(name, left_out, lambda m: f"expected no tensors of {m}, which exclude_modules leaves out, found some")
    contents.list(name, targets - used, lambda t: f"expected tensors for the target {t[:200]}, found none")
    before = len(contents.problems)
    for module, pair in pairs.items():
        _check_pair(contents, name, expert, module, pair, sizes)
    if len(tensors) != expert.tensors:
        contents.expect(name, "", f"{expert.tensors} tensors", len(tensors))
    parameters = sum(math.prod(info.shape) for info in tensors.values())
    if parameters != expert.parameters:
        contents.expect(name, "", f"{expert.parameters} parameters", parameters)
    found = layout((tensor, info.shape) for tensor, info in tensors.items())
    if found != expert.layout and not foreign and len(contents.problems) == before:
        contents.report(
            name,
            f"expected tensors of the names and shapes that {formats.CONFIG} tells of, found others of their number",
        )
    _check_values(contents, name, expert, scan)


def _target(module: str, targets: set[str]) -> str | None:
    """Return the target that a module matches by PEFT's rule: it is its name, or the end of its name after a dot."""
    while module not in targets:
        _, dot, module = module.partition(".")
        if not dot:
            return None
    return module


def _check_pair(
    contents: Contents,
    name: str,
    expert: ExpertEntry,
    module: str,
    pair: dict[str, TensorInfo],
    sizes: dict[str, tuple[str, Size]],
) -> None:
    tensor = {side: f"tensor base_model.model.{module}.lora_{side}.weight" for side in "AB"}
    for side in "AB":
        if side not in pair:
            contents.expect(name, tensor[side], "one of each pair", "nothing")
            return
    r, a, b = expert.r, pair["A"].shape, pair["B"].shape
    for side, shape, rank_at, wanted in (("A", a, 0, f"({r}, d_in)"), ("B", b, 1, f"(d_out, {r})")):
        if len(shape) != 2 or shape[rank_at] != r or not all(shape):
            contents.expect(name, tensor[side], f"shape {wanted}", shape)
            return
    size = (a[1], b[0])
    other, known = sizes.setdefault(module, (expert.name, size))
    if known != size:
        contents.expect(name, f"tensors of {module}", f"to map {known[0]} to {known[1]} as in {other}", size)


def _check_values(contents: Contents, name: str, expert: ExpertEntry, scan: Scan) -> None:
    _check_finite(contents, name, scan)
    trained = False
    for tensor, extremes in scan.extremes.items():
        is_b = tensor.endswith(".lora_B.weight")
        trained = trained or (is_b and extremes.nonzero)
        if not is_b and not extremes.nonzero:
            contents.expect(name, f"tensor {tensor}", "values", "zeros only: it can have no effect")
    if not trained and expert.state != NEW:
        contents.report(name, f"expected {expert.state} experts to be trained, found every lora_B zero: no effect")
    if trained and expert.state == NEW:
        contents.report(name, "expected every lora_B of a new expert to be zero, found trained ones")


def _check_finite(contents: Contents, name: str, scan: Scan) -> None:
    for tensor, extremes in scan.extremes.items():
        if not extremes.finite:
            contents.report(name, f"tensor {tensor}: expected finite numbers, found NaN or Inf", GO_BACK)


# ---- the other files ----


def check_router(contents: Contents, config: CheckpointConfig) -> None:
    """Check the router's tensors."""
    scan = contents.scan(formats.ROUTER)
    if scan is None:
        return
    n, width = config.num_experts, config.router.width
    expected = {formats.GATE: ("F32", (n, width)), formats.GATE_BIAS: ("F32", (n,)), formats.PRIOR: ("F32", (n,))}
    _check_tensors(contents, formats.ROUTER, scan.tensors, expected, f"for {n} experts")
    _check_finite(contents, formats.ROUTER, scan)
    if formats.GATE in scan.extremes and not scan.extremes[formats.GATE].nonzero:
        contents.expect(formats.ROUTER, f"tensor {formats.GATE}", "values", "zeros only: it would not route")


def check_skills(contents: Contents) -> None:
    """Check the skill library, against the experts and the width of the router unless config.json is wrong."""
    name, config = formats.SKILLS, contents.config
    scan = contents.scan(name)
    if scan is None:
        return
    tensors = scan.tensors
    n = tensors["names"].shape[0] if "names" in tensors and tensors["names"].shape else 0
    expected: dict[str, tuple] = {"names": ("U8", (n, NAME_BYTES)), "losses": ("F32", (n,))}
    expected |= {tensor: ("I64", (n,)) for tensor in ("experts", "tokens", "features.rows", "states.rows")}
    widths = {}
    for kind in ("features", "states"):
        shape = tensors[f"{kind}.values"].shape if f"{kind}.values" in tensors else ()
        rows, widths[kind] = shape if len(shape) == 2 else (0, 0)
        if rows and kind == "features" and config:
            widths[kind] = config.router.width
        expected[f"{kind}.values"] = ("I8", (rows, widths[kind]))
        expected[f"{kind}.keys"] = ("I64", (rows,))
        expected |= {f"{kind}.{part}": ("F32", (rows,)) for part in ("scales", "counts")}
    if not _check_tensors(contents, name, tensors, expected, f"for {n} skills"):
        return
    rows = sum(tensors[f"{kind}.keys"].shape[0] for kind in widths)
    if n > MAX_SKILLS or rows > n * sum(SampleSizes()):
        contents.expect(name, "", f"at most {MAX_SKILLS} skills of {sum(SampleSizes())} rows", f"{n} of {rows} in all")
        return
    small = [tensor for tensor in expected if not tensor.endswith(".values")]
    values = contents.read(name, lambda path: {key: read_array(path, key, tensors[key]) for key in small})
    if values is None:
        return
    _check_finite(contents, name, scan)
    _check_skill_names(contents, values["names"])
    count = config.num_experts if config else None
    _check_each(contents, "experts", values["experts"], f"-1 or an expert below {count}", NO_EXPERT, count)
    _check_each(contents, "tokens", values["tokens"], "a number from 0")
    losses = values["losses"]
    _check_each(contents, "losses", np.where(losses == NO_LOSS, 0, losses), "-1 or a number from 0")
    largest = max((4 * expert.parameters for expert in config.experts), default=0) if config else 1 << 48
    sizes = sample_sizes(largest, widths["features"], widths["states"])
    for kind, most in (("features", sizes.features), ("states", sizes.states)):
        _check_sample(contents, kind, {part: values[f"{kind}.{part}"] for part in SAMPLE_PARTS}, most)
    if not contents.is_known(name):
        facts = (values[tensor].tolist() for tensor in ("names", "experts", "tokens", "losses"))
        contents.skills = [_skill_facts(*each) for each in zip(*facts, strict=True)]


def _skill_facts(name: list[int], expert: int, tokens: int, loss: float) -> SkillFacts:
    text = bytes(name).rstrip(b"\0").decode("utf-8")
    return SkillFacts(text, None if expert == NO_EXPERT else expert, tokens, None if loss == NO_LOSS else loss)


def _check_each(
    contents: Contents, tensor: str, found: np.ndarray, expected: str, least: float = 0, below: int | None = None
) -> None:
    wrong = (found < least) | (found >= (below or math.inf))
    for row in wrong.nonzero()[0][:3]:
        contents.expect(formats.SKILLS, f"tensor {tensor}, skill {row}", expected, found[row])


def _check_sample(contents: Contents, kind: str, parts: dict[str, np.ndarray], most: int) -> None:
    """Check the rows of each skill: how many there are, and their keys, scales and counts."""
    name, rows = formats.SKILLS, parts["rows"]
    _check_each(contents, f"{kind}.rows", rows, f"0 to {most} rows, a tenth of an expert's bytes", 0, most + 1)
    total = len(parts["keys"])
    if (rows < 0).any() or (rows > total).any() or rows.sum() != total:
        contents.expect(name, f"tensor {kind}.rows", f"{total} in all, as in {kind}.keys", rows.sum())
        return
    for tensor in ("scales", "counts"):
        if (parts[tensor] <= 0).any():
            contents.expect(name, f"tensor {kind}.{tensor}", "numbers above 0", parts[tensor].min())
    for index, keys in enumerate(np.split(parts["keys"], rows.cumsum()[:-1])):
        if len(keys) and (keys[0] < 0 or (keys[1:] <= keys[:-1]).any()):
            what = f"tensor {kind}.keys, skill {index}"
            contents.expect(name, what, "keys from 0 in ascending order, none twice", "others")
            return


def _check_skill_names(contents: Contents, names: np.ndarray) -> None:
    seen: set[str] = set()
    for row, raw in enumerate(names):
        stripped = raw.tobytes().rstrip(b"\0")
        try:
            found = stripped.decode("utf-8")
        except UnicodeDecodeError:
            found = ""
        if not found or "\0" in found or found in seen:
            what = f"tensor names, skill {row}"
            contents.expect(formats.SKILLS, what, "a name in UTF-8 that no other skill has", repr(stripped))
            return
        seen.add(found)


def check_probe(contents: Contents, config: CheckpointConfig) -> None:
    """Check the probe's tensors, and the facts in its metadata."""
    name, n = formats.PROBE, config.num_experts
    scan = contents.scan(name)
    if scan is None:
        return
    tensors = scan.tensors
    entries = tensors["vocabulary"].shape[0] if "vocabulary" in tensors and tensors["vocabulary"].shape else 0
    tokens = formats.PROBE_TOKENS
    expected = {
        "input_ids": ("I64", (1, tokens)),
        "vocabulary": ("I64", (entries,)),
        "routed": ("F32", (tokens, entries)),
        "experts": ("F32", (n, tokens, entries)),
        "sha256": ("U8", (n + 1, 32)),
    }
    _check_facts(contents, config, scan.metadata)
    if not _check_tensors(contents, name, tensors, expected, f"for {n} experts"):
        return
    if not 1 <= entries <= 1 << 16:
        contents.expect(name, "tensor vocabulary", f"1 to {1 << 16} entries", entries)
        return
    _check_finite(contents, name, scan)
    size = config.base_model.architecture.vocab_size or 1 << 48
    for tensor in ("input_ids", "vocabulary"):
        values = contents.read(name, partial(read_array, name=tensor, info=tensors[tensor]))
        if values is not None and (values.min() < 0 or values.max() >= size):
            wrong = values.min() if values.min() < 0 else values.max()
            contents.expect(name, f"tensor {tensor}", f"numbers of tokens from 0 to {size - 1}", wrong)


def _check_facts(contents: Contents, config: CheckpointConfig, metadata: dict[str, str]) -> None:
    try:
        facts = parse_json(metadata.get("probe", "null").encode("utf-8", "surrogatepass"))
    except FileProblem as error:
        contents.report(formats.PROBE, f"metadata: {error}")
        return
    if not isinstance(facts, dict) or set(facts) != set(FACTS) or not all(isinstance(v, str) for v in facts.values()):
        contents.expect(formats.PROBE, "metadata", f"texts for {', '.join(FACTS)}", short(facts))
    elif facts["dtype"] != config.base_model.dtype:
        expected = f"{config.base_model.dtype} as in {formats.CONFIG}"
        contents.expect(formats.PROBE, "metadata, dtype", expected, short(facts["dtype"]))


def _check_tensors(
    contents: Contents, name: str, found: dict[str, TensorInfo], expected: dict[str, tuple], why: str
) -> bool:
    before = len(contents.problems)
    contents.list(name, set(expected) - set(found), lambda t: f"tensor {t}: expected {why}, found nothing")
    contents.list(name, set(found) - set(expected), lambda t: f"tensor {t}: expected no such tensor")
    for tensor in sorted(set(found) & set(expected)):
        (dtype, shape), info = expected[tensor], found[tensor]
        if info.dtype != dtype:
            contents.expect(name, f"tensor {tensor}", f"dtype {dtype}", info.dtype)
        if info.shape != shape:
            contents.expect(name, f"tensor {tensor}", f"shape {shape} {why}", info.shape)
    return len(contents.problems) == before
