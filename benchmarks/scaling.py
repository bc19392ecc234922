"""How the mixture's cost grows with experts, sequence and model, and how large a model can be validated here.

python -m benchmarks.scaling
python -m benchmarks.scaling --only experts sequence
python -m benchmarks.scaling --device cuda --json benchmarks/results/scaling-cuda.json

Times are relative to one plain PEFT LoRA on the same base, in the same round. The bases are Llamas with the width of
SmolLM2-135M and fewer layers, since layers cost alike. The last part runs test_checkpoint_minimal.py on config.json
files of ever larger Llamas.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig

from . import child, common, loop, models
from .child import GB
from .common import Result
from .routing import WARM_UPS, evaluation_case, training_case

ROUNDS, QUICK_ROUNDS = 3, 1
PARTS = ("experts", "sequence", "model", "largest")
LAYERS, VOCABULARY = 6, 8192
EXPERTS = (1, 2, 4, 8, 16, 32, 64)
SEQUENCES = (64, 256, 1024)
WIDTHS = (256, 576, 1536)
TOKENS, SOME_EXPERTS, CHECK_TOKENS = 256, 8, 16
TRAINING, DENSE, SPARSE = "training step", "evaluation, all experts", "evaluation, top-2"
# Name -> hidden size, intermediate size, layers, heads, key-value heads, vocabulary. The last two are made up.
LLAMAS = {
    "8B": (4096, 14336, 32, 32, 8, 128256),
    "2T": (32768, 106496, 160, 256, 8, 128256),
    "8T": (65536, 212992, 160, 512, 8, 128256),
}
TIMEOUT = 120
GRIDS = {  # part -> (what grows, points of (experts, batch, length, width))
    "experts": ("number of experts", {n: (n, 2, TOKENS // 2, 576) for n in EXPERTS}),
    "sequence": ("tokens per batch", {n: (SOME_EXPERTS, 1, n, 576) for n in SEQUENCES}),
    "model": ("hidden size", {n: (SOME_EXPERTS, 2, TOKENS // 2, n) for n in WIDTHS}),
}
QUICK_GRIDS = {
    "experts": ("number of experts", {n: (n, 1, 8, 64) for n in (1, 3)}),
    "sequence": ("tokens per batch", {n: (2, 1, n, 64) for n in (8,)}),
    "model": ("hidden size", {n: (2, 1, 8, n) for n in (64,)}),
}


def main(argv: Sequence[str] | None = None) -> int:
    return common.run("scaling", __doc__, measure, argv, flags)


def flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts only")
    parser.add_argument("--dtype", help="of the bases; default float32, on a GPU bfloat16")


def measure(args: argparse.Namespace, result: Result) -> None:
    result.settings["threads"] = common.fix_threads()
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    parts = args.only or (PARTS[:3] if args.quick else PARTS)
    grids = QUICK_GRIDS if args.quick else GRIDS
    for part in parts:
        if part == "largest":
            largest(("8B",) if args.quick else tuple(LLAMAS), result)
        else:
            grow(part, grids[part], args, rounds, result)


# ---- what grows ----


def grow(part: str, grid: tuple, args: argparse.Namespace, rounds: int, result: Result) -> None:
    what, points = grid
    columns = [what, "plain LoRA", TRAINING, "floor", "plain LoRA", DENSE, "floor", SPARSE, "floor"]
    some = next(iter(points.values()))
    fixed = {
        "experts": f"{some[1]} x {some[2]} tokens, hidden size {some[3]}",
        "sequence": f"{some[0]} experts, hidden size {some[3]}",
        "model": f"{some[0]} experts, {some[1]} x {some[2]} tokens",
    }[part]
    table = result.table(f"scaling-{part}", f"By {what}: {fixed}, {LAYERS} layers", columns, "Floor: by FLOPs.")
    lines: dict[str, list] = {TRAINING: [], DENSE: [], SPARSE: [], "floor, training": [], "floor, top-2": []}
    worst = 0.0
    for point, (experts, batch, length, width) in points.items():
        base = llama(width, args)
        training, evaluation, off = compare(base, experts, batch, length, rounds, args.device)
        dtype, worst = base.get_input_embeddings().weight.dtype, max(worst, off)
        floors = [_floor(base, length, n, experts) for n in (experts, min(experts, models.TOP_K))]
        row = [
            (training, models.OURS, floors[0][1], TRAINING),
            (evaluation, models.OURS, floors[0][0], DENSE),
            (evaluation, models.OURS_SPARSE, floors[1][0], SPARSE),
        ]
        cells = [str(point)]
        for timings, name, floor, line in row:
            plain = timings[models.PLAIN]
            cells += [common.seconds(plain.median)] if line != SPARSE else []
            cells += [common.ratio(timings[name], plain), f"{floor:.2f}"]
            lines[line].append(timings[name].ratio(plain))
        lines["floor, training"].append(floors[0][1])
        lines["floor, top-2"].append(floors[1][0])
        table.add(*cells)
    result.check(f"by {what}, every point, layers against a float64 loop", worst, loop.VALUE_TOLERANCE[dtype])
    result.series[part] = {"x": list(points), "label": what, "lines": lines}


def llama(width: int, args: argparse.Namespace):
    heads = max(1, width // 64)
    config = LlamaConfig(
        vocab_size=256 if args.quick else VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=2 if args.quick else LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // (3 if heads % 3 == 0 else 4)),
        max_position_embeddings=2048,
    )
    default = "bfloat16" if args.device != "cpu" else "float32"
    return models.random_base(config, getattr(torch, args.dtype or default), args.device)


def compare(base, experts: int, batch: int, length: int, rounds: int, device: str) -> tuple:
    """(timings of the training step, of the evaluation forward, how far ours is from the loop in float64)."""
    ours = models.build_ours(base, experts)
    with tempfile.TemporaryDirectory(prefix="dylora_benchmark_") as folder:
        plain = models.build_peer(models.PLAIN, base, models.export_experts(ours, Path(folder))[:1])
    off = difference(ours, models.random_ids(base, 1, min(length, CHECK_TOKENS), seed=1))
    ids = models.random_ids(base, batch, length)
    ours.mark_immature()
    training = common.interleaved(
        {models.PLAIN: training_case(plain.train(), ids), models.OURS: training_case(ours.train(), ids)}, rounds, device
    )
    cases = {
        models.PLAIN: evaluation_case(plain.eval(), ids),
        models.OURS: evaluation_case(ours.eval(), ids, before=ours.mark_immature),
        models.OURS_SPARSE: evaluation_case(ours, ids, before=ours.mark_mature),
    }
    return training, common.interleaved(cases, rounds, device, WARM_UPS), off


def difference(ours, ids: torch.Tensor) -> float:
    worst = 0.0
    for sparse in (False, True):
        ours.mark_mature() if sparse else ours.mark_immature()
        worst = max(worst, loop.value_difference(ours, ids, sparse))
    return worst


def _floor(base, length: int, active: int, experts: int) -> tuple[float, float]:
    """(evaluation, training) by multiplications, relative to one plain LoRA."""
    here, plain = models.flops(base, length, active, experts), models.flops(base, length, 1, 1)
    return here[0] / plain[0], here[1] / plain[1]


# ---- how large a model can be validated ----


def largest(names: tuple[str, ...], result: Result) -> None:
    """Save and verify 2 experts of ever larger Llamas, until one does not fit into this machine."""
    title = "test_checkpoint_minimal.py on a config.json alone, 2 experts"
    table = result.table("largest", title, ["Llama", "parameters", "checkpoint", "time", "peak memory"])
    for name in names:
        config = llama_config(LLAMAS[name])
        with tempfile.TemporaryDirectory(prefix="dylora_benchmark_") as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            flags = ["--model", folder, "--max-size-mb", "100000"]
            made = child.run_script("test_checkpoint_minimal.py", flags, timeout=TIMEOUT)
        parameters = f"{parameter_count(config) / 1e9:,.0f}e9"
        if made.code == child.TIMED_OUT:
            table.add(name, parameters, "", f"more than {TIMEOUT} s", "")
            break
        if made.code == 2:  # too little memory or disk, said before anything was allocated
            table.add(name, parameters, "refused", "", "")
            table.note = f"{name}: {made.output.strip().splitlines()[-1].strip()[:160]}"
            break
        result.problems += child.problems(f"largest: {name}", made)
        if made.report is None:
            break
        size, peak = made.report["total_bytes"] or 0, made.report["peak_memory_bytes"]
        table.add(name, parameters, f"{size / GB:.2f} GB", f"{made.seconds:.1f} s", f"{peak / GB:.2f} GB")


def llama_config(sizes: tuple[int, ...]) -> dict:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return child.LLAMA_70B | dict(zip((*names, "vocab_size"), sizes, strict=True))


def parameter_count(config: dict) -> int:
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    keys = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    per_layer = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * config["intermediate_size"] + 2 * hidden
    return layers * per_layer + 2 * config["vocab_size"] * hidden + hidden


if __name__ == "__main__":
    raise SystemExit(main())
