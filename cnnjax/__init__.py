"""cnnjax: a convolutional network in JAX that tells pneumonia from normal on chest radiographs."""

__version__ = "0.1.0"
