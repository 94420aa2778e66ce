"""Flowformer GPT: logits, loss, and the same logits token by token."""

from __future__ import annotations

import torch
from harness import Golden

import effformer


def check(golden: Golden) -> None:
    c = golden.config
    model = effformer.build_model(
        "flowformer-gpt-nano",
        dim=c["n_embd"],
        depth=c["n_layer"],
        heads=c["n_head"],
        vocab=c["vocab_size"],
        context=c["block_size"],
    ).eval()
    report = effformer.load_weights(model, golden.weights())
    assert report.layout == "official"
    tokens, targets = golden.tensor("in.idx"), golden.tensor("in.targets")
    logits = model(tokens)
    golden.assert_close(logits, "out.logits")
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=-1
    )
    golden.assert_close(loss.reshape(1), "out.loss")
    state, pieces = model.init_state(tokens.shape[0]), []
    for token in tokens.split(1, dim=1):
        piece, state = model.step(token, state)
        pieces.append(piece)
    golden.assert_close(torch.cat(pieces, dim=1), "out.logits")
