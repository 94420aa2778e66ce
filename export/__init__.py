"""Export to edge runtimes, verified against torch."""

if not __name__.startswith("effformer."):
    raise ImportError("import effformer.export, not export: a second copy of every class would be loaded")
