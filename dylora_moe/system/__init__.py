"""This machine and its terminal: memory, disk, command lines, signals. Nothing here knows torch."""
