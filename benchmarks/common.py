"""What the benchmarks share: interleaved timing, tables with ratios, results as JSON, exit codes.

Heavy modules are imported where they are used: scripts.py measures the memory of its child processes, and the kernel
adds the memory of the parent to that of a child that it starts.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dylora_moe.system import machine

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
RIGHT, WRONG = 0, 1
MIB = 1 << 20
MARKS = {True: "✓", False: "✗"}
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")


# ---- measuring ----


@dataclass(frozen=True)
class Timing:
    """Seconds of the repetitions of one case, in the order of the rounds."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> tuple[float, float]:
        """The first and third quartile, or the extremes of fewer than four samples."""
        return _quartiles(self.samples)

    def ratio(self, reference: Timing) -> float:
        """Return the median, over the rounds of both, of this case's time divided by that of the reference.

        It varies less than the ratio of the medians, because what slows a machine down for seconds slows both cases.
        """
        return statistics.median(self._ratios(reference))

    def ratio_spread(self, reference: Timing) -> tuple[float, float]:
        return _quartiles(self._ratios(reference))

    def _ratios(self, reference: Timing) -> list[float]:
        return [mine / theirs for mine, theirs in zip(self.samples, reference.samples, strict=False)]


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 4:
        return min(values), max(values)
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    return quartiles[0], quartiles[2]


@dataclass(frozen=True)
class Case:
    """One thing to be measured.

    Args:
        run: is timed. It may return the seconds that it took instead of being timed from outside.
        before: is not timed. It brings the model into the state to be measured.
        rounds: how many rounds the case takes part in, if it is so slow that its ratio needs no more.
    """

    run: Callable[[], object]
    before: Callable[[], object] | None = None
    rounds: int | None = None


def interleaved(cases: dict[str, Case], rounds: int, device: str = "cpu", warmups: int = 1) -> dict[str, Timing]:
    """Measure every case once per round, in random order, because each case leaves the caches in another state."""
    samples: dict[str, list[float]] = {name: [] for name in cases}
    names, shuffle = list(cases), random.Random(0).shuffle
    gc.collect()
    collecting = gc.isenabled()
    gc.disable()  # a collection visits all modules of all models, in any case that happens to start it
    try:
        for number in range(-warmups, rounds):
            gc.collect(1)  # young objects only, without the modules of the models
            shuffle(names)
            for name in names:
                if cases[name].rounds is not None and number >= cases[name].rounds:
                    continue
                seconds = _timed(cases[name], device)
                if number >= 0:
                    samples[name].append(seconds)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _timed(case: Case, device: str) -> float:
    if case.before is not None:
        case.before()
    synchronize(device)
    started = time.perf_counter()
    outcome = case.run()
    synchronize(device)
    seconds = time.perf_counter() - started
    return outcome if isinstance(outcome, float) else seconds


