"""A training step and an evaluation forward of the mixture, beside PEFT's own ways to use many LoRAs at once.

python -m benchmarks.routing
python -m benchmarks.routing --experts 4 16 --rounds 3
python -m benchmarks.routing --experts 64 --all-peers
python -m benchmarks.routing --device cuda --json benchmarks/results/routing-cuda.json

Every model has the same base tensors, adapters, targets (q/k/v/o), rank 16 and no dropout; times are relative to one
plain PEFT LoRA in the same round. A training step is forward, loss and backward: the optimizer is the same for all
that have the same number of parameters, and is left out.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from dylora_moe import DyLoRAMoE
from dylora_moe.base.preserve import untouched

from . import common, loop, models
from .common import Case, Result, Timing

# Experts -> rounds of the training step and of the evaluation: more where a limit is narrow.
ROUNDS, QUICK_ROUNDS = {4: (7, 9), 16: (9, 13), 64: (5, 7)}, 1
WARM_UPS = 2  # the second time, ours keeps the experts' matrices
# Experts -> (batch, length) in training and in evaluation.
SHAPES = {4: ((4, 128), (4, 128)), 16: ((2, 128), (2, 128)), 64: ((1, 128), (4, 128))}
MOST_EXPERTS = 16  # of peers, and of the loop's gradients: with 64, PEFT takes minutes to load them
GPU_SHAPES = {4: ((8, 512), (8, 512)), 16: ((4, 512), (4, 512)), 64: ((1, 512), (4, 512))}
QUICK_SHAPES = {3: ((2, 8), (2, 8))}
CHECK_TOKENS = (2, 16)
PEER_NAMES = (models.UNROUTED, models.X_LORA, models.ARROW)
FEW_ROUNDS = {models.UNROUTED: 5, models.X_LORA: 1, models.ARROW: 5}  # each takes seconds, X-LoRA most
LIMITS = {  # experts -> what is asked of (joint training step, evaluation with what is the default there)
    4: (1.10, 1.03),
    16: (1.40, 1.10),
    64: (None, 1.20),
}
SPECIALISED = 1.05  # what is asked of a step of specialised training, whatever the number of experts


def main(argv: Sequence[str] | None = None) -> int:
    return common.run("routing", __doc__, measure, argv, flags)


def flags(parser: argparse.ArgumentParser) -> None:
    models.add_model_flags(parser)
    parser.add_argument("--experts", type=int, nargs="+", help="only these of 4, 16 and 64")
    parser.add_argument("--all-peers", action="store_true", help=f"with more than {MOST_EXPERTS} experts too (slow)")


def measure(args: argparse.Namespace, result: Result) -> None:
    result.settings["threads"] = common.fix_threads()
    base = models.base_of(args, result.settings)
    shapes = QUICK_SHAPES if args.quick else SHAPES if args.device == "cpu" else GPU_SHAPES
    fixed = args.rounds or (QUICK_ROUNDS if args.quick else None)
    bars: dict[str, dict[str, list]] = {"training": {}, "evaluation": {}}
    chosen = [n for n in shapes if not args.experts or n in args.experts]
    for experts in chosen:
        rounds = (fixed, fixed) if fixed else ROUNDS[experts]
        training, evaluation = compare(base, experts, shapes[experts], rounds, args, result)
        report(base, experts, shapes[experts], training, evaluation, result)
        for kind, timings in (("training", training), ("evaluation", evaluation)):
            for name, timing in timings.items():
                bars[kind].setdefault(name, []).append(timing.ratio(timings[models.PLAIN]))
    result.series = {kind: {"x": chosen, "lines": lines} for kind, lines in bars.items()}


# ---- measuring ----


def compare(
    base, experts: int, shapes, rounds: tuple[int, int], args: argparse.Namespace, result: Result
) -> tuple[dict[str, Timing], dict[str, Timing]]:
    """The timings of the training step and of the evaluation forward, by model."""
    with tempfile.TemporaryDirectory(prefix="dylora_benchmark_") as folder:
        ours = models.build_ours(base, experts)
        adapters = models.export_experts(ours, Path(folder))
        chosen = models.PEERS if experts <= MOST_EXPERTS or args.all_peers else [models.PLAIN]
        peers = {name: models.build_peer(name, base, adapters) for name in chosen}
    check(ours, peers, base, experts, result)
    everyone = peers | {models.OURS: ours}
    training_shape, evaluation_shape = shapes
    for model in everyone.values():
        model.train()
    ours.mark_immature()
    ids = models.random_ids(base, *training_shape)
    cases = {name: training_case(model, ids, FEW_ROUNDS.get(name)) for name, model in everyone.items()}
    cases[models.OURS_SPECIALISED] = training_case(ours, ids, expert=experts - 1)
    training = common.interleaved(cases, rounds[0], args.device)
    for model in everyone.values():
        model.zero_grad(set_to_none=True)
        model.eval()
    ids = models.random_ids(base, *evaluation_shape)
    cases = {name: evaluation_case(model, ids, rounds=FEW_ROUNDS.get(name)) for name, model in peers.items()}
    no_grad = torch.no_grad()  # with gradients, asking for the experts' states would drop the matrices that are kept
    cases[models.OURS] = evaluation_case(ours, ids, before=no_grad(ours.mark_immature))
    cases[models.OURS_SPARSE] = evaluation_case(ours, ids, before=no_grad(ours.mark_mature))
    return training, common.interleaved(cases, rounds[1], args.device, WARM_UPS)


def training_case(model, ids: torch.Tensor, rounds: int | None = None, **which: int) -> Case:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def clear() -> None:  # as an optimizer does: a walk over the modules of 64 experts takes a tenth of a step
        for parameter in trained:
            parameter.grad = None

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False, **which).loss.backward()
        clear()  # so that the gradients of one model at a time take memory

    return Case(step, before=clear, rounds=rounds)


def evaluation_case(model, ids: torch.Tensor, before=None, rounds: int | None = None) -> Case:
    @torch.no_grad()
    def forward() -> None:
        model(input_ids=ids, use_cache=False)

    return Case(forward, before=before, rounds=rounds)


# ---- the answers are right ----


def check(ours: DyLoRAMoE, peers: dict, base, experts: int, result: Result) -> None:
    """Ours against the loop in float64; each peer's adapters at work, or it would be fast for nothing."""
    dtype = base.get_input_embeddings().weight.dtype
    ids = models.random_ids(base, *CHECK_TOKENS, seed=1)
    for state, sparse in (("dense", False), ("top-2", True)):
        ours.mark_mature() if sparse else ours.mark_immature()
        off = loop.value_difference(ours, ids, sparse)
        result.check(f"{experts} experts, {state}, layers against a float64 loop", off, loop.VALUE_TOLERANCE[dtype])
    ours.mark_immature()
    gradients = loop.gradient_difference(ours, ids) if experts <= MOST_EXPERTS else {}
    for part, off in gradients.items():
        what = f"{experts} experts, gradients of the {part} against a float64 loop"
        result.check(what, off, loop.GRADIENT_TOLERANCE[dtype])
    with untouched(ours), ours.disable_experts():
        bare = ours(ids, use_cache=False).logits
    for name, model in peers.items():
        model.eval()
        with torch.no_grad():
            effect = (model(input_ids=ids, use_cache=False).logits - bare).abs().max().item()
        if not effect > 1e-4:
            result.problems.append(f"{experts} experts, {name}: its adapters change the logits by {effect:.3g} only")


