"""Similarities of pairs of sentences by the trained MiniLM: as near to one person's grades as the official
code is, and kept by compression.
"""

from __future__ import annotations

from typing import Any

import torch
from effformer.compress import quantize
from minilm import embeddings, encoder, tokenized
from torch import Tensor

AGREES = 0.917
"""Spearman's correlation of the official model with the grades of the public pairs."""
KEPT = {"int8": (0.998, 0.995), "bct": (0.95, 0.5)}
"""Scheme -> least correlation with the uncompressed similarities, least mean cosine."""


def check(golden: Any) -> None:
    pairs = golden.meta["pairs"]
    assert len(pairs) == golden.meta["count"]
    model = encoder()
    texts = [tokenized([pair[side] for pair in pairs]) for side in "ab"]
    dense = [embeddings(model, **text)[2] for text in texts]
    grades = torch.tensor([float(pair["score"]) for pair in pairs])
    similar = (dense[0] * dense[1]).sum(-1)
    if golden.name == "minilm_pairs":  # others have other grades
        assert abs(_spearman(similar, grades) - AGREES) < 2e-3
    for scheme, (pair, cosine) in KEPT.items():
        small, _ = quantize(model, scheme, sensitive=None)
        packed = [embeddings(small, **text)[2] for text in texts]
        assert _spearman((packed[0] * packed[1]).sum(-1), similar) >= pair
        assert (
            torch.cat([(p * d).sum(-1) for p, d in zip(packed, dense, strict=True)]).mean()
            >= cosine
        )


def _spearman(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Ranks, of equal values their mean."""
    below = (values[:, None] > values).sum(1) + (values[:, None] >= values).sum(1)
    return below.double() / 2
