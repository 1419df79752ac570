"""Where images come from, until they are arrays."""
