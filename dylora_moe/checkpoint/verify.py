"""Everything that can be wrong with a checkpoint folder, found without torch, without unpickling, in bounded memory.

Compared are the manifest with the files (manifest.py), and then the files with each other: config.json with the file
set (here), the adapters, the router, the skill library and the probe (verify_tensors.py), and the training state.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from ..constants import MAX_EXPERTS, STATES
from ..errors import UsageError, listed
from ..store import run_folder
from ..store.files import shown
from ..store.manifest import MANIFEST, held_still, manifest_problems
from . import formats
from .findings import SAVE_AGAIN, Contents, Rules, get, natural, nothing_or, number, short, text, texts
from .safetensors_file import MAX_JSON_BYTES, read_json
from .torch_file import check_torch_file
from .verify_tensors import DTYPES, check_experts, check_probe, check_router, check_skills

_SHA256 = re.compile(r"[0-9a-f]{64}")


def find_problems(folder: str | Path) -> list[str]:
    """Every problem of a checkpoint folder, sorted; empty where it is complete and sound.

    Raises:
        UsageError: where there is no folder of that name, it is a run folder, or it is moved away meanwhile.
    """
    return inspect_checkpoint(folder).problems


def inspect_checkpoint(folder: str | Path) -> Contents:
    """As `verify`, with the file sizes and the config."""
    contents = Contents(checkpoint_folder(folder))
    with held_still(contents.folder):
        contents.take(manifest_problems(contents.folder))
        return _inspect(contents, {MANIFEST}, values=True)


def inspect_files(folder: str | Path, scanned: dict[str, list] | None = None) -> Contents:
    """As `inspect`, of a folder that has no manifest yet: what is to be published is looked at before it is.

    Args:
        scanned: what the writer of a file has seen of its values; they are not read again, nor are those in the files
            of `torch.save`.
    """
    return _inspect(Contents(Path(folder), scanned=scanned or {}), set(), values=False)


def inspect_config(folder: str | Path) -> dict:
    """The config of a checkpoint where all that others rely on is there and right, otherwise an empty dict."""
    contents = Contents(Path(folder))
    contents.walk()
    return _check_config(contents)


def _inspect(contents: Contents, besides: set[str], *, values: bool) -> Contents:
    contents.walk()
    _check_pollution(contents)
    contents.config = _guarded(contents, _check_config) or {}
    if contents.config:
        _guarded(contents, lambda c: _check_file_set(c, besides))
        _guarded(contents, check_experts)
        _guarded(contents, check_router)
        _guarded(contents, check_probe)
    _guarded(contents, check_skills)
    _guarded(contents, lambda c: _check_training(c, values))
    contents.problems = sorted(set(contents.problems))
    return contents


def _guarded(contents: Contents, check: Callable[[Contents], object]) -> object:
    """A check that fails on what nobody thought of is a problem of the checkpoint, too, and no reason to pass it."""
    try:
        return check(contents)
    except Exception as error:
        contents.report(
            ".",
            f"expected to be able to check it, found {type(error).__name__}: {str(error)[:200]}",
            f"{SAVE_AGAIN}, and report this as a bug",
        )
        return None


# ---- the file set ----


def _check_pollution(contents: Contents) -> None:
    for name in contents.files:
        if formats.is_merged_model(PurePosixPath(name).name):
            contents.problems = [p for p in contents.problems if not p.startswith(f"{shown(name)}: ")]
            why = "expected experts and router only; delete it, and save without the base model's weights"
            contents.problems.append(f"Found merged model file: {shown(name)}; {why}")
            contents.suspects.add(shown(name))


def _check_file_set(contents: Contents, besides: set[str]) -> None:
    config = contents.config
    expected = {formats.CONFIG, formats.ROUTER, formats.SKILLS} | besides
    for index in range(config["num_experts"]):
        folder = formats.adapter_folder(contents.files, f"expert_{index}")
        expected |= {f"{folder}/{formats.ADAPTER_CONFIG}", f"{folder}/{formats.ADAPTER_WEIGHTS}"}
    if config["probe"]:
        expected.add(formats.PROBE)
    expected |= _expected_training_files(contents.files)
    for name in expected.difference(contents.files):
        if not contents.is_known(name):
            contents.report(name, "expected in this checkpoint, found nothing")
    for name in set(contents.files).difference(expected):
        if not contents.is_known(name):
            expected_none = f"expected no such file in a checkpoint of {config['num_experts']} experts"
            contents.report(name, expected_none, "remove it, or restore the checkpoint from a copy")


def _expected_training_files(files) -> set[str]:
    """All or none; with several processes, the random state of each."""
    found = {name for name in files if formats.is_training_file(name)}
    if not found:
        return set()
    ranks = {int(match[2]) for name in found if (match := formats.RNG_STATE.fullmatch(name)) and match[2]}
    if ranks and "rng_state.pth" not in found:
        random = {f"rng_state_{rank}.pth" for rank in range(max(2, min(max(ranks) + 1, 1 << 16)))}
    else:
        random = {"rng_state.pth"}
    return {*formats.TRAINING_FILES, *random} | (found & {formats.SCALER})


# ---- config.json ----


def _check_config(contents: Contents) -> dict:
    """The config where all that the other checks rely on is there and right, otherwise an empty dict."""
    name = formats.CONFIG
    if name not in contents.files:
        if not contents.is_known(name):
            contents.report(name, "expected in every checkpoint, found nothing")
        return {}
    config = contents.read(name, read_json)
    if config is None and contents.is_known(name):
        return {}
    if not isinstance(config, dict):
        contents.expect(name, "", "a JSON object", type(config).__name__)
        return {}
    right = _only_keys(contents, "", config, _CONFIG_RULES)
    right &= contents.follow(name, config, _CONFIG_RULES)
    if not right:
        return {}
    experts, n = config["experts"], config["num_experts"]
    if len(experts) != n:
        contents.expect(name, "experts", f"{n} as num_experts says", len(experts))
        return {}
    for index, expert in enumerate(experts):
        right &= _check_expert_entry(contents, index, expert)
    hidden = config["base_model"]["architecture"]["hidden_size"]
    if hidden is not None and hidden != config["router"]["hidden_size"]:
        contents.expect(name, "router.hidden_size", hidden, config["router"]["hidden_size"])
        return {}
    return config if right else {}


def _check_expert_entry(contents: Contents, index: int, expert: object) -> bool:
    if not isinstance(expert, dict):
        contents.expect(formats.CONFIG, f"experts[{index}]", "an object", short(expert))
        return False
    prefix = f"experts[{index}]."
    rules = (("name", f"'expert_{index}'", lambda v: v == f"expert_{index}"), *_EXPERT_RULES)
    right = _only_keys(contents, prefix, expert, rules)
    return contents.follow(formats.CONFIG, expert, rules, prefix) and right


def _only_keys(contents: Contents, prefix: str, found: dict, rules: Rules) -> bool:
    """Whoever knows this version knows all its keys: another one is from somewhere else, or asks for something."""
    unknown, missing = [], []
    for group in sorted({path.rpartition(".")[0] for path, _, _ in rules} | {""}):
        inside = get(found, group) if group else found
        if not isinstance(inside, dict):
            continue  # which the rules of its keys report
        head = f"{group}." if group else ""
        known = {path.removeprefix(head).partition(".")[0] for path, _, _ in rules if path.startswith(head)}
        unknown += [f"{prefix}{head}{key[:200]}" for key in inside if key not in known]
        missing += [f"{prefix}{head}{key}" for key in known if key not in inside]
    contents.list(formats.CONFIG, unknown, lambda key: f"{key}: expected no such key")
    contents.list(formats.CONFIG, missing, lambda key: f"{key}: expected this key, found nothing")
    return not unknown and not missing


def _size(value: object) -> bool:
    return natural(value, 1)


def _sizes(value: object) -> bool:
    """One for all decoder layers, or one for each."""
    return value is None or _size(value) or (isinstance(value, list) and all(map(_size, value)))


_CONFIG_RULES: Rules = (
    ("model_type", repr(formats.MODEL_TYPE), lambda v: v == formats.MODEL_TYPE),
    ("format_version", str(formats.FORMAT_VERSION), lambda v: natural(v) and v == formats.FORMAT_VERSION),
    ("num_experts", f"1 to {MAX_EXPERTS}", lambda v: natural(v, 1, MAX_EXPERTS)),
    ("experts", "a list", lambda v: isinstance(v, list)),
    ("step", "a whole number", natural),
    ("probe", "true or false", lambda v: isinstance(v, bool)),
    ("versions", "an object of texts", lambda v: isinstance(v, dict) and all(isinstance(x, str) for x in v.values())),
    ("base_model.name", "a text or null", nothing_or(text)),
    ("base_model.revision", "a text or null", nothing_or(text)),
    ("base_model.dtype", "float32, float64, bfloat16 or float16", lambda v: v in DTYPES),
    ("base_model.architecture.model_type", "a text", text),
    ("base_model.architecture.hidden_size", "a positive whole number or null", nothing_or(_size)),
    ("base_model.architecture.num_hidden_layers", "a positive whole number or null", nothing_or(_size)),
    ("base_model.architecture.num_attention_heads", "positive whole numbers or null", _sizes),
    ("base_model.architecture.intermediate_size", "positive whole numbers or null", _sizes),
    ("base_model.architecture.vocab_size", "a positive whole number or null", nothing_or(_size)),
    ("base_model.architecture.fingerprint", "a SHA-256", lambda v: isinstance(v, str) and bool(_SHA256.fullmatch(v))),
    ("router.hidden_size", "a positive whole number", _size),
    ("router.temperature", "a positive number", lambda v: number(v) and v > 0),
    ("router.top_k", "null or a positive whole number", nothing_or(_size)),
    ("router.balance_coefficient", "a number of at least 0", lambda v: number(v) and v >= 0),
)
_EXPERT_RULES: Rules = (
    ("r", "a positive whole number", _size),
    ("lora_alpha", "a positive number", lambda v: number(v) and v > 0),
    ("use_rslora", "true or false", lambda v: isinstance(v, bool)),
    ("target_modules", "a sorted list of names", lambda v: texts(v) and v == sorted(set(v))),
    ("state", " or ".join(STATES), lambda v: isinstance(v, str) and v in STATES),
    ("tensors", "a positive even number", lambda v: natural(v, 2) and v % 2 == 0),
    ("parameters", "a positive whole number", _size),
    ("layout", "a SHA-256", lambda v: isinstance(v, str) and bool(_SHA256.fullmatch(v))),
)


# ---- training state ----


def _check_training(contents: Contents, values: bool) -> None:
    for name in contents.files:
        if formats.is_training_file(name) and name != formats.TRAINER_STATE:
            contents.read(name, lambda path: check_torch_file(path, values=values))
    name = formats.TRAINER_STATE
    if name not in contents.files or contents.files[name].st_size > MAX_JSON_BYTES:
        return  # a long run's log; the manifest vouches for it
    before = len(contents.problems)
    state = contents.read(name, read_json)
    if len(contents.problems) > before:
        return
    if not isinstance(state, dict):
        contents.expect(name, "", "a JSON object", type(state).__name__)
        return
    contents.follow(name, state, _TRAINER_RULES)
    step = state.get("global_step")
    if contents.config and natural(step) and step != contents.config["step"]:
        contents.expect(name, "global_step", f"{contents.config['step']} as in {formats.CONFIG}", step)


def _callbacks(value: object) -> bool:
    """As Transformers writes them: each with an object of attributes, or a list of such."""
    if not isinstance(value, dict):
        return False
    states = [state for each in value.values() for state in (each if isinstance(each, list) else [each])]
    return all(isinstance(s, dict) and isinstance(s.get("attributes", {}), dict) for s in states)


_TRAINER_RULES: Rules = (
    ("global_step", "a whole number", natural),
    ("log_history", "a list", nothing_or(lambda v: isinstance(v, list))),
    ("best_model_checkpoint", "a text or null", nothing_or(text)),
    ("best_global_step", "a whole number or null", nothing_or(natural)),
    ("stateful_callbacks", "an object of objects", nothing_or(_callbacks)),
)


def checkpoint_folder(folder: os.PathLike | str) -> Path:
    """The folder that a user names as a checkpoint.

    Raises:
        UsageError: where it is missing or a file; or a folder around checkpoints: then it names the one to give.
    """
    folder = Path(folder)
    try:
        found = "a folder" if folder.is_dir() else "a file" if folder.exists() else "nothing"
    except (OSError, ValueError) as error:
        found = str(error)
    if found != "a folder":
        raise UsageError(
            f"{folder}: expected a checkpoint folder, found {found}; name a folder like RUN/checkpoint-100"
        )
    # A damaged checkpoint has some of these left; what cannot be listed is for verify.py to say.
    can_list = os.access(folder, os.R_OK | os.X_OK)
    if can_list and not any(os.path.lexists(folder / name) for name in (MANIFEST, formats.ROUTER, formats.ADAPTERS)):
        if newest := run_folder.latest(folder):
            raise UsageError(f"{folder} is a run folder: name its newest checkpoint,\n    {newest.path}")
        if broken := run_folder.incomplete(folder):
            reasons = listed([f"{path.name}: {reason}" for path, reason in broken])
            raise UsageError(f"{folder} is a run folder without a complete checkpoint:\n{reasons}")
        if os.path.lexists(folder / formats.CHECKPOINT / MANIFEST):
            raise UsageError(f"{folder}: the checkpoint is in it,\n    {folder / formats.CHECKPOINT}")
    return folder
