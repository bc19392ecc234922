"""Train a mixture of LoRA experts on a frozen causal LM, in checkpoints that can be trusted.

    python train.py --demo
    python train.py --model google/codegemma-2b --data code.jsonl=2 --data prose/ --experts 4 --output-dir runs/first
    python train.py ... --output-dir runs/first --resume
    python train.py --grow --output-dir runs/first --data sql.jsonl
    python train.py --eval-only --output-dir runs/first [--device DEVICE] [--dtype DTYPE] [--batch-size N]
    torchrun --nproc_per_node 2 train.py ...
    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 train.py ...

Stopped by SIGTERM or Ctrl-C it saves at the end of the step; --resume goes on as if it had never been stopped.
--eval-only prints what `dylora-moe eval` does: the losses of the newest checkpoint on the held-out text of the run.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dylora_moe.cli.main import main as dylora_moe
from dylora_moe.distributed import ranks
from dylora_moe.errors import CheckpointError, UsageError, shown
from dylora_moe.store import run_folder
from dylora_moe.system import command_line
from dylora_moe.system.command_line import PASSED, run
from dylora_moe.system.interrupts import Interrupted, handled
from dylora_moe.system.settings import build_parser, given, spelled
from dylora_moe.training.checkpoint_callback import PeftCheckpointCallback
from dylora_moe.training.settings import TrainSettings, parse

__all__ = ["PeftCheckpointCallback", "main"]

EVAL_ONLY = {"--eval-only", "--eval_only"}
EVAL_FLAGS = ("device", "dtype", "batch_size")


def main(argv: Sequence[str] | None = None) -> int:
    return run(_main, argv, prog="train.py")


def _main(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not EVAL_ONLY.isdisjoint(words):
        return _evaluate([word for word in words if word not in EVAL_ONLY])
    settings = parse(words, __doc__)

    from dylora_moe.training.run import execute  # the Trainer and the data sets, which the callback does not need
    from dylora_moe.training.summary import closing_lines

    try:
        with handled():  # before the first step and after the last; in between, a signal saves
            result = execute(settings, say, warn)
            for line in closing_lines(settings, result, words):
                say(line)
    except Interrupted as error:
        command_line.say(f"train.py: {error}", sys.stderr)
        return error.exit_code
    except CheckpointError as error:  # a run that cannot start: 2, as for all that a user can mend
        raise UsageError(str(error)) from error
    return PASSED if result.stopped_by is None else 128 + result.stopped_by


def _evaluate(words: Sequence[str]) -> int:
    parser = build_parser(TrainSettings, ("output_dir", *EVAL_FLAGS), prog="train.py --eval-only")
    flags = given(parser, words)
    run = flags.get("output_dir") or parser.error("--output-dir is needed: the run folder")
    newest = run_folder.latest(run)
    if newest is None:
        raise UsageError(f"{run}: expected a run folder with a complete checkpoint, found none")
    options = [f"{spelled(name)}={flags[name]}" for name in EVAL_FLAGS if name in flags]
    return dylora_moe(["eval", str(newest.path), *options])


def say(line: str) -> None:
    if ranks.is_first():
        command_line.say(shown(line, most=None))


def warn(line: str) -> None:
    if ranks.is_first():
        command_line.say(shown(line, most=None), sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
