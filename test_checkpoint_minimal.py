"""Saves a checkpoint as training does and checks its structure and size, without loading it again.

python test_checkpoint_minimal.py
python test_checkpoint_minimal.py --experts 4
python test_checkpoint_minimal.py --keep-checkpoint
python test_checkpoint_minimal.py --checkpoint runs/demo/checkpoint-60
"""

from __future__ import annotations

from collections.abc import Sequence

from dylora_moe.validation.flags import MINIMAL
from dylora_moe.validation.script import run_script


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(MINIMAL, __doc__, checkpoint_callback, argv)


def checkpoint_callback() -> type:
    from train import PeftCheckpointCallback  # takes seconds: imported once the flags are known to be right

    return PeftCheckpointCallback


if __name__ == "__main__":
    raise SystemExit(main())
