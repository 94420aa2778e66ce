"""Cost: multiply-adds, latency, memory, with pictures."""
