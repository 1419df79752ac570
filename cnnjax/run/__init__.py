"""A run: its start, its state, its folder and its results; the loop is `cnnjax.train`."""
