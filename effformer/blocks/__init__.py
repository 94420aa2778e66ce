"""Blocks: ordered lists of residual branches."""
