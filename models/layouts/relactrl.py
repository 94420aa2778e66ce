"""Key layouts of RelaCtrl's released control branch.

The released files hold the branch as ``controlnet.*`` beside a PixArt backbone as ``base_model.*``;
`BRANCH` takes the branch out of them.
"""

from __future__ import annotations

from typing import Any

from effformer.layout import Layout, StateDict, has_keys, renamed

__all__ = ["BLOCK", "BRANCH", "EXPERT"]

_NAMES = (
    ("before", "before_proj"),
    ("after", "after_proj"),
    ("table", "process.scale_shift_table"),
    ("mixer.part.experts.{i}", "process.experts_attn.{i}.attn"),
)

EXPERT = renamed("official", [("experts.0", "attn")], recognise=has_keys("attn.qkv.weight"))
"""A `TDSM` of one group, which the official code calls a token mixer."""

BLOCK = renamed("official", _NAMES, recognise=has_keys("before_proj.weight", "after_proj.weight"))
"""A `ControlBlock`."""

_BRANCH = renamed(
    "official",
    [(f"blocks.{{j}}.{ours}", f"controlnet.{{j}}.{theirs}") for ours, theirs in _NAMES],
    recognise=has_keys("controlnet.0.before_proj.weight"),
)


def _to_ours(state: StateDict, config: Any) -> StateDict:
    """Leave out the backbone, which is loaded by itself."""
    branch = {k: v for k, v in state.items() if not k.startswith("base_model.")}
    return _BRANCH.to_ours(branch, config)


BRANCH = Layout(
    name="official",
    recognise=_BRANCH.recognise,
    to_ours=_to_ours,
    from_ours=_BRANCH.from_ours,
)
"""A `ControlBranch`."""
