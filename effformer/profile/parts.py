"""Name the part of a transformer that an operator belongs to.

Our parts say it themselves: a module class with ``ROLES`` maps names of its children to keys of
`PART_LABELS`, and ``""`` to what everything else inside it is. Modules of other libraries are known
by their usual names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

__all__ = ["PART_LABELS", "Parts", "block_of"]

PART_LABELS = {
    "patch_embed": "patch embedding",
    "t_mlp": "time MLP",
    "adaln_blocks": "modulation (blocks)",
    "gates": "gates",
    "qkv": "qkv projections",
    "attn": "attention core",
    "proj": "output projection",
    "projections": "attention projections",
    "mlp": "FFN",
    "convs": "convolutions",
    "skips": "long skips",
    "adaln_final": "modulation (final)",
    "final_linear": "final linear",
    "head": "head",
    "other": "other",
}
"""Part -> words for it, in the order in which a transformer runs them."""

_RULES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (part, re.compile(pattern))
    for part, pattern in (
        (
            "adaln_final",
            r"(^|\.)final\w*\.(.*\.)?(\w*modulation|adaln\w*)(\.|$)|^proj_out_1$|^norm_out\.linear$",
        ),
        ("final_linear", r"(^|\.)final\w*\.(.*\.)?(linear|proj|out)$|^proj_out(_2)?$"),
        ("adaln_blocks", r"(^|\.)(\w*modulation|adaln\w*)(\.|$)|\.norm\d?\.linear$"),
        ("t_mlp", r"(^|\.)(t_embed\w*|time\w*|t_block)(\.|$)"),
        ("patch_embed", r"(^|\.)(patch\w*|x_embed\w*|conv_proj)(\.|$)|^pos_embed\.proj$"),
        (
            "qkv",
            r"\.(qkvg?|qg|qk|kv|q|k|v|to_qkv|to_q|to_k|to_v|[qkv]_proj|query|key|value)(\.(fc[12]|gate)\..*)?$",
        ),
        (
            "proj",
            r"(attn|attention|cross)\w*\.(.*\.)?(proj|out_proj|to_out(\.\d+)?)(\.(fc[12]|gate)\..*)?$|attention\.output\.dense$",
        ),
        (
            "mlp",
            r"(^|\.)(\w*mlp\w*|ffn?\w*|feed_?forward|intermediate|linear[12]|output\.dense)(\.|$)",
        ),
        ("attn", r"(^|\.)(\w*attn\w*|\w*attention|mixer|core)(\.|$)"),
        ("head", r"^(head|heads|fc|classifier|lm_head|pooler|nsp|mlm)(\.|$)"),
    )
)
_BLOCK = re.compile(r"^(.*?\.\d+)(\.|$)")


class Parts:
    """The part (a key of `PART_LABELS`) of the operators of a model.

    The nearest module with ``ROLES`` decides, by the last name on the way down that it lists. Where
    there is none, the names of timm, diffusers and the official DiT are known; anything else is
    "other".

    Args:
        model: the module whose children the paths name.

    Example:
        >>> Parts(torch.nn.Module())("blocks.3.attn.qkv")
        'qkv'
    """

    def __init__(self, model: nn.Module) -> None:
        self._roles: dict[str, Mapping[str, str]] = {
            path: module.ROLES for path, module in model.named_modules() if hasattr(module, "ROLES")
        }

    def __call__(self, path: str, op: str = "") -> str:
        """The part of the operator ``op`` at a module path."""
        part = self._declared(path) or _guessed(path)
        # projections without a name of their own: a matrix product with a weight
        return "projections" if part == "attn" and op in ("aten::addmm", "aten::mm") else part

    def _declared(self, path: str) -> str | None:
        names = path.split(".") if path else []
        for depth in range(len(names), -1, -1):
            roles = self._roles.get(".".join(names[:depth]), {})
            for name in (*reversed(names[depth:]), ""):
                if name in roles:
                    return roles[name]
        return None


def _guessed(path: str) -> str:
    """The part by the usual names of children."""
    lowered = path.lower()
    return next((part for part, rule in _RULES if rule.search(lowered)), "other")


def block_of(path: str) -> str | None:
    """Path of the numbered block that a module path lies in, ``"blocks.3"``, or None."""
    match = _BLOCK.match(path)
    return match.group(1) if match else None
