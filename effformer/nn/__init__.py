"""Norms, embeddings, rotary tables, patching."""
