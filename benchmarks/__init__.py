"""Benchmarks. Run `python -m benchmarks.NAME` from the root of the checkout."""
