"""Time and peak memory of the three test_checkpoint_*.py scripts, beside the imports and the bytes that they need.

python -m benchmarks.scripts
python -m benchmarks.scripts --rounds 9
python -m benchmarks.scripts --large --json benchmarks/results/scripts.json

Every command is a process of its own, run in turns with `python -c "import torch, transformers, peft"`. This process
stays small, since the kernel counts it into the memory of its children. The scripts run with their defaults; whether
the hub answers is part of what they take.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from . import child, common
from .child import GB, PYTHON, Child
from .common import Case, Result, Timing

ROUNDS, QUICK_ROUNDS = 3, 1
IMPORTS, RAW = "imports", "floor"
IMPORT_LINE = "import torch, transformers, peft"
QUICK, MINIMAL, FULL, FULL_RANDOM, FULL_REAL = (
    "quick", "minimal", "full", "full, --weights random", "full, weights from disk",
)  # fmt: skip
FILES = {
    QUICK: "test_checkpoint_quick.py",
    MINIMAL: "test_checkpoint_minimal.py",
    FULL: "test_checkpoint_save_load.py",
    FULL_RANDOM: "test_checkpoint_save_load.py",
    FULL_REAL: "test_checkpoint_save_load.py",
}
FEW_ROUNDS = {FULL_REAL: 1}  # only its memory has a limit
WITH_FLOOR = {MINIMAL, FULL, FULL_RANDOM}  # those that save a checkpoint of the default model
TIME_LIMITS = {QUICK: 1.3, MINIMAL: 1.5, FULL: 3.0}
MEMORY_LIMITS = {QUICK: 1.1, MINIMAL: 1.25}
FULL_GB, REAL_EXTRA_GB = 2.6, 1.4
LARGE_EXPERTS, LARGE_MINIMAL_GB, LARGE_FULL_GB, LARGE_WRITES = 8, 6, 8, 4
PARENT_LIMIT = 150 << 20
REAL_MODEL, REAL_BYTES = "SmolLM2-135M-Instruct", 4 * 134_515_008  # in float32

FLOOR = f"""
{IMPORT_LINE}
import hashlib, os, sys
size = int(sys.argv[2])
data = os.urandom(1 << 20) * (size >> 20) + bytes(size & 0xFFFFF)
with open(sys.argv[1], "wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
hashlib.sha256(data)
open(sys.argv[1], "rb").read()
"""
WRITE_WEIGHTS = """
import sys
import torch
from transformers import AutoModelForCausalLM
from dylora_moe.base.find import find_base
source, _ = find_base(sys.argv[2], weights="none")
AutoModelForCausalLM.from_config(source.config, dtype=torch.float32).save_pretrained(sys.argv[1])
"""
RAW_WRITE = """
import os, sys, time
data = os.urandom(1 << 20) * (int(sys.argv[2]) >> 20)
started = time.perf_counter()
with open(sys.argv[1], "wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())
print(time.perf_counter() - started)
"""


def main(argv: Sequence[str] | None = None) -> int:
    return common.run("scripts", __doc__, measure, argv, flags)


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--large", action="store_true", help="also a 70B Llama of which only the config.json is there")
    parser.add_argument("--only", nargs="+", choices=sorted(FILES), help="these only")


def measure(args: argparse.Namespace, result: Result) -> None:
    chosen = args.only or ([QUICK, MINIMAL] if args.quick else [QUICK, MINIMAL, FULL, FULL_REAL])
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    with tempfile.TemporaryDirectory(prefix="dylora_benchmark_") as name:
        folder = Path(name)
        children, timings = run_all(chosen, folder, rounds, result)
        report(children, timings, result)
        if args.large:
            large(folder, timings[IMPORTS].median, result)
    check_parent(result)


def run_all(chosen: list[str], folder: Path, rounds: int, result: Result) -> tuple[dict, dict[str, Timing]]:
    """The children of every round and their timings, by name: the imports, the scripts, and the floor of the two that
    save a checkpoint of the default model."""
    extra = {}
    if FULL_REAL in chosen:
        extra[FULL_REAL] = ["--model", str(write_weights(folder))]
    if FULL_RANDOM in chosen:
        extra[FULL_RANDOM] = ["--weights", "random"]
    warm_up = next((name for name in chosen if name in WITH_FLOOR), chosen[0])
    size = first_run(warm_up, extra.get(warm_up, []), result)
    commands: dict[str, Callable[[], Child]] = {IMPORTS: lambda: child.run([PYTHON, "-c", IMPORT_LINE])}
    for name in chosen:
        commands[name] = partial(child.run_script, FILES[name], extra.get(name, []))
    if warm_up in WITH_FLOOR:
        commands[RAW] = partial(child.run, [PYTHON, "-c", FLOOR, str(folder / "raw"), str(size)])
    children: dict[str, list[Child]] = {name: [] for name in commands}

    def run(name: str) -> float:
        made = commands[name]()
        children[name].append(made)
        result.problems += child.problems(name, made) if name in FILES else _floor_problems(name, made)
        return made.seconds

    cases = {name: Case(partial(run, name), rounds=FEW_ROUNDS.get(name)) for name in commands}
    return children, common.interleaved(cases, rounds, warmups=0)


def _floor_problems(name: str, made: Child) -> list[str]:
    return [] if made.code == 0 else [f"{name}: exit code {made.code}: {made.output.strip()[-300:]}"]


def first_run(name: str, flags: list[str], result: Result) -> int:
    """A warm-up of what the files of all scripts are read into; the bytes of the checkpoint that this one writes."""
    made = child.run_script(FILES[name], flags)
    result.problems += child.problems(name, made)
    return (made.report or {}).get("total_bytes") or 0


def write_weights(folder: Path) -> Path:
    """A base model on disk whose tensors are all distinct; for time and memory it matters not what is in them."""
    target = folder / "base"
    made = child.run([PYTHON, "-c", WRITE_WEIGHTS, str(target), REAL_MODEL])
    if made.code != 0:
        raise RuntimeError(f"the base model could not be written: {made.output[-500:]}")
    os.sync()  # what is still on its way to the disk would be waited for by the scripts that are timed
    return target


def _last_word(command: list[str]) -> str:
    """What the command printed last; libraries may have said something before."""
    made = child.run(command)
    if made.code != 0:
        raise RuntimeError(f"exit code {made.code}: {made.output[-500:]}")
    return made.output.split()[-1]


def check_parent(result: Result) -> None:
    from dylora_moe.system import machine

    own = machine.peak_memory()
    result.check(
        "MiB of this process, which its children are charged with", own / common.MIB, PARENT_LIMIT / common.MIB
    )


# ---- what is printed ----


def report(children: dict, timings: dict[str, Timing], result: Result) -> None:
    columns = ["", "time", "relative to the imports", "relative to its floor", "peak memory", "relative to the imports"]
    note = (
        f"{RAW}: the imports, and the checkpoint's bytes written, fsynced, hashed and read once. It is the floor of "
        "minimal and full with the default model, whose base weights take next to nothing."
    )
    table = result.table("scripts", "The three scripts with their defaults, each a process of its own", columns, note)
    imports, memory = timings[IMPORTS], _peak(children[IMPORTS])
    for name, timing in timings.items():
        floor = timings.get(RAW) if name in WITH_FLOOR else None
        peak = _peak(children[name])
        cells = [common.seconds(timing.median), common.ratio(timing, imports)]
        cells += [common.ratio(timing, floor) if floor else "", f"{peak / GB:.2f} GB", f"{peak / memory:.2f}"]
        table.add(name, *cells)
        if name in TIME_LIMITS:
            result.claim(f"{name} script: time, relative to the imports", timing.ratio(imports), TIME_LIMITS[name])
        if name in MEMORY_LIMITS:
            result.claim(f"{name} script: peak memory, relative to the imports", peak / memory, MEMORY_LIMITS[name])
    if FULL in children:
        result.claim("full script: peak memory", _peak(children[FULL]) / GB, FULL_GB, "GB")
    if FULL_REAL in children:
        extra = (_peak(children[FULL_REAL]) - REAL_BYTES) / GB
        result.claim("full script with weights from disk: peak memory beyond their bytes", extra, REAL_EXTRA_GB, "GB")


def _peak(children: list[Child]) -> int:
    return max(made.peak_bytes for made in children)


# ---- a 70B Llama without weights ----


def large(folder: Path, imports: float, result: Result) -> None:
    model = folder / "llama-70b"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(child.LLAMA_70B), encoding="utf-8")
    flags = ["--model", str(model), "--max-size-mb", "100000"]
    minimal = child.run_script(FILES[MINIMAL], [*flags, "--experts", str(LARGE_EXPERTS)])
    full = child.run_script(FILES[FULL], [*flags, "--experts", "2", "--weights", "random"])
    result.problems += child.problems("70B minimal", minimal) + child.problems("70B full", full)
    size = (minimal.report or {}).get("total_bytes") or 0
    write = float(_last_word([PYTHON, "-c", RAW_WRITE, str(folder / "raw"), str(size)]))
    (folder / "raw").unlink()
    title = "A 70B Llama of which only the config.json is there"
    note = f"Writing and fsyncing {size / GB:.1f} GB as one file took {write:.1f} s, the imports {imports:.1f} s."
    table = result.table("large", title, ["", "experts", "checkpoint", "time", "peak memory"], note)
    for name, experts, made in (("minimal", LARGE_EXPERTS, minimal), ("full", 2, full)):
        written = (made.report or {}).get("total_bytes") or 0
        table.add(
            name, str(experts), f"{written / GB:.2f} GB", f"{made.seconds:.1f} s", f"{made.peak_bytes / GB:.2f} GB"
        )
    limit = imports + LARGE_WRITES * write
    result.claim(
        f"70B, minimal script: time, relative to the imports and {LARGE_WRITES} times the write",
        minimal.seconds / limit,
        1,
    )
    result.claim("70B, minimal script: peak memory", minimal.peak_bytes / GB, LARGE_MINIMAL_GB, "GB")
    result.claim("70B, full script: peak memory", full.peak_bytes / GB, LARGE_FULL_GB, "GB")


if __name__ == "__main__":
    raise SystemExit(main())
