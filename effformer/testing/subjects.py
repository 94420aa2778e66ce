"""Parts at a small size, with weights away from zero: what is tested, and how it is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from effformer import registry
from effformer.attention import Mixer
from effformer.blocks.stack import with_causal
from effformer.config import resolve
from effformer.context import Context
from effformer.nn.lif import LIF
from effformer.registry import Caps
from effformer.site import Site

__all__ = [
    "BLOCK_OPTIONS", "CONDS", "DIM", "HEADS", "OPTIONS", "Subject", "TwoStreams", "context_for", "is_dynamic", "macs_of",
    "make_block", "make_ffn", "make_mixer", "run", "spikes", "subjects", "tokens", "unrolled",
]  # fmt: skip

DIM, HEADS = 24, 3
CONDS = {"never": [False], "optional": [False, True], "always": [True]}
"""Forms of a block, by what it says of the conditioning vector."""
OPTIONS: dict[str, dict[str, Any]] = {
    "gated-delta": {"direction": "both-exclusive"},  # the others keep the default
    "gla": {"direction": "both-exclusive"},
    "linformer": {"tokens": 130, "projected": 5},
    "longformer": {"window": 4, "global_tokens": 1},
    "moe": {"experts": 3},
    "nystrom": {"landmarks": 4, "conv": 3},
    "performer": {"eps": 1e-8},  # its scale takes no gradient, and cancels but for eps
    "reformer": {"chunk": 3, "rounds": 2, "buckets": 4},
    "spiking-conv-channel": {"lif": {"threshold": 0.05}},
    "spiking-lmu": {"normed": False, "lif": {"threshold": 0.05}},
    "tdsm": {"segments": 1, "tokens": 11},
    "topk": {"keep": 3},
}
"""Options that let a mechanism work on the few tokens of a test, or that a part shares with others
which are tested without."""


BLOCK_OPTIONS: dict[str, dict[str, Any]] = {
    "spiking-lmu": {"attn_lif": {"threshold": 0.05}, "ffn_lif": {"threshold": 0.05}},
}


def make_mixer(
    name: str,
    *,
    causal: bool | None = None,
    options: Mapping[str, Any] | None = None,
    **site: Any,
) -> Any:
    """A mixer by name; causal None means the part's own default form."""
    config = resolve("attention", {"name": name, **OPTIONS.get(name, {}), **(options or {})})
    if causal:
        config = with_causal(config, True)
    return _random(config.build(Site(**{"dim": DIM, "heads": HEADS, **site})))


def make_ffn(name: str, options: Mapping[str, Any] | None = None) -> Any:
    """An FFN by name."""
    entry = registry.ffn.get(name)
    config = resolve("ffn", {"name": name, **OPTIONS.get(name, {}), **(options or {})})
    time_dim = DIM if entry.caps.time else None
    return _random(entry.build(config, Site(dim=DIM, time_dim=time_dim)))


