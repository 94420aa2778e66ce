"""GenCompositor: a moving foreground put into a video.

Reference: GenCompositor: Generative Video Compositing with Diffusion Transformer, 2025, arXiv 2509.02460;
CogVideoX: Text-to-Video Diffusion Models with An Expert Transformer, 2024, arXiv 2408.06072.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from effformer.attention import Attention
from effformer.blocks import BackboneConfig, ExpertAdaLN, Needs, build_stack, head_width
from effformer.checks import check_shape
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import Context, Ledger, Tap, explained
from effformer.layout import Layout
from effformer.nn.embeddings import TimeEmbedding, sincos_1d, sincos_2d
from effformer.nn.norms import make_norm
from effformer.nn.patch import PatchEmbed, patchify, unpatchify
from effformer.nn.positions import extended_positions
from effformer.nn.rope import GridRope
from effformer.site import NormRule, Site
from effformer.values import Count

from .base import Model, Preset, register_presets
from .diffusion_parts import FinalLayer, reset_parameters
from .layouts.gencompositor import OFFICIAL

__all__ = ["PRESETS", "BackgroundBranch", "GenCompositor"]


class GenCompositor(Model):
    """Video transformer that puts a moving foreground into a video: text, video and foreground meet in
    one attention, and a light branch keeps the background.

    The foreground is not aligned with the video: its rotary positions go on below those of the video
    (ERoPE). The branch, a few blocks, reads the background, and what it makes is added to the tokens of
    the video where the mask leaves the background as it is.

    ``forward(x, t, text, background, foreground, mask)`` returns the CogVideoX "v" (B, T, C, H, W) for
    steps t of its diffusion, 0..999; no `FlowConvention` says its schedule, whose last step is noise
    alone. Latents are those of CogVideoX's autoencoder, ``text`` features of T5-XXL; the published
    weights saw empty texts only. Positions are stored for one size: videos have the size and texts the
    length of the config.

    Args:
        config: the config.
        name: preset name.

    Raises:
        ValueError: the widths of the rotary tables are not those of the heads.
        CapabilityError: a part cannot do what its block needs; parts that can are named.

    Differs from the paper: with ``order="release"`` positions are those of the released code, which gives
    the table of the extended grid to tokens of another order; published weights need it.

    Reference: GenCompositor: Generative Video Compositing with Diffusion Transformer, 2025, arXiv
    2509.02460.
    """

    FAMILY: ClassVar[str] = "gencompositor"
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (OFFICIAL,)
    ROLES: ClassVar[Mapping[str, str]] = {"norm": "final_linear"}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BackboneConfig):
        """Knobs of `GenCompositor`, beside `BackboneConfig`.

        Attributes:
            attn: token mixer of text, video and foreground together.
            block: arrangement of the blocks, of two streams.
            branch_depth: number of blocks that read the background; ``layers`` counts through the
                others.
            frames: latent frames.
            size: height and width of the latents.
            channels: channels of the latents.
            patch: patch side.
            text_dim: width of a text token.
            text_length: number of text tokens.
            time_dim: width of the time embedding, which modulates the blocks.
            order: which tokens have which positions, see `extended_positions`.
            rope: rotary tables over (frame, row, column).
        """

        attn: BaseConfig = part("attention", Attention.Config(qk_norm=True, qk_norm_eps=1e-6))
        block: BaseConfig = part("block", ExpertAdaLN.Config())
        branch_depth: Count = 2
        frames: Count = 13
        size: tuple[Count, Count] = (60, 90)
        channels: Count = 16
        patch: Count = 2
        text_dim: Count = 4096
        text_length: Count = 226
        time_dim: Count = 512
        order: Literal["paper", "release"] = "paper"
        rope: GridRope.Config = GridRope.Config(temperature=1e4, widths=(16, 24, 24))

        def check(self) -> None:
            if any(side % self.patch for side in self.size):
                raise ValueError(f"size {self.size} is not divisible by patch {self.patch}")
            if self.dim % 16:
                raise ValueError(f"dim must be divisible by 16 for 3-D positions, got {self.dim}")
            if self.branch_depth > self.depth:
                raise ValueError(
                    f"branch_depth={self.branch_depth} blocks serve at least one other each, but depth "
                    f"is {self.depth}"
                )

        @property
        def grid(self) -> tuple[int, int, int]:
            """Frames, rows and columns of patches."""
            return self.frames, self.size[0] // self.patch, self.size[1] // self.patch

    def __init__(self, config: GenCompositor.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        site, needs = _place(config)
        self.stem = Stem(config, 2 * config.channels, streams=2)
        self.foreground_embed = PatchEmbed(config.channels, config.dim, config.patch)
        self.rope = GridRope(
            config.rope, head_width(config), heads=config.heads, depth=config.depth, axes=3
        )
        self.blocks = build_stack(config, site, needs, name=self.name)
        self.norm = make_norm(site)
        self.final = FinalLayer(site, config.patch, config.channels)
        self.branch = BackgroundBranch(config, self.name)
        reset_parameters(self, self.stem.patch_embed, self.final)
        for out in self.branch.outs:
            nn.init.zeros_(out.weight)  # type: ignore[arg-type]
        with torch.no_grad():
            weight = self.stem.patch_embed.proj.weight[:, : config.channels]
            self.foreground_embed.proj.weight.copy_(weight)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        background: Tensor,
        foreground: Tensor,
        mask: Tensor,
        *,
        branch_scale: float = 1.0,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Predict v.

        Args:
            x: (B, T, C, H, W) noisy latents.
            t: (B,) steps, 0..999, 999 = noise.
            text: (B, L, text_dim) tokens of the text.
            background: (B, T, C, H, W) latents of the video that is black inside the mask.
            foreground: (B, T, C, H, W) latents of the foreground.
            mask: (B, T, 1, H, W), above 0 where the video may change.
            branch_scale: factor on what the branch adds.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work.

        Returns:
            (B, T, C, H, W).

        Raises:
            ValueError: a shape does not fit.
        """
        self._check(x, t, text, background, foreground, mask)
        c, shared = self.config, Context(ledger=ledger, tap=tap, complete=complete)
        kept = ~self.editable(mask)
        given = self.branch(torch.cat([x, background, mask.to(x.dtype)], dim=2), t, text, shared)
        h, y, video, wording = self.stem(
            torch.cat([x, background], dim=2), t, text, shared, self.rope,
            beside=tokens_of(self.foreground_embed, foreground),
        )  # fmt: skip
        count, each = kept.shape[1], ceil(c.depth / c.branch_depth)
        for i, block in enumerate(self.blocks):
            h, y = block(h, y, video, wording)
            added = branch_scale * given[i // each] * kept.to(h.dtype)
            h = torch.cat([h[:, :count] + added, h[:, count:]], dim=1)
        out = self.final(self.norm(h[:, :count]), video.cond)
        frames = out.unflatten(1, (c.frames, -1)).flatten(0, 1)
        _, rows, columns = c.grid
        made = unpatchify(frames, rows, columns, c.patch, channels_first=True)
        return made.unflatten(0, (-1, c.frames))

    def editable(self, mask: Tensor) -> Tensor:
        """Which tokens of the video may change: (B, T, 1, H, W) -> (B, N, 1), True if the mask is above 0
        anywhere in the patch.
        """
        patches = patchify(mask.flatten(0, 1), self.config.patch)
        return (patches > 0).any(dim=-1).unflatten(0, mask.shape[:2]).flatten(1)[..., None]

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        c, like = self.config, self.foreground_embed.proj.weight

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)

        video = (batch, c.frames, c.channels, *c.size)
        return {
            "x": drawn(*video),
            "t": torch.randint(0, 1000, (batch,), device=like.device, generator=generator),
            "text": drawn(batch, c.text_length, c.text_dim),
            "background": drawn(*video),
            "foreground": drawn(*video),
            "mask": (drawn(batch, c.frames, 1, *c.size) > 1).to(like.dtype),
        }

    def _check(
        self, x: Tensor, t: Tensor, text: Tensor, background: Tensor, foreground: Tensor, mask: Tensor
    ) -> None:  # fmt: skip
        c, batch = self.config, x.shape[0]
        height, width = c.size
        shown = f"(B, {c.frames}, {c.channels}, {height}, {width})"
        video = (batch, c.frames, c.channels, height, width)
        check_shape(x, shown, (None, *video[1:]), where=f"{self.name}: x")
        for name, value in (("background", background), ("foreground", foreground)):
            check_shape(value, shown, video, where=f"{self.name}: {name}")
        one = (batch, c.frames, 1, height, width)
        check_shape(mask, f"(B, {c.frames}, 1, {height}, {width})", one, where=f"{self.name}: mask")
        check_shape(t, "(B,)", (batch,), where=f"{self.name}: t")
        wide = (batch, c.text_length, c.text_dim)
        check_shape(text, f"(B, {wide[1]}, {wide[2]})", wide, where=f"{self.name}: text")


