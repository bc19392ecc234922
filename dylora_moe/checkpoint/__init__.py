"""What the files of a checkpoint say: written, verified and read."""
