"""Key layout of RecTok's official checkpoints."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effformer.layout import Layout, StateDict, has_keys, renamed

from .forms import SIZES, Form

__all__ = ["OFFICIAL"]

_TEACHER = "sem_decoders.dinov3"
_TOWERS = {"encoder": "encoder", "decoder": "decoder", "describer": _TEACHER}
_PAIRS = [
    ("patch_embed.proj", "encoder.patch_embed.0"),
    ("to_latents", "encoder.latent_head"),
    ("from_latents", "decoder.decoder_embed"),
    ("mask_token", "decoder.mask_token"),
    ("to_pixels", "decoder.ffn.1"),
    ("smooth", "decoder.conv_out"),
    ("from_noisy", f"{_TEACHER}.token_embedding"),
    ("mask_feature", f"{_TEACHER}.mask_embedding"),
    ("to_features", f"{_TEACHER}.out"),
]
for _ours, _theirs in _TOWERS.items():
    _PAIRS += [
        (f"{_ours}.positions", f"{_theirs}.positional_embedding"),
        (f"{_ours}.norm_in", f"{_theirs}.ln_pre"),
        (f"{_ours}.norm_out", f"{_theirs}.ln_post"),
        *(
            (f"{_ours}.blocks.{{i}}.{a}", f"{_theirs}.transformer.{{i}}.{b}")
            for a, b in (
                ("attn.norm", "norm1"), ("ffn.norm", "norm2"), ("ffn.part.fc1", "mlp.w12"),
                ("ffn.part.fc2", "mlp.w3"), ("attn.part", "attn"),
            )
        ),
    ]  # fmt: skip
_NAMES = renamed(
    "official", _PAIRS, recognise=has_keys("encoder.latent_head.weight", "decoder.mask_token")
)
_PIXELS = "decoder.ffn.1.weight"


def _paired(state: StateDict, config: Any, *, back: bool) -> StateDict:
    """Channels of queries and keys with the members of a pair half a head apart, as we turn them, or
    (``back``) beside each other.
    """
    out = dict(state)
    for key, value in state.items():
        heads = config.describer_heads if key.startswith("describer.") else config.heads
        if key.endswith(("attn.part.q_norm.weight", "attn.part.k_norm.weight")):
            out[key] = _turned(value, back=back)
        elif ".attn.part.qkv." in key and value.shape[0] % (6 * heads) == 0:
            q, k, v = value.unflatten(0, (3, heads, -1)).unbind()
            turned = (_turned(x.transpose(0, 1), back=back).transpose(0, 1) for x in (q, k))
            out[key] = torch.stack([*turned, v]).flatten(0, 2)
    return out


def _turned(x: Tensor, *, back: bool) -> Tensor:
    pairs = x.unflatten(0, (2, -1) if back else (-1, 2))
    return pairs.transpose(0, 1).flatten(0, 1)


def _to_ours(state: StateDict, config: Any) -> StateDict:
    """The part that predicts features is called by its teacher there, whoever that is."""
    out: StateDict = {}
    for key, value in state.items():
        first, _, rest = key.partition(".")
        if first == "sem_decoders":
            key = f"{_TEACHER}.{rest.partition('.')[2]}"
        out[key] = value.flatten(1) if key == _PIXELS else value
    return _paired(_NAMES.to_ours(out, config), config, back=False)


def _from_ours(state: StateDict, config: Any) -> StateDict:
    out = _NAMES.from_ours(_paired(state, config, back=True), config)
    return {k: x[..., None, None] if k == _PIXELS else x for k, x in out.items()}


OFFICIAL = Layout(
    name="official",
    recognise=_NAMES.recognise,
    to_ours=_to_ours,
    from_ours=_from_ours,
    strange=Form(
        free=(*SIZES, "input_size", "patch", "channels", "features", "describer_*", "gamma", "ffn.ratio", "ffn.hidden"),
        choices={"attn.qk_norm": (True, False), "attn.qk_norm_eps": (1e-6,)},
    ).strange,
)  # fmt: skip
