"""What the networks compute with: layers, and the binding to oneDNN."""