def make_block(
    name: str,
    *,
    cond: bool,
    width: str | None = None,
    tokens: str | None = None,
    attn: str = "softmax",
    ffn: str = "mlp",
    causal: bool = False,
    cross: str | None = None,
    memories: int = 1,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """A block by name, with parts in its slots; a conditioned one has a time embedding, too. With
    ``cross`` it has a branch to a memory of the tokens' width, or to each of several.
    """
    entry = registry.block.get(name)
    config = resolve("block", {"name": name, **BLOCK_OPTIONS.get(name, {}), **(options or {})})
    there = DIM if cond else None
    memory = None if cross is None else DIM if memories == 1 else (DIM,) * memories
    depth = 2 if entry.caps.joint else 1  # the second stream may end in the last block
    site = Site(
        dim=DIM, heads=HEADS, cond_dim=there, time_dim=there, length=130, memory_dim=memory,
        depth=depth,
    )  # fmt: skip
    parts = {
        "attn": resolve("attention", {"name": attn, **OPTIONS.get(attn, {})}),
        "ffn": resolve("ffn", {"name": ffn, **OPTIONS.get(ffn, {})}),
    }
    if causal:
        parts["attn"] = with_causal(parts["attn"], True)
    if cross is not None:
        parts["cross"] = resolve("attention", cross)
    block = entry.build(config, site, **parts)
    slots = {"width": width, "tokens": tokens}
    block.attach(**{k: resolve(k, v) for k, v in slots.items() if v is not None})
    return _random(TwoStreams(block) if entry.caps.joint else block)


class TwoStreams(nn.Module):
    """A block of two streams seen as one of a single stream, whose first tokens are the second."""

    FIRST = 2
    block: Any

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.site, self.caps = block, block.site, block.caps

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        first = self.FIRST
        if not torch.compiler.is_compiling() and x.shape[1] <= first:
            raise ValueError(f"two streams need more than {first} tokens, got {x.shape[1]}")
        out: Tensor = torch.cat(self.block(x[:, first:], x[:, :first], ctx, ctx)[::-1], dim=1)
        return out

    def macs(self, n: int) -> int:
        return int(self.block.macs(n - self.FIRST, self.FIRST))

    @property
    def holders(self) -> list[Any]:
        """What holds the slots: its streams, or the block that reads both as one row."""
        return [self.block.x, self.block.y] if hasattr(self.block, "x") else [self.block]

    @property
    def width(self) -> Any:
        return self.holders[0].width

    @width.setter
    def width(self, part: None) -> None:
        for holder in self.holders:
            holder.width = part

    @property
    def tokens(self) -> Any:
        return self.holders[0].tokens

    @tokens.setter
    def tokens(self, part: None) -> None:
        for holder in self.holders:
            holder.tokens = part


def tokens(n: int = 11, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Tokens (batch, n, DIM)."""
    return torch.randn(batch, n, DIM, dtype=dtype)


def context_for(part: nn.Module, x: Tensor, **fields: Any) -> Context:
    """What a model would pass: conditioning for modulated blocks, a grid where one is needed."""
    site: Site = part.site  # type: ignore[assignment]
    caps: Caps = part.caps  # type: ignore[assignment]
    if site.cond_dim is not None:
        fields.setdefault("cond", torch.linspace(-1, 1, DIM, dtype=x.dtype).expand(x.shape[0], -1))
    if site.time_dim is not None:
        fields.setdefault("time", torch.linspace(1, -2, DIM, dtype=x.dtype).expand(x.shape[0], -1))
    if caps.axes:
        frames = (1,) if "t" in caps.axes else ()
        fields.setdefault("grid", (*frames, 1, x.shape[1]))
    return Context(**fields)


def macs_of(part: Any, n: int) -> int:
    """Counted work of n tokens in the grid of `context_for`."""
    if not isinstance(part, Mixer):
        return int(part.macs(n))
    return int(part.macs(n, grid=context_for(part, tokens(n)).grid))


def spikes(part: nn.Module) -> bool:
    """The part fires: the gradient of a spike is a surrogate, no derivative."""
    return any(isinstance(module, LIF) for module in part.modules())


def unrolled(block: nn.Module) -> nn.Module:
    """The block that has the slots: the body of an iterated one."""
    return getattr(block, "body", block)


def is_dynamic(part: nn.Module) -> bool:
    """The part skips work in evaluation, and runs densely in training."""
    slots = [getattr(unrolled(part), name, None) for name in ("width", "tokens")]
    parts = [part, *(slot for slot in slots if slot is not None)]
    return any(p.caps.dynamic for p in parts)


def _random(module: nn.Module) -> nn.Module:
    """Weights away from zero, so that gates are open and every path matters. They depend on the
    part alone, not on those that were built before it.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.2, generator=generator)
    return module.eval()


@dataclass(frozen=True, slots=True)
class Subject:
    """One form of a registered part that is tested.

    Attributes:
        kind: "attention", "ffn" or "block".
        name: as ``attn=``, ``ffn=`` or ``block=`` take it.
        cond: the block is modulated by a conditioning vector.
        options: of its config.
    """

    kind: str
    name: str
    cond: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        conditioned = f" cond={self.cond}" if self.kind == "block" else ""
        return f"{self.kind} {self.name}{conditioned}"

    @property
    def entry(self) -> registry.Entry:
        """What is registered: the core where the name is that of one."""
        cores = self.kind == "attention" and self.name in registry.core
        return (registry.core if cores else registry.KINDS[self.kind]).get(self.name)

    @property
    def caps(self) -> Caps:
        """What it says that it can do, with the options."""
        if not self.options:
            return registry.KINDS[self.kind].get(self.name).caps
        return resolve(self.kind, {"name": self.name, **self.options}).caps()

    @property
    def carries(self) -> bool:
        """A state runs from token to token, whatever the options."""
        return self.kind != "attention" and self.caps.causal == "always"

    def make(self, *, causal: bool | None = None, **site: Any) -> Any:
        """The part, in evaluation; ``causal`` and ``site`` are for mixers."""
        if self.kind == "attention":
            return make_mixer(self.name, causal=causal, options=self.options, **site)
        if self.kind == "ffn":
            return make_ffn(self.name, self.options)
        attn = "lmu" if self.carries else "softmax"
        return make_block(self.name, cond=self.cond, attn=attn, options=self.options)

    def forms(self) -> list[bool]:
        """Not causal and causal, as far as there are such."""
        return [c for c in (False, True) if self.caps.satisfies(causal=c)]


def subjects(kind: str, name: str, options: Mapping[str, Any] | None = None) -> list[Subject]:
    """The forms of a part: a block with and without a conditioning vector, as it says."""
    made = Subject(kind, name, options=dict(options or {}))
    conds = CONDS[made.caps.cond] if kind == "block" else [False]
    return [Subject(kind, name, cond, made.options) for cond in conds]


def run(part: nn.Module, x: Tensor, **fields: Any) -> Tensor:
    """The part on tokens, with the context that a model would pass."""
    out: Tensor = part(x, context_for(part, x, **fields))
    return out
