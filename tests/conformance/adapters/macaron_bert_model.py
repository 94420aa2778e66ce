"""Macaron Net: the whole BERT-style model with both heads."""

from __future__ import annotations

from harness import Golden

import effformer


def check(golden: Golden) -> None:
    c = golden.config
    macaron, pre, act = c["macaron"], c["encoder_normalize_before"], c["act_fn"]
    assert not c["encoder_learned_pos"]
    plain = "prenorm" if pre else "postnorm"
    model = effformer.build_model(
        "macaron-bert-tiny",
        dim=c["encoder_embed_dim"],
        depth=c["encoder_layers"],
        heads=c["encoder_attention_heads"],
        ffn={"hidden": (2 if macaron else 1) * c["encoder_ffn_embed_dim"], "act": act},
        block={"post_norm": not pre} if macaron else plain,
        final_norm=pre,
        norm_affine=not c["no_normalize_affine"],
        vocab=c["vocab"],
        pad=c["pad_index"],
        positions=not c["no_token_positional_embeddings"],
    ).eval()
    report = effformer.load_weights(model, golden.weights())
    assert report.layout == "fairseq"
    tokens, segments = golden.tensor("in.src_tokens"), golden.tensor("in.segment")
    rows = golden.tensor("in.output_mask").flatten().nonzero().flatten()
    golden.assert_close(model.encode(tokens, segments).transpose(0, 1), "out.encoder_out")
    out = model(tokens, segments, rows=rows)
    golden.assert_close(out.mlm, "out.mlm_logits")
    golden.assert_close(out.nsp, "out.nsp_logit")
