"""What the contract tests share: the registered parts, and how one is built at a small size."""

from __future__ import annotations

from effformer import registry
from effformer.build import list_attention
from effformer.config import Config, resolve
from effformer.registry import Caps
from effformer.testing.subjects import (
    BLOCK_OPTIONS,
    CONDS,
    DIM,
    HEADS,
    OPTIONS,
    TwoStreams,
    context_for,
    is_dynamic,
    macs_of,
    make_block,
    make_ffn,
    make_mixer,
    spikes,
    tokens,
    unrolled,
)

__all__ = [
    "BLOCKS", "BLOCK_FORMS", "BLOCK_OPTIONS", "CONDS", "DIM", "FFNS", "HEADS", "JOINT", "MIXERS", "OPTIONS", "TwoStreams",
    "caps_of", "context_for", "default_config", "is_dynamic", "macs_of", "make_block", "make_ffn", "make_mixer", "mixers",
    "mixers_without", "spikes", "tokens", "unrolled",
]  # fmt: skip

MIXERS = [name for name in list_attention() if name != "multihead"]
FFNS = registry.ffn.names()
BLOCKS = registry.block.names()
JOINT = registry.block.names(joint=True)
BLOCK_FORMS = [(n, c) for n in BLOCKS for c in CONDS[registry.block.get(n).caps.cond]]


def caps_of(name: str) -> Caps:
    """Capabilities of a name accepted by ``attn=``."""
    return registry.attention.get(name).caps


def mixers(**caps: object) -> list[str]:
    return [name for name in MIXERS if caps_of(name).satisfies(**caps)]


def mixers_without(**caps: object) -> list[str]:
    return [name for name in MIXERS if not caps_of(name).satisfies(**caps)]


def default_config(kind: str, name: str) -> Config:
    return resolve(kind, name)
