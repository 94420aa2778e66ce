"""Macaron Net written down slowly: one sample, one head, one token at a time, fairseq's names.

``c`` holds fairseq's options, ``w`` a state dict with its keys. Nothing is shared with the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Options = Mapping[str, Any]
State = dict[str, Tensor]

TRANSLATION: Options = {
    "encoder_embed_dim": 12, "encoder_ffn_embed_dim": 10, "encoder_attention_heads": 3,
    "encoder_layers": 1, "decoder_embed_dim": 12, "decoder_ffn_embed_dim": 10,
    "decoder_attention_heads": 3, "decoder_layers": 1, "share_all_embeddings": True,
    "share_decoder_input_output_embed": True, "left_pad_source": True, "left_pad_target": False,
    "max_source_positions": 16, "max_target_positions": 16, "macaron": True,
    "encoder_normalize_before": True, "decoder_normalize_before": True,
    "encoder_learned_pos": False, "decoder_learned_pos": False,
    "no_token_positional_embeddings": False, "adaptive_softmax_cutoff": None,
    "decoder_output_dim": 12, "decoder_input_dim": 12, "vocab": 17, "pad_index": 1,
}  # fmt: skip
BERT: Options = {
    "encoder_embed_dim": 12, "encoder_ffn_embed_dim": 10, "encoder_attention_heads": 3,
    "encoder_layers": 2, "macaron": True, "encoder_normalize_before": True,
    "encoder_learned_pos": False, "share_all_embeddings": True,
    "no_token_positional_embeddings": False, "act_fn": "gelu", "no_normalize_affine": True,
    "max_source_positions": 16, "vocab": 17, "pad_index": 1,
}  # fmt: skip


def relu(x: Tensor) -> Tensor:
    return x * (x > 0)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": relu, "gelu": gelu}


def linear(x: Tensor, w: State, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def norm(x: Tensor, w: State, name: str) -> Tensor:
    mean = x.mean(dim=-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(dim=-1, keepdim=True)
    y = (x - mean) / (variance + 1e-5).sqrt()
    if f"{name}.weight" not in w:
        return y
    return y * w[f"{name}.weight"] + w[f"{name}.bias"]


def attention(
    x: Tensor, memory: Tensor, w: State, name: str, heads: int, sees: Callable[[int, int], bool]
) -> Tensor:
    """(N, D) queries over (M, D), token by token; ``sees(i, j)``: query i may attend to key j."""
    dim = x.shape[1]
    width = dim // heads
    weight, bias = w[f"{name}.in_proj_weight"], w[f"{name}.in_proj_bias"]
    q, k, v = (
        rows @ weight[i * dim : (i + 1) * dim].T + bias[i * dim : (i + 1) * dim]
        for i, rows in enumerate((x, memory, memory))
    )
    out = []
    for i in range(len(x)):
        keys = [j for j in range(len(memory)) if sees(i, j)]
        parts = []
        for h in range(heads):
            cut = slice(h * width, (h + 1) * width)
            scores = torch.stack([(q[i, cut] * k[j, cut]).sum() * width**-0.5 for j in keys])
            weights = scores.exp() / scores.exp().sum()
            parts.append(sum(p * v[j, cut] for p, j in zip(weights, keys, strict=True)))
        out.append(torch.cat(parts))
    return linear(torch.stack(out), w, f"{name}.out_proj")


def branch(
    x: Tensor, w: State, name: str, pre: bool, part: Callable[[Tensor], Tensor], factor: float = 1.0
) -> Tensor:
    if pre:
        return x + factor * part(norm(x, w, name))
    return norm(x + factor * part(x), w, name)


def layer(x: Tensor, memory: Tensor | None, w: State, name: str, o: Options) -> Tensor:
    """One block; ``memory`` makes it a decoder's."""
    pre, heads = o["pre"], o["heads"]
    decoder = memory is not None
    norms = ("layer_norms.2", "layer_norms.0", "layer_norms.1")
    if decoder:
        norms = ("macaron_layer_norm", "self_attn_layer_norm", "final_layer_norm")
    first, own, last = (f"{name}.{n}" for n in norms)

    def ffn(which: str, act: str) -> Callable[[Tensor], Tensor]:
        return lambda u: linear(
            ACTIVATIONS[act](linear(u, w, f"{name}.{which}fc1")), w, f"{name}.{which}fc2"
        )

    factor = o.get("factor", 0.5) if o["macaron"] else 1.0
    if o["macaron"]:
        x = branch(x, w, first, pre, ffn("macaron_", o.get("first_act", "relu")), factor)
    sees = (lambda i, j: j <= i) if decoder else (lambda i, j: bool(o["real"][j]))
    x = branch(x, w, own, pre, lambda u: attention(u, u, w, f"{name}.self_attn", heads, sees))
    if decoder:
        far = f"{name}.encoder_attn"
        x = branch(
            x, w, f"{far}_layer_norm", pre,
            lambda u: attention(u, memory, w, far, heads, lambda i, j: bool(o["real"][j])),
        )  # fmt: skip
    return branch(x, w, last, pre, ffn("", o["act"]), factor)


