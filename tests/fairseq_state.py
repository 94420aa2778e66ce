"""Random state dicts with fairseq's keys for the options of `fairseq_reference`."""

from __future__ import annotations

import torch
from fairseq_reference import Options, State
from torch import Tensor


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) * 0.4


def linear(w: State, name: str, out: int, into: int) -> None:
    w[f"{name}.weight"], w[f"{name}.bias"] = draw(out, into), draw(out)


def norm(w: State, name: str, dim: int) -> None:
    w[f"{name}.weight"], w[f"{name}.bias"] = 1 + draw(dim), draw(dim)


def layer(w: State, c: Options, at: str, name: str) -> None:
    """One block of the tower ``name``; ``at`` stands before its keys."""
    dim, far = c["encoder_embed_dim"], ["encoder_attn"] if name == "decoder" else []
    norms = ["layer_norms.0", "layer_norms.1", "layer_norms.2"]
    if name == "decoder":
        norms = ["self_attn_layer_norm", "final_layer_norm", "macaron_layer_norm"]
    for attn in ["self_attn", *far]:
        w[f"{at}{attn}.in_proj_weight"] = draw(3 * dim, dim)
        w[f"{at}{attn}.in_proj_bias"] = draw(3 * dim)
        linear(w, f"{at}{attn}.out_proj", dim, dim)
    widths = {"": c[f"{name}_ffn_embed_dim"]}
    if c["macaron"]:
        widths["macaron_"] = c["encoder_ffn_embed_dim"]
    for half, width in widths.items():
        linear(w, f"{at}{half}fc1", width, dim)
        linear(w, f"{at}{half}fc2", dim, width)
    if not c.get("no_normalize_affine"):
        used = norms if c["macaron"] else norms[:2]
        for one in used + [f"{attn}_layer_norm" for attn in far]:
            norm(w, f"{at}{one}", dim)


def tower(w: State, c: Options, name: str) -> None:
    """The blocks, the final norm and the positions."""
    dim = c["encoder_embed_dim"]
    for i in range(c[f"{name}_layers"]):
        layer(w, c, f"{name}.layers.{i}.", name)
    if c[f"{name}_normalize_before"] and not c.get("no_normalize_affine"):
        norm(w, f"{name}.layer_norm", dim)
    if not c["no_token_positional_embeddings"]:
        longest = c["max_source_positions" if name == "encoder" else "max_target_positions"]
        if c[f"{name}_learned_pos"]:
            w[f"{name}.embed_positions.weight"] = draw(longest + c["pad_index"] + 1, dim)
        else:
            w[f"{name}.embed_positions._float_tensor"] = draw(1)
    w[f"{name}.version"] = torch.tensor([2.0], dtype=torch.float64)


def translation_state(c: Options) -> State:
    """Tables that fairseq shares are the same tensor."""
    vocab, dim = c["vocab"], c["encoder_embed_dim"]
    w: State = {"encoder.embed_tokens.weight": draw(vocab, dim)}
    w["decoder.embed_tokens.weight"] = (
        w["encoder.embed_tokens.weight"] if c["share_all_embeddings"] else draw(vocab, dim)
    )
    if not c["share_all_embeddings"] and not c["share_decoder_input_output_embed"]:
        w["decoder.embed_out"] = draw(vocab, dim)
    tower(w, c, "encoder")
    tower(w, c, "decoder")
    return w


def bert_state(c: Options) -> State:
    vocab, dim = c["vocab"], c["encoder_embed_dim"]
    w: State = {
        "encoder.embed_tokens.weight": draw(vocab, dim),
        "encoder.embed_segment.weight": draw(2, dim),
    }
    w["embed_out"] = (
        w["encoder.embed_tokens.weight"] if c["share_all_embeddings"] else draw(vocab, dim)
    )
    tower(w, c, "encoder")
    linear(w, "mid_layer.0", dim, dim)
    norm(w, "mid_layer.2", dim)
    linear(w, "classifier", 1, dim)
    return w
