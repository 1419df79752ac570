"""Uses of a trained network: prediction, evaluation, heat maps, export and releases."""
