"""Backbones assembled from registered parts; one family per file."""

if not __name__.startswith("effformer."):
    raise ImportError("import effformer.models, not models: a second copy of every class would be loaded")
