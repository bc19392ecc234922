"""The commands of `dylora-moe`, one file each, with `add_flags` and `run`. It is loaded when its command is called."""
