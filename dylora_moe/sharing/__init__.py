"""Checkpoints on the Hugging Face Hub: pushed with a model card, and pulled with the files of the format alone."""
