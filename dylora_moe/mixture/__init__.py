"""LoRA experts and their router on a base model: the forward pass, and nothing of files."""
