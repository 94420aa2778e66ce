"""Macaron Net for translation: an encoder and a decoder of Macaron blocks.

Reference: Understanding and Improving Transformer From a Multi-Particle Dynamic System Point of
View, 2019, arXiv 1906.02762.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from effformer.attention import Attention
from effformer.blocks import BackboneConfig, Macaron, Needs, build_stack, layer_pattern
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import Context, Ledger, Tap, explained
from effformer.ffn import MLP
from effformer.layout import Layout
from effformer.nn.init import xavier_linears
from effformer.nn.norms import make_norm
from effformer.nn.text import Padding, Positions, check_tokens, draw_tokens, make_positions
from effformer.site import NormRule, Site
from effformer.values import Chance, Count, Depth, Natural

from .base import Model, Preset, register_presets
from .layouts.macaron import TRANSLATION

__all__ = ["PRESETS", "MacaronNet", "scaled_tokens"]


def scaled_tokens(
    table: nn.Embedding, tokens: Tensor, mask: Tensor, positions: nn.Module | None
) -> Tensor:
    """``sqrt(D) table[token] + positions``.

    Args:
        table: (V, D) embeddings.
        tokens: (B, N) ids.
        mask: (B, N) bool, True = real token.
        positions: maps the mask to (B, N, D) codes; None adds nothing.

    Returns:
        (B, N, D).
    """
    x: Tensor = table(tokens) * table.embedding_dim**0.5
    return x if positions is None else x + positions(mask).to(x.dtype)


class Tower(nn.Module):
    """A stack of blocks and, with pre-norm blocks, the norm behind it."""

    def __init__(self, blocks: nn.ModuleList, norm: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks
        self.norm = norm

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        for block in self.blocks:
            x = block(x, ctx)
        out: Tensor = self.norm(x)
        return out


class MacaronNet(Model):
    """Translation model of Macaron blocks: half an FFN, attention (in the decoder also over the
    source), half an FFN.

    ``forward(source, target)`` gives the logits of the next target token at every position. The
    published "_v2" and "t2t" architectures are pre-norm with a final norm; the others post-norm
    without. An ordinary transformer is the same model with ``block="prenorm"``.

    Args:
        config: the config; ``depth``, ``heads`` and ``layers`` are the encoder's.
        name: preset name.

    Differs from the paper: one dropout probability; the inner width of the decoder's leading FFN is
    the decoder's, where the published code takes the encoder's (``decoder_layers={":": {"block":
    {"first_hidden": ...}}}``).

    Reference: Understanding and Improving Transformer From a Multi-Particle Dynamic System Point of
    View, 2019, arXiv 1906.02762.
    """

    FAMILY: ClassVar[str] = "macaron"
    ROLES: ClassVar[Mapping[str, str]] = {"head": "head"}
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (TRANSLATION,)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BackboneConfig):
        """Knobs of `MacaronNet`, beside `BackboneConfig`.

        Attributes:
            cross: token mixer of the decoder over the source.
            decoder_depth: blocks of the decoder, None for ``depth``.
            decoder_heads: heads of the decoder, None for ``heads``.
            decoder_layers: changes for some blocks of the decoder, as ``layers``.
            final_norm: a norm follows each stack (pre-norm blocks need one).
            decoder_final_norm: the same for the decoder's, None for ``final_norm``.
            vocab: number of token ids.
            target_vocab: the target's, None for ``vocab``.
            pad: id of padding.
            share: token table that source, target and output use: "all" one, "target" one for
                target and output, "none" three.
            source_padding: side of the source's padding.
            target_padding: side of the target's padding.
            positions: what is added to the tokens: "sinusoidal" codes, rows of a "learned" table,
                or "none".
            decoder_positions: the same for the target, None for ``positions``.
            context: number of learned positions, the most tokens of a sequence.
            decoder_context: the target's, None for ``context``.
        """

        ffn: BaseConfig = part("ffn", MLP.Config(act="relu"))
        block: BaseConfig = part("block", Macaron.Config())
        cross: BaseConfig = part("attention", Attention.Config())
        dropout: Chance = 0.1
        decoder_depth: Depth | None = None
        decoder_heads: Count | None = None
        decoder_layers: Mapping[str, Any] = field(
            default_factory=dict, metadata={"short": layer_pattern}
        )
        final_norm: bool = True
        decoder_final_norm: bool | None = None
        vocab: Count = 32768
        target_vocab: Count | None = None
        pad: Natural = 1
        share: Literal["all", "target", "none"] = "all"
        source_padding: Padding = "left"
        target_padding: Padding = "right"
        positions: Positions = "sinusoidal"
        decoder_positions: Positions | None = None
        context: Count = 1024
        decoder_context: Count | None = None

        def check(self) -> None:
            if self.pad >= min(self.vocab, self.target_vocab or self.vocab):
                raise ValueError(f"pad must be a token id, got {self.pad}")
            if self.share == "all" and self.target_vocab not in (None, self.vocab):
                raise ValueError(
                    f"share='all' needs one vocabulary, got {self.vocab} and {self.target_vocab}"
                )

        def decoder(self) -> MacaronNet.Config:
            """The same config with the decoder's own values as the main ones."""
            names = ("depth", "heads", "final_norm", "positions", "context")
            own = {name: getattr(self, f"decoder_{name}") for name in names}
            given = {name: value for name, value in own.items() if value is not None}
            return replace(self, layers=self.decoder_layers, **given)

    def __init__(self, config: MacaronNet.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        dim, target_vocab = config.dim, config.target_vocab or config.vocab
        decoder = config.decoder()
        self.embed = nn.Embedding(config.vocab, dim, padding_idx=config.pad)
        if config.share != "all":
            self.target_embed = nn.Embedding(target_vocab, dim, padding_idx=config.pad)
        if config.share == "none":
            self.head = nn.Linear(dim, target_vocab, bias=False)
        self.positions = make_positions(
            config.positions, dim, context=config.context, pad=config.pad,
            padding=config.source_padding,
        )  # fmt: skip
        self.target_positions = make_positions(
            decoder.positions, dim, context=decoder.context, pad=config.pad,
            padding=config.target_padding,
        )  # fmt: skip
        self.drop = nn.Dropout(config.dropout)
        self.encoder = self._tower("encoder", config)
        self.decoder = self._tower("decoder", decoder)
        self.reset_parameters()

    def _tower(self, path: str, config: MacaronNet.Config) -> Tower:
        decoder = path == "decoder"
        site = Site(
            dim=config.dim,
            heads=config.heads,
            memory_dim=config.dim if decoder else None,
            norm=NormRule(eps=1e-5),
            path=path,
        )
        cross = config.cross if decoder else None
        other = replace(site, memory_dim=None if decoder else config.dim)
        encoding, decoding = Needs(mask="key"), Needs(causal=True, mask="key")
        needs, beside = (decoding, encoding) if decoder else (encoding, decoding)
        where = f"{self.name} {path}"
        blocks = build_stack(
            config, site, needs, name=where, cross=cross, beside=((beside, other),)
        )
        return Tower(blocks, make_norm(site) if config.final_norm else nn.Identity())

    def reset_parameters(self) -> None:
        """Xavier-uniform linear layers, zero biases, normal tables of width^-0.5."""
        xavier_linears(self)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.dim**-0.5)
                with torch.no_grad():
                    module.weight[self.config.pad].zero_()

    def forward(
        self,
        source: Tensor,
        target: Tensor,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        *,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Logits of the next target token.

        Args:
            source: (B, M) int64 ids.
            target: (B, N) int64 ids, shifted right by one.
            source_mask: (B, M) bool, True = real token; None: every id but ``config.pad``.
            target_mask: (B, N) bool; None: every id but ``config.pad`` has a position, and
                attention relies on causality (right padding).
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work, as if the model had none.

        Returns:
            (B, N, target vocabulary).

        Raises:
            ValueError: a shape does not fit.
            TypeError: ids are not integers, or a mask is not bool.
        """
        if source_mask is None:
            source_mask = source != self.config.pad
        memory = self.encode(source, source_mask, ledger=ledger, tap=tap, complete=complete)
        return self.decode(
            target, memory, source_mask, target_mask, ledger=ledger, tap=tap, complete=complete
        )

    def encode(
        self,
        source: Tensor,
        source_mask: Tensor | None = None,
        *,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """The source as memory of the decoder, (B, M, D); arguments as in `forward`."""
        check_tokens(source, source_mask, self.embed.num_embeddings, where=f"{self.name}: source")
        mask = source != self.config.pad if source_mask is None else source_mask
        h: Tensor = self.drop(scaled_tokens(self.embed, source, mask, self.positions))
        out: Tensor = self.encoder(h, Context(mask=mask, ledger=ledger, tap=tap, complete=complete))
        return out

    def decode(
        self,
        target: Tensor,
        memory: Tensor,
        source_mask: Tensor | None = None,
        target_mask: Tensor | None = None,
        *,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Logits from the result of `encode`; the other arguments as in `forward`."""
        table = self.embed if self.config.share == "all" else self.target_embed
        check_tokens(target, target_mask, table.num_embeddings, where=f"{self.name}: target")
        real = target != self.config.pad if target_mask is None else target_mask
        h: Tensor = self.drop(scaled_tokens(table, target, real, self.target_positions))
        ctx = Context(
            memory=memory,
            mask=target_mask,
            memory_mask=source_mask,
            ledger=ledger,
            tap=tap,
            complete=complete,
        )
        h = self.decoder(h, ctx)
        weight = self.head.weight if self.config.share == "none" else table.weight
        return nn.functional.linear(h, weight)

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        table = self.embed if self.config.share == "all" else self.target_embed
        source, target = min(24, self.config.context), min(16, self.config.decoder().context)
        return {
            "source": draw_tokens(self.embed, batch, source, generator),
            "target": draw_tokens(table, batch, target, generator),
        }

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return {"source": {0: "batch", 1: "source"}, "target": {0: "batch", 1: "target"}}


def _preset(
    dim: int, hidden: int, heads: int, params: int, dropout: float, aliases: tuple[str, ...]
) -> dict[bool, Preset]:
    """Pre-norm (True) and post-norm (False) preset of one size."""
    source = f"architecture {aliases[0]}; parameters without the shared token table"
    config = MacaronNet.Config(
        dim=dim, depth=6, heads=heads, ffn=MLP.Config(hidden=hidden, act="relu"), dropout=dropout
    )
    post = replace(config, block=Macaron.Config(post_norm=True), final_norm=False)
    return {
        True: Preset(config=config, params=params, source=source, aliases=aliases),
        False: Preset(config=post, source=source.replace("_v2", "")),
    }


_SIZES = {
    "iwslt": _preset(512, 1024, 4, 31_563_776, 0.3, ("transformer_iwslt_de_en_macaron_v2",)),
    "wmt-base": _preset(512, 2048, 8, 44_158_976, 0.1, ("transformer_wmt_en_de_macaron_v2",)),
    "wmt-big": _preset(
        1024, 4096, 16, 176_398_336, 0.3, ("transformer_wmt_en_de_big_t2t_macaron",)
    ),
}

PRESETS = {
    **{f"macaron-{size}": presets[True] for size, presets in _SIZES.items()},
    **{f"macaron-{size}-postnorm": presets[False] for size, presets in _SIZES.items()},
    "macaron-tiny": Preset(
        config=MacaronNet.Config(dim=48, depth=2, heads=2, vocab=256),
        summary="A size of ours for tests and examples.",
    ),
}
register_presets(MacaronNet, PRESETS, paper="1906.02762")
