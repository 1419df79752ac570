"""A run: its start, its state, its folder, its results, and releases of it."""
