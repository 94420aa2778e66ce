"""Name the part of a transformer that a module path belongs to."""

from __future__ import annotations

import re

__all__ = ["PART_LABELS", "block_of", "part_of"]

PART_LABELS = {
    "patch_embed": "patch embedding",
    "t_mlp": "time MLP",
    "adaln_blocks": "modulation (blocks)",
    "gates": "gates of dynamic parts",
    "qkv": "qkv projections",
    "attn": "attention core",
    "proj": "output projection",
    "projections": "attention projections",
    "mlp": "FFN",
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
        ("gates", r"\.(width|tokens)\.gates\.|\.gate\.router$"),
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


def part_of(path: str, op: str = "") -> str:
    """The part (a key of `PART_LABELS`) of the operator ``op`` at a module path, by the usual names
    of children.

    Our own names, timm's, diffusers' and the official DiT's are known; anything else is "other".

    Example:
        >>> part_of("blocks.3.attn.qkv")
        'qkv'
    """
    lowered = path.lower()
    for part, rule in _RULES:
        if rule.search(lowered):
            # nn.MultiheadAttention calls its projections as functions
            return "projections" if part == "attn" and op in ("aten::addmm", "aten::mm") else part
    return "other"


def block_of(path: str) -> str | None:
    """Path of the numbered block that a module path lies in, ``"blocks.3"``, or None."""
    match = _BLOCK.match(path)
    return match.group(1) if match else None
