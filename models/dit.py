"""DiT: class-conditional diffusion transformer.

Reference: Scalable Diffusion Models with Transformers, 2022, arXiv 2212.09748.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from effformer.blocks import AdaLNZero, BackboneConfig, Needs, build_stack
from effformer.checks import check_shape
from effformer.config import Config, part
from effformer.context import Context, Ledger, Rope, Tap
from effformer.layout import Layout
from effformer.nn.embeddings import LabelEmbedding, TimeEmbedding, sincos_2d
from effformer.nn.init import xavier_linears
from effformer.nn.norms import Modulation, branch_norm, modulate
from effformer.nn.patch import PatchEmbed, unpatchify
from effformer.site import NormRule, Site

from .base import Model, Preset, register_presets
from .layouts.dit import DIFFUSERS, OFFICIAL

__all__ = ["PRESETS", "DiT", "dit_presets"]


class FinalLayer(nn.Module):
    """Modulated norm and linear map to patches; starts at zero, so that the model's output is
    zero.
    """

    def __init__(self, site: Site, patch: int, channels: int) -> None:
        super().__init__()
        assert site.cond_dim is not None
        self.norm = branch_norm(site)
        self.modulation = Modulation(site.cond_dim, site.dim, 2)
        self.linear = nn.Linear(site.dim, patch * patch * channels)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, p p C)."""
        shift, scale = self.modulation(cond)
        return self.linear(modulate(self.norm(x), shift, scale))


