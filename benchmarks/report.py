"""Rewrites the tables and plots of docs/ from the results of the benchmarks, so that they cannot drift from them.

python -m benchmarks.report
python -m benchmarks.report --check     exit code 1 where a page is not what the results say

In docs/performance.md and docs/learning.md, what stands between `<!-- NAME -->` and `<!-- end -->` is generated. NAME
is `claims`, `machine/RESULT`, `checks/RESULT` or `RESULT/TABLE`, where RESULT is a file of benchmarks/results without
its suffix. `claims` are those of the results that the page shows.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from dylora_moe.system import machine

from .common import MARKS, RESULTS, RIGHT, ROOT, WRONG

PAGES = (ROOT / "docs" / "performance.md", ROOT / "docs" / "learning.md")
BLOCK = re.compile(r"<!-- (?P<name>[\w./-]+) -->\n.*?<!-- end -->", re.DOTALL)
NOT_YET = "_Not measured yet._"
BUSY = 0.1  # of the cores: where others used more during the run, it says so


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--check", action="store_true", help="change nothing; is the page what the results say?")
    args = parser.parse_args(argv)
    results = read_results(RESULTS)
    pages = {path: path.read_text(encoding="utf-8") for path in PAGES}
    wanted = {path: rendered(page, results) for path, page in pages.items()}
    if args.check:
        stale = [path for path in PAGES if pages[path] != wanted[path]]
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not what the results say: run python -m benchmarks.report")
        return WRONG if stale else RIGHT
    for path, page in wanted.items():
        path.write_text(page, encoding="utf-8")
    from . import plots

    drawn = plots.draw(results, ROOT / "docs")
    print(f"{len(pages)} pages and {len(drawn)} plots are what {len(results)} results say")
    return RIGHT


def read_results(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def rendered(page: str, results: dict[str, dict]) -> str:
    """The page with every block made anew."""
    shown = {part for found in BLOCK.finditer(page) for part in found["name"].split("/")}
    results = {name: result for name, result in results.items() if name in shown}
    return BLOCK.sub(lambda found: f"<!-- {found['name']} -->\n{block(found['name'], results)}\n<!-- end -->", page)


def block(name: str, results: dict[str, dict]) -> str:
    if name == "claims":
        return claims(results)
    first, _, second = name.partition("/")
    if first in ("machine", "checks"):
        result = results.get(second)
        return NOT_YET if result is None else {"machine": conditions, "checks": checks}[first](result)
    tables = [table for table in results.get(first, {"tables": []})["tables"] if table["name"] == second]
    return markdown(tables[0]) if tables else NOT_YET


def markdown(table: dict) -> str:
    lines = [f"**{table['title']}**", "", _row(table["columns"]), _row(["---", *["--:"] * (len(table["columns"]) - 1)])]
    lines += [_row(row) for row in table["rows"]]
    return "\n".join([*lines, *(["", table["note"]] if table["note"] else [])])


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def claims(results: dict[str, dict]) -> str:
    lines = [_row(["", "limit", "measured", "", "benchmark"]), _row(["---", "--:", "--:", ":-:", "---"])]
    for name, result in results.items():
        for claim in result["claims"]:
            sign = "≥" if claim["at_least"] else "≤"
            limit = f"{sign} {claim['limit']:g} {claim['unit']}"
            lines.append(_row([claim["text"], limit, f"{claim['measured']:.2f}", MARKS[claim["met"]], f"`{name}`"]))
    return "\n".join(lines) if len(lines) > 2 else NOT_YET


def conditions(result: dict) -> str:
    """What it was measured on, and whether the machine was busy with something else."""
    found, settings = result["machine"], result["settings"]
    on = settings.get("gpu") or f"{found['cpu']}, {found['cores']} cores, {machine.readable(found['memory_bytes'])}"
    model = f"{settings['model']} ({settings['weights']} weights, {settings['dtype']})" if "model" in settings else ""
    threads = f"{settings['threads']} threads" if "threads" in settings else ""
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "transformers", "peft") if found.get(name))
    others = result["others"] or 0.0
    busy = f"**other processes kept {others:.1f} cores busy meanwhile**"
    parts = [on, threads, model, versions, busy if others > BUSY * found["cores"] else ""]
    return "Measured on " + "; ".join(part for part in parts if part) + "."


def checks(result: dict) -> str:
    return "\n".join(f"- {line}" for line in result["checks"])


if __name__ == "__main__":
    raise SystemExit(main())
