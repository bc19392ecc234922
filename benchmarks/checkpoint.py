"""Saving, verifying and loading a checkpoint, beside what the disk, SHA-256 and the memory allow for the same bytes.

python -m benchmarks.checkpoint
python -m benchmarks.checkpoint --experts 64 --rounds 5
python -m benchmarks.checkpoint --json benchmarks/results/checkpoint.json

The checkpoint is of CodeGemma-2B's architecture, without base weights, in the system's temporary folder (TMPDIR). The
probe, which base weights are needed for, is measured on its own.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from dylora_moe import DyLoRAMoE, MoELoraConfig
from dylora_moe.base.find import DEFAULT_MODEL, find_base
from dylora_moe.base.load import load_base
from dylora_moe.base.preserve import fresh_base, seeded, untouched
from dylora_moe.checkpoint import formats
from dylora_moe.checkpoint.probe import make_probe
from dylora_moe.checkpoint.read import load_into
from dylora_moe.checkpoint.verify import find_problems, open_checkpoint
from dylora_moe.checkpoint.write import save_checkpoint
from dylora_moe.errors import CheckpointError
from dylora_moe.store import run_folder
from dylora_moe.validation.saved import fill_experts

from . import common, models
from .common import MIB, Case, Result, Timing

EXPERTS, R = 40, 16  # 562 MiB
ROUNDS, QUICK_ROUNDS = 5, 1
SAVE_LIMIT = 2.0  # by the time of writing and fsyncing the same bytes as one file
SMALL_FILES_LIMIT = 30 << 10  # all but the adapters, for 2 experts
BEYOND_LIMIT = 1.0  # per cent of bytes that are none of the adapters' tensors
WRITE, HASH, HASH_ALL, READ, COPY = (
    "write and fsync one file", "SHA-256, one thread", "SHA-256, a thread per core", "read from the page cache",
    "copy in memory",
)  # fmt: skip
SAVE, VERIFY, LOAD = "save", "verify", "load into a model"
CHUNK = 4 * MIB


def main(argv: Sequence[str] | None = None) -> int:
    return common.run("checkpoint", __doc__, measure, argv, flags)


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--experts", type=int, default=EXPERTS)


def measure(args: argparse.Namespace, result: Result) -> None:
    result.settings["threads"] = common.fix_threads()
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    experts = 3 if args.quick else args.experts
    model = build(experts, args.quick)
    with tempfile.TemporaryDirectory(prefix="dylora_benchmark_") as folder:
        timings, size = measure_folder(model, Path(folder), rounds, result)
        report(timings, size, experts, result)
        beyond_tensors(Path(folder), args.quick, result)
    probe(args, rounds, result)


def build(experts: int, quick: bool, seed: int = 0) -> DyLoRAMoE:
    """A mixture on a base without weights."""
    if quick:
        base = models.random_base(models.tiny_config(), torch.float32, "cpu").to("meta")
    else:
        source, weights = find_base(DEFAULT_MODEL, weights="none")
        base = load_base(source, weights)
    with seeded(seed):
        model = DyLoRAMoE(base, experts, lora=MoELoraConfig(r=R))
    fill_experts(model, seed)
    return model


# ---- save, verify, load ----


def measure_folder(model: DyLoRAMoE, folder: Path, rounds: int, result: Result) -> tuple[dict[str, Timing], int]:
    """Timings by what is done, and the checkpoint's bytes."""
    kept, other = folder / "kept" / "checkpoint", build(model.num_experts, model.base.config.hidden_size < 100, seed=1)
    kept.parent.mkdir()
    save_checkpoint(kept, model)
    files = [path for path in kept.rglob("*") if path.is_file()]
    data = b"".join(path.read_bytes() for path in files)
    source, target = torch.frombuffer(bytearray(data), dtype=torch.uint8), torch.empty(len(data), dtype=torch.uint8)
    target.fill_(1)  # its pages are there
    cases = {
        WRITE: Case(lambda: write_raw(folder / "raw", data)),
        SAVE: Case(lambda: save_and_remove(folder, model)),
        HASH: Case(lambda: hashlib.sha256(data).digest()),
        HASH_ALL: Case(lambda: hash_in_parts(data)),
        READ: Case(lambda: read_all(files)),
        VERIFY: Case(lambda: find_problems(kept)),
        COPY: Case(lambda: target.copy_(source)),
        LOAD: Case(lambda: load_into(open_checkpoint(kept), other)),
    }
    timings = common.interleaved(cases, rounds)
    check(model, other, kept, result)
    return timings, len(data)


def write_raw(path: Path, data: bytes) -> float:
    started = time.perf_counter()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


def save_and_remove(folder: Path, model: DyLoRAMoE) -> float:
    with tempfile.TemporaryDirectory(dir=folder) as run_folder:
        started = time.perf_counter()
        save_checkpoint(Path(run_folder) / "checkpoint-1", model)
        return time.perf_counter() - started


