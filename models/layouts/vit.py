"""Key layouts of ViT: those of timm's ``vit_*`` models.

"timm" is the form of ``VisionTransformer`` and, for models with rotary positions, of ``Eva`` with
fused projections. The others name the same weights in their own way: "timm-eva02" (no key bias), "timm-eva" (gate
and value of a gated FFN apart, too), "timm-split" (query, key and value apart), "timm-srelpos" (one
relative position function for all blocks). All are read by one function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from effformer.checks import FormatError
from effformer.layout import Layout, StateDict, has_keys, renamed

from .forms import SIZES, Choice, Form
from .torchvision import TORCHVISION

__all__ = ["LAYOUTS"]

_CORE = [
    ("blocks.{i}.attn.part.core.fc1", "blocks.{i}.attn.rel_pos.mlp.fc1"),
    ("blocks.{i}.attn.part.core.fc2", "blocks.{i}.attn.rel_pos.mlp.fc2"),
    ("blocks.{i}.attn.part.core.norm", "blocks.{i}.attn.sub_norm"),
    *(
        (f"blocks.{{i}}.attn.part.core.lambda_{x}", f"blocks.{{i}}.attn.lambda_{x}")
        for x in ("q1", "k1", "q2", "k2")
    ),
]
_OUTSIDE = [
    ("stem", "patch_embed.backbone"),
    ("patch_embed.proj", "patch_embed.proj"),
    ("class_token", "cls_token"),
    ("registers", "reg_token"),
    ("pos_embed", "pos_embed"),
    ("rope.freqs", "rope.freqs"),
    ("norm_before", "norm_pre"),
    ("norm", "norm"),
    ("head.norm", "fc_norm"),
    ("head.pool.latent", "attn_pool.latent"),
    ("head.pool.attn.q", "attn_pool.q"),
    ("head.pool.attn.kv", "attn_pool.kv"),
    ("head.pool.attn.proj", "attn_pool.proj"),
    ("head.pool.ffn.norm", "attn_pool.norm"),
    ("head.pool.ffn.part", "attn_pool.mlp"),
    ("head.linear", "head"),
]
_BLOCKS = [
    ("blocks.{i}.attn.norm", "blocks.{i}.norm1"),
    ("blocks.{i}.ffn.norm", "blocks.{i}.norm2"),
    ("blocks.{i}.norm", "blocks.{i}.in_norm"),
    ("blocks.{i}.layer_scale", "blocks.{i}.ls.gamma"),
    ("blocks.{i}.attn{j}.norm", "blocks.{i}.attns.{j}.norm"),
    ("blocks.{i}.attn{j}.part", "blocks.{i}.attns.{j}.attn"),
    ("blocks.{i}.attn{j}.layer_scale", "blocks.{i}.attns.{j}.ls.gamma"),
    ("blocks.{i}.ffn{j}.norm", "blocks.{i}.ffns.{j}.norm"),
    ("blocks.{i}.ffn{j}.part", "blocks.{i}.ffns.{j}.mlp"),
    ("blocks.{i}.ffn{j}.layer_scale", "blocks.{i}.ffns.{j}.ls.gamma"),
    ("blocks.{i}.attn.part", "blocks.{i}.attn"),
    ("blocks.{i}.ffn.part", "blocks.{i}.mlp"),
]
_GAMMA = [
    ("blocks.{i}.attn.layer_scale", "blocks.{i}.ls1.gamma"),
    ("blocks.{i}.ffn.layer_scale", "blocks.{i}.ls2.gamma"),
]
_EVA_GAMMA = [
    ("blocks.{i}.attn.layer_scale", "blocks.{i}.gamma_1"),
    ("blocks.{i}.ffn.layer_scale", "blocks.{i}.gamma_2"),
]


_READ, _WRITE, _WRITE_EVA = (
    renamed("timm", [*_CORE, *gamma, *_BLOCKS, *_OUTSIDE], recognise=has_keys("cls_token"))
    for gamma in ([*_GAMMA, *_EVA_GAMMA], _GAMMA, _EVA_GAMMA)
)


def _from_timm(state: StateDict, config: Any) -> StateDict:
    state = dict(state)
    _check_positions(state, config)
    shared = {k: state.pop(k) for k in list(state) if k.startswith("shared_rel_pos.")}
    for i in range(config.depth):
        _split_parallel(state, f"blocks.{i}", config.dim)
        _merge(state, f"blocks.{i}")
        for key, value in shared.items():
            state[key.replace("shared_rel_pos", f"blocks.{i}.attn.rel_pos")] = value.clone()
    return _READ.to_ours(state, config)


_BODY = (
    *SIZES, "image_size", "channels", "patch", "num_classes", "stem", "prefix.*", "positions.absolute",
    "positions.rope", "norm.*", "head.*",
)  # fmt: skip
_PROJECTIONS = ("qkv_bias", "proj_bias", "head_dim", "kv_heads")
_FORM = Form(
    free=(
        *_BODY, *(f"attn.{name}" for name in _PROJECTIONS), "attn.core.hidden", "attn.core.eps", "ffn.ratio",
        "ffn.hidden", "ffn.bias", "block.scale_ffn", "block.copies",
    ),
    choices={
        "block": ("prenorm", "respost", "parallel", "parallel-branches"),
        "attn.core": ("softmax", "relative", "differential"),
        "attn.qk_norm": (True, False),
        "ffn": ("mlp", "swiglu"),
        "ffn.act": ("gelu", "gelu-tanh", "quick-gelu", "silu", "relu"),
    },
    layers=True,
)  # fmt: skip


def _strange(form: Form, config: Any) -> dict[str, str]:
    found = form.strange(config)
    if "ffn" not in found and config.ffn.entry.name == "swiglu" and config.ffn.act != "silu":
        found["ffn.act"] = f"ffn.act={config.ffn.act!r} in 'swiglu'"
    return found


def _form(**choices: Choice) -> Form:
    """The form of networks with fewer choices; two underscores stand for the dot of a path."""
    fewer = {path.replace("__", "."): choice for path, choice in choices.items()}
    free = tuple(path for path in _FORM.free if path not in fewer)
    return replace(_FORM, free=free, choices={**_FORM.choices, **fewer})


_EVA_FORM = _form(block=(), attn__core=(), attn__kv_heads=())
_SPLIT_FORM = _form(block=(), attn__core=())
_SHARED_FORM = _form(block=("respost",), attn__core=lambda core: core == "relative")


def _options(config: Any) -> Mapping[str, Any]:
    return {
        "global_pool": config.head.pool,
        "num_heads": config.heads,
        "patch_size": config.patch,
        "class_token": config.prefix.class_token,
        "no_embed_class": not config.prefix.positions,
    }


def _to_timm(state: StateDict, config: Any, *, eva: bool = False) -> StateDict:
    names = _WRITE_EVA if eva or config.positions.rope is not None else _WRITE
    out = names.from_ours(state, config)
    if config.block.entry.name == "parallel":
        for i in range(config.depth):
            _join_parallel(out, f"blocks.{i}")
    return out


def _to_timm_eva02(state: StateDict, config: Any) -> StateDict:
    out = _to_timm(state, config, eva=True)
    for i in range(config.depth):
        bias = out.pop(f"blocks.{i}.attn.qkv.bias", None)
        if bias is not None:
            query, key, value = bias.chunk(3)
            if key.any():
                raise FormatError(f"blocks.{i}: 'timm-eva' has no key bias, but the model has one")
            out[f"blocks.{i}.attn.q_bias"], out[f"blocks.{i}.attn.v_bias"] = query, value
    return out


def _to_timm_eva(state: StateDict, config: Any) -> StateDict:
    out = _to_timm_eva02(state, config)
    for i in range(config.depth):
        mlp = f"blocks.{i}.mlp"
        if out[f"{mlp}.fc1.weight"].shape[0] == out[f"{mlp}.fc2.weight"].shape[1]:
            continue
        for kind in ("weight", "bias"):
            if f"{mlp}.fc1.{kind}" in out:
                gate, value = out.pop(f"{mlp}.fc1.{kind}").chunk(2)
                out[f"{mlp}.fc1_g.{kind}"], out[f"{mlp}.fc1_x.{kind}"] = gate, value
    return out


def _to_timm_split(state: StateDict, config: Any) -> StateDict:
    out = _to_timm(state, config)
    for i in range(config.depth):
        attn = f"blocks.{i}.attn"
        rows = out[f"{attn}.proj.weight"].shape[1]
        for kind in ("weight", "bias"):
            if f"{attn}.qkv.{kind}" in out:
                packed = out.pop(f"{attn}.qkv.{kind}")
                grouped = (packed.shape[0] - rows) // 2
                for x, value in zip("qkv", packed.split([rows, grouped, grouped]), strict=True):
                    out[f"{attn}.{x}_proj.{kind}"] = value
    return out


def _to_timm_shared(state: StateDict, config: Any) -> StateDict:
    out = _to_timm(state, config)
    for key in [k for k in out if ".attn.rel_pos." in k]:
        name, value = f"shared_rel_pos.{key.partition('.rel_pos.')[2]}", out.pop(key)
        if not torch.equal(out.setdefault(name, value), value):
            raise FormatError(f"{key}: 'timm-srelpos' has one bias function, the blocks' differ")
    return out


def _check_positions(state: StateDict, config: Any) -> None:
    """Refuse a position table of another image size: it is interpolated on request only."""
    table = state.get("pos_embed")
    if table is None or not config.positions.absolute:
        return
    front = config.prefix.count if config.prefix.positions else 0
    tokens = front + config.grid[0] * config.grid[1]
    if table.shape[-2] != tokens:
        raise FormatError(
            f"pos_embed has {table.shape[-2]} entries, but image_size={config.image_size} needs "
            f"{tokens}; build the model with the image size of the file, load, then call "
            "model.resized(...)"
        )


def _split_parallel(state: StateDict, block: str, dim: int) -> None:
    """Cut the joint projections of a parallel block (FFN and q, k, v) into those of its parts."""
    if f"{block}.in_proj.weight" not in state:
        return
    weight = state.pop(f"{block}.in_proj.weight")
    sizes = [weight.shape[0] - 3 * dim, 3 * dim]
    state[f"{block}.mlp.fc1.weight"], state[f"{block}.attn.qkv.weight"] = weight.split(sizes)
    if f"{block}.in_proj.bias" in state:
        halves = state.pop(f"{block}.in_proj.bias").split(sizes)
        state[f"{block}.mlp.fc1.bias"], state[f"{block}.attn.qkv.bias"] = halves
    if f"{block}.out_proj.weight" in state:
        halves = state.pop(f"{block}.out_proj.weight").split([dim, sizes[0]], dim=1)
        state[f"{block}.attn.proj.weight"], state[f"{block}.mlp.fc2.weight"] = halves
    for theirs, ours in _PARALLEL.items():
        for key in [k for k in state if k.startswith(f"{block}.{theirs}")]:
            state[key.replace(f"{block}.{theirs}", f"{block}.{ours}")] = state.pop(key)


def _join_parallel(out: StateDict, block: str) -> None:
    fused = f"{block}.attn.proj.bias" not in out and f"{block}.mlp.fc2.bias" in out
    parts = [out.pop(f"{block}.mlp.fc1.weight"), out.pop(f"{block}.attn.qkv.weight")]
    out[f"{block}.in_proj.weight"] = torch.cat(parts)
    if f"{block}.attn.qkv.bias" in out:
        parts = [out.pop(f"{block}.mlp.fc1.bias"), out.pop(f"{block}.attn.qkv.bias")]
        out[f"{block}.in_proj.bias"] = torch.cat(parts)
    if fused:
        parts = [out.pop(f"{block}.attn.proj.weight"), out.pop(f"{block}.mlp.fc2.weight")]
        out[f"{block}.out_proj.weight"] = torch.cat(parts, dim=1)
    for theirs, ours in _PARALLEL.items():
        if theirs == "out_proj.bias" and not fused:
            continue
        for key in [k for k in out if k.startswith(f"{block}.{ours}")]:
            out[key.replace(f"{block}.{ours}", f"{block}.{theirs}")] = out.pop(key)


_PARALLEL = {
    "mlp_bias": "mlp.fc1.bias",
    "out_proj.bias": "mlp.fc2.bias",
    "attn_out_proj.": "attn.proj.",
    "mlp_out_proj.": "mlp.fc2.",
    "q_norm.": "attn.q_norm.",
    "k_norm.": "attn.k_norm.",
    "sub_norm.": "attn.sub_norm.",
    "lambda_": "attn.lambda_",
}


def _merge(state: StateDict, block: str) -> None:
    """Put query, key and value into one matrix, gate and value too; an absent key bias is zero."""
    for kind in ("weight", "bias"):
        for parts, whole in (
            ([f"attn.{x}_proj.{kind}" for x in "qkv"], f"attn.qkv.{kind}"),
            ([f"mlp.fc1_{x}.{kind}" for x in "gx"], f"mlp.fc1.{kind}"),
        ):
            keys = [f"{block}.{part}" for part in parts]
            if all(k in state for k in keys):
                state[f"{block}.{whole}"] = torch.cat([state.pop(k) for k in keys])
    if f"{block}.attn.q_bias" in state and f"{block}.attn.v_bias" in state:
        query, value = state.pop(f"{block}.attn.q_bias"), state.pop(f"{block}.attn.v_bias")
        state[f"{block}.attn.qkv.bias"] = torch.cat([query, torch.zeros_like(query), value])


def _marked(*marks: str) -> Callable[[Iterable[str]], bool]:
    """A recogniser: a patch embedding, and one of these keys in the first block or outside."""

    def recognise(keys: Iterable[str]) -> bool:
        present = set(keys)
        return any(k.startswith("patch_embed.") for k in present) and any(
            m in present or f"blocks.0.{m}" in present for m in marks
        )

    return recognise


TIMM = Layout(
    name="timm",
    recognise=_marked("attn.proj.weight", "in_proj.weight", "attns.0.attn.proj.weight"),
    to_ours=_from_timm,
    from_ours=_to_timm,
    strange=partial(_strange, _FORM),
    options=_options,
)
TIMM_EVA, TIMM_EVA02, TIMM_SPLIT, TIMM_SHARED = (
    replace(
        TIMM, name=name, recognise=_marked(*marks), from_ours=write, strange=partial(_strange, form)
    )
    for name, marks, write, form in (
        ("timm-eva", ("mlp.fc1_g.weight",), _to_timm_eva, _EVA_FORM),
        ("timm-eva02", ("attn.q_bias",), _to_timm_eva02, _EVA_FORM),
        ("timm-split", ("attn.q_proj.weight",), _to_timm_split, _SPLIT_FORM),
        ("timm-srelpos", ("shared_rel_pos.mlp.fc1.weight",), _to_timm_shared, _SHARED_FORM),
    )
)
# "timm" is the most general form and comes last
LAYOUTS = (TORCHVISION, TIMM_SHARED, TIMM_SPLIT, TIMM_EVA, TIMM_EVA02, TIMM)
