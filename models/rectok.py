"""RecTok: an image tokenizer whose latents mean something when they are noisy, too.

Reference: RecTok: Reconstruction Distillation along Rectified Flow, 2025, arXiv 2512.13421.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.attention import Attention
from effformer.blocks import BackboneConfig, Needs, build_stack, head_width
from effformer.checks import CapabilityError, check_shape
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import EMPTY, Context, Ledger, Rope, Tap, explained
from effformer.ffn import SwiGLU
from effformer.layout import Layout
from effformer.nn.init import xavier_linears
from effformer.nn.latents import Latents
from effformer.nn.norms import make_norm
from effformer.nn.patch import PatchEmbed, unpatchify
from effformer.nn.precision import widened
from effformer.site import NormRule, Site
from effformer.values import Count, NonNegative

from .base import Model, Preset, register_presets
from .layouts.rectok import OFFICIAL

__all__ = ["PRESETS", "Draws", "RecTok", "TokenizerLosses", "hinge_losses", "unit_angles"]


class Draws(NamedTuple):
    """What is random in a step of training.

    Attributes:
        kept: (B, K) int64 cells that the encoder sees, in the order in which it sees them.
        t: (B, 1, 1) how noisy the latents are, 1 = noise.
        posterior: (B, K, C) noise of the latents.
        flow: (B, K, C) noise that is mixed with them.
    """

    kept: Tensor
    t: Tensor
    posterior: Tensor
    flow: Tensor


class TokenizerLosses(NamedTuple):
    """Losses of a step, scalars.

    Attributes:
        pixels: squared error of the image in [0, 1].
        kl: divergence of the latents, summed over a sample.
        meaning: ``mean(1 - cos)`` of predicted and given features, over all cells.
    """

    pixels: Tensor
    kl: Tensor
    meaning: Tensor

    def total(self, kl: float = 1e-6) -> Tensor:
        """Their sum, with the published weight of the divergence."""
        return self.pixels + kl * self.kl + self.meaning


class RecTok(Model):
    """Autoencoder of images, a ViT on either side of latents, with a small third one that predicts the
    features of a vision foundation model from noisy latents; it is left out after training.

    ``forward(x)`` returns the image that the mean of the latents gives. `encode`, `decode` and
    `describe` are the steps; `losses` is a step of training: some cells are hidden from the encoder, and
    what is decoded are latents mixed with noise along the straight path, so that reconstruction and
    meaning survive it.

    Args:
        config: the config.
        name: preset name.

    Differs from the paper: perceptual and adversarial losses need networks of others; `hinge_losses`
    has the terms of the latter.

    Reference: RecTok: Reconstruction Distillation along Rectified Flow, 2025, arXiv 2512.13421.
    """

    FAMILY: ClassVar[str] = "rectok"
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (OFFICIAL,)
    ROLES: ClassVar[Mapping[str, str]] = {
        "to_latents": "head", "from_latents": "patch_embed", "to_pixels": "head", "smooth": "head",
        "from_noisy": "patch_embed", "to_features": "head",
    }  # fmt: skip

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BackboneConfig):
        """Knobs of `RecTok`, beside `BackboneConfig`.

        Attributes:
            depth: number of blocks of the encoder, and of the decoder; ``layers`` changes both.
            input_size: side of the image.
            patch: patch side.
            channels: channels of a latent.
            features: width of the foundation model's features; None: no part that predicts them.
            describer_dim: width of that part.
            describer_depth: number of its blocks.
            describer_heads: number of its heads.
            gamma: factor of the noise in training.
        """

        attn: BaseConfig = part("attention", Attention.Config())
        ffn: BaseConfig | None = part("ffn", SwiGLU.Config())
        input_size: Count = 256
        patch: Count = 16
        channels: Count = 128
        features: Count | None = 1024
        describer_dim: Count = 192
        describer_depth: Count = 3
        describer_heads: Count = 4
        gamma: NonNegative = 1.0

        def check(self) -> None:
            if self.input_size % self.patch:
                raise ValueError(
                    f"input_size {self.input_size} is not divisible by patch {self.patch}"
                )

        @property
        def describer(self) -> RecTok.Config:
            """The same in the sizes of the part that predicts features."""
            return self.replace(
                dim=self.describer_dim, depth=self.describer_depth, heads=self.describer_heads,
                layers={},
            )  # fmt: skip

    def __init__(self, config: RecTok.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        dim = config.dim
        self.side = config.input_size // config.patch
        self.patch_embed = PatchEmbed(3, dim, config.patch)
        self.encoder = Tower(config, self.side, "encoder", self.name)
        self.to_latents = nn.Linear(dim, 2 * config.channels)
        self.from_latents = nn.Linear(config.channels, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.decoder = Tower(config, self.side, "decoder", self.name)
        self.to_pixels = nn.Linear(dim, 3 * config.patch**2)
        self.smooth = nn.Conv2d(3, 3, 3, padding=1)
        if config.features is not None:
            small = config.describer
            self.from_noisy = nn.Linear(config.channels, small.dim)
            self.mask_feature = nn.Parameter(torch.zeros(1, 1, small.dim))
            self.describer = Tower(small, self.side, "describer", self.name)
            self.to_features = nn.Linear(small.dim, config.features)
        xavier_linears(self)
        nn.init.normal_(self.mask_token, std=dim**-0.5)

    def forward(
        self,
        x: Tensor,
        *,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """The image that its latents give.

        Args:
            x: (B, 3, H, W) in [-1, 1], of the config's size.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work.

        Returns:
            (B, 3, H, W).

        Raises:
            ValueError: a shape does not fit.
        """
        ctx = Context(ledger=ledger, tap=tap, complete=complete)
        return self.decode(self.encode(x, ctx=ctx).mean, ctx=ctx)

    def encode(self, x: Tensor, kept: Tensor | None = None, *, ctx: Context = EMPTY) -> Latents:
        """Latents of images, one for each cell, or for some.

        Args:
            x: (B, 3, H, W) in [-1, 1].
            kept: (B, K) int64 cells to look at, in this order; None: all.
            ctx: what the blocks get beside the tokens.
        """
        size = self.config.input_size
        shape = (None, 3, size, size)
        check_shape(x, f"(B, 3, {size}, {size})", shape, where=f"{self.name}: x")
        return Latents.of(self.to_latents(self.encoder(self.patch_embed(x), ctx, kept)))

    def decode(
        self, latents: Tensor, kept: Tensor | None = None, *, ctx: Context = EMPTY
    ) -> Tensor:
        """The images (B, 3, H, W) of latents (B, K, C) of these cells."""
        self._check(latents, kept)
        h = self._placed(self.from_latents(latents), self.mask_token, kept)
        pixels = self.to_pixels(self.decoder(h, ctx))
        return self.smooth(unpatchify(pixels, self.side, self.side, self.config.patch))

    def describe(
        self, latents: Tensor, kept: Tensor | None = None, *, ctx: Context = EMPTY
    ) -> Tensor:
        """Predicted features (B, N, features) of all cells, from latents (B, K, C) of these.

        Raises:
            CapabilityError: the model was built without.
        """
        if self.config.features is None:
            raise CapabilityError(
                f"{self.name}: built without the part that predicts features (features=None); "
                "features=1024 would have it"
            )
        self._check(latents, kept)
        h = self._placed(self.from_noisy(latents), self.mask_feature, kept)
        return self.to_features(self.describer(h, ctx))

    def draw(self, batch: int, generator: torch.Generator | None = None) -> Draws:
        """What is random in a step of training, as published: up to 40 % of the cells are hidden, one
        share for all samples, and times are shifted towards noise by the size of the latent.
        """
        c, like, cells = self.config, self.to_latents.weight, self.side**2
        share = max(0.0, torch.empty(1).uniform_(-0.1, 0.4, generator=generator).item())
        count = math.ceil(cells * (1 - share))
        order = torch.rand(batch, cells, generator=generator).argsort(dim=1)
        u = torch.rand(batch, 1, 1, generator=generator)
        noise = torch.randn(2, batch, count, c.channels, generator=generator)
        t = u * self.shift / (1 + (self.shift - 1) * u)
        posterior, flow = noise.to(like)
        return Draws(order[:, :count].to(like.device), t.to(like), posterior, flow)

    @property
    def shift(self) -> float:
        """By which times are shifted towards noise: ``sqrt(numbers of a latent / 4096)``."""
        return math.sqrt(self.side**2 * self.config.channels / 4096)

    def losses(
        self, x: Tensor, features: Tensor, draws: Draws, *, ctx: Context = EMPTY
    ) -> TokenizerLosses:
        """A step of training.

        Args:
            x: (B, 3, H, W) images in [-1, 1].
            features: (B, N, features) of a foundation model on the whole images; nothing flows back
                into them.
            draws: of `draw`.
            ctx: what the blocks get beside the tokens.

        Raises:
            ValueError: a shape does not fit.
            CapabilityError: the model was built without the part that predicts features.
        """
        found = self.encode(x, draws.kept, ctx=ctx)
        clean = found.at(draws.posterior)
        noisy = (1 - draws.t) * clean + draws.t * (self.config.gamma * draws.flow)
        said = self.describe(noisy, draws.kept, ctx=ctx)
        check_shape(
            features, f"(B, {self.side**2}, {self.config.features})", said.shape,
            where=f"{self.name}: features",
        )  # fmt: skip
        made = self.decode(noisy, draws.kept, ctx=ctx)
        return TokenizerLosses(
            pixels=(widened(made - x) / 2).square().mean(),
            kl=found.kl().mean(),
            meaning=(
                1 - F.cosine_similarity(widened(said), widened(features.detach()), dim=-1)
            ).mean(),
        )

    def _placed(self, h: Tensor, missing: Tensor, kept: Tensor | None) -> Tensor:
        """Tokens (B, K, D) at their cells (B, N, D), the others ``missing``."""
        if kept is None:
            return h
        every = missing.to(h).expand(h.shape[0], self.side**2, -1)
        return every.scatter(1, kept[..., None].expand_as(h), h)

    def _check(self, latents: Tensor, kept: Tensor | None) -> None:
        count = self.side**2 if kept is None else kept.shape[1]
        channels = self.config.channels
        check_shape(
            latents, f"(B, {count}, {channels})", (None, count, channels),
            where=f"{self.name}: latents",
        )  # fmt: skip

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        like, size = self.to_latents.weight, self.config.input_size
        x = torch.randn(
            batch, 3, size, size, dtype=like.dtype, device=like.device, generator=generator
        )
        return {"x": x.tanh()}


class Tower(nn.Module):
    """Blocks over the cells of a square: learned positions, a norm, rotary blocks, a norm.

    Args:
        config: the parts and sizes.
        side: cells in a row.
        path: name of the tower.
        name: the model's name, for messages.
    """

    def __init__(self, config: RecTok.Config, side: int, path: str, name: str) -> None:
        super().__init__()
        site = Site(dim=config.dim, heads=config.heads, norm=NormRule(kind="rms"), path=path)
        self.side, self.width = side, head_width(config)
        if self.width % 4:
            raise ValueError(
                f"{name} {path}: heads of width {self.width}; it must be divisible by 4"
            )
        self.positions = nn.Parameter(torch.empty(1, side**2, config.dim))
        self.norm_in, self.norm_out = make_norm(site), make_norm(site)
        needs = Needs(rope=self.width)
        self.blocks = build_stack(config, site, needs, name=f"{name} {path}")
        nn.init.normal_(self.positions, std=config.dim**-0.5)

    def forward(self, h: Tensor, ctx: Context, kept: Tensor | None = None) -> Tensor:
        """Tokens (B, N, D) of all cells, of which those in ``kept`` (B, K) go on."""
        h = h + self.positions
        # pairs (0, 1), (2, 3), ... stand as (0, K/2), (1, K/2 + 1), ...: their angles may differ there
        angles = unit_angles(self.side, self.width).unflatten(-1, (-1, 2)).mT.flatten(-2)
        angles = angles.to(h.device)
        cos, sin = (wave.to(h.dtype) for wave in (angles.cos(), angles.sin()))
        if kept is not None:
            h = h.gather(1, kept[..., None].expand(-1, -1, h.shape[-1]))
            cos, sin = cos[kept][:, None], sin[kept][:, None]
        own = Context(
            rope=Rope(cos, sin),
            ledger=ctx.ledger, tap=ctx.tap, complete=ctx.complete,
        )  # fmt: skip
        h = self.norm_in(h)
        for block in self.blocks:
            h = block(h, own)
        return self.norm_out(h)


def unit_angles(side: int, width: int) -> Tensor:
    """Angles (N, width) of the cells of a square that is 1 wide, row-major; the first half of the
    channels are the row's. Channels 2 k and 2 k + 1 are a pair.

    Frequencies fall from 7 turns to 7e-4 and are listed twice one behind the other, so that the two
    channels of a pair turn differently: this is not a rotation. The published weights were trained so.

    Args:
        side: cells in a row.
        width: width of a head, divisible by 4.

    Reference: RecTok: Reconstruction Distillation along Rectified Flow, 2025, arXiv 2512.13421
    (released code).
    """
    turns = torch.logspace(math.log10(7.0), math.log10(7e-4), width // 4).repeat(2)
    places = torch.linspace(0, 1, side)[:, None] * (2 * math.pi * turns)
    rows = places[:, None].expand(-1, side, -1)
    columns = places[None].expand(side, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def hinge_losses(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of a discriminator and of its generator.

    Args:
        real: logits of real images, any shape.
        fake: logits of made ones.

    Returns:
        ``mean(relu(1 - real)) / 2 + mean(relu(1 + fake)) / 2`` and ``-mean(fake)``.

    Reference: Geometric GAN, 2017, arXiv 1705.02894.
    """
    judged = (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
    return judged, -fake.mean()


PRESETS = {
    "rectok": Preset(
        config=RecTok.Config(dim=768, depth=12, heads=12),
        source="released code of RecTok (Shi-qingyu/RecTok)",
        aliases=("RecTok",),
    ),
    "rectok-tiny": Preset(
        config=RecTok.Config(
            dim=24, depth=2, heads=2, input_size=32, patch=8, channels=6, features=10, describer_dim=16,
            describer_depth=1, describer_heads=2,
        ),
        summary="A size of ours for tests and examples.",
    ),
}  # fmt: skip
register_presets(RecTok, PRESETS, paper="2512.13421")
