"""What is made of a trained network: predictions, metrics, heat maps, a release."""
