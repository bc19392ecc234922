"""What each expert is good at, and whether a text is something new."""
