"""`dylora-moe experts`: one file for each of its subcommands."""
