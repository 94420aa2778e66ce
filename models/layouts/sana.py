"""Key layouts of SANA (diffusers): the whole network, its linear attention and its FFN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effformer.layout import Layout, Rows, StateDict, has_keys, renamed

from .forms import SIZES, Form

__all__ = ["ATTENTION", "DIFFUSERS", "MIX_FFN"]

ATTENTION = renamed(
    "diffusers",
    [("proj", "to_out.0"), ("q_norm", "norm_q"), ("k_norm", "norm_k")],
    rows=[Rows(("qkv.{kind}",), tuple(f"to_{x}.{{kind}}" for x in "qkv"))],
    recognise=has_keys("to_q.weight", "to_out.0.weight"),
)
"""One self-attention."""

_FFN = renamed(
    "diffusers",
    [("fc1", "conv_inverted"), ("conv", "conv_depth"), ("fc2", "conv_point")],
    recognise=has_keys("conv_inverted.weight", "conv_point.weight"),
)
_POINTWISE = ("conv_inverted.weight", "conv_point.weight")


def _to_ours(state: StateDict, config: Any) -> StateDict:
    plain = {k: x.flatten(1) if k in _POINTWISE else x for k, x in state.items()}
    return _FFN.to_ours(plain, config)


def _from_ours(state: StateDict, config: Any) -> StateDict:
    out = _FFN.from_ours(state, config)
    return {k: x[..., None, None] if k in _POINTWISE else x for k, x in out.items()}


MIX_FFN = Layout(name="diffusers", recognise=_FFN.recognise, to_ours=_to_ours, from_ours=_from_ours)
"""One `effformer.ffn.GLUMBConv`; its linear layers are 1x1 convolutions there."""

_HERE, _THERE = "blocks.{i}", "transformer_blocks.{i}"
_PLAIN_TIME = [("time_embed", "time_embed.emb.timestep_embedder")]
_TOLD_TIME = [
    ("time_embed", "time_embed.timestep_embedder"),
    ("guidance_embed", "time_embed.guidance_embedder"),
]


def _network(*, told: bool) -> Layout:
    """Keys of the whole network; where it is told the scale of guidance (Sprint), the embedding of
    the time stands elsewhere.
    """
    times = _TOLD_TIME if told else _PLAIN_TIME
    return renamed(
        "diffusers",
        [
            ("patch_embed.proj", "patch_embed.proj"),
            ("text_embed.0", "caption_projection.linear_1"),
            ("text_embed.2", "caption_projection.linear_2"),
            ("text_norm", "caption_norm"),
            *((f"{a}.fc{n}", f"{b}.linear_{n}") for a, b in times for n in (1, 2)),
            ("modulation", "time_embed.linear"),
            *(
                (f"{_HERE}.{attn}.part.{a}", f"{_THERE}.{attn_there}.{b}")
                for attn, attn_there in (("attn", "attn1"), ("cross", "attn2"))
                for a, b in (("proj", "to_out.0"), ("q_norm", "norm_q"), ("k_norm", "norm_k"))
            ),
            (f"{_HERE}.cross.part.q", f"{_THERE}.attn2.to_q"),
            *(
                (f"{_HERE}.ffn.part.{a}", f"{_THERE}.ff.{b}")
                for a, b in (("fc1", "conv_inverted"), ("conv", "conv_depth"), ("fc2", "conv_point"))
            ),
            (f"{_HERE}.modulation.table", f"{_THERE}.scale_shift_table"),
            ("final.modulation.table", "scale_shift_table"),
            ("final.linear", "proj_out"),
        ],
        recognise=_RECOGNISE,
        rows=[
            Rows(
                (f"{_HERE}.attn.part.qkv.{{kind}}",),
                tuple(f"{_THERE}.attn1.to_{x}.{{kind}}" for x in "qkv"),
            ),
            Rows(
                (f"{_HERE}.cross.part.kv.{{kind}}",),
                tuple(f"{_THERE}.attn2.to_{x}.{{kind}}" for x in "kv"),
            ),
        ],
    )  # fmt: skip


_RECOGNISE = has_keys(
    "caption_projection.linear_1.weight", "transformer_blocks.0.ff.conv_depth.weight"
)
_FORM = Form(
    free=(
        *SIZES, "input_size", "channels", "patch", "text_dim", "text_length", "ffn.ratio", "ffn.hidden",
        "attn.qkv_bias", "attn.core.eps", "cross.heads", "cross.head_dim",
    ),
    choices={
        "guidance": (0.1,),
        **{f"{attn}.qk_norm": ("across-heads",) for attn in ("attn", "cross")},
    },
)  # fmt: skip


def _network_to_ours(state: StateDict, config: Any) -> StateDict:
    plain = {k: x.flatten(1) if k.endswith(_POINTWISE) else x for k, x in state.items()}
    told = any(key.startswith(_TOLD_TIME[1][1]) for key in state)
    return _network(told=told).to_ours(plain, config)


def _network_from_ours(state: StateDict, config: Any) -> StateDict:
    out = _network(told=config.guidance is not None).from_ours(state, config)
    return {k: x[..., None, None] if k.endswith(_POINTWISE) else x for k, x in out.items()}


def _options(config: Any) -> Mapping[str, Any]:
    """Options of diffusers' ``SanaTransformer2DModel``."""
    normed = config.attn.qk_norm
    return {
        "guidance_embeds": config.guidance is not None,
        "qk_norm": "rms_norm_across_heads" if normed else None,
        "num_attention_heads": config.heads,
        "num_cross_attention_heads": config.cross.head_count(config.heads),
        "patch_size": config.patch,
    }


DIFFUSERS = Layout(
    name="diffusers",
    recognise=_RECOGNISE,
    to_ours=_network_to_ours,
    from_ours=_network_from_ours,
    strange=_FORM.strange,
    options=_options,
)
"""The whole network."""
