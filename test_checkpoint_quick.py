"""Is this environment able to save checkpoints? No model is loaded; takes seconds.

python test_checkpoint_quick.py
python test_checkpoint_quick.py --json result.json
"""

from __future__ import annotations

from collections.abc import Sequence

from dylora_moe import validation


def main(argv: Sequence[str] | None = None) -> int:
    return validation.main(validation.QUICK, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
