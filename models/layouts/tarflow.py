"""Key layout of TarFlow's official checkpoints, and what STARFlow's have in common with it.

Both number maps, ``blocks.N``, and inside of each its transformer blocks, ``attn_blocks.M``; ours
counts the latter through.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from effformer.checks import FormatError
from effformer.layout import Layout, StateDict, has_keys, renamed

from .forms import SIZES, Form

__all__ = ["MAPS", "NETWORK", "OFFICIAL", "counted", "numbered"]

NETWORK = (
    ("blocks.{i}.attn.norm", "layer.{i}.attention.norm"),
    ("blocks.{i}.attn.part.qkv", "layer.{i}.attention.qkv"),
    ("blocks.{i}.attn.part.proj", "layer.{i}.attention.proj"),
    ("blocks.{i}.ffn.norm", "layer.{i}.mlp.norm"),
    ("blocks.{i}.ffn.part.fc1", "layer.{i}.mlp.main.0"),
    ("blocks.{i}.ffn.part.fc2", "layer.{i}.mlp.main.2"),
)
MAPS = tuple((f"flows.{{i}}.{name}", f"blocks.{{i}}.{name}") for name in ("proj_in", "proj_out"))
_NAMES = renamed(
    "official",
    (
        *NETWORK,
        *MAPS,
        *((f"flows.{{i}}.{x}", f"blocks.{{i}}.{x}") for x in ("pos_embed", "class_embed")),
        ("variance", "var"),
    ),
    recognise=has_keys("var", "blocks.0.pos_embed", "blocks.0.proj_in.weight"),
)
_INSIDE = re.compile(r"blocks\.(\d+)\.attn_blocks\.(\d+)\.(.+)")
_COUNTED = re.compile(r"layer\.(\d+)\.(.+)")


def counted(state: StateDict, config: Any) -> StateDict:
    """Number the blocks of all maps through."""
    runs, made = config.runs(), {}
    for key, value in state.items():
        found = _INSIDE.fullmatch(key)
        if found is not None and int(found[1]) < len(runs):
            key = f"layer.{runs[int(found[1])].start + int(found[2])}.{found[3]}"
        made[key] = value
    return made


def numbered(state: StateDict, config: Any) -> StateDict:
    """The inverse of `counted`."""
    runs, made = config.runs(), {}
    for key, value in state.items():
        found = _COUNTED.fullmatch(key)
        if found is not None:
            index = int(found[1])
            flow = next(i for i, run in enumerate(runs) if index in run)
            key = f"blocks.{flow}.attn_blocks.{index - runs[flow].start}.{found[2]}"
        made[key] = value
    return made


def _to_ours(state: StateDict, config: Any) -> StateDict:
    """Causal masks are checked and left out; so is the variance where the prior is N(0, I)."""
    state = dict(state)
    for key in [key for key in state if key.endswith(".attn_mask")]:
        if not torch.equal(mask := state.pop(key), mask.new_ones(mask.shape).tril()):
            raise FormatError(f"{key} is not the mask of a causal model")
    variance = state.get("var")
    if variance is not None and not config.volume_preserving:
        if not bool((variance == 1).all()):
            raise FormatError(
                "var is the learned variance of a model that shifts only; build the model with "
                "volume_preserving=True"
            )
        del state["var"]
    return _NAMES.to_ours(counted(state, config), config)


def _from_ours(state: StateDict, config: Any) -> StateDict:
    made = numbered(_NAMES.from_ours(state, config), config)
    like = next(iter(made.values()))
    made.setdefault("var", like.new_ones(config.places, config.features))
    mask = like.new_ones(config.places, config.places).tril()
    return made | {
        f"blocks.{i}.attn_mask": mask.clone() for i, run in enumerate(config.runs()) if run
    }


_FORM = Form(
    free=(
        *SIZES, "input_size", "channels", "patch", "num_classes", "volume_preserving",
        "ffn.ratio", "ffn.hidden",
    ),
    choices={"flows": lambda flows: all(flows)},
)  # fmt: skip

OFFICIAL = Layout(
    name="official",
    recognise=_NAMES.recognise,
    to_ours=_to_ours,
    from_ours=_from_ours,
    strange=_FORM.strange,
)
