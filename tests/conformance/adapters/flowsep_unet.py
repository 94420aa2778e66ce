"""FlowSep's network: the velocity under a mask of the text and without, features of the time, names of the weights."""

from __future__ import annotations

import torch
from effformer.models import FlowSep
from harness import Golden

import effformer
from effformer.nn.embeddings import time_features


def build(golden: Golden) -> FlowSep:
    c = golden.config
    why = "the published network has no other"
    for option in ("use_spatial_transformer", "extra_sa_layer"):
        golden.only(option, True, why=why)
    golden.only("transformer_depth", 1, why=why)
    golden.only("out_channels", c["in_channels"], why=why)
    x, context = golden.tensor("in.x"), golden.tensor("in.context")
    model = effformer.build_model(
        "flowsep",
        dim=c["model_channels"],
        multipliers=tuple(c["channel_mult"]),
        residuals=c["num_res_blocks"],
        attention=tuple(c["attention_resolutions"]),
        head_dim=c["num_head_channels"],
        channels=c["in_channels"],
        mixture=0,
        text_dim=c["context_dim"][0],
        text_length=context.shape[1],
        input_size=tuple(x.shape[2:]),
    )
    assert isinstance(model, FlowSep)
    report = effformer.load_weights(model, golden.weights())
    assert report.layout == "official"
    return model.eval()


@torch.no_grad()
def check(golden: Golden) -> None:
    model = build(golden)
    x, t, text = (golden.tensor(f"in.{key}") for key in ("x", "t", "context"))
    features = time_features(t, golden.config["model_channels"])
    golden.assert_close(features, "out.t_emb")
    mask = golden.tensor("in.context_mask") == 1
    golden.assert_close(model(x, t, text, text_mask=mask), "out.v")
    golden.assert_close(model(x, t, text), "out.v_mask_ones")
    golden.assert_close(model(x, t, text, text_mask=torch.ones_like(mask)), "out.v_mask_ones")
    saved = model.LAYOUTS[0].from_ours(model.state_dict(), model.config)
    assert saved.keys() == golden.weights().keys()
    for key, value in golden.weights().items():
        assert torch.equal(saved[key], value.to(saved[key])), key
