"""Flowformer as a causal language model in the style of GPT-2.

Reference: Flowformer: Linearizing Transformers with Conservation Flows, 2022, arXiv 2202.06258.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from effformer.attention import Attention
from effformer.attention.flow import FLOW_PRESETS
from effformer.blocks import BackboneConfig, Needs, build_stack, init_states
from effformer.checks import check_batch, check_state
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import Context, Ledger, Stream, Tap, explained
from effformer.ffn import FFN
from effformer.layout import Layout
from effformer.nn.norms import make_norm
from effformer.nn.text import check_tokens, draw_tokens
from effformer.site import NormRule, Site
from effformer.values import Chance, Count

from .base import Model, Preset, register_presets
from .layouts.flowformer import GPT

__all__ = ["PRESETS", "FlowformerGPT", "GPTState"]


class GPTState(NamedTuple):
    """What a language model keeps of the tokens that it has read.

    Attributes:
        position: number of tokens read.
        mixers: state of every part that keeps one, by its path; of constant size with flow and linear
            attention, a cache of keys and values with softmax.
    """

    position: int
    mixers: dict[str, Any]


class FlowformerGPT(Model):
    """Causal language model: GPT-2's pre-norm blocks around any causal token mixer.

    ``forward(tokens)`` gives the logits of the next token at every position. The same weights read
    a text piece by piece: `init_state` and `step`, with a state of constant size if the mixers have
    one (flow, linear).

    Differs from the paper: one dropout probability; the MLP drops behind its activation too. Masks
    for padded batches (left or right) are ours.

    Args:
        config: the config.
        name: preset name.

    Example:
        >>> model = effformer.build_model("flowformer-gpt-nano", vocab=100, context=64)
        >>> model(torch.zeros(2, 7, dtype=torch.int64)).shape
        torch.Size([2, 7, 100])

    Reference: Flowformer: Linearizing Transformers with Conservation Flows, 2022, arXiv 2202.06258.
    """

    FAMILY: ClassVar[str] = "flowformer-gpt"
    ROLES: ClassVar[Mapping[str, str]] = {"head": "head"}
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (GPT,)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BackboneConfig):
        """Knobs of `FlowformerGPT`, beside `BackboneConfig`.

        Attributes:
            vocab: number of token ids.
            context: number of learned positions, the most tokens of a sequence.
        """

        attn: BaseConfig = part("attention", Attention.Config(core=FLOW_PRESETS["gpt"]))
        dropout: Chance = 0.1
        vocab: Count = 50257
        context: Count = 1024

    def __init__(self, config: FlowformerGPT.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        site = Site(dim=config.dim, heads=config.heads, norm=NormRule(eps=1e-5))
        self.embed = nn.Embedding(config.vocab, config.dim)
        self.positions = nn.Embedding(config.context, config.dim)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = build_stack(config, site, Needs(causal=True), name=self.name)
        self.norm = make_norm(site)
        self.head = nn.Linear(config.dim, config.vocab, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of 0.02, zero biases; the last layer of every FFN shrinks with depth."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for module in self.modules():
            last = getattr(module, "fc2", None) if isinstance(module, FFN) else None
            if isinstance(last, nn.Linear):
                nn.init.normal_(last.weight, std=0.02 / (2 * self.config.depth) ** 0.5)

    def forward(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: (B, N) int64 ids, N at most ``config.context``.
            mask: (B, N) bool, True = real token; positions count from the first real one.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work, as if the model had none.

        Returns:
            (B, N, vocab).

        Raises:
            ValueError: a shape does not fit, or there are more tokens than positions.
            TypeError: ids are not integers, or the mask is not bool.
        """
        check_tokens(tokens, mask, self.config.vocab, where=self.name, longest=self.config.context)
        if mask is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        else:
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        return self._logits(
            tokens, positions, Context(mask=mask, ledger=ledger, tap=tap, complete=complete)
        )

    @explained
    def init_state(self, batch: int) -> GPTState:
        """The state before the first token.

        Raises:
            CapabilityError: a token mixer cannot stream.
        """
        check_batch(batch, where=f"{self.name}: init_state")
        return GPTState(0, init_states(self, batch, like=self.head.weight))

    @explained
    def step(self, tokens: Tensor, state: GPTState) -> tuple[Tensor, GPTState]:
        """Read the next tokens.

        Args:
            tokens: (B, n) int64 ids, n >= 1: one token, or a chunk.
            state: from `init_state` or the step before; it is not changed.

        Returns:
            Logits (B, n, vocab), equal to those of `forward` on the whole text, and the new state.

        Raises:
            ValueError: a shape does not fit, or the text outgrows the positions.
            TypeError: ids are not integers.
        """
        left = self.config.context - getattr(state, "position", 0)
        check_tokens(tokens, None, self.config.vocab, where=f"{self.name}: step", longest=left)
        check_state(state, GPTState, tokens.shape[0], where=f"{self.name}: step")
        last = state.position + tokens.shape[1]
        positions = torch.arange(state.position, last, device=tokens.device)
        stream = Stream(state.mixers)
        logits = self._logits(tokens, positions, Context(stream=stream))
        return logits, GPTState(last, stream.after)

    def _logits(self, tokens: Tensor, positions: Tensor, ctx: Context) -> Tensor:
        h = self.drop(self.embed(tokens) + self.positions(positions))
        for block in self.blocks:
            h = block(h, ctx)
        logits: Tensor = self.head(self.norm(h))
        return logits

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        return {"tokens": draw_tokens(self.embed, batch, min(self.config.context, 64), generator)}

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return {"tokens": {0: "batch", 1: "tokens"}}


_SIZES = {  # depth, heads, width
    "openai-gpt": (12, 12, 768), "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600), "gopher-44m": (8, 16, 512),
    "gpt-mini": (6, 6, 192), "gpt-micro": (4, 4, 128), "gpt-nano": (3, 3, 48),
}  # fmt: skip

PRESETS = {
    f"flowformer-{size}": Preset(
        config=FlowformerGPT.Config(dim=dim, depth=depth, heads=heads),
        params=163_037_184 if size in ("openai-gpt", "gpt2") else None,
        source="package flowformergpt of the official code",
    )
    for size, (depth, heads, dim) in _SIZES.items()
}
register_presets(FlowformerGPT, PRESETS, paper="2202.06258")
