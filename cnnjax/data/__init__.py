"""Reads images from their sources and makes arrays of them."""
