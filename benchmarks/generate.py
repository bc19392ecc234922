"""Tokens per second of greedy generation with the KV cache: the mixture, one plain PEFT LoRA, and PEFT X-LoRA.

python -m benchmarks.generate
python -m benchmarks.generate --experts 16 --rounds 5
python -m benchmarks.generate --device cuda --json benchmarks/results/generate-cuda.json

X-LoRA has no cache: PEFT turns it off, since its scalings are computed from the whole prefix at every token.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from dylora_moe import DyLoRAMoE
from dylora_moe.base.preserve import untouched
from dylora_moe.mixture.router import count_tokens

from . import common, models
from .common import Case, Result, Timing

EXPERTS = 4
PROMPT, NEW = 64, 64
QUICK_PROMPT, QUICK_NEW = 6, 4
ROUNDS, QUICK_ROUNDS = 5, 1
BATCHED_ROUNDS = 3
FEW_ROUNDS = {models.X_LORA: 1}  # its 64 tokens take half a minute
PADDED_LENGTHS = (1.0, 0.75, 0.5, 0.25)  # of the prompt: the four rows of the left-padded batch
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of logits, relative to the largest
X_LORA_TIMES, PLAIN_SHARE = 6, 0.95
LONG_PROMPT, QUICK_LONG_PROMPT, ROUTING_PERCENT = 4096, 32, 1.0


def main(argv: Sequence[str] | None = None) -> int:
    return common.run("generate", __doc__, measure, argv, flags)


def flags(parser: argparse.ArgumentParser) -> None:
    models.add_model_flags(parser)
    parser.add_argument("--experts", type=int, default=EXPERTS)


def measure(args: argparse.Namespace, result: Result) -> None:
    result.settings["threads"] = common.fix_threads()
    base = models.base_of(args, result.settings)
    prompt, new = (QUICK_PROMPT, QUICK_NEW) if args.quick else (PROMPT, NEW)
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else ROUNDS)
    with tempfile.TemporaryDirectory(prefix="dylora_benchmark_") as folder:
        ours = models.build_ours(base, args.experts)
        adapters = models.export_experts(ours, Path(folder))
        peers = {name: models.build_peer(name, base, adapters).eval() for name in (models.PLAIN, models.X_LORA)}
    ours.eval().mark_mature()
    everyone = {models.PLAIN: peers[models.PLAIN], models.OURS_SPARSE: ours, models.X_LORA: peers[models.X_LORA]}
    single = models.random_ids(base, 1, prompt), None
    padded = padded_batch(base, prompt)
    check(ours, single, padded, new, result)
    one_by_one = timings(everyone, single, new, rounds, args.device, result)
    batched = timings({name: everyone[name] for name in (models.PLAIN, models.OURS_SPARSE)}, padded, new,
                      min(rounds, BATCHED_ROUNDS), args.device, result)  # fmt: skip
    report(one_by_one, batched, prompt, new, args.experts, result)
    long = QUICK_LONG_PROMPT if args.quick else LONG_PROMPT
    routing_share(ours, models.random_ids(base, 1, long, seed=3), rounds, args.device, result)


def routing_share(ours: DyLoRAMoE, ids: torch.Tensor, rounds: int, device: str, result: Result) -> None:
    """What the router takes of the prefill of a long prompt: its sums and weights for all tokens, computed alone."""
    router, embeddings = ours.router, ours.get_input_embeddings()
    tokens = count_tokens(tuple(ids.shape), None, None, torch.zeros(len(ids), dtype=torch.bool, device=ids.device))

    @torch.no_grad()
    def route() -> None:
        router.logits(router.sums(embeddings(ids), tokens)).softmax(-1)

    @torch.no_grad()
    def prefill() -> None:
        ours(ids, use_cache=True, logits_to_keep=1)

    timings = common.interleaved({"router": Case(route), "prefill": Case(prefill)}, min(rounds, 3), device, warmups=1)
    share = 100 * timings["router"].median / timings["prefill"].median
    result.claim(f"routing a prompt of {ids.shape[1]:,} tokens, of its prefill", share, ROUTING_PERCENT, "%")


def padded_batch(base, prompt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Four prompts of different lengths, padded on the left: ids (4, T) and attention mask (4, T)."""
    ids = models.random_ids(base, len(PADDED_LENGTHS), prompt, seed=2)
    mask = torch.ones_like(ids)
    for row, share in enumerate(PADDED_LENGTHS):
        padding = prompt - max(1, int(prompt * share))
        ids[row, :padding], mask[row, :padding] = base.generation_config.pad_token_id, 0
    return ids, mask


