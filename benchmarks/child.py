"""A command run as a child process: its time, its peak memory, what it printed, and the scripts' JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from .common import ROOT

PYTHON = sys.executable
GB = 1e9
TIMED_OUT = -1
# A 70B Llama, as its config.json says: 8192 wide, 80 layers; one expert of r=16 on q/k/v/o has 262 MB.
LLAMA_70B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


@dataclass(frozen=True)
class Child:
    """What a child process took. `peak_bytes` counts what it started and waited for as well, and on Linux its parent's
    memory at the fork: start it from a small process."""

    seconds: float
    peak_bytes: int
    code: int
    output: str
    report: dict | None = None


def run(command: list[str], timeout: float | None = None) -> Child:
    """Run a command in the repository's root; standard error goes into the output."""
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        try:
            peak, code = _wait(process, timeout)
        except subprocess.TimeoutExpired:
            peak, code = 0, TIMED_OUT
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        seconds = time.perf_counter() - started
        output.seek(0)
        return Child(seconds, peak, code, output.read().decode(errors="replace"))


def _wait(process: subprocess.Popen, timeout: float | None) -> tuple[int, int]:
    if not hasattr(os, "wait4") or timeout is not None:
        return 0, process.wait(timeout)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), process.returncode


def run_script(name: str, flags: list[str], timeout: float | None = None) -> Child:
    """Run one of the root scripts and read its JSON; `report` is None where it wrote none."""
    with tempfile.TemporaryDirectory(prefix="dylora_benchmark_") as folder:
        path = Path(folder) / "report.json"
        child = run([PYTHON, name, *flags, "--json", str(path)], timeout)
        report = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return Child(child.seconds, child.peak_bytes, child.code, child.output, report)


def problems(what: str, child: Child) -> list[str]:
    """Why the answer of a script's run is not the one that it has to be."""
    if child.code != 0 or child.report is None:
        return [f"{what}: exit code {child.code}, expected 0: {child.output.strip()[-300:]}"]
    found = [f"{what}: {c['name']} failed: {c['problems'][:3]}" for c in child.report["checks"] if not c["passed"]]
    if not child.report["passed"] or not child.report["checks"]:
        found.append(f"{what}: did not pass")
    for check in child.report["checks"]:
        found += _consistency_problems(what, check["measures"])
    return found


def _consistency_problems(what: str, measures: dict) -> list[str]:
    found = []
    if measures.get("max_abs_diff", 0) != 0:
        found.append(f"{what}: logits differ by {measures['max_abs_diff']}, expected 0 on the machine that saved")
    for name, difference in measures.get("spoiled", {}).items():
        if isinstance(difference, (int, float)) and not difference > 0:
            found.append(f"{what}: spoiling {name} made no difference, so the comparison could not fail")
    return found
