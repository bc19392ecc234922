"""The user's files to blocks of tokens."""