def synchronize(device: str) -> None:
    """Wait until the accelerator has finished its work."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)
    elif device == "mps":
        import torch

        torch.mps.synchronize()


# ---- where it is measured ----


def describe() -> dict[str, Any]:
    """Describe what a measurement runs on: processor, cores, memory and the versions that matter."""
    import psutil

    return {
        "platform": platform.platform(),
        "cpu": machine.cpu_name(),
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "available_bytes": machine.available_memory(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- what is found ----


@dataclass
class Table:
    """A table of a benchmark, for the terminal, the JSON file and docs/performance.md."""

    name: str
    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""  # what the ratios refer to, and what is left out

    def add(self, *cells: str) -> None:
        if len(cells) != len(self.columns):
            raise ValueError(f"table {self.name}: expected {len(self.columns)} cells, got {len(cells)}")
        self.rows.append(list(cells))

    def text(self) -> str:
        widths = [max(len(row[i]) for row in [self.columns, *self.rows]) for i in range(len(self.columns))]
        lines = [self._line(row, widths) for row in [self.columns, ["-" * width for width in widths], *self.rows]]
        return "\n".join([self.title, "", *lines, *([self.note] if self.note else [])])

    @staticmethod
    def _line(row: list[str], widths: list[int]) -> str:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        return "  ".join(cells).rstrip()


@dataclass
class Claim:
    """A figure that has to be reached. A claim that is not met is shown as such; it is not an error."""

    text: str
    measured: float
    limit: float
    unit: str = "x"
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit


@dataclass
class Result:
    """What a benchmark found. `problems`: answers that were wrong; they decide the exit code."""

    benchmark: str
    settings: dict
    machine: dict = field(default_factory=describe)
    others: float | None = None  # cores that other processes kept busy meanwhile
    tables: list[Table] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    checks: list[str] = field(default_factory=list)  # what was re-checked, and how closely it agreed
    problems: list[str] = field(default_factory=list)
    series: dict = field(default_factory=dict)  # for the plots: name -> {"x": [...], "lines": {label: [...]}, ...}

    @property
    def exit_code(self) -> int:
        return WRONG if self.problems else RIGHT

    def table(self, name: str, title: str, columns: list[str], note: str = "") -> Table:
        self.tables.append(Table(name, title, columns, note=note))
        return self.tables[-1]

    def claim(self, text: str, measured: float, limit: float, unit: str = "x", at_least: bool = False) -> None:
        self.claims.append(Claim(text, measured, limit, unit, at_least))

    def check(self, what: str, difference: float, tolerance: float) -> None:
        """Note that an answer was re-checked; NaN is wrong too."""
        text = f"{what}: differs by {difference:.3g}, allowed {tolerance:.3g}"
        self.checks.append(text)
        if not difference <= tolerance:
            self.problems.append(text)

    def to_json(self) -> dict:
        return {
            "benchmark": self.benchmark,
            "settings": self.settings,
            "machine": self.machine,
            "others": self.others,
            "tables": [vars(table) for table in self.tables],
            "claims": [vars(claim) | {"met": claim.met} for claim in self.claims],
            "checks": self.checks,
            "problems": self.problems,
            "series": self.series,
        }


def seconds_of_others() -> float | None:
    """Return the core seconds, since some moment, that other processes or a hypervisor used; None if not known.

    The load average would not do: one benchmark after the other, it is that of the one before.
    """
    import psutil

    if not psutil.LINUX:  # elsewhere the parts are others
        return None
    cpu, own = psutil.cpu_times(), os.times()
    everything = cpu.user + cpu.nice + cpu.system + cpu.irq + cpu.softirq + cpu.steal
    return everything - (own.user + own.system + own.children_user + own.children_system)


# ---- how they are run ----


def run(
    name: str,
    description: str,
    measure: Callable[[argparse.Namespace, Result], None],
    argv: Sequence[str] | None = None,
    flags: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """Parse the flags, measure, print what was found and on what machine, write the JSON; return the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="the smallest sizes: to see that it runs, not to measure")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was found")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (%(default)s)")
    parser.add_argument("--rounds", type=int, help="how often everything is measured")
    if flags is not None:
        flags(parser)
    args = parser.parse_args(argv)
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    result = Result(name, settings)
    print(header(result))
    started, others = time.perf_counter(), seconds_of_others()
    measure(args, result)
    elapsed = time.perf_counter() - started
    result.settings["seconds"] = round(elapsed, 1)
    if others is not None:
        result.others = round(max(0.0, seconds_of_others() - others) / elapsed, 2)
    show(result)
    if args.json:
        write_json(args.json, result)
    return result.exit_code


def header(result: Result) -> str:
    found = result.machine
    versions = ", ".join(f"{name} {found[name]}" for name in ("python", *PACKAGES) if found.get(name))
    size = machine.readable(found["memory_bytes"])
    return f"{result.benchmark}: {found['cpu']}, {found['cores']} cores, {size}\n{versions}\n"


def show(result: Result) -> None:
    for table in result.tables:
        print(table.text(), end="\n\n")
    for claim in result.claims:
        sign = "≥" if claim.at_least else "≤"
        measured = f"{claim.measured:.2f} {claim.unit}, limit {sign} {claim.limit:g} {claim.unit}"
        print(f"{MARKS[claim.met]} {claim.text}: {measured}")
    for line in result.checks:
        print(f"  checked: {line}")
    if result.others is not None:
        print(f"Other processes kept {result.others:.2f} cores busy meanwhile.")
    for problem in result.problems:
        print(f"✗ WRONG ANSWER: {problem}", file=sys.stderr)


def write_json(path: Path, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# ---- cells ----


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.1f} ms" if value < 0.1 else f"{value * 1000:.0f} ms"


def ratio(timing: Timing, reference: Timing) -> str:
    low, high = timing.ratio_spread(reference)
    return f"{timing.ratio(reference):.2f} ({low:.2f}-{high:.2f})"


def mebibytes(size: float) -> str:
    return f"{size / MIB:,.1f} MiB" if size < 100 * MIB else f"{size / MIB:,.0f} MiB"


def fix_threads() -> int:
    """Use as many threads as there are cores, or as OMP_NUM_THREADS says, and return their number.

    On a machine that others use as well, one thread measures better: two wait for each other's time slices.
    """
    import torch

    if not os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(cores())
    return torch.get_num_threads()
