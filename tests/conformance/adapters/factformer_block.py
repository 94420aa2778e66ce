"""One factorized block of FactFormer, on planes and in space."""

from __future__ import annotations

from factorized import check_block
from harness import Golden


def check(golden: Golden) -> None:
    check_block(golden, "factformer")
