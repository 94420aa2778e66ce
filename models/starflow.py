"""STARFlow: a normalizing flow of an autoencoder's latents, one deep map behind several shallow ones.

Reference: STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis, 2025, arXiv
2506.06276.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from effformer.attention import Attention
from effformer.blocks import Needs, build_stack, head_width
from effformer.checks import CapabilityError, check_shape
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import EMPTY, Context, Ledger, Tap, explained
from effformer.ffn import MLP
from effformer.layout import Layout
from effformer.nn.patch import unpatchify
from effformer.nn.positions import cell_counts, grid_positions
from effformer.nn.rope import GridRope
from effformer.site import NormRule, Site
from effformer.values import Count, Positive

from .base import Model, Preset, register_presets
from .flow_ends import StartedEnds
from .flow_parts import Latents, TokenFlowConfig, TokenMap, cooled, patches, pieces, run_maps
from .layouts.starflow import OFFICIAL

__all__ = ["PRESETS", "STARFlow"]


class STARFlow(Model):
    """Invertible model of latents whose last map is a deep causal transformer that also reads a text; the
    others are shallow and read no text. Maps alternate between both orders of the tokens.

    ``forward(x, text)`` returns the flow's latents z (B, C, H, W) and log |det dz/dx| (B,), exactly.
    `effformer.flow.invert` goes back, guided by ``Away(scale=3.0, weak={"text": null}, rule=
    "gaussian")`` with the features of an empty text. `effformer.flow.log_likelihood` and `denoised` read
    the density. It is trained by ``Generation(loss={"name": "likelihood", "noise": 0.3})``.

    A learned token in front predicts the first one, so that none passes unchanged. Rotary tables have
    three coordinates, (row, column, 0) of a latent and (0, 0, word) of a text, in units that give every
    grid the extent of the config's; without a text two. They count places as they are read, in
    reversed maps, too.

    Args:
        config: the config.
        name: preset name.

    Raises:
        CapabilityError: a part sees later tokens or takes no rotary tables; parts that do are named.

    Differs from the paper: log_det is a sum, not a mean.

    Reference: STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis, 2025,
    arXiv 2506.06276.
    """

    FAMILY: ClassVar[str] = "starflow"
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (OFFICIAL,)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(TokenFlowConfig):
        """Knobs of `STARFlow`, beside `TokenFlowConfig`.

        Attributes:
            input_size: side of the latents it is made for; others are accepted.
            text_dim: width of a text token, None for a model without text.
            text_length: number of text tokens of the example; other numbers are accepted.
            norm: norms of the blocks, "layer" or "rms"; those of queries and keys are "rms".
            last_norm: there is a norm behind the last block of every map.
            clip: smooth bound of what the last matrix makes, None for none.
            scale: scales are softplus(o + c), which is 1 at o = 0, or exp(o).
            first: order of the first map, "reversed" or "raster"; the others alternate.
            rope: rotary tables over (row, column, word), over (row, column) without a text. Widths of
                None: the word turns 16 channels, row and column half of the rest each.
        """

        attn: BaseConfig = part("attention", Attention.Config(qk_norm_eps=1e-6))
        ffn: BaseConfig = part("ffn", MLP.Config(act="gelu"))
        input_size: Count = 32
        channels: Count = 4
        text_dim: Count | None = 2048
        text_length: Count = 128
        norm: Literal["layer", "rms"] = "layer"
        last_norm: bool = True
        clip: Positive | None = 4.0
        scale: Literal["softplus", "exp"] = "softplus"
        first: Literal["reversed", "raster"] = "reversed"
        rope: GridRope.Config = GridRope.Config(temperature=1e4)

        def check(self) -> None:
            if self.input_size % self.patch:
                raise ValueError(
                    f"input_size {self.input_size} is not divisible by patch {self.patch}"
                )
            if (self.rope.kind, self.rope.offset, self.rope.reference) != ("axial", 0.0, None):
                raise ValueError(
                    "rope: places are scaled to the config's grid; use kind 'axial', offset 0 and "
                    "reference None"
                )
            if not any(self.flows):
                raise ValueError(f"flows {self.flows} have no block at all")
            if self.text_dim is not None and not self.flows[-1]:
                raise ValueError(
                    "the last map reads the text; it must have a block, or text_dim=None"
                )

    def __init__(self, config: STARFlow.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        width, texts = head_width(config), config.text_dim is not None
        eps = 1e-5 if config.norm == "layer" else 1e-6
        rule = NormRule(kind=config.norm, eps=eps, qk_kind="rms")
        site = Site(dim=config.dim, heads=config.heads, norm=rule)
        features, last = config.channels * config.patch**2, len(config.flows) - 1
        self.flows = nn.ModuleList(
            StartedEnds(
                features, config.dim, text_dim=config.text_dim if i == last else None,
                norm=config.last_norm, clip=config.clip, scale=config.scale,
                reverses=(i % 2 == 0) == (config.first == "reversed"),
            ) if count else nn.Identity()
            for i, count in enumerate(config.flows)
        )  # fmt: skip
        rope = config.rope
        if texts and rope.widths is None:
            if width < 20 or width % 4:
                raise ValueError(
                    f"{self.name}: heads of width {width} leave no pair of channels to row and column "
                    "beside 16 of the word; give rope widths, or heads of width 20, 24, ..."
                )
            rope = rope.replace(widths=((width - 16) // 2, (width - 16) // 2, 16))
        axes = 3 if texts else 2
        self.rope = GridRope(rope, width, heads=config.heads, depth=config.depth, axes=axes)
        needs = Needs(causal=True, rope=width)
        self.blocks = build_stack(config, site, needs, name=self.name)

    def forward(
        self,
        x: Tensor,
        text: Tensor | None = None,
        *,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Latents:
        """Latents of the flow and log-determinant.

        Args:
            x: (B, C, H, W) latents of an autoencoder, H and W divisible by the patch.
            text: (B, L, text_dim) features of the text, rows of padding zero; None only for a model
                without.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work.

        Returns:
            z (B, C, H, W) and log |det dz/dx| (B,), in float32 at least.

        Raises:
            ValueError: a shape does not fit, or the text is missing.
            CapabilityError: a text for a model without.
        """
        tokens = self.tokens(x)
        ctx = Context(ledger=ledger, tap=tap, complete=complete)
        z, log_det = run_maps(self.maps(x, text, ctx=ctx), tokens)
        return Latents(self.image(z, x), log_det)

    def tokens(self, x: Tensor) -> Tensor:
        """Latents (B, C, H, W) as patches (B, T, D), row by row, channels last inside."""
        return patches(self.config, x, size=None, channels_first=False, where=self.name)

    def image(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Latents of patches (B, T, D), of the shape of ``like`` (B, C, H, W)."""
        rows, columns = (n // self.config.patch for n in like.shape[2:])
        return unpatchify(tokens, rows, columns, self.config.patch)

    def prior(self, z: Tensor) -> Tensor:
        """What the last map made, from latents N(0, I): the same."""
        return z

    def maps(
        self, like: Tensor, text: Tensor | None = None, *, temperature: float = 1.0,
        ctx: Context = EMPTY,
    ) -> list[TokenMap]:  # fmt: skip
        """The autoregressive maps under given conditions, from the data to the latents.

        Args:
            like: (B, C, H, W) data or latents, whose shape counts.
            text: (B, L, text_dim) features of the text.
            temperature: divides the scores of all attentions.
            ctx: what the blocks get beside the tokens.

        Raises:
            ValueError: a shape does not fit, or the text is missing.
            CapabilityError: a text for a model without, or a temperature without softmax attention.
        """
        self._check_text(text, like.shape[0])
        ctx, made = cooled(ctx, temperature, self.blocks, self.name), []
        plain = self._placed(ctx, like, 0)
        for i, ends, blocks in pieces(self.config, self.flows, self.blocks):
            front, here = None, plain
            if text is not None and i == len(self.flows) - 1:
                front = ends.proj_text(text.to(ends.like.dtype))
                here = self._placed(ctx, like, text.shape[1])
            changed = front is not None or temperature != 1
            made.append(
                TokenMap(ends=ends, blocks=blocks, ctx=here, front=front, conditioned=changed)
            )
        return made

    def _check_text(self, text: Tensor | None, batch: int) -> None:
        width = self.config.text_dim
        if width is None and text is not None:
            raise CapabilityError(f"{self.name}: built without a text; text_dim is None")
        if width is not None and text is None:
            raise ValueError(
                f"{self.name}: the text is missing; give text (B, L, {width}), the features of an empty "
                "text for none"
            )
        if text is not None:
            if not text.is_floating_point():
                raise TypeError(
                    f"{self.name}: text: expected features of a text, real numbers, got {text.dtype}"
                )
            shown = f"({batch}, L, {width})"
            check_shape(text, shown, (batch, None, width), where=f"{self.name}: text")

    def _placed(self, ctx: Context, like: Tensor, words: int) -> Context:
        """With the coordinates (1, L + T, axes) of a text and of the grid of ``like``."""
        config = self.config
        side, grid = config.input_size // config.patch, [n // config.patch for n in like.shape[2:]]
        places = grid_positions(cell_counts(grid, device=like.device))
        places = places * (side / math.sqrt(math.prod(grid)))
        if config.text_dim is not None:
            places = nn.functional.pad(places, (0, 1))
        if words:
            text = torch.arange(words, device=like.device) * side / words
            places = torch.cat([nn.functional.pad(text[None, :, None], (2, 0)), places], dim=1)
        (rope,) = self.rope(places, like=like)
        return replace(ctx, positions=places, rope=rope)

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        config, like = self.config, next(p for p in self.parameters() if p.is_floating_point())

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)

        inputs = {"x": drawn(batch, config.channels, config.input_size, config.input_size)}
        if config.text_dim is not None:
            inputs["text"] = drawn(batch, config.text_length, config.text_dim)
        return inputs

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        axes = {"x": {0: "batch"}}
        return axes if self.config.text_dim is None else axes | {"text": {0: "batch", 1: "words"}}


PRESETS = {
    "starflow-t2i": Preset(
        config=STARFlow.Config(dim=3072, depth=34, heads=48, flows=(2, 2, 2, 2, 2, 24)),
        params=3_858_281_544,
        source="released config starflow_3B_t2i_256x256 of arXiv 2506.06276",
        licence="Apple Machine Learning Research Model License (research only)",
        aliases=("starflow", "STARFlow-3B"),
        summary="STARFlow of the latents (4, 32, 32) of 256 x 256 images of a text (Flan-T5-XL).",
    ),
    "starflow-tiny": Preset(
        config=STARFlow.Config(
            dim=48, depth=4, heads=2, flows=(1, 1, 2), input_size=4, text_dim=12, text_length=5
        ),
        summary="A size of ours for tests and examples.",
    ),
}
register_presets(STARFlow, PRESETS, paper="2506.06276")