def hash_in_parts(data: bytes) -> None:
    workers = os.cpu_count() or 1
    step = -(-len(data) // workers)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda at: hashlib.sha256(memoryview(data)[at : at + step]).digest(), range(0, len(data), step)))


def read_all(files: list[Path]) -> None:
    buffer = bytearray(CHUNK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def check(model: DyLoRAMoE, loaded: DyLoRAMoE, folder: Path, result: Result) -> None:
    """Every tensor came back to the bit; one changed byte is found by verify and refused by load."""
    wrong = different_tensors(model, loaded)
    result.check("tensors that differ after loading", wrong, 0)
    problems = find_problems(folder)
    result.check("problems of a sound checkpoint", len(problems), 0)
    path = folder / formats.expert_folder("expert_1") / formats.ADAPTER_WEIGHTS
    flip_last_byte(path)
    found = sum(formats.ADAPTER_WEIGHTS in problem for problem in find_problems(folder))
    result.check("changed bytes that verify missed", 1 - min(found, 1), 0)
    try:
        load_into(open_checkpoint(folder), loaded)
        result.check("changed bytes that load missed", 1, 0)
    except CheckpointError:
        result.check("changed bytes that load missed", 0, 0)
    flip_last_byte(path)


def different_tensors(model: DyLoRAMoE, loaded: DyLoRAMoE) -> int:
    pairs = [(model.router.gate.weight, loaded.router.gate.weight)]
    for index in range(model.num_experts):
        here, there = model.expert_tensors(index), loaded.expert_tensors(index)
        pairs += [(here[name], there[name]) for name in here]
    return sum(not torch.equal(a, b) for a, b in pairs)


def flip_last_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def report(timings: dict[str, Timing], size: int, experts: int, result: Result) -> None:
    title = f"A checkpoint of {experts} experts, {common.mebibytes(size)}"
    note = (
        "Floors: saving has to write and fsync the bytes; verifying has to read and hash them; loading has to verify "
        "them, since nothing in the model may be touched by a damaged file, and to copy them. Reads are from the page "
        "cache."
    )
    table = result.table("checkpoint", title, ["", "time", "MiB/s", "relative to its floor", "its floor"], note)
    floors = {SAVE: WRITE, VERIFY: HASH_ALL, LOAD: VERIFY}
    for name, timing in timings.items():
        floor = floors.get(name)
        cells = [common.ratio(timing, timings[floor]), floor] if floor else ["", ""]
        table.add(name, common.seconds(timing.median), f"{size / MIB / timing.median:,.0f}", *cells)
    result.claim("a save, relative to writing its bytes as one file", timings[SAVE].ratio(timings[WRITE]), SAVE_LIMIT)


# ---- bytes beyond the tensors ----


def beyond_tensors(folder: Path, quick: bool, result: Result) -> None:
    """What a checkpoint of 2 experts holds but their tensors' bytes."""
    title = "Bytes of a checkpoint of 2 experts beyond the adapters' tensors"
    table = result.table("beyond", title, ["r", "in all", "tensors", "beyond", "of it all files but the adapters'"])
    for r in (16, 64) if not quick else (16,):
        size, tensors, small = _sizes(folder / f"r{r}", quick, r)
        table.add(str(r), f"{size:,}", f"{tensors:,}", f"{size - tensors:,}", f"{small:,}")
        if r == R and not quick:
            result.claim("all files but the adapters'", small / 1024, SMALL_FILES_LIMIT / 1024, "KiB")
            result.claim("bytes beyond the tensors", 100 * (size - tensors) / size, BEYOND_LIMIT, "%")


def _sizes(folder: Path, quick: bool, r: int) -> tuple[int, int, int]:
    """(bytes in all, of the adapters' tensors, of all files but the adapters')."""
    model = build(2, quick)
    if r != R:
        with seeded(0):
            model = DyLoRAMoE(fresh_base(model.base), 2, lora=MoELoraConfig(r=r))
        fill_experts(model, 0)
    folder.mkdir()
    save_checkpoint(folder / "checkpoint", model)
    sizes = run_folder.file_sizes(folder / "checkpoint")
    tensors = sum(t.nbytes for index in range(2) for t in model.expert_tensors(index).values())
    return sum(sizes.values()), tensors, sum(n for path, n in sizes.items() if not path.startswith(formats.ADAPTERS))


# ---- the probe ----


def probe(args: argparse.Namespace, rounds: int, result: Result) -> None:
    """The forward passes of the probe, relative to one routed pass over as many tokens."""
    source, _ = find_base(models.CPU_MODEL, weights="none")
    config = models.tiny_config() if args.quick else source.config
    base = models.random_base(config, torch.float32, "cpu")
    title = f"The probe, {formats.PROBE_TOKENS} tokens, on {config._name_or_path or source.name} in float32"
    note = "Floor: one routed pass over (1 + experts) x 16 tokens."
    table = result.table("probe", title, ["experts", "probe", "relative to its floor"], note)
    for experts in (2,) if args.quick else (2, 8):
        model = models.build_ours(base, experts).eval()
        length = formats.PROBE_TOKENS
        ids = models.random_ids(base, 1 + experts, length)
        cases = {"floor": Case(lambda m=model, i=ids: _pass(m, i)), "probe": Case(lambda m=model: _probe(m))}
        timings = common.interleaved(cases, rounds)
        made, again = make_probe(model)[0], make_probe(model)[0]
        off = max((made[name].double() - again[name].double()).abs().max().item() for name in made)
        result.check(f"probe of {experts} experts, made twice", off, 0)
        alone = [(made["experts"][i] - made["routed"]).abs().max().item() for i in range(experts)]
        result.check(f"probe of {experts} experts: experts that compute what the mixture does", alone.count(0.0), 0)
        table.add(
            str(experts), common.seconds(timings["probe"].median), common.ratio(timings["probe"], timings["floor"])
        )


def _pass(model: DyLoRAMoE, ids: torch.Tensor) -> None:
    with untouched(model):
        model(ids, use_cache=False)


def _probe(model: DyLoRAMoE) -> None:
    make_probe(model)


if __name__ == "__main__":
    raise SystemExit(main())
