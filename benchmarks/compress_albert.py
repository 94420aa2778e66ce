"""A trained ALBERT, one layer that runs twelve times: quantized once, how far do its errors grow?

The weights are those of the package rxnmapper (reactions of molecules, written as SMILES), which is never
imported. Needs pip install --no-deps rxnmapper
"""

from __future__ import annotations

import re
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import torch
from effformer.compress import quantize
from markdown import Row, write
from torch import Tensor, nn

from effformer.checks import MissingExtra
from effformer.io import read_weights
from effformer.profile import machine, profile

_TOKEN = re.compile(
    r"\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\(|\)|\.|=|#|-|\+|\\|/|:|~|@|\?|>>?|\*|\$|%[0-9]{2}|[0-9]"
)
SCHEMES: dict[str, Any] = {
    "int8": "int8",
    "w8a8": "w8a8",
    "gptq, 4 bits": {"name": "gptq", "bits": 4, "block": 64},
    "affine, 4 bits": {"name": "affine", "bits": 4, "block": 64},
    "nf4": "nf4",
    "bct": "bct",
}


class Albert(nn.Module):
    """Factorized embeddings, one post-norm layer that all twelve passes share, and a tied decoder."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.passes, self.heads = 12, 8
        for name, key in (("words", "word"), ("positions", "position"), ("types", "token_type")):
            table = weights[f"albert.embeddings.{key}_embeddings.weight"]
            setattr(self, name, nn.Embedding(*table.shape, _weight=table))
        layer = "albert.encoder.albert_layer_groups.0.albert_layers.0"
        linear = {
            "enter": "albert.encoder.embedding_hidden_mapping_in", "query": f"{layer}.attention.query",
            "key": f"{layer}.attention.key", "value": f"{layer}.attention.value",
            "dense": f"{layer}.attention.dense", "fc1": f"{layer}.ffn", "fc2": f"{layer}.ffn_output",
            "leave": "predictions.dense",
        }  # fmt: skip
        norms = {
            "words_norm": "albert.embeddings.LayerNorm", "norm1": f"{layer}.attention.LayerNorm",
            "norm2": f"{layer}.full_layer_layer_norm", "leave_norm": "predictions.LayerNorm",
        }  # fmt: skip
        for name, key in linear.items():
            setattr(self, name, nn.Linear(*weights[f"{key}.weight"].shape[::-1]))
        for name, key in norms.items():
            setattr(self, name, nn.LayerNorm(weights[f"{key}.weight"].shape, eps=1e-12))
        for name, key in (linear | norms).items():
            own = {kind: weights[f"{key}.{kind}"] for kind in ("weight", "bias")}
            getattr(self, name).load_state_dict(own)
        self.bias = nn.Parameter(weights["predictions.bias"])

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Logits (B, N, vocabulary)."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.words(tokens) + self.positions(place) + self.types(torch.zeros_like(tokens))
        x = self.enter(self.words_norm(x))
        for _ in range(self.passes):
            q, k, v = (
                part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for part in (self.query, self.key, self.value)
            )
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None])
            x = self.norm1(x + self.dense(mixed.transpose(1, 2).flatten(2)))
            x = self.norm2(x + self.fc2(nn.functional.gelu(self.fc1(x))))
        out = self.leave_norm(nn.functional.gelu(self.leave(x)))
        scores: Tensor = out @ self.words(torch.arange(591)).T + self.bias
        return scores


def reactions() -> list[str]:
    """Esters and amides of small acids, and ethers."""
    tails, heads = ("C", "CC", "CCC", "C(C)C", "c1ccccc1"), ("C", "CC", "CCCC", "CC(C)C")
    made = [f"O{b}.{a}C(=O)O>>{b}OC({a})=O" for a, b in product(tails, heads)]
    made += [f"N{b}.{a}C(=O)O>>{b}NC({a})=O" for a, b in product(tails, heads)]
    return made + [f"{b}O.Br{a}>>{b}O{a}" for a, b in product(heads, heads)]


def masked(texts: list[str], vocabulary: dict[str, int]) -> tuple[dict[str, Tensor], Tensor]:
    """Every reaction with every third of its tokens masked in turn, and which token that was."""
    rows, hidden = [], []
    for text in texts:
        ids = [vocabulary[t] for t in _TOKEN.findall(text)]
        for i in range(1, len(ids), 3):
            place = [*ids[:i], vocabulary["[MASK]"], *ids[i + 1 :]]
            rows.append([vocabulary["[CLS]"], *place, vocabulary["[SEP]"]])
            hidden.append(ids[i])
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return {"tokens": tokens, "mask": torch.arange(longest) < lengths[:, None]}, torch.tensor(
        hidden
    )


def guessed(model: nn.Module, data: dict[str, Tensor], mark: int) -> Tensor:
    """Log-probabilities (samples, vocabulary) at the masked places."""
    found = []
    with torch.no_grad():
        for rows in torch.arange(len(data["tokens"])).split(64):
            batch = {name: x[rows] for name, x in data.items()}
            found.append(model(**batch)[batch["tokens"] == mark].log_softmax(-1))
    return torch.cat(found)


def main() -> None:
    torch.set_num_threads(1)
    package = find_spec("rxnmapper")
    if package is None or not package.submodule_search_locations:
        raise MissingExtra("pip install --no-deps rxnmapper")
    (folder,) = (Path(package.submodule_search_locations[0]) / "models/transformers").iterdir()
    words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    vocabulary = {word: i for i, word in enumerate(words)}
    model = Albert(dict(read_weights(folder / "pytorch_model.bin"))).eval()
    data, truth = masked(reactions(), vocabulary)
    mark = vocabulary["[MASK]"]
    whole = guessed(model, data, mark)
    macs = profile(model, {k: x[:1] for k, x in data.items()}, memory=False)
    right = float((whole.argmax(-1) == truth).double().mean())
    value = f"{right:.1%} of {len(truth):,} masked tokens found"
    rows = [Row(what="float32", value=value)]
    calibration = {name: x[::3] for name, x in data.items()}
    for name, scheme in SCHEMES.items():
        small, report = quantize(model, scheme, sensitive=None, data=calibration)
        found = guessed(small, data, mark)
        same = float((found.argmax(-1) == whole.argmax(-1)).double().mean())
        right = float((found.argmax(-1) == truth).double().mean())
        apart = float((whole.exp() * (whole - found)).sum(-1).mean())
        said = f"{same:.1%} of the guesses agree, {right:.1%} found, KL {apart:.2g}"
        rows.append(Row(what=name, value=said, ratio=report.ratio))
        print(rows[-1].line(), flush=True)
    tokens = data["tokens"].shape[1]
    notes = [
        f"ratio: file over that of float32; the layer is stored once and runs twelve times ({macs.params:,} "
        f"parameters, {macs.total:,} multiply-adds for {tokens} tokens), and it is packed once",
        "56 reactions of our own, every third token masked in turn; gptq is calibrated on every third of the masked "
        "reactions",
        "`prune` takes models of ours only, and no model of ours shares a layer in this way: not pruned",
    ]
    write("compress_albert", "A trained ALBERT, quantized", rows, machine(), notes)


if __name__ == "__main__":
    main()
