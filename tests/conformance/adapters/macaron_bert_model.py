"""Macaron Net: the whole BERT-style model with both heads."""

from __future__ import annotations

from effformer.models import MacaronBert
from harness import Golden

import effformer


def check(golden: Golden) -> None:
    model = build(golden)
    tokens, segments = golden.tensor("in.src_tokens"), golden.tensor("in.segment")
    rows = golden.tensor("in.output_mask").flatten().nonzero().flatten()
    golden.assert_close(model.encode(tokens, segments).transpose(0, 1), "out.encoder_out")
    out = model(tokens, segments, rows=rows)
    golden.assert_close(out.mlm, "out.mlm_logits")
    golden.assert_close(out.nsp, "out.nsp_logit")


def build(golden: Golden) -> MacaronBert:
    c = golden.config
    macaron, pre = c["macaron"], c["encoder_normalize_before"]
    positions = "learned" if c["encoder_learned_pos"] else "sinusoidal"
    block = {"share": 1.0, "post_norm": not pre} if macaron else "prenorm" if pre else "postnorm"
    model = effformer.build_model(
        "macaron-bert-tiny",
        dim=c["encoder_embed_dim"],
        depth=c["encoder_layers"],
        heads=c["encoder_attention_heads"],
        ffn={"hidden": c["encoder_ffn_embed_dim"], "act": golden.activation(c["act_fn"])},
        block=block,
        final_norm=pre,
        norm_affine=not c["no_normalize_affine"],
        vocab=c["vocab"],
        pad=c["pad_index"],
        positions="none" if c["no_token_positional_embeddings"] else positions,
        context=c["max_source_positions"],
        tied=c["share_all_embeddings"],
    )
    assert effformer.load_weights(model, golden.weights()).layout == "fairseq"
    assert isinstance(model, MacaronBert)
    return model.eval()
