"""Is this environment able to save checkpoints? No model is loaded; takes seconds.

python test_checkpoint_quick.py
python test_checkpoint_quick.py --json result.json
"""

from __future__ import annotations

from collections.abc import Sequence

from dylora_moe.validation.flags import QUICK
from dylora_moe.validation.script import run_script


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(QUICK, __doc__, checkpoint_callback, argv)


def checkpoint_callback() -> type:
    from train import PeftCheckpointCallback  # takes seconds: imported once the flags are known to be right

    return PeftCheckpointCallback


if __name__ == "__main__":
    raise SystemExit(main())