# ---- what is printed ----


def report(base, experts: int, shapes, training: dict, evaluation: dict, result: Result) -> None:
    (train_batch, train_length), (batch, length) = shapes
    title = f"{experts} experts: training {train_batch} x {train_length} tokens, evaluation {batch} x {length}"
    columns = ["", "training step", "relative", "floor", "evaluation", "relative", "floor"]
    note = "Relative to one plain LoRA, median over rounds (quartiles). Floor: the same ratio of multiplications."
    table = result.table(f"routing-{experts}", title, columns, note)
    for name in dict.fromkeys([*training, *evaluation]):
        floors, cells = floor(base, experts, shapes, name), []
        for timings, least in zip((training, evaluation), floors, strict=True):
            timing = timings.get(name)
            cells += ["", "", ""] if timing is None else [
                common.seconds(timing.median), common.ratio(timing, timings[models.PLAIN]), f"{least:.2f}",
            ]  # fmt: skip
        table.add(name, *cells)
    claims(experts, training, evaluation, result)


def floor(base, experts: int, shapes, name: str) -> tuple[float, float]:
    """(training, evaluation): multiplications of that way of mixing by those of one plain LoRA."""
    top = min(models.TOP_K, experts)
    used = {models.PLAIN: 1, models.OURS_SPECIALISED: 1, models.ARROW: top, models.OURS_SPARSE: top}
    active = used.get(name, experts)
    scored = 1 if name in (models.PLAIN, models.UNROUTED, models.OURS_SPECIALISED) else experts
    ratios = []
    for kind, (_, length) in enumerate(shapes):
        ratios.append(models.flops(base, length, active, scored)[1 - kind] / models.flops(base, length, 1, 1)[1 - kind])
    return ratios[0], ratios[1]


def claims(experts: int, training: dict, evaluation: dict, result: Result) -> None:
    asked_training, asked_evaluation = LIMITS.get(experts, (None, None))
    plain = training[models.PLAIN], evaluation[models.PLAIN]
    step = training[models.OURS].ratio(plain[0])
    if asked_training is not None:
        result.claim(f"{experts} experts: joint training step, relative to one plain LoRA", step, asked_training)
    if experts in LIMITS:
        own = training[models.OURS_SPECIALISED].ratio(plain[0])
        result.claim(f"{experts} experts: specialised training step, relative to one plain LoRA", own, SPECIALISED)
    if asked_evaluation is not None:
        sparse = evaluation[models.OURS_SPARSE].ratio(plain[1])
        result.claim(f"{experts} experts: evaluation with top-2, relative to one plain LoRA", sparse, asked_evaluation)
    if experts in LIMITS:
        _claim_fastest(f"{experts} experts, training step", training, models.OURS, result)
        _claim_fastest(f"{experts} experts, evaluation", evaluation, models.OURS_SPARSE, result)


def _claim_fastest(what: str, timings: dict[str, Timing], name: str, result: Result) -> None:
    peers = [timings[peer] for peer in PEER_NAMES if peer in timings]
    if peers:
        best = min(peers, key=lambda timing: timing.median)
        result.claim(f"{what}, relative to the fastest peer", timings[name].ratio(best), 1.0)


if __name__ == "__main__":
    raise SystemExit(main())
