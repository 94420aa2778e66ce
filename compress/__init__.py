"""Compression: one verb per family, f(model, scheme, where) -> (model, report)."""

if not __name__.startswith("effformer."):
    raise ImportError("import effformer.compress, not compress: a second copy of every class would be loaded")