class DiT(Model):
    """Diffusion transformer: patches of a latent, conditioned by time and class through adaLN-Zero.

    ``forward(x, t, y)`` follows the official convention: t counts diffusion steps (0..999), the
    output holds the predicted noise and, with ``learn_sigma``, as many channels of variance logits.

    Args:
        config: the config.
        name: preset name.

    Differs from the paper: other input sizes than ``input_size`` are accepted, with positions
    computed for them; labels are dropped by an explicit mask, never by hidden randomness.

    Reference: Scalable Diffusion Models with Transformers, 2022, arXiv 2212.09748.
    """

    FAMILY: ClassVar[str] = "dit"
    CONVENTION: ClassVar[str | None] = "dit"
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (OFFICIAL, DIFFUSERS)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BackboneConfig):
        """Knobs of `DiT`, beside `BackboneConfig`.

        Attributes:
            input_size: side of the square input; fixes the stored position table.
            channels: input channels.
            patch: patch side.
            num_classes: number of classes; id ``num_classes`` is the null class.
            label_dropout: probability of dropping labels in training; 0 means there is no null
                class.
            learn_sigma: the last layer has twice the channels.
            positions: "sincos" (fixed) or "learned" (a checkpoint that changed the table).
            time_freq_shift: 0 as in DiT, 1 as diffusers evaluates time features by default.
            ffn_norm_eps: epsilon of the norms before FFNs (diffusers' default checkpoints: 1e-5).
        """

        block: Config = part("block", AdaLNZero.Config())
        input_size: int = 32
        channels: int = 4
        patch: int = 2
        num_classes: int = 1000
        label_dropout: float = 0.1
        learn_sigma: bool = True
        positions: Literal["sincos", "learned"] = "sincos"
        time_freq_shift: Literal[0, 1] = 0
        ffn_norm_eps: float = 1e-6

        def __post_init__(self) -> None:
            BackboneConfig.__post_init__(self)
            for name in ("input_size", "channels", "patch", "num_classes"):
                if getattr(self, name) < 1:
                    raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
            if self.input_size % self.patch:
                fit = [p for p in range(1, self.input_size + 1) if not self.input_size % p]
                raise ValueError(
                    f"input_size {self.input_size} is not divisible by patch {self.patch}; "
                    f"patches that fit: {', '.join(map(str, fit[:8]))}"
                )
            if self.dim % 4:
                raise ValueError(f"dim must be divisible by 4 for 2-D positions, got {self.dim}")
            if not 0 <= self.label_dropout < 1:
                raise ValueError(f"label_dropout must lie in [0, 1), got {self.label_dropout}")

    def __init__(self, config: DiT.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        side = config.input_size // config.patch
        self.grid = (side, side)
        self.out_channels = config.channels * (2 if config.learn_sigma else 1)
        site = self._site()
        self.patch_embed = PatchEmbed(config.channels, config.dim, config.patch)
        learned = config.positions == "learned"
        self.pos_embed = nn.Parameter(sincos_2d(side, side, config.dim), requires_grad=learned)
        self.time_embed = TimeEmbedding(config.dim, freq_shift=config.time_freq_shift)
        self.label_embed = LabelEmbedding(
            config.num_classes, config.dim, null=config.label_dropout > 0
        )
        self.blocks = build_stack(config, site, self._needs(), name=self.name)
        self.final = FinalLayer(site, config.patch, self.out_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the official code does: blocks are the identity, the output is zero."""
        xavier_linears(self)
        weight = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        assert self.patch_embed.proj.bias is not None
        nn.init.zeros_(self.patch_embed.proj.bias)
        for table in (self.label_embed.table, self.time_embed.fc1, self.time_embed.fc2):
            nn.init.normal_(table.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Modulation):
                module.reset_parameters()
        nn.init.zeros_(self.final.linear.weight)
        nn.init.zeros_(self.final.linear.bias)

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
        """Predict noise (and variance logits).

        Args:
            x: (B, C, H, W) latents, H and W divisible by the patch.
            t: (B,) time.
            y: (B,) class ids, int64.
            drop: (B,) bool, labels to replace by the null class.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work, as if the model had none.

        Returns:
            (B, C, H, W), or (B, 2 C, H, W) with ``learn_sigma``.

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
        self._check(x, t, y)
        time = self.time_embed(t, x.dtype)
        cond = time + self.label_embed(y, drop)
        grid = self._cells(x)
        positions, rope = self._places(grid, x)
        return Context(
            cond=cond, time=time, grid=grid, positions=positions, rope=rope,
            ledger=ledger, tap=tap, complete=complete,
        )  # fmt: skip

    def embed(self, x: Tensor) -> Tensor:
        """Patches of x (B, C, H, W) with positions: the tokens (B, N, D) of the first block."""
        tokens: Tensor = self.patch_embed(x) + self._positions(*self._cells(x))
        return tokens

    def head(self, h: Tensor, ctx: Context) -> Tensor:
        """The output of the model from the tokens (B, N, D) behind the last block."""
        assert ctx.grid is not None
        height, width = ctx.grid
        return unpatchify(self.final(h, ctx.cond), height, width, self.config.patch)

    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        config, weight = self.config, self.patch_embed.proj.weight
        shape = (batch, config.channels, config.input_size, config.input_size)
        device, rng = weight.device, generator
        return {
            "x": torch.randn(shape, dtype=weight.dtype, device=device, generator=rng),
            "t": torch.randint(0, 1000, (batch,), device=device, generator=rng),
            "y": torch.randint(0, config.num_classes, (batch,), device=device, generator=rng),
        }

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        space = {} if self.config.positions == "learned" else {2: "height", 3: "width"}
        return {"x": {0: "batch", **space}, "t": {0: "batch"}, "y": {0: "batch"}}

    def _site(self) -> Site:
        """What the blocks are told about this model when they are built."""
        config = self.config
        return Site(
            dim=config.dim,
            heads=config.heads,
            cond_dim=config.dim,
            time_dim=config.dim,
            norm=NormRule(affine=False, ffn_eps=config.ffn_norm_eps),
            length=self.grid[0] * self.grid[1],
            grid=self.grid,
        )

    def _needs(self) -> Needs:
        """What this model asks of its parts."""
        return Needs(cond=True, time=True, axes="hw")

    def _places(self, grid: tuple[int, int], like: Tensor) -> tuple[Tensor | None, Rope | None]:
        """Coordinates of the tokens and their rotary tables, where a family has them."""
        return None, None

    def _cells(self, x: Tensor) -> tuple[int, int]:
        return x.shape[2] // self.config.patch, x.shape[3] // self.config.patch

    def _positions(self, height: int, width: int) -> Tensor:
        if self.config.positions == "learned":
            return self.pos_embed
        # an exported graph serves every grid, so it carries the formula instead of the table
        if torch.compiler.is_exporting() or (height, width) != self.grid:
            return sincos_2d(height, width, self.config.dim).to(self.pos_embed)
        return self.pos_embed

    def _check(self, x: Tensor, t: Tensor, y: Tensor) -> None:
        config = self.config
        size = config.input_size if config.positions == "learned" else None
        shown = f"(B, {config.channels}, {size or 'H'}, {size or 'W'})"
        check_shape(x, shown, (None, config.channels, size, size), where=f"{self.name}: x")
        check_shape(t, "(B,)", (x.shape[0],), where=f"{self.name}: t")
        check_shape(y, "(B,)", (x.shape[0],), where=f"{self.name}: y")
        if not x.is_floating_point():
            raise TypeError(f"{self.name}: x must be floating point, got {x.dtype}")
        if y.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{self.name}: y must hold integer class ids, got {y.dtype}")
        if x.shape[2] % config.patch or x.shape[3] % config.patch:
            raise ValueError(
                f"{self.name}: {tuple(x.shape[2:])} is not divisible by patch {config.patch}"
            )


_SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
_PARAMS = {
    "s-2": 32_963_360, "s-4": 32_945_024, "s-8": 33_148_160,
    "b-2": 130_512_416, "b-4": 130_475_648, "b-8": 130_881_536,
    "l-2": 458_102_816, "l-4": 458_053_760, "l-8": 458_594_816,
    "xl-2": 675_129_632, "xl-4": 675_074_432, "xl-8": 675_683_072,
}  # fmt: skip
_TINY = {"tiny": (96, 3, 3), "nano": (48, 2, 2)}


def dit_presets(
    config: type[DiT.Config], family: str, title: str, source: str
) -> dict[str, Preset]:
    """The twelve published sizes ``<family>-{s,b,l,xl}-{2,4,8}`` and two tiny ones of ours.

    Args:
        config: config class of the family.
        family: prefix of the names.
        title: official spelling, for the aliases (``DiT-B/2``).
        source: where the sizes come from.
    """
    presets = {}
    for size, (dim, depth, heads) in _SIZES.items():
        for patch in (2, 4, 8):
            short = (f"{family}-{size}",) if patch == 2 else ()
            presets[f"{family}-{size}-{patch}"] = Preset(
                config=config(dim=dim, depth=depth, heads=heads, patch=patch),
                params=_PARAMS[f"{size}-{patch}"],
                source=source,
                aliases=(*short, f"{title}-{size.upper()}/{patch}"),
            )
    for size, (dim, depth, heads) in _TINY.items():
        presets[f"{family}-{size}"] = Preset(
            config=config(dim=dim, depth=depth, heads=heads),
            summary="A size of ours for tests and examples.",
        )
    return presets


PRESETS = dit_presets(
    DiT.Config, "dit", "DiT", "arXiv 2212.09748, table 1 and released checkpoints"
)
register_presets(DiT, PRESETS, paper="2212.09748")
