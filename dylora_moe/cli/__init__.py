"""The command `dylora-moe`: one file for each subcommand."""
