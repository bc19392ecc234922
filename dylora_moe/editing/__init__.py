"""New checkpoints from old ones: experts come in, go, are renamed and merged; and experts for other programs."""
