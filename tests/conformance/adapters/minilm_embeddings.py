"""Embeddings of sentences by the trained MiniLM, from transformers' keys; padding and batch do not matter."""

from __future__ import annotations

from typing import Any

from closeness import assert_close
from effformer.export.text_bundle import read_tokenizer
from effformer.export.wordpiece import WordPiece
from minilm import embeddings, encoder, folder, tokenized

TOKENS = {"rtol": 2e-5, "atol": 2e-5}
POOLED = {"rtol": 1e-5, "atol": 1e-5}


def check(golden: Any) -> None:
    model = encoder()
    for name, kind in (("hidden", "dim"), ("layers", "depth"), ("heads", "heads")):
        assert getattr(model.config, kind) == golden.config[name]
    tokens, mask = golden.tensor("in.ids"), golden.tensor("in.mask").bool()
    assert not golden.tensor("in.types").any()
    hidden, pooled, unit = embeddings(model, tokens, mask)
    assert_close(hidden[mask], golden.tensor("out.hidden")[mask], **TOKENS)
    golden.assert_close(pooled, "out.pooled", **POOLED)
    golden.assert_close(unit, "out.embedding", **POOLED)
    golden.assert_close(unit @ unit.T, "out.similarity", **POOLED)
    for row in range(len(tokens)):
        real = int(mask[row].sum())
        alone = embeddings(model, tokens[row : row + 1, :real], mask[row : row + 1, :real])[2]
        assert_close(alone, unit[row : row + 1], **POOLED)
    packed = model(tokens, mask=mask, packed=True).hidden
    assert_close(packed[mask], hidden[mask], **TOKENS)
    rules, vocabulary, told = read_tokenizer(folder())
    assert told == {"pooling": "mean", "normalise": True, "longest": 256}
    for row, text in enumerate(golden.config["sentences"]):
        own = WordPiece(vocabulary, rules)(text, 256)
        assert own == tokens[row][mask[row]].tolist()
    made = tokenized(golden.config["sentences"])
    assert (made["tokens"] == tokens).all()
    assert (made["mask"] == mask).all()