def row_of(table: Tensor, index: int, pad: int) -> Tensor:
    """A row of a table; that of padding is not learned."""
    return table[index].detach() if index == pad else table[index]


def embed(tokens: Tensor, w: State, tower: str, o: Options) -> Tensor:
    """Scaled rows of the table plus positions, of one sample."""
    table, pad = w[f"{tower}.embed_tokens.weight"], o["pad"]
    dim, ahead = table.shape[1], int((tokens == pad).sum()) if o["left"] else 0
    rows = []
    for column, token in enumerate(tokens.tolist()):
        row, place = row_of(table, token, pad) * math.sqrt(dim), column - ahead + pad + 1
        if o["learned"]:
            codes = w[f"{tower}.embed_positions.weight"]
            row = row + row_of(codes, pad if token == pad else place, pad)
        elif o["positions"] and token != pad:
            steps = [math.exp(-math.log(1e4) * i / (dim // 2 - 1)) for i in range(dim // 2)]
            waves = [math.sin(place * s) for s in steps] + [math.cos(place * s) for s in steps]
            row = row + torch.tensor(waves + [0.0] * (dim % 2), dtype=row.dtype)
        rows.append(row)
    return torch.stack(rows)


def options(c: Options, tower: str, tokens: Tensor, real: Tensor) -> dict[str, Any]:
    """What `embed` and `layer` need to know; ``tokens`` of the tower, ``real`` keys of its source."""
    positions = not c["no_token_positional_embeddings"]
    side = "left_pad_source" if tower == "encoder" else "left_pad_target"
    return {
        "pre": c[f"{tower}_normalize_before"], "heads": c[f"{tower}_attention_heads"],
        "macaron": c["macaron"], "act": c.get("act_fn", "relu"), "real": real,
        "learned": positions and c[f"{tower}_learned_pos"], "positions": positions,
        "left": c.get(side, False), "pad": c["pad_index"],
    }  # fmt: skip


def stack(x: Tensor, memory: Tensor | None, w: State, tower: str, o: Options, depth: int) -> Tensor:
    for i in range(depth):
        x = layer(x, memory, w, f"{tower}.layers.{i}", o)
    return norm(x, w, f"{tower}.layer_norm") if o["pre"] else x


def encode(c: Options, w: State, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
    """(B, N) ids to (B, N, D)."""
    out = []
    for b, row in enumerate(tokens):
        o = options(c, "encoder", row, row != c["pad_index"])
        x = embed(row, w, "encoder", o)
        if segments is not None:
            table = w["encoder.embed_segment.weight"]
            x = x + torch.stack([row_of(table, s, 1) for s in segments[b].tolist()])
        out.append(stack(x, None, w, "encoder", o, c["encoder_layers"]))
    return torch.stack(out)


def translate(c: Options, w: State, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Memory (B, M, D) and logits (B, N, V)."""
    memory, out = encode(c, w, source), []
    for b, row in enumerate(target):
        o = options(c, "decoder", row, source[b] != c["pad_index"])
        x = embed(row, w, "decoder", o)
        x = stack(x, memory[b], w, "decoder", o, c["decoder_layers"])
        tied = c["share_all_embeddings"] or c["share_decoder_input_output_embed"]
        out.append(x @ w["decoder.embed_tokens.weight" if tied else "decoder.embed_out"].T)
    return memory, torch.stack(out)


def bert(c: Options, w: State, tokens: Tensor, segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features (B, N, D), logits of all tokens (B, N, V), next-sentence logits (B,)."""
    h = encode(c, w, tokens, segments)
    y = norm(gelu(linear(h, w, "mid_layer.0")), w, "mid_layer.2")
    return h, y @ w["embed_out"].T, linear(h[:, 0], w, "classifier")[:, 0]
