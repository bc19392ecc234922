"""Tokens per second in vLLM: a mixture, beside its base model alone and with one of its experts as a plain LoRA.

python benchmark.py CHECKPOINT
python benchmark.py CHECKPOINT --dtype bfloat16 --rounds 5 --json result.json

Each arm runs in processes of its own, in turn; the fastest round of each counts. Nothing is compiled, since vLLM does
not compile a model with LoRA on the CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ARMS = ("base", "lora", "mixture")
PROMPT, NEW, FEW, MANY = 256, 32, 2, 8
REPEATS = 2
LORA_RANKS = (8, 16, 32, 64, 128, 256, 512)  # that vLLM takes


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.arm:
        print("\n" + json.dumps(run(args.arm, args.checkpoint, args.dtype)))
        return 0
    found: dict[str, dict[str, float]] = {arm: {} for arm in ARMS}
    for _ in range(args.rounds):
        for arm in ARMS:
            for case, rate in measured(arm, args).items():
                found[arm][case] = max(rate, found[arm].get(case, 0.0))
    report(found)
    if args.json:
        args.json.write_text(json.dumps({"dtype": args.dtype, "tokens_per_second": found}, indent=2) + "\n")
    return 0


def measured(arm: str, args: argparse.Namespace) -> dict[str, float]:
    """Run one arm in a process of its own."""
    command = [sys.executable, __file__, str(args.checkpoint), "--arm", arm, "--dtype", args.dtype]
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def run(arm: str, checkpoint: Path, dtype: str) -> dict[str, float]:
    """Return the tokens per second of each case."""
    from dylora_moe_vllm.checkpoint import read_mixture
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    mixture = read_mixture(json.loads((checkpoint / "config.json").read_text()), str(checkpoint))
    options: dict[str, Any] = {"max_model_len": PROMPT + NEW, "enable_prefix_caching": False, "enforce_eager": True}
    if arm == "lora":
        rank = next(rank for rank in LORA_RANKS if rank >= mixture.experts[0].rank)
        options |= {"enable_lora": True, "max_lora_rank": rank}
    model = str(checkpoint) if arm == "mixture" else mixture.base
    llm = LLM(model, dtype=dtype, skip_tokenizer_init=True, **options)
    folder = str(checkpoint.resolve() / "peft_adapters/expert_0/expert_0")
    request = LoRARequest("expert_0", 1, folder) if arm == "lora" else None

    def generate(prompts: int, length: int, new: int) -> None:
        ids = [{"prompt_token_ids": [(i * 31 + j * 7) % 250 for j in range(length)]} for i in range(prompts)]
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        llm.generate(ids, params, use_tqdm=False, lora_request=request)

    return {
        f"prompts of {PROMPT} tokens": rate(lambda: generate(FEW, PROMPT, 1), FEW * PROMPT),
        "one answer": rate(lambda: generate(1, 8, NEW), NEW),
        f"{MANY} answers": rate(lambda: generate(MANY, 8, NEW), MANY * NEW),
    }


def rate(work: Callable[[], None], tokens: int) -> float:
    """Return tokens per second of the fastest of some repetitions, after one that does not count."""
    work()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return tokens / min(seconds)


def report(found: dict[str, dict[str, float]]) -> None:
    print(f"{'tokens per second':24}" + "".join(f"{arm:>12}" for arm in ARMS) + f"{'mixture / lora':>18}")
    for case, lora in found["lora"].items():
        rates = "".join(f"{found[arm][case]:12.1f}" for arm in ARMS)
        print(f"{case:24}{rates}{found['mixture'][case] / lora:18.2f}")


if __name__ == "__main__":
    raise SystemExit(main())
