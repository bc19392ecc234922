"""Several processes: what they tell each other, and how they share a base model."""
