"""Token mixers and attention cores."""
