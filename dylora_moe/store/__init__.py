"""A folder of files, published whole or not at all. Nothing here knows what a tensor is."""
