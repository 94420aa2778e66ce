"""TripoSG's autoencoder of shapes: points of a surface to a set of latents, to a signed distance.

Reference: TripoSG: High-Fidelity 3D Shape Synthesis using Large-Scale Rectified Flow Models, 2025,
arXiv 2502.06608; 3DShape2VecSet: A 3D Shape Representation for Neural Fields and Generative Diffusion
Models, 2023, arXiv 2301.11445.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from effformer.arguments import checked
from effformer.attention import Attention
from effformer.blocks import BackboneConfig, Needs, build_stack
from effformer.checks import check_shape
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import EMPTY, Context, Ledger, Tap, explained
from effformer.ffn import MLP
from effformer.layout import Layout
from effformer.nn.init import xavier_linears
from effformer.nn.latents import Latents
from effformer.nn.norms import make_norm
from effformer.nn.points import farthest_points, octave_features
from effformer.site import NormRule, Site
from effformer.values import Count, Depth, Natural

from .base import Model, Preset, register_presets
from .layouts.triposg_vae import OFFICIAL
from .reading import Reading

__all__ = ["PRESETS", "TripoSGVAE"]


class TripoSGVAE(Model):
    """Autoencoder of shapes: some points of a surface gather what all of them say, blocks make latents
    of them, and every point in space asks these for its signed distance.

    ``forward(surface, queries, points)`` returns distances (B, P), positive outside, of the mean of
    the latents. `encode`, `decode` and `distances` are its three steps; what `decode` returns serves
    any number of points, and a point does not depend on the others. Latents are sets of any number:
    as many as queries, which `choose` takes from the surface, far from each other.

    Args:
        config: the config.
        name: preset name.

    Reference: TripoSG: High-Fidelity 3D Shape Synthesis using Large-Scale Rectified Flow Models, 2025,
    arXiv 2502.06608.
    """

    FAMILY: ClassVar[str] = "triposg-vae"
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (OFFICIAL,)
    ROLES: ClassVar[Mapping[str, str]] = {
        "embed": "patch_embed", "to_latents": "head", "from_latents": "patch_embed",
        "embed_points": "patch_embed", "norm": "head", "encoder_norm": "head", "head": "head",
    }  # fmt: skip

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BackboneConfig):
        """Knobs of `TripoSGVAE`, beside `BackboneConfig`.

        Attributes:
            dim: width of the decoder.
            depth: number of blocks of encoder and decoder, which ``layers`` counts through.
            encoder_depth: how many of them, the first ones, are the encoder's.
            encoder_dim: width of these.
            cross: token mixer of the queries over the surface, and of the points over the latents.
            channels: channels of a latent.
            octaves: frequencies of a coordinate's features.
            latents: number of latents of the example; other numbers are accepted.
            surface: number of surface points of the example; other numbers are accepted.
            points: number of points in space of the example; other numbers are accepted.
        """

        attn: BaseConfig = part("attention", Attention.Config(qkv_bias=False))
        cross: BaseConfig = part("attention", Attention.Config(qkv_bias=False))
        ffn: BaseConfig | None = part("ffn", MLP.Config(act="gelu"))
        dim: Count = 1024
        depth: Depth = 24
        heads: Count = 8
        encoder_depth: Natural = 8
        encoder_dim: Count = 512
        channels: Count = 64
        octaves: Count = 8
        latents: Count = 2048
        surface: Count = 20480
        points: Count = 8192

        def check(self) -> None:
            if self.encoder_depth > self.depth:
                raise ValueError(
                    f"encoder_depth={self.encoder_depth} blocks are more than all, depth={self.depth}"
                )

    def __init__(self, config: TripoSGVAE.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        here = Site(dim=config.dim, heads=config.heads, norm=NormRule(eps=1e-5))
        there = replace(here, dim=config.encoder_dim)
        features = 3 * (1 + 2 * config.octaves)
        first = config.encoder_depth
        sites = [there] * first + [here] * (config.depth - first)
        self.embed = nn.Linear(features + 3, config.encoder_dim)
        self.gather = _reading(config, there, "gather")
        self.blocks = build_stack(config, sites, Needs(), name=self.name)
        self.encoder_norm = make_norm(there)
        self.to_latents = nn.Linear(config.encoder_dim, 2 * config.channels)
        self.from_latents = nn.Linear(config.channels, config.dim)
        self.embed_points = nn.Linear(features, config.dim)
        self.ask = _reading(config, here, "ask")
        self.norm = make_norm(here)
        self.head = nn.Linear(config.dim, 1)
        xavier_linears(self)

    def forward(
        self,
        surface: Tensor,
        queries: Tensor,
        points: Tensor,
        *,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Signed distances of points to the shapes of surfaces.

        Args:
            surface: (B, S, 6) points of a surface with their unit normals, within [-1, 1].
            queries: (B, M, 6) some of them, see `choose`.
            points: (B, P, 3) points in space.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work.

        Returns:
            (B, P), positive outside.

        Raises:
            ValueError: a shape does not fit.
        """
        ctx = Context(ledger=ledger, tap=tap, complete=complete)
        memory = self.decode(self.encode(surface, queries, ctx=ctx).mean, ctx=ctx)
        return self.distances(memory, points, ctx=ctx)

    @checked
    def choose(
        self, surface: Tensor, count: Count, generator: torch.Generator | None = None
    ) -> Tensor:
        """Queries: of four times as many points of a surface, drawn at random, those that lie far from
        each other.

        Args:
            surface: (B, S, 6).
            count: number M of queries.
            generator: source of randomness.

        Returns:
            (B, M, 6).

        Raises:
            ValueError: the surface has fewer points.
        """
        self._check("surface", surface, 6)
        some = torch.randperm(surface.shape[1], generator=generator)[: 4 * count]
        drawn = surface[:, some.to(surface.device)]
        index = farthest_points(drawn[..., :3], count)
        return drawn.gather(1, index[..., None].expand(-1, -1, 6))

    def encode(self, surface: Tensor, queries: Tensor, *, ctx: Context = EMPTY) -> Latents:
        """Latents of surfaces, one for each query; the order of the surface's points says nothing.

        Args:
            surface: (B, S, 6) points with unit normals.
            queries: (B, M, 6) some of them.
            ctx: what the blocks get beside the tokens.
        """
        self._check("surface", surface, 6)
        self._check("queries", queries, 6, surface.shape[0])
        far, h = (self.embed(self._features(x)) for x in (surface, queries))
        h = self.gather(h, replace(ctx, memory=far))
        for block in self.blocks[: self.config.encoder_depth]:
            h = block(h, ctx)
        return Latents.of(self.to_latents(self.encoder_norm(h)))

    def decode(self, latents: Tensor, *, ctx: Context = EMPTY) -> Tensor:
        """What points ask of latents (B, M, C): tokens (B, M, D)."""
        self._check("latents", latents, self.config.channels)
        h = self.from_latents(latents)
        for block in self.blocks[self.config.encoder_depth :]:
            h = block(h, ctx)
        return h

    @checked
    def distances(
        self, memory: Tensor, points: Tensor, *, chunk: Count | None = None, ctx: Context = EMPTY
    ) -> Tensor:
        """Signed distances (B, P) of points (B, P, 3), positive outside.

        Args:
            memory: (B, M, D) of `decode`.
            points: (B, P, 3).
            chunk: points at a time, which bounds the memory (the published code: 50,000); None: all.
            ctx: what the block gets beside the tokens.
        """
        self._check("points", points, 3, memory.shape[0])
        if chunk is not None:
            each = [self.distances(memory, some, ctx=ctx) for some in points.split(chunk, dim=1)]
            return torch.cat(each, dim=1)
        h = self.embed_points(self._features(points))
        h = self.ask(h, replace(ctx, memory=memory))
        return self.head(self.norm(h))[..., 0]

    def _features(self, x: Tensor) -> Tensor:
        """Features of points (B, N, 3), and behind them the normals of (B, N, 6)."""
        waves = octave_features(x[..., :3], self.config.octaves)
        return torch.cat([waves, x[..., 3:]], dim=-1)

    def _check(self, name: str, value: Tensor, width: int, batch: int | None = None) -> None:
        check_shape(value, f"(B, N, {width})", (batch, None, width), where=f"{self.name}: {name}")

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Points of a sphere of radius 0.5."""
        c, like = self.config, self.embed.weight

        def drawn(count: int) -> Tensor:
            shape = (batch, count, 3)
            return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)

        normals = nn.functional.normalize(drawn(max(c.surface, c.latents)), dim=-1)
        sphere = torch.cat([normals / 2, normals], dim=-1)
        return {
            "surface": sphere[:, : c.surface],
            "queries": sphere[:, : c.latents],
            "points": drawn(c.points).tanh(),
        }

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return {
            "surface": {0: "batch", 1: "surface"},
            "queries": {0: "batch", 1: "latents"},
            "points": {0: "batch", 1: "points"},
        }


def _reading(config: TripoSGVAE.Config, site: Site, path: str) -> Reading:
    """A block that looks at a memory as wide as its tokens."""
    place = replace(site, path=path, memory_dim=site.dim)
    return Reading(config.cross, config.ffn, place, Needs())


_TINY = TripoSGVAE.Config(
    dim=32, depth=3, heads=2, encoder_depth=1, encoder_dim=24, channels=8, octaves=4, latents=8,
    surface=32, points=16,
)  # fmt: skip
PRESETS = {
    "triposg-vae": Preset(
        config=TripoSGVAE.Config(),
        params=242_662_017,
        source="released weights and code of TripoSG (VAST-AI/TripoSG, folder vae)",
        licence="MIT",
    ),
    "triposg-vae-tiny": Preset(config=_TINY, summary="A size of ours for tests and examples."),
}
register_presets(TripoSGVAE, PRESETS, paper="2502.06608")