def generate(model, inputs: tuple, new: int, **options):
    ids, mask = inputs
    mask = torch.ones_like(ids) if mask is None else mask
    lengths = {"max_new_tokens": new, "min_new_tokens": new}
    return model.generate(input_ids=ids, attention_mask=mask, do_sample=False, **lengths, **options)


def timings(everyone: dict, inputs: tuple, new: int, rounds: int, device: str, result: Result) -> dict[str, Timing]:
    def case(name: str, model) -> Case:
        @torch.no_grad()
        def run() -> None:
            made = generate(model, inputs, new).shape[1] - inputs[0].shape[1]
            if made != new:
                result.problems.append(f"{name}: generated {made} tokens, expected {new}")

        return Case(run, rounds=FEW_ROUNDS.get(name))

    for model in everyone.values():
        with torch.no_grad():
            generate(model, inputs, 2)  # a warm-up of full length would take X-LoRA half a minute
    return common.interleaved({name: case(name, model) for name, model in everyone.items()}, rounds, device, warmups=0)


# ---- the answers are right ----


def check(ours: DyLoRAMoE, single: tuple, padded: tuple, new: int, result: Result) -> None:
    """Logits step by step, against one pass over the finished sequence; padded rows, against the same rows alone."""
    dtype = ours.base.get_input_embeddings().weight.dtype
    new = min(new, 16)
    off = cache_difference(ours, single, new)
    result.check("logits with the KV cache against one pass without", off, TOLERANCE[dtype])
    off = padding_difference(ours, padded, new)
    result.check("logits of left-padded rows against each row alone", off, TOLERANCE[dtype])


def cache_difference(ours: DyLoRAMoE, inputs: tuple, new: int) -> float:
    """The largest difference of logits, relative to the largest logit."""
    made, stepwise = _with_logits(ours, inputs, new)
    with untouched(ours):
        whole = ours(made[:, :-1], use_cache=False).logits[:, -new:].float()  # (B, new, vocabulary)
    return ((stepwise - whole).abs().max() / whole.abs().max()).item()


def padding_difference(ours: DyLoRAMoE, padded: tuple, new: int) -> float:
    """As above, each row of the batch against one pass over it without its padding."""
    made, stepwise = _with_logits(ours, padded, new)
    worst = 0.0
    for row, mask in enumerate(padded[1]):
        padding = int((mask == 0).sum())
        with untouched(ours):
            alone = ours(made[row : row + 1, padding:-1], use_cache=False).logits[0, -new:].float()
        off = ((stepwise[row] - alone).abs().max() / alone.abs().max()).item()
        worst = max(worst, off) if off == off else float("inf")
    return worst


def _with_logits(ours: DyLoRAMoE, inputs: tuple, new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(sequences (B, T + new), logits of each step (B, new, vocabulary) in float32)."""
    with untouched(ours):
        out = generate(ours, inputs, new, output_logits=True, return_dict_in_generate=True)
    return out.sequences, torch.stack(out.logits, 1).float()


# ---- what is printed ----


def report(single: dict, batched: dict, prompt: int, new: int, experts: int, result: Result) -> None:
    columns = ["", "tokens/s", "time relative to plain LoRA", "tokens/s, batch of 4", "time relative to plain LoRA"]
    title = f"{prompt} tokens in, {new} out, greedy; {experts} experts"
    note = (
        "Floor: plain LoRA, which computes one adapter for every token. The batch of 4 is padded on the left; "
        "X-LoRA, which has no cache, is left out of it."
    )
    table = result.table("generate", title, columns, note)
    for name, timing in single.items():
        cells = [f"{new / timing.median:.1f}", common.ratio(timing, single[models.PLAIN])]
        if name in batched:
            speed = len(PADDED_LENGTHS) * new / batched[name].median
            cells += [f"{speed:.1f}", common.ratio(batched[name], batched[models.PLAIN])]
        else:
            cells += ["", ""]
        table.add(name, *cells)
    ours = single[models.OURS_SPARSE]
    result.claim(
        "tokens per second, relative to X-LoRA", single[models.X_LORA].ratio(ours), X_LORA_TIMES, at_least=True
    )
    result.claim(
        "tokens per second, relative to plain LoRA", single[models.PLAIN].ratio(ours), PLAIN_SHARE, at_least=True
    )
    share = batched[models.PLAIN].ratio(batched[models.OURS_SPARSE])
    result.claim("tokens per second of the padded batch, relative to plain LoRA", share, PLAIN_SHARE, at_least=True)
    result.series["generate"] = {
        "x": ["batch 1"],
        "lines": {name: [new / timing.median] for name, timing in single.items()},
    }


if __name__ == "__main__":
    raise SystemExit(main())
