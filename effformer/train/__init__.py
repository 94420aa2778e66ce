"""Training loop, data, checkpoints."""
