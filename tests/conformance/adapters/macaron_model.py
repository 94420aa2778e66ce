"""Macaron Net: the whole translation model."""

from __future__ import annotations

from harness import Golden

import effformer


def check(golden: Golden) -> None:
    c = golden.config
    macaron, pre = c["macaron"], c["encoder_normalize_before"]
    assert pre == c["decoder_normalize_before"]
    assert not c["encoder_learned_pos"]
    assert not c["decoder_learned_pos"]
    halves = 2 if macaron else 1
    plain = "prenorm" if pre else "postnorm"
    block = {"name": "macaron", "post_norm": not pre} if macaron else plain
    share = "target" if c["share_decoder_input_output_embed"] else "none"
    model = effformer.build_model(
        "macaron-tiny",
        dim=c["encoder_embed_dim"],
        depth=c["encoder_layers"],
        heads=c["encoder_attention_heads"],
        decoder_depth=c["decoder_layers"],
        decoder_heads=c["decoder_attention_heads"],
        ffn={"hidden": halves * c["encoder_ffn_embed_dim"]},
        decoder_layers={":": {"ffn": {"hidden": halves * c["decoder_ffn_embed_dim"]}}},
        block=block,
        final_norm=pre,
        vocab=c["vocab"],
        pad=c["pad_index"],
        share="all" if c["share_all_embeddings"] else share,
        source_padding="left" if c["left_pad_source"] else "right",
        target_padding="left" if c["left_pad_target"] else "right",
        positions=not c["no_token_positional_embeddings"],
    ).eval()
    report = effformer.load_weights(model, golden.weights())
    assert report.layout == "fairseq"
    source, target = golden.tensor("in.src_tokens"), golden.tensor("in.prev_output_tokens")
    golden.assert_close(model.encode(source).transpose(0, 1), "out.encoder_out")
    golden.assert_close(model(source, target), "out.logits")
