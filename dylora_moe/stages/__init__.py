"""Specialised training: which expert each block trains, where experts begin, and when a new one is needed."""
