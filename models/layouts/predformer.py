"""Key layouts of PredFormer: those of the official code, whose names tell the arrangement.

"official" numbers its layers (``blocks.0.ts_temporal_transformer...``), or is one unit over
everything; "official-factorized" is one unit over space and one over time. An arrangement of two
units can be written in both ways, and is the same network.

Official patches run over (row, column, channel) on the way in and over (channel, row, column) on
the way out; ours are always images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from effformer.blocks.schedule import axes_of
from effformer.checks import FormatError
from effformer.layout import Layout, Rows, StateDict, has_keys, renamed

from .forms import SIZES, Form

__all__ = ["FACTORIZED", "OFFICIAL"]

_FULL = "space_temporal_transformer"
_FACTORIZED = {"t": "temporal_transformer", "hw": "space_transformer"}
_LAYERS = {
    ("hw", "t"): ("st_space_transformer", "st_temporal_transformer"),
    ("t", "hw"): ("ts_temporal_transformer", "ts_space_transformer"),
    ("t", "hw", "t"): (
        "temporal_transformer_first", "space_transformer", "temporal_transformer_second",
    ),
    ("hw", "t", "hw"): (
        "space_transformer_first", "temporal_transformer", "space_transformer_second",
    ),
    ("t", "hw", "hw", "t"): (
        "ts_temporal_transformer", "ts_space_transformer", "st_space_transformer",
        "st_temporal_transformer",
    ),
    ("hw", "t", "t", "hw"): (
        "st_space_transformer", "st_temporal_transformer", "ts_temporal_transformer",
        "ts_space_transformer",
    ),
}  # fmt: skip
"""Axes of the units of one layer, in execution order, and their names."""


Place = tuple[int, str, int, bool, bool]
"""Our block, the official unit, the layer in it; the mixer is a view; the unit ends here."""


def _units(config: Any) -> list[tuple[str, int]]:
    """Axes and number of blocks of every unit.

    Raises:
        FormatError: the official code has no such blocks.
    """
    if config.block.entry.name != "gated":
        raise FormatError(
            "predformer: official keys are those of gated blocks; keep this model in our layout"
        )
    depth, unit = config.depth, config.block.unit
    axes = axes_of(config.axes or "f", depth, "thw", where="predformer axes")
    runs = [axes[i : i + unit] for i in range(0, depth, unit)]
    if any(len(set(run)) > 1 or len(run) < unit for run in runs):
        raise FormatError(
            f"predformer: units of {unit} blocks that mix along different axes, or end without a "
            f"norm (axes {config.axes!r}, depth {depth}), have no official name"
        )
    return [(run[0], unit) for run in runs]


def _numbered(config: Any) -> list[str]:
    """Official names of the units, in execution order."""
    axes = tuple(axes for axes, _ in _units(config))
    if config.transposed_head:
        raise FormatError(
            "predformer: transposed_head belongs to one unit over space and one over time; "
            "use layout 'official-factorized'"
        )
    if axes == ("thw",):
        return [_FULL]
    for pattern, names in _LAYERS.items():
        layers, rest = divmod(len(axes), len(pattern))
        if not rest and axes == pattern * layers:
            return [f"blocks.{i}.{name}" for i in range(layers) for name in names]
    raise FormatError(
        f"predformer: units over {', '.join(axes)} are none of the published arrangements (full, "
        "facst, facts, binst, bints, tst, sts, tsst, stts); keep this model in our layout"
    )


def _factorized(config: Any) -> list[str]:
    axes = [axes for axes, _ in _units(config)]
    if sorted(axes) != ["hw", "t"]:
        raise FormatError(
            f"predformer: 'official-factorized' is one unit over space and one over time, this model "
            f"has units over {', '.join(axes)}; use 'official'"
        )
    return [_FACTORIZED[name] for name in axes]


def _places(config: Any, names: list[str]) -> Iterator[Place]:
    block = 0
    for name, (axes, count) in zip(names, _units(config), strict=True):
        for layer in range(count):
            yield block, name, layer, axes != "thw", layer == count - 1
            block += 1


def _renaming(config: Any, names: list[str]) -> Layout:
    pairs = [
        ("patch_embed.proj", "to_patch_embedding.1"), ("norm", "mlp_head.0"),
        ("head", "mlp_head.1"),
    ]  # fmt: skip
    rows = []
    for block, unit, layer, view, last in _places(config, names):
        ours, theirs = f"blocks.{block}", f"{unit}.layers.{layer}"
        mixer = f"{ours}.attn.part.mixer" if view else f"{ours}.attn.part"
        pairs += [
            (f"{ours}.attn.norm", f"{theirs}.0.norm"),
            (f"{mixer}.qkv", f"{theirs}.0.fn.to_qkv"),
            (f"{mixer}.proj", f"{theirs}.0.fn.to_out.0"),
            (f"{ours}.ffn.norm", f"{theirs}.1.norm"),
            (f"{ours}.ffn.part.fc2", f"{theirs}.1.fn.fc2"),
        ]
        gate, value = f"{theirs}.1.fn.fc1_g.{{kind}}", f"{theirs}.1.fn.fc1_x.{{kind}}"
        rows.append(Rows((f"{ours}.ffn.part.fc1.{{kind}}",), (gate, value)))
        if last:
            pairs.append((f"{ours}.norm", f"{unit}.norm"))
    return renamed("official", pairs, rows=rows, recognise=has_keys())


_FORM = Form(
    free=(
        *SIZES, "frames", "channels", "size", "patch", "axes", "transposed_head", "block.unit", "block.scale_*", "attn.head_dim",
        "attn.proj", "ffn.ratio", "ffn.hidden",
    )
)  # fmt: skip


def _strange(config: Any) -> dict[str, str]:
    """One head as wide as the tokens has no output projection there, all others have."""
    found, proj = _FORM.strange(config), getattr(config.attn, "proj", None)
    if proj is not None and proj is (
        config.heads == 1 and config.attn.head_dim in (None, config.dim)
    ):
        found["attn.proj"] = f"attn.proj={proj} ({not proj} there)"
    return found


def _layout(
    name: str, names: Callable[[Any], list[str]], recognise: Callable[[Iterable[str]], bool]
) -> Layout:
    def to_ours(state: StateDict, config: Any) -> StateDict:
        made = _renaming(config, names(config)).to_ours(state, config)
        p, c = config.patch, config.channels
        weight = made.get("patch_embed.proj.weight")
        if weight is not None and weight.shape[1:] == (p * p * c,):
            made["patch_embed.proj.weight"] = weight.unflatten(1, (p, p, c)).permute(0, 3, 1, 2)
        for key in ("head.weight", "head.bias"):
            if key in made and len(made[key]) == p * p * c:
                made[key] = made[key].unflatten(0, (c, p * p)).transpose(0, 1).flatten(0, 1)
        return made

    def from_ours(state: StateDict, config: Any) -> StateDict:
        state, c = dict(state), config.channels
        if (weight := state.get("patch_embed.proj.weight")) is not None:
            state["patch_embed.proj.weight"] = weight.permute(0, 2, 3, 1).flatten(1)
        for key in ("head.weight", "head.bias"):
            if key in state:
                state[key] = state[key].unflatten(0, (-1, c)).transpose(0, 1).flatten(0, 1)
        return _renaming(config, names(config)).from_ours(state, config)

    return Layout(
        name=name, recognise=recognise, to_ours=to_ours, from_ours=from_ours, strange=_strange
    )


def _is_numbered(keys: Iterable[str]) -> bool:
    known = set(keys)
    units = any(key.startswith(("blocks.0.", f"{_FULL}.")) for key in known)
    return "to_patch_embedding.1.weight" in known and units


OFFICIAL = _layout("official", _numbered, _is_numbered)
FACTORIZED = _layout(
    "official-factorized", _factorized,
    has_keys(
        "to_patch_embedding.1.weight", "space_transformer.norm.weight",
        "temporal_transformer.norm.weight",
    ),
)  # fmt: skip
