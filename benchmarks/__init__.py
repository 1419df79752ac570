"""What is measured, and beside whom: `python -m benchmarks.NAME`, from the root of the checkout."""
