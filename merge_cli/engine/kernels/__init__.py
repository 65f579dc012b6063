"""The native kernel: weighted sums in C, one call a chunk, without torch. See `native.py`."""
