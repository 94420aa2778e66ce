"""Macaron Net: the whole translation model."""

from __future__ import annotations

from typing import Any

from effformer.models import MacaronNet
from harness import Golden

import effformer


def check(golden: Golden) -> None:
    model = build(golden)
    source, target = golden.tensor("in.src_tokens"), golden.tensor("in.prev_output_tokens")
    golden.assert_close(model.encode(source).transpose(0, 1), "out.encoder_out")
    golden.assert_close(model(source, target), "out.logits")


def build(golden: Golden) -> MacaronNet:
    _refuse_unknown(golden)
    c = golden.config
    share = "target" if c["share_decoder_input_output_embed"] else "none"
    model = effformer.build_model(
        "macaron-tiny",
        dim=c["encoder_embed_dim"],
        depth=c["encoder_layers"],
        heads=c["encoder_attention_heads"],
        decoder_depth=c["decoder_layers"],
        decoder_heads=c["decoder_attention_heads"],
        ffn={"hidden": c["encoder_ffn_embed_dim"]},
        block=_block(golden, "encoder"),
        decoder_layers={
            ":": {
                "ffn": {"hidden": c["decoder_ffn_embed_dim"]},
                "block": _block(golden, "decoder"),
            }
        },
        final_norm=c["encoder_normalize_before"],
        decoder_final_norm=c["decoder_normalize_before"],
        vocab=c["vocab"],
        pad=c["pad_index"],
        share="all" if c["share_all_embeddings"] else share,
        source_padding="left" if c["left_pad_source"] else "right",
        target_padding="left" if c["left_pad_target"] else "right",
        positions=_positions(golden, "encoder"),
        decoder_positions=_positions(golden, "decoder"),
        context=c["max_source_positions"],
        decoder_context=c["max_target_positions"],
    )
    assert effformer.load_weights(model, golden.weights()).layout == "fairseq"
    assert isinstance(model, MacaronNet)
    return model.eval()


def _block(golden: Golden, tower: str) -> dict[str, Any]:
    c = golden.config
    post = not c[f"{tower}_normalize_before"]
    if not c["macaron"]:
        return {"name": "postnorm" if post else "prenorm"}
    # the official decoder gives its leading FFN the encoder's width
    first = c["encoder_ffn_embed_dim"]
    return {"name": "macaron", "share": 1.0, "first_hidden": first, "post_norm": post}


def _positions(golden: Golden, tower: str) -> str:
    if golden.config["no_token_positional_embeddings"]:
        return "none"
    return "learned" if golden.config[f"{tower}_learned_pos"] else "sinusoidal"


def _refuse_unknown(golden: Golden) -> None:
    c = golden.config
    golden.only("adaptive_softmax_cutoff", None, why="its output is features, not logits")
    for option in ("decoder_embed_dim", "decoder_input_dim", "decoder_output_dim"):
        golden.only(option, c["encoder_embed_dim"], why="the model has one width")
