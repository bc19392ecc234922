"""Saves a checkpoint as training does and checks its structure and size, without loading it again.

python test_checkpoint_minimal.py
python test_checkpoint_minimal.py --experts 4
python test_checkpoint_minimal.py --keep-checkpoint
python test_checkpoint_minimal.py --checkpoint runs/demo/checkpoint-60
"""

from __future__ import annotations

from collections.abc import Sequence

from dylora_moe import validation


def main(argv: Sequence[str] | None = None) -> int:
    return validation.main(validation.MINIMAL, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
