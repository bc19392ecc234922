"""What is in a checkpoint, and what is in a run folder; without loading a model.

python -m dylora_moe verify runs/first/checkpoint-100
python -m dylora_moe verify runs/first/checkpoint-100 --json result.json
python -m dylora_moe list runs/first
"""

from __future__ import annotations

import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from . import cli, commit, formats, verify
from .checks import MIB, file_sizes
from .errors import UsageError
from .manifest import FolderGone


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(_main, argv)


def _main(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)
    return args.command(args)


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="python -m dylora_moe", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="{verify,list}")
    check = commands.add_parser("verify", help="0: complete and sound, 1: every problem listed, 2: not a folder")
    check.add_argument("checkpoint", metavar="DIR", type=cli.path)
    check.add_argument("--json", metavar="FILE", type=cli.report_file, help=cli.JSON_HELP)
    check.set_defaults(command=verify_checkpoint)
    listing = commands.add_parser("list", help="one line for each checkpoint of a run folder")
    listing.add_argument("run", metavar="RUN_DIR", type=cli.path)
    listing.set_defaults(command=list_run)
    return parser


# ---- verify ----


def verify_checkpoint(args: Namespace) -> int:
    folder = Path(args.checkpoint)
    contents = verify.inspect(folder)
    code = cli.FAILED if contents.problems else cli.PASSED
    lines = sys.stderr if args.json == "-" else sys.stdout
    for problem in contents.problems:
        print(f"{cli.FAIL_MARK} {problem}", file=lines)
    if contents.problems:
        print(f"{cli.FAIL_MARK} {folder}: not complete and sound, {_count(contents.problems, 'problem')}", file=lines)
    else:
        print(f"{cli.PASS_MARK} {folder}: complete and sound, {_summary(contents)}", file=lines)
    if args.json:
        _write_json(args.json, folder, contents, code)
    return code


def _write_json(target: str, folder: Path, contents: verify.Contents, code: int) -> None:
    value = {
        "checkpoint": str(folder),
        "passed": not contents.problems,
        "exit_code": code,
        "problems": contents.problems,
        "files": len(contents.files),
        "total_bytes": contents.total_bytes,
        "step": contents.config.get("step"),
        "experts": contents.config.get("num_experts"),
        "states": _states(contents.config),
    }
    text = json.dumps(value, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        Path(target).write_text(text, encoding="utf-8")


# ---- list ----


def list_run(args: Namespace) -> int:
    """By step; hashes nothing, so that it is fast on a run of any size."""
    folder = Path(args.run)
    if not folder.is_dir():
        raise UsageError(f"{folder}: expected a run folder, found {'a file' if folder.exists() else 'nothing'}.")
    if (folder / formats.ADAPTERS).exists():
        raise UsageError(
            f"{folder}: expected a run folder, found a checkpoint; to look into it\n"
            f"    python -m dylora_moe verify {shlex.quote(str(folder))}"
        )
    complete = [(checkpoint.path, None) for checkpoint in commit.checkpoints(folder)]
    found = sorted(complete + commit.incomplete(folder), key=lambda item: int(item[0].name.rpartition("-")[2]))
    if not found:
        print(f"{folder}: no checkpoints")
    width = max((len(path.name) for path, _ in found), default=0)
    for path, reason in found:
        try:
            size, experts = sum(file_sizes(path).values()), _experts(verify.inspect_config(path))
        except (FileNotFoundError, FolderGone):  # training has rotated it away meanwhile
            continue
        print(f"{path.name:{width}}  {size / MIB:8.1f} MB  {experts}  {_verdict(reason)}")
    sys.stdout.flush()
    return cli.PASSED


def _verdict(reason: str | None) -> str:
    return "complete" if reason is None else f"incomplete: {reason}"


# ---- what both say ----


def _summary(contents: verify.Contents) -> str:
    files, step = _count(list(contents.files), "file"), contents.config["step"]
    return f"step {step}, {contents.total_bytes / MIB:.1f} MB in {files}, {_experts(contents.config)}"


def _experts(config: dict) -> str:
    """As "4 experts (3 mature, 1 new)"."""
    states = _states(config)
    if not states:
        return "experts unknown"
    if len(set(states)) == 1:
        counts = states[0]
    else:
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states), key=states.index))
    return f"{_count(states, 'expert')} ({counts})"


def _states(config: dict) -> list[str]:
    return [expert["state"] for expert in config.get("experts", [])]


def _count(items: list, what: str) -> str:
    return f"{len(items)} {what}{'' if len(items) == 1 else 's'}"


if __name__ == "__main__":
    raise SystemExit(main())