class BackgroundBranch(nn.Module):
    """The blocks that read the background, behind each of them a linear layer that starts at zero.

    Args:
        config: of the model.
        name: of the model, for messages.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"outs": "skips"}

    def __init__(self, config: GenCompositor.Config, name: str) -> None:
        super().__init__()
        site, needs = _place(config)
        self.stem = Stem(config, 2 * config.channels + 1, streams=1)
        self.rope = GridRope(
            config.rope, head_width(config), heads=config.heads, depth=config.branch_depth, axes=3
        )
        places = [replace(site, path="branch")] * config.branch_depth
        self.blocks = build_stack(config.replace(layers={}), places, needs, name=f"{name} branch")
        self.outs = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in self.blocks)

    def forward(self, video: Tensor, t: Tensor, text: Tensor, shared: Context) -> Sequence[Tensor]:
        """What is added to the tokens of the video (B, N, D), one for each block, of latents with the
        background and the mask beside them (B, T, 2 C + 1, H, W).
        """
        h, y, ctx, wording = self.stem(video, t, text, shared, self.rope)
        made = []
        for block, out in zip(self.blocks, self.outs, strict=True):
            h, y = block(h, y, ctx, wording)
            made.append(out(h))
        return made


class Stem(nn.Module):
    """Tokens of videos and a text with their positions, and what the blocks get beside them.

    Args:
        config: of the model.
        channels: channels of the first video.
        streams: number of videos.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"text_embed": "patch_embed"}
    pos_embed: Tensor

    def __init__(self, config: GenCompositor.Config, channels: int, *, streams: int) -> None:
        super().__init__()
        self.config, self.streams = config, streams
        self.patch_embed = PatchEmbed(channels, config.dim, config.patch)
        self.text_embed = nn.Linear(config.text_dim, config.dim)
        self.time_embed = TimeEmbedding(config.time_dim, features=config.dim)
        self.register_buffer("pos_embed", self._table())

    def _table(self) -> Tensor:
        """Zeros for the text, then ``[code(frame) | code(column) | code(row)]`` of every token."""
        c = self.config
        frames, rows, columns = c.grid
        rows = rows * self.streams
        times = sincos_1d(torch.arange(frames), c.dim // 4).float()
        space = sincos_2d(rows, columns, 3 * c.dim // 4, step=1 / 1.875)[0]
        whole = torch.cat(
            [times[:, None].expand(-1, len(space), -1), space.expand(frames, -1, -1)], dim=-1
        )
        if c.order == "paper":  # the rows of one video after those of the other
            whole = whole.unflatten(1, (self.streams, -1)).transpose(0, 1)
        return torch.cat([whole.new_zeros(c.text_length, c.dim), whole.flatten(0, -2)])[None]

    def forward(
        self,
        video: Tensor,
        t: Tensor,
        text: Tensor,
        shared: Context,
        rope: GridRope,
        *,
        beside: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Context, Context]:
        """Tokens of the videos and of the text, and the contexts of both.

        Args:
            video: (B, T, channels, H, W).
            t: (B,).
            text: (B, L, text_dim).
            shared: what both contexts have.
            rope: makes the rotary tables.
            beside: (B, N, D) tokens of another video, behind those of the first.
        """
        c, words = self.config, text.shape[1]
        h = tokens_of(self.patch_embed, video)
        h = h if beside is None else torch.cat([h, beside], dim=1)
        h, y = h + self.pos_embed[:, words:], self.text_embed(text) + self.pos_embed[:, :words]
        time = self.time_embed(t, h.dtype)
        positions = extended_positions(c.grid, self.streams, order=c.order, device=h.device)
        (tables,) = rope(positions, like=h)
        wording = replace(shared, cond=time, time=time)
        return h, y, replace(wording, positions=positions, rope=tables), wording


def tokens_of(embed: PatchEmbed, video: Tensor) -> Tensor:
    """Patches of every frame, frame after frame: (B, T, C, H, W) -> (B, N, D)."""
    frames: Tensor = embed(video.flatten(0, 1))
    return frames.unflatten(0, video.shape[:2]).flatten(1, 2)


def _place(config: GenCompositor.Config) -> tuple[Site, Needs]:
    """What the blocks are told, of the model and of its branch."""
    site = Site(
        dim=config.dim, heads=config.heads, cond_dim=config.time_dim, time_dim=config.time_dim,
        norm=NormRule(eps=1e-5, modulated_affine=True),
    )  # fmt: skip
    return site, Needs(rope=head_width(config), joint=True)


_LICENCE = "that of the repository (academic use) and the CogVideoX License"
PRESETS = {
    "gencompositor": Preset(
        config=GenCompositor.Config(dim=3072, depth=42, heads=48, order="release"),
        params=5_868_785_728,
        source="released weights and code of TencentARC/GenCompositor, on CogVideoX-5B-I2V",
        licence=_LICENCE,
        sampling={"steps": 20},
        aliases=("GenCompositor",),
        summary="GenCompositor: a moving foreground put into a video of 480 x 720.",
    ),
    "gencompositor-tiny": Preset(
        config=GenCompositor.Config(
            dim=32, depth=2, heads=2, frames=2, size=(4, 6), channels=3, text_dim=10, text_length=4,
            time_dim=12, rope=GridRope.Config(temperature=1e4, widths=(4, 6, 6)),
        ),
        summary="A size of ours for tests and examples.",
    ),
}  # fmt: skip
register_presets(GenCompositor, PRESETS, paper="2509.02460")
