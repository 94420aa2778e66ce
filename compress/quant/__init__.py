"""Blockwise weight quantization."""
