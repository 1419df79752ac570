"""The networks of `cnnjax.networks` in plain NumPy, with every gradient derived by hand.

Read the modules in this order: `layers` (a forward and a backward function for each layer),
`losses`, `models` (chains of layers, forward and backward), `optimizers`, `steps` (one pure
training step). The modules `initializers`, `trees`, `shapes` and `convert` are helpers.

A backward function gets delta, the derivative of the loss L with respect to the layer's output. It
returns the derivatives with respect to the layer's inputs. In the code `dy` is delta = dL/dy, `dx`
is dL/dx, and so on; dL/dx has the shape of x. The values that a backward function needs from the
forward pass are its argument `cache`, the last value that the forward function returned.

Images are NHWC and kernels HWIO, as everywhere in cnnjax. Arrays are float32 or float64; results
have the dtype of the inputs. No function changes its arguments in place.
"""
