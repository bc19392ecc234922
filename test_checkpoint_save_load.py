"""Saves a checkpoint as training does, loads it into a fresh instance and compares the logits.

python test_checkpoint_save_load.py
python test_checkpoint_save_load.py --model google/codegemma-2b --experts 4 --keep_checkpoint
python test_checkpoint_save_load.py --checkpoint runs/demo/checkpoint-60
"""

from __future__ import annotations

from collections.abc import Sequence

from dylora_moe.validation.flags import FULL
from dylora_moe.validation.script import run_script


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(FULL, __doc__, checkpoint_callback, argv)


def checkpoint_callback() -> type:
    from train import PeftCheckpointCallback  # takes seconds: imported once the flags are known to be right

    return PeftCheckpointCallback


if __name__ == "__main__":
    raise SystemExit(main())
