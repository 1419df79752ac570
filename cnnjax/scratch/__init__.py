"""The networks of `cnnjax.networks` in plain NumPy, every gradient derived by hand.

Read it in this order: `layers` (each a forward and a backward function), `losses`, `models` (the
layers chained, and the chain walked back), `optimizers`, `steps` (one pure training step).
`initializers`, `trees`, `shapes` and `convert` are what those stand on.

A backward function gets delta, the derivative of the loss L by the layer's output, and returns the
derivatives by the layer's inputs. In the code `dy` is delta = dL/dy, `dx` is dL/dx, and so on: each
has the shape of what it is the derivative by. What a backward function needs from the forward pass
comes to it as `cache`, the last thing that the forward function returned.

Images are NHWC and kernels HWIO, as everywhere in cnnjax. Arrays are float32 or float64, and what
comes out has the dtype of what went in. Nothing is changed in place that a caller can see.
"""
