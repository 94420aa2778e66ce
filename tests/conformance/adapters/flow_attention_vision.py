"""Flowformer vision: pooled features and logits."""

from __future__ import annotations

from harness import Golden

import effformer


def check(golden: Golden) -> None:
    c = golden.config
    model = effformer.build_model(
        "flowformer-vision",
        dims=c["embed_dim"],
        depths=c["depth"],
        heads=c["num_heads"],
        input_size=c["img_size"],
        patch=c["patch_size"],
        ffn={"ratio": c["mlp_ratio"]},
        num_classes=c["num_classes"],
        norm_eps=c["norm_eps"],
        channels=golden.tensor("in.image").shape[1],
    ).eval()
    report = effformer.load_weights(model, golden.weights())
    assert report.layout == "official"
    image = golden.tensor("in.image")
    golden.assert_close(model.features(image), "out.features")
    golden.assert_close(model(image), "out.logits")
