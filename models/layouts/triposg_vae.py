"""Key layout of TripoSG's autoencoder."""

from __future__ import annotations

from typing import Any

from effformer.layout import Layout, Rows, StateDict, has_keys, renamed

from .forms import SIZES, Form
from .triposg import apart, together, turned

__all__ = ["OFFICIAL"]

_RECOGNISE = has_keys("encoder.blocks.0.attn2.norm_cross.weight", "decoder.proj_query.weight")


def _network(config: Any) -> Layout:
    """Blocks stand in one list here, and in two there, which begin and end with those that read."""
    first = config.encoder_depth
    blocks = {
        f"blocks.{i}": f"encoder.blocks.{i + 1}" if i < first else f"decoder.blocks.{i - first}"
        for i in range(config.depth)
    }
    reading = {"gather": "encoder.blocks.0", "ask": f"decoder.blocks.{config.depth - first}"}
    mixers = {
        **{f"{a}.attn": (f"{b}.attn1", f"{b}.norm1", "qkv") for a, b in blocks.items()},
        **{f"{a}.cross": (f"{b}.attn2", f"{b}.norm2", "kv") for a, b in reading.items()},
    }
    pairs = [
        ("embed", "encoder.proj_in"),
        ("encoder_norm", "encoder.norm_out"),
        ("to_latents", "quant"),
        ("from_latents", "post_quant"),
        ("embed_points", "decoder.proj_query"),
        ("norm", "decoder.norm_out"),
        ("head", "decoder.proj_out"),
    ]
    for ours, theirs in reading.items():
        pairs += [
            (f"{ours}.memory_norm", f"{theirs}.attn2.norm_cross"),
            (f"{ours}.cross.part.q", f"{theirs}.attn2.to_q"),
        ]
    for ours, theirs in (blocks | reading).items():
        pairs += [
            (f"{ours}.ffn.norm", f"{theirs}.norm3"),
            (f"{ours}.ffn.part.fc1", f"{theirs}.ff.net.0.proj"),
            (f"{ours}.ffn.part.fc2", f"{theirs}.ff.net.2"),
        ]
    rows = []
    for ours, (attn, norm, parts) in mixers.items():
        pairs += [(f"{ours}.norm", norm), (f"{ours}.part.proj", f"{attn}.to_out.0")]
        theirs_rows = tuple(f"{attn}.to_{x}.{{kind}}" for x in parts)
        rows.append(Rows((f"{ours}.part.{parts}.{{kind}}",), theirs_rows))
    return renamed("official", pairs, recognise=_RECOGNISE, rows=rows)


def _to_ours(state: StateDict, config: Any) -> StateDict:
    return turned(_network(config).to_ours(state, config), config, apart)


def _from_ours(state: StateDict, config: Any) -> StateDict:
    return _network(config).from_ours(turned(state, config, together), config)


OFFICIAL = Layout(
    name="official",
    recognise=_RECOGNISE,
    to_ours=_to_ours,
    from_ours=_from_ours,
    strange=Form(
        free=(
            *SIZES, "encoder_depth", "encoder_dim", "channels", "octaves", "latents", "surface", "points",
        ),
    ).strange,
    options=lambda config: {
        "num_attention_heads": config.heads,
        "width_encoder": config.encoder_dim,
        "width_decoder": config.dim,
        "num_layers_encoder": config.encoder_depth,
        "num_layers_decoder": config.depth - config.encoder_depth,
        "latent_channels": config.channels,
        "embed_frequency": config.octaves,
        "embed_include_pi": False,
    },
)  # fmt: skip
"""The whole autoencoder."""
