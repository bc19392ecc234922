"""The command `dylora-moe`."""
