"""The frozen base model: found, loaded, imitated by random weights, and left as it was."""
