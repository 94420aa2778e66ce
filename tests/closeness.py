"""The comparison of numbers, under the short name that tests import."""

from effformer.testing.closeness import assert_close, largest

__all__ = ["assert_close", "largest"]
