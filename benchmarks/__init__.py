"""What the claims about speed and memory rest on. `make bench` runs all; each is `python -m benchmarks.NAME`."""
