"""`python -m dylora_moe` is the command `dylora-moe`."""

from .cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
