"""Macaron Net as a masked language model in the style of BERT.

Reference: Understanding and Improving Transformer From a Multi-Particle Dynamic System Point of
View, 2019, arXiv 1906.02762.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from effformer.blocks import BackboneConfig, Macaron, Needs, build_stack
from effformer.checks import check_ids, check_shape
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import Context, Ledger, Packing, Tap, explained
from effformer.ffn import MLP
from effformer.layout import Layout
from effformer.nn.norms import LayerNorm, make_norm
from effformer.nn.text import Positions, check_tokens, draw_tokens, make_positions
from effformer.site import NormRule, Site
from effformer.values import Chance, Count, Natural

from .base import Model, Preset, register_presets
from .layouts.macaron import BERT
from .macaron import scaled_tokens

__all__ = ["PRESETS", "MacaronBert", "MacaronBertOutput"]


class MacaronBertOutput(NamedTuple):
    """Logits of both tasks.

    Attributes:
        mlm: (B, N, vocab), or (R, vocab) for chosen rows: which token stands there.
        nsp: (B,) binary logit of "the second sentence follows the first".
    """

    mlm: Tensor
    nsp: Tensor


class MaskedHead(nn.Module):
    """``norm(gelu(fc(x)))`` before the product with the token table."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, dim)
        self.norm = LayerNorm(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        out: Tensor = self.norm(nn.functional.gelu(self.fc(x)))
        return out


class MacaronBert(Model):
    """Encoder of Macaron blocks with the heads of BERT's two pre-training tasks.

    As published, the leading half FFN has a ReLU and the trailing one a GELU, the norms have no
    learned factors, and segment 1 (the first sentence) has a fixed zero vector.

    Args:
        config: the config.
        name: preset name.

    Differs from the paper: one dropout probability; the last block computes every token, and
    ``rows`` chooses those that the large product with the token table sees.

    Reference: Understanding and Improving Transformer From a Multi-Particle Dynamic System Point of
    View, 2019, arXiv 1906.02762.
    """

    FAMILY: ClassVar[str] = "macaron-bert"
    ROLES: ClassVar[Mapping[str, str]] = {"mlm": "head", "head": "head", "nsp": "head"}
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (BERT,)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BackboneConfig):
        """Knobs of `MacaronBert`, beside `BackboneConfig`.

        Attributes:
            vocab: number of token ids.
            pad: id of padding.
            norm_affine: the norms of the encoder have learned factors.
            final_norm: a norm follows the stack (pre-norm blocks need one).
            positions: what is added to the tokens: "sinusoidal" codes, rows of a "learned" table,
                or "none".
            context: number of learned positions, the most tokens of a sequence.
            tied: the output is the token table; False gives it a matrix of its own.
        """

        ffn: BaseConfig = part("ffn", MLP.Config(act="gelu"))
        block: BaseConfig = part("block", Macaron.Config(first_act="relu"))
        dropout: Chance = 0.1
        vocab: Count = 32768
        pad: Natural = 1
        norm_affine: bool = False
        final_norm: bool = True
        positions: Positions = "sinusoidal"
        context: Count = 512
        tied: bool = True

        def check(self) -> None:
            if self.pad >= self.vocab:
                raise ValueError(f"pad must be a token id below {self.vocab}, got {self.pad}")

    def __init__(self, config: MacaronBert.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        site = Site(
            dim=config.dim, heads=config.heads, norm=NormRule(eps=1e-5, affine=config.norm_affine)
        )
        self.embed = nn.Embedding(config.vocab, config.dim, padding_idx=config.pad)
        self.segment_embed = nn.Embedding(2, config.dim, padding_idx=1)
        self.positions = make_positions(
            config.positions, config.dim, context=config.context, pad=config.pad, padding="right"
        )
        self.drop = nn.Dropout(config.dropout)
        self.blocks = build_stack(config, site, Needs(mask="key"), name=self.name)
        self.norm = make_norm(site) if config.final_norm else nn.Identity()
        self.mlm = MaskedHead(config.dim, site.norm.eps)
        if not config.tied:
            self.head = nn.Linear(config.dim, config.vocab, bias=False)
        self.nsp = nn.Linear(config.dim, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-normal weights (gain of ReLU where one precedes), zero biases, normal tables."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                gain = nn.init.calculate_gain("relu" if name.endswith("fc2") else "linear")
                nn.init.normal_(module.weight, std=gain / module.in_features**0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.dim**-0.5)
                with torch.no_grad():
                    module.weight[module.padding_idx].zero_()

    def forward(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        rows: Tensor | None = None,
        *,
        packed: bool = False,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> MacaronBertOutput:
        """Logits of both tasks.

        Args:
            tokens: (B, N) int64 ids, padded on the right.
            segments: (B, N) int64, 1 for the first sentence and 0 for the second; None: all 1.
            mask: (B, N) bool, True = real token; None: every id but ``config.pad``.
            rows: (R,) int64 flat places b * N + n whose tokens are to be predicted; None: all.
            packed: run the blocks on the real tokens only; features of padding are then zero. The
                number of tokens depends on the data; export the padded form.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work, as if the model had none.

        Raises:
            ValueError: a shape does not fit.
            TypeError: ids are not integers, or the mask is not bool.
            CapabilityError: ``packed``, but a part cannot run packed.
        """
        h = self.encode(
            tokens, segments, mask, packed=packed, ledger=ledger, tap=tap, complete=complete
        )
        nsp = self.nsp(h[:, 0]).squeeze(-1)
        if rows is not None:
            check_shape(rows, "(R,)", (None,), where=f"{self.name}: rows")
            h = h.flatten(0, 1).index_select(0, rows)
        weight = self.embed.weight if self.config.tied else self.head.weight
        return MacaronBertOutput(nn.functional.linear(self.mlm(h), weight), nsp)

    def encode(
        self,
        tokens: Tensor,
        segments: Tensor | None = None,
        mask: Tensor | None = None,
        *,
        packed: bool = False,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Features (B, N, D); arguments as in `forward`."""
        check_tokens(tokens, mask, self.config.vocab, where=self.name)
        if mask is None:
            mask = tokens != self.config.pad
        h = scaled_tokens(self.embed, tokens, mask, self.positions)
        if segments is not None:
            check_shape(segments, "(B, N)", tuple(tokens.shape), where=f"{self.name}: segments")
            check_ids(segments, self.segment_embed.num_embeddings, where=f"{self.name}: segments")
            h = h + self.segment_embed(segments)
        ctx = Context(mask=mask, ledger=ledger, tap=tap, complete=complete)
        if packed:
            packing = Packing.from_mask(mask)
            h, ctx = packing.pack(h), replace(ctx, mask=None, packing=packing)
        h = self.drop(h)
        for block in self.blocks:
            h = block(h, ctx)
        out: Tensor = self.norm(h)
        return out if ctx.packing is None else ctx.packing.unpack(out)

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        tokens = draw_tokens(self.embed, batch, min(32, self.config.context), generator)
        return {"tokens": tokens, "segments": torch.ones_like(tokens)}

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return {name: {0: "batch", 1: "tokens"} for name in ("tokens", "segments")}


_SOURCE = "architecture transformer_bert_{}; parameters without the token table"
PRESETS = {
    "macaron-bert-base": Preset(
        config=MacaronBert.Config(dim=768, depth=12, heads=12),
        params=85_621_249,
        source=_SOURCE.format("base_macaron"),
        aliases=("transformer_bert_base_macaron",),
    ),
    "macaron-bert-l6": Preset(
        config=MacaronBert.Config(dim=768, depth=6, heads=12),
        params=43_107_841,
        source=_SOURCE.format("L6_A12_macaron"),
        aliases=("transformer_bert_L6_A12_macaron",),
    ),
    "macaron-bert-tiny": Preset(
        config=MacaronBert.Config(dim=48, depth=2, heads=2, vocab=256),
        summary="A size of ours for tests and examples.",
    ),
}
register_presets(MacaronBert, PRESETS, paper="1906.02762")
