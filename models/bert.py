"""BERT: a bidirectional encoder, executed padded or packed.

References: BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding, 2018,
arXiv 1810.04805; ByteTransformer: A High-Performance Transformer Boosted for Variable-Length
Inputs, 2022, arXiv 2210.03052.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from effformer.blocks import BackboneConfig, Needs, PostNorm, build_stack
from effformer.checks import check_ids, check_shape
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import Context, Ledger, Packing, Tap, explained
from effformer.ffn import MLP
from effformer.layout import Layout
from effformer.nn.norms import make_norm
from effformer.nn.text import check_tokens, draw_tokens
from effformer.site import NormRule, Site
from effformer.values import Chance, Count, Positive

from .base import Model, Preset, register_presets
from .layouts.bert import HUGGINGFACE, ROBERTA

__all__ = ["PRESETS", "Bert", "BertOutput"]


class BertOutput(NamedTuple):
    """Features of a text.

    Attributes:
        hidden: (B, N, D), zero on padding.
        pooled: (B, D) ``tanh(W hidden_0 + b)``, or (B, 0) for a model without pooler.
    """

    hidden: Tensor
    pooled: Tensor


class Bert(Model):
    """Post-norm encoder of texts.

    ``forward(tokens, mask=mask, packed=True)`` gathers the real tokens before the first block,
    runs the whole stack on them alone, and scatters once behind the last: linear layers cost the
    sum of lengths, attention the sum of their squares (or less). Padded and packed results are
    equal.

    Differs from the paper (ByteTransformer): packing and unpacking happen once per model, not in
    every layer, and any mask packs: left padding, holes and empty samples too.

    Args:
        config: the config.
        name: preset name.

    Example:
        >>> model = effformer.build_model("bert-tiny").eval()
        >>> tokens = torch.randint(0, 256, (2, 8))
        >>> mask = torch.arange(8) < torch.tensor([[8], [3]])
        >>> model(tokens, mask=mask, packed=True).hidden.shape
        torch.Size([2, 8, 48])

    Reference: BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding,
    2018, arXiv 1810.04805.
    """

    FAMILY: ClassVar[str] = "bert"
    ROLES: ClassVar[Mapping[str, str]] = {"pooler": "head"}
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (HUGGINGFACE, ROBERTA)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BackboneConfig):
        """Knobs of `Bert`, beside `BackboneConfig`.

        Attributes:
            vocab: number of token ids.
            context: number of learned positions, the most tokens of a sequence.
            segments: number of segment ids.
            norm_eps: epsilon of the norms.
            pooler: the model has a pooler.
        """

        ffn: BaseConfig = part("ffn", MLP.Config(act="gelu"))
        block: BaseConfig = part("block", PostNorm.Config())
        dropout: Chance = 0.1
        vocab: Count = 30522
        context: Count = 512
        segments: Count = 2
        norm_eps: Positive = 1e-12
        pooler: bool = True

    def __init__(self, config: Bert.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        site = Site(dim=config.dim, heads=config.heads, norm=NormRule(eps=config.norm_eps))
        self.embed = nn.Embedding(config.vocab, config.dim)
        self.positions = nn.Embedding(config.context, config.dim)
        self.segment_embed = nn.Embedding(config.segments, config.dim)
        self.embed_norm = make_norm(site)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = build_stack(config, site, Needs(mask="key"), name=self.name)
        if config.pooler:
            self.pooler = nn.Linear(config.dim, config.dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of 0.02, zero biases."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        packed: bool = False,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> BertOutput:
        """Features of every token and of the text.

        Args:
            tokens: (B, N) int64 ids, N at most ``config.context``.
            segments: (B, N) int64 segment ids, None for all 0.
            mask: (B, N) bool, True = real token; None: all are.
            packed: run on the real tokens only. The number of tokens then depends on the data;
                export the padded form.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work, as if the model had none.

        Raises:
            ValueError: a shape does not fit, or there are more tokens than positions.
            TypeError: ids are not integers, or the mask is not bool.
            CapabilityError: ``packed``, but a token mixer cannot run packed.
        """
        check_tokens(tokens, mask, self.config.vocab, where=self.name, longest=self.config.context)
        if segments is not None:
            check_shape(segments, "(B, N)", tuple(tokens.shape), where=f"{self.name}: segments")
            check_ids(segments, self.segment_embed.num_embeddings, where=f"{self.name}: segments")
        packing = None if mask is None or not packed else Packing.from_mask(mask)
        h = self.embedding(tokens, segments, packing)
        ctx = Context(
            mask=mask if packing is None else None,
            packing=packing,
            ledger=ledger,
            tap=tap,
            complete=complete,
        )
        for block in self.blocks:
            h = block(h, ctx)
        if packing is not None:
            h = packing.unpack(h)
        elif mask is not None:
            h = h * mask.unsqueeze(-1)
        return BertOutput(h, self.pool(h))

    def embedding(
        self, tokens: Tensor, segments: Tensor | None = None, packing: Packing | None = None
    ) -> Tensor:
        """What the first block reads: (B, N, D), or (1, T, D) if packed.

        Positions are those of the padded layout in both.
        """
        where = torch.arange(tokens.shape[1], device=tokens.device)
        if segments is None:
            segments = torch.zeros_like(tokens)
        if packing is not None:
            tokens, segments = packing.pack(tokens), packing.pack(segments)
            where = packing.positions
        h = self.embed(tokens) + self.positions(where) + self.segment_embed(segments)
        out: Tensor = self.drop(self.embed_norm(h))
        return out

    def pool(self, hidden: Tensor) -> Tensor:
        """``tanh(W hidden_0 + b)`` of padded features (B, N, D); (B, 0) without pooler."""
        if not self.config.pooler:
            return hidden.new_zeros(hidden.shape[0], 0)
        return torch.tanh(self.pooler(hidden[:, 0]))

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        tokens = draw_tokens(self.embed, batch, min(self.config.context, 32), generator)
        segments = draw_tokens(self.segment_embed, batch, tokens.shape[1], generator)
        return {"tokens": tokens, "segments": segments, "mask": torch.ones_like(tokens).bool()}

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return {name: {0: "batch", 1: "tokens"} for name in ("tokens", "segments", "mask")}


PRESETS = {
    "bert-base": Preset(
        config=Bert.Config(dim=768, depth=12, heads=12),
        params=109_482_240,
        source="arXiv 1810.04805 and the released bert-base-uncased",
        aliases=("bert-base-uncased",),
    ),
    "bert-large": Preset(
        config=Bert.Config(dim=1024, depth=24, heads=16),
        params=335_141_888,
        source="arXiv 1810.04805 and the released bert-large-uncased",
        aliases=("bert-large-uncased",),
    ),
    "bert-tiny": Preset(
        config=Bert.Config(dim=48, depth=2, heads=2, vocab=256, context=64),
        summary="A size of ours for tests and examples.",
    ),
}
register_presets(Bert, PRESETS, paper="1810.04805")
