"""Position-wise networks."""
