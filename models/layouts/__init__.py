"""Published key layouts, one file per family."""
