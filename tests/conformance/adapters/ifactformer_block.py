"""One factorized block of IFactFormer, parallel (-m) or chained (-o)."""

from __future__ import annotations

from factorized import check_block
from harness import Golden


def check(golden: Golden) -> None:
    check_block(golden, "ifactformer")
