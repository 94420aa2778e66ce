"""What class-conditional diffusion transformers over patches of a latent are made of: knobs,
embeddings, conditioning, the last layer, their forward pass, checks, example inputs and published sizes.

Reference: Scalable Diffusion Models with Transformers, 2022, arXiv 2212.09748.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from effformer.blocks import AdaLNZero, BackboneConfig, Needs, build_stack
from effformer.checks import check_shape
from effformer.config import Config, part
from effformer.context import Context, Ledger, Rope, Tap, explained
from effformer.nn.embeddings import LabelEmbedding, TimeEmbedding, is_formula, sincos_2d
from effformer.nn.init import xavier_linears
from effformer.nn.lengths import is_fixed
from effformer.nn.norms import Modulation, SharedModulation, branch_norm, modulate
from effformer.nn.patch import PatchEmbed, unpatchify
from effformer.site import NormRule, Site
from effformer.values import Chance, Count, Positive

from .base import Model, Preset

__all__ = [
    "DIT_PARAMS", "FinalLayer", "LatentConfig", "LatentTransformer", "check_inputs", "dit_presets", "latent_axes",
    "latent_inputs", "latent_site", "position_table", "positions_of", "reset_parameters",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig(BackboneConfig):
    """Knobs that the families share, beside `BackboneConfig`.

    Attributes:
        input_size: side of the square input, or (height, width); fixes the stored position table.
        channels: input channels.
        patch: patch side.
        num_classes: number of classes; id ``num_classes`` is the null class.
        label_dropout: probability of dropping labels in training; 0 means there is no null class.
        learn_sigma: the last layer has twice the channels.
        positions: "sincos" (fixed) or "learned" (a checkpoint that changed the table).
        time_freq_shift: 0 as in DiT, 1 as diffusers evaluates time features by default.
        ffn_norm_eps: epsilon of the norms before FFNs (diffusers' default checkpoints: 1e-5).
    """

    block: Config = part("block", AdaLNZero.Config())
    input_size: Count | tuple[Count, Count] = 32
    channels: Count = 4
    patch: Count = 2
    num_classes: Count = 1000
    label_dropout: Chance = 0.1
    learn_sigma: bool = True
    positions: Literal["sincos", "learned"] = "sincos"
    time_freq_shift: Literal[0, 1] = 0
    ffn_norm_eps: Positive = 1e-6

    def check(self) -> None:
        if any(side % self.patch for side in self.size):
            fit = [p for p in range(1, min(self.size) + 1) if not any(n % p for n in self.size)]
            raise ValueError(
                f"input_size {self.input_size} is not divisible by patch {self.patch}; "
                f"patches that fit: {', '.join(map(str, fit[:8]))}"
            )
        if self.dim % 4:
            raise ValueError(f"dim must be divisible by 4 for 2-D positions, got {self.dim}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the input."""
        size = self.input_size
        return (size, size) if isinstance(size, int) else size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of the stored table."""
        height, width = self.size
        return height // self.patch, width // self.patch

    @property
    def out_channels(self) -> int:
        """Channels of the last layer."""
        return self.channels * (2 if self.learn_sigma else 1)

    def cells(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of x (B, C, H, W)."""
        return x.shape[2] // self.patch, x.shape[3] // self.patch


class FinalLayer(nn.Module):
    """Modulated norm and linear map to patches; starts at zero, so that the model's output is
    zero.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"modulation": "adaln_final", "": "final_linear"}

    def __init__(
        self,
        site: Site,
        patch: int | tuple[int, ...],
        channels: int,
        *,
        by: type[Modulation] | type[SharedModulation] = Modulation,
    ) -> None:
        super().__init__()
        assert site.cond_dim is not None
        self.norm = branch_norm(site)
        self.modulation = by(site.cond_dim, site.dim, 2)
        sides = (patch, patch) if isinstance(patch, int) else patch
        self.linear = nn.Linear(site.dim, prod(sides) * channels)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, p p C), of patches in three dimensions (B, N, p q r C)."""
        shift, scale = self.modulation(cond)
        return self.linear(modulate(self.norm(x), shift, scale))


def latent_site(config: LatentConfig, norm: NormRule) -> Site:
    """What the blocks are told about the model when they are built."""
    rows, columns = config.grid
    return Site(
        dim=config.dim,
        heads=config.heads,
        cond_dim=config.dim,
        time_dim=config.dim,
        norm=norm,
        length=rows * columns,
        grid=config.grid,
    )


def position_table(config: LatentConfig) -> nn.Parameter:
    """Sin-cos positions (1, N, D) of the config's grid; learned if the config says so."""
    learned = config.positions == "learned"
    return nn.Parameter(sincos_2d(*config.grid, config.dim), requires_grad=learned)


def positions_of(table: Tensor, grid: tuple[int, int], config: LatentConfig) -> Tensor:
    """Positions of a grid: the stored table, or the formula for grids that it was not made for."""
    if config.positions == "learned":
        return table
    # a graph for every grid carries the formula, and `latent_axes` says whether that is the table
    every = torch.compiler.is_exporting() and not all(map(is_fixed, grid))
    if every or grid != config.grid:
        return sincos_2d(*grid, config.dim).to(table)
    return table


def reset_parameters(
    model: nn.Module, patches: PatchEmbed, final: FinalLayer, *tables: nn.Linear | nn.Embedding
) -> None:
    """Initialise a model as the official code of DiT does: blocks are the identity, the output is
    zero.

    Args:
        model: the model.
        patches: its patch embedding.
        final: its last layer.
        tables: layers of its conditioning that start small.
    """
    xavier_linears(model)
    weight = patches.proj.weight
    nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
    assert patches.proj.bias is not None
    nn.init.zeros_(patches.proj.bias)
    for table in tables:
        nn.init.normal_(table.weight, std=0.02)
    for module in model.modules():
        if isinstance(module, (Modulation, SharedModulation)):
            module.reset_parameters()
    nn.init.zeros_(final.linear.weight)
    nn.init.zeros_(final.linear.bias)


def check_inputs(config: LatentConfig, x: Tensor, t: Tensor, y: Tensor, *, where: str) -> None:
    """Refuse inputs of a shape or type that the model cannot take.

    Raises:
        ValueError: a shape does not fit.
        TypeError: latents are not floating point, or labels are not integers.
    """
    fixed = config.positions == "learned"
    height, width = config.size if fixed else (None, None)
    shown = f"(B, {config.channels}, {height or 'H'}, {width or 'W'})"
    check_shape(x, shown, (None, config.channels, height, width), where=f"{where}: x")
    check_shape(t, "(B,)", (x.shape[0],), where=f"{where}: t")
    check_shape(y, "(B,)", (x.shape[0],), where=f"{where}: y")
    if not x.is_floating_point():
        raise TypeError(f"{where}: x must be floating point, got {x.dtype}")
    if y.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{where}: y must hold integer class ids, got {y.dtype}")
    if x.shape[2] % config.patch or x.shape[3] % config.patch:
        raise ValueError(f"{where}: {tuple(x.shape[2:])} is not divisible by patch {config.patch}")


def latent_inputs(
    config: LatentConfig,
    like: Tensor,
    batch: int,
    *,
    steps: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Noise, times and labels.

    Args:
        config: sizes.
        like: gives dtype and device.
        batch: number of samples.
        steps: time counts steps 0..steps - 1; None means that it lies in [0, 1].
        generator: source of randomness.
    """
    device, rng = like.device, generator
    shape = (batch, config.channels, *config.size)
    x = torch.randn(shape, dtype=like.dtype, device=device, generator=rng)
    if steps is None:
        t = torch.rand(batch, dtype=like.dtype, device=device, generator=rng)
    else:
        t = torch.randint(0, steps, (batch,), device=device, generator=rng)
    y = torch.randint(0, config.num_classes, (batch,), device=device, generator=rng)
    return {"x": x, "t": t, "y": y}


def latent_axes(config: LatentConfig, table: Tensor) -> dict[str, dict[int, str]]:
    """Axes of the inputs that may vary at run time; sizes do where the table (1, N, D) of positions
    is what the formula gives.
    """
    fixed = config.positions == "learned" or not is_formula(
        table, sincos_2d(*config.grid, config.dim)
    )
    space = {} if fixed else {2: "height", 3: "width"}
    return {"x": {0: "batch", **space}, "t": {0: "batch"}, "y": {0: "batch"}}


class LatentTransformer(Model):
    """What DiT, SiT, DyDiT and LightningDiT share: patches of a latent with positions, modulated
    blocks, and a map back to patches. Others may run its blocks themselves (`RelaCtrl`): ``context``,
    ``embed``, the blocks one by one, ``head``.

    Args:
        config: the config.
        name: preset name.
        norm: the norms of the family.
        rope: width of the heads for its rotary tables, None if it has none.

    Attributes:
        STEPS: time counts steps 0..STEPS - 1; None means that it lies in [0, 1].
        LATENT_SCALE: the published weights saw latents of an autoencoder times this; None if it is
            more than one number.
    """

    STEPS: ClassVar[int | None] = None
    LATENT_SCALE: ClassVar[float | None] = None

    def __init__(
        self, config: LatentConfig, name: str | None, norm: NormRule, *, rope: int | None = None
    ) -> None:
        super().__init__(config, name)
        self.grid, self.out_channels = config.grid, config.out_channels
        site = latent_site(config, norm)
        needs = Needs(rope=rope)
        self.patch_embed = PatchEmbed(config.channels, config.dim, config.patch)
        self.pos_embed = position_table(config)
        self.time_embed = TimeEmbedding(config.dim, freq_shift=config.time_freq_shift)
        self.label_embed = LabelEmbedding(
            config.num_classes, config.dim, null=config.label_dropout > 0
        )
        self.blocks = build_stack(config, site, needs, name=self.name)
        self.final = FinalLayer(site, config.patch, self.out_channels)
        time, labels = self.time_embed, self.label_embed
        reset_parameters(self, self.patch_embed, self.final, labels.table, time.fc1, time.fc2)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        drop: Tensor | None = None,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Predict what the family predicts.

        Args:
            x: (B, C, H, W) latents, H and W divisible by the patch.
            t: (B,) time, as the family counts it.
            y: (B,) class ids, int64.
            drop: (B,) bool, labels to replace by the null class.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work, as if the model had none.

        Returns:
            (B, C, H, W), or as many channels as `head` gives.

        Raises:
            ValueError: a shape does not fit.
            TypeError: labels are not integers.
        """
        ctx = self.context(x, t, y, drop=drop, ledger=ledger, tap=tap, complete=complete)
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, ctx)
        return self.head(h, ctx)

    def context(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        drop: Tensor | None = None,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Context:
        """Check the inputs and make what the blocks get beside the tokens; see `forward`."""
        check_inputs(self.config, x, t, y, where=self.name)
        time = self.time_embed(t, x.dtype)
        cond = time + self.label_embed(y, drop)
        grid = self.config.cells(x)
        positions, rope = self.places(grid, x)
        return Context(
            cond=cond, time=time, grid=grid, positions=positions, rope=rope,
            ledger=ledger, tap=tap, complete=complete,
        )  # fmt: skip

    def assumed(self) -> Mapping[str, Any] | None:
        drops = self.STEPS is not None and self.config.learn_sigma  # SiT's head drops it itself
        return {
            "convention": {"name": self.CONVENTION, "variance": drops},
            "null": self.config.label_dropout > 0,
            "latent_scale": self.LATENT_SCALE,
        }

    def places(self, grid: tuple[int, int], like: Tensor) -> tuple[Tensor | None, Rope | None]:
        """Coordinates of the tokens and rotary tables made of them, where a family has them."""
        return None, None

    def embed(self, x: Tensor) -> Tensor:
        """Patches of x (B, C, H, W) with positions: the tokens (B, N, D) of the first block."""
        cells = self.config.cells(x)
        tokens: Tensor = self.patch_embed(x) + positions_of(self.pos_embed, cells, self.config)
        return tokens

    def head(self, h: Tensor, ctx: Context) -> Tensor:
        """The output of the model from the tokens (B, N, D) behind the last block."""
        assert ctx.grid is not None
        height, width = ctx.grid
        return unpatchify(self.final(h, ctx.cond), height, width, self.config.patch)

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        like = self.patch_embed.proj.weight
        return latent_inputs(self.config, like, batch, steps=self.STEPS, generator=generator)

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return latent_axes(self.config, self.pos_embed)


_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
DIT_PARAMS = {
    "s-2": 32_963_360, "s-4": 32_945_024, "s-8": 33_148_160,
    "b-2": 130_512_416, "b-4": 130_475_648, "b-8": 130_881_536,
    "l-2": 458_102_816, "l-4": 458_053_760, "l-8": 458_594_816,
    "xl-2": 675_129_632, "xl-4": 675_074_432, "xl-8": 675_683_072,
}  # fmt: skip
"""Parameters of DiT and SiT."""
_TINY = {"tiny": (96, 3, 3), "nano": (48, 2, 2)}


def dit_presets(
    config: type[LatentConfig], family: str, title: str, source: str, params: Mapping[str, int]
) -> dict[str, Preset]:
    """The twelve published sizes ``<family>-{s,b,l,xl}-{2,4,8}`` and two tiny ones of ours.

    Args:
        config: config class of the family.
        family: prefix of the names.
        title: official spelling, for the aliases (``DiT-B/2``).
        source: where the sizes come from.
        params: parameters of every published size, ``{"s-2": ...}``.
    """
    presets = {}
    for size, (dim, depth, heads) in _SIZES.items():
        for patch in (2, 4, 8):
            short = (f"{family}-{size}",) if patch == 2 else ()
            presets[f"{family}-{size}-{patch}"] = Preset(
                config=config(dim=dim, depth=depth, heads=heads, patch=patch),
                params=params[f"{size}-{patch}"],
                source=source,
                aliases=(*short, f"{title}-{size.upper()}/{patch}"),
            )
    for size, (dim, depth, heads) in _TINY.items():
        presets[f"{family}-{size}"] = Preset(
            config=config(dim=dim, depth=depth, heads=heads),
            summary="A size of ours for tests and examples.",
        )
    return presets
