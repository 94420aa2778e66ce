"""TarFlow: a normalizing flow of patches, made of causal transformers.

Reference: Normalizing Flows are Capable Generative Models, 2024, arXiv 2412.06329.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from effformer.blocks import Needs, build_stack
from effformer.checks import CapabilityError, check_ids, check_shape
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import EMPTY, Context, Ledger, Tap, explained
from effformer.ffn import MLP
from effformer.layout import Layout
from effformer.nn.patch import unpatchify
from effformer.site import NormRule, Site
from effformer.values import Count, Natural

from .base import Model, Preset, register_presets
from .flow_ends import PlacedEnds
from .flow_parts import Latents, TokenFlowConfig, TokenMap, cooled, patches, pieces, run_maps
from .layouts.tarflow import OFFICIAL

__all__ = ["PRESETS", "TarFlow"]


class TarFlow(Model):
    """Invertible image model: autoregressive maps of patches, every second one from the last patch to
    the first, each predicted by a causal transformer.

    ``forward(x, y)`` returns the latents z (B, C, H, W) and log |det dz/dx| (B,), so that log p(x) =
    log N(z; 0, I) + log_det, exactly. `effformer.flow.invert` goes back, one patch after the other or
    many at once; `effformer.flow.log_likelihood`, `bits_per_dim` and `denoised` read the density. It
    is trained by ``Generation(loss="likelihood")``.

    Published samples move away from ``{"y": None}`` by rising scales of 2.0 (64 x 64), 1.5 (128 x 128) and
    3.4 (AFHQ), without labels from ``{"temperature": 0.3}`` by 0.2, and noise of 0.05, 0.15 and 0.07 is
    taken out of them.

    The first patch of a map's order passes unchanged. Labels are added to the patches; without a label
    (``y=None``, or ``drop``) the mean of all classes is.

    Args:
        config: the config.
        name: preset name.

    Raises:
        CapabilityError: a part sees later tokens; parts that do not are named.

    Differs from the paper: log_det is a sum, not a mean; the volume-preserving form divides by its
    learned prior deviation in both directions; it learns that in training mode, as batch norm does.

    Example:
        >>> model = effformer.build_model("tarflow-tiny").eval()
        >>> x = torch.randn(2, 3, 8, 8)
        >>> z, log_det = model(x, torch.tensor([1, 3]))
        >>> z.shape, log_det.shape
        (torch.Size([2, 3, 8, 8]), torch.Size([2]))

    Reference: Normalizing Flows are Capable Generative Models, 2024, arXiv 2412.06329.
    """

    variance: Tensor
    FAMILY: ClassVar[str] = "tarflow"
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (OFFICIAL,)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(TokenFlowConfig):
        """Knobs of `TarFlow`, beside `TokenFlowConfig`.

        Attributes:
            input_size: side of the square image, which the position tables fix.
            num_classes: number of classes, 0 for a model without labels.
            volume_preserving: maps shift and do not scale ("VP"); the prior's deviation is learned.
        """

        ffn: BaseConfig = part("ffn", MLP.Config(act="gelu"))
        input_size: Count = 64
        patch: Count = 2
        num_classes: Natural = 0
        volume_preserving: bool = False

        def check(self) -> None:
            if self.input_size % self.patch:
                raise ValueError(
                    f"input_size {self.input_size} is not divisible by patch {self.patch}"
                )
            if self.places < 2:
                raise ValueError(
                    f"one patch leaves nothing to predict; patch {self.patch} must be smaller than "
                    f"input_size {self.input_size}"
                )

        @property
        def places(self) -> int:
            """Number of patches."""
            return (self.input_size // self.patch) ** 2

        @property
        def features(self) -> int:
            """Numbers in a patch."""
            return self.channels * self.patch**2

    def __init__(self, config: TarFlow.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        site = Site(
            dim=config.dim, heads=config.heads, length=config.places, norm=NormRule(eps=1e-5)
        )
        self.flows = nn.ModuleList(
            PlacedEnds(
                config.features, config.dim, places=config.places, num_classes=config.num_classes,
                scales=not config.volume_preserving, reverses=i % 2 == 1,
            ) if count else nn.Identity()
            for i, count in enumerate(config.flows)
        )  # fmt: skip
        self.blocks = build_stack(config, site, Needs(causal=True), name=self.name)
        if config.volume_preserving:
            self.register_buffer("variance", torch.ones(config.places, config.features))

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        drop: Tensor | None = None,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Latents:
        """Latents and log-determinant.

        Args:
            x: (B, C, H, W) images of the config's size, in [-1, 1] in the published models.
            y: (B,) class ids, int64; None: no label.
            drop: (B,) bool, labels to leave out.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work.

        Returns:
            z (B, C, H, W) and log |det dz/dx| (B,), in float32 at least.

        Raises:
            ValueError: a shape does not fit, or a label is no class.
            CapabilityError: labels for a model without.
        """
        ctx = Context(ledger=ledger, tap=tap, complete=complete)
        tokens = self.tokens(x)
        z, log_det = run_maps(self.maps(x, y, drop=drop, ctx=ctx), tokens)
        if self.config.volume_preserving:
            if self.training:
                with torch.no_grad():
                    self.variance.lerp_(z.square().mean(dim=0), 0.1)
            z, log_det = z / self.variance.sqrt(), log_det - 0.5 * self.variance.log().sum()
        return Latents(self.image(z, x), log_det)

    def tokens(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) as patches (B, T, D), row by row, channels first inside."""
        size = self.config.input_size
        return patches(self.config, x, size=size, channels_first=True, where=self.name)

    def image(self, tokens: Tensor, like: Tensor) -> Tensor:
        """The image of patches (B, T, D), of the shape of ``like`` (B, C, H, W)."""
        rows, columns = (n // self.config.patch for n in like.shape[2:])
        return unpatchify(tokens, rows, columns, self.config.patch, channels_first=True)

    def prior(self, z: Tensor) -> Tensor:
        """What the last map made, from latents N(0, I), as patches (B, T, D) both."""
        return z * self.variance.sqrt() if self.config.volume_preserving else z

    def maps(
        self, like: Tensor, y: Tensor | None = None, *, drop: Tensor | None = None,
        temperature: float = 1.0, ctx: Context = EMPTY,
    ) -> list[TokenMap]:  # fmt: skip
        """The autoregressive maps under given conditions, from the data to the latents.

        Args:
            like: (B, C, H, W) data or latents, whose shape counts.
            y: (B,) class ids, None: no label.
            drop: (B,) bool, labels to leave out.
            temperature: divides the scores of all attentions.
            ctx: what the blocks get beside the tokens.

        Raises:
            ValueError: a label is no class.
            CapabilityError: labels for a model without, or a temperature without softmax attention.
        """
        where, classes = self.name, self.config.num_classes
        if (y is not None or drop is not None) and not classes:
            raise CapabilityError(f"{where}: built without labels; num_classes is 0")
        if y is not None:
            check_shape(y, "(B,)", (like.shape[0],), where=f"{where}: y")
            check_ids(y, classes, where=f"{where}: labels y")
        if drop is not None:
            check_shape(drop, "(B,)", (like.shape[0],), where=f"{where}: drop")
        ctx = cooled(ctx, temperature, self.blocks, where)
        return [
            TokenMap(ends=ends, blocks=blocks, ctx=ctx, added=ends.label(y, drop))
            for _, ends, blocks in pieces(self.config, self.flows, self.blocks)
        ]

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        config, like = self.config, next(p for p in self.parameters() if p.is_floating_point())
        shape = (batch, config.channels, config.input_size, config.input_size)
        x = torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
        if not config.num_classes:
            return {"x": x}
        y = torch.randint(config.num_classes, (batch,), device=like.device, generator=generator)
        return {"x": x, "y": y}


def _published(
    patch: int, dim: int, params: int, size: int, classes: int, note: str, aliases: tuple[str, ...]
) -> Preset:
    """A model of the paper: 8 maps of 8 blocks with heads of width 64."""
    config = TarFlow.Config(
        dim=dim, depth=64, heads=dim // 64, flows=(8,) * 8, input_size=size, patch=patch,
        num_classes=classes,
    )  # fmt: skip
    return Preset(
        config=config, params=params, source="released code of arXiv 2412.06329", licence=_LICENCE,
        aliases=aliases, summary=f"TarFlow {note}.",
    )  # fmt: skip


_LICENCE = "terms of apple/ml-tarflow"
PRESETS = {
    "tarflow-imagenet64": _published(
        2, 768, 460_142_784, 64, 0, "of 64 x 64 images without labels", ("TarFlow-2-768-8-8",)
    ),
    "tarflow-imagenet64-class": _published(
        2, 768, 466_286_784, 64, 1000, "of 64 x 64 images of 1,000 classes", ()
    ),
    "tarflow-imagenet128": _published(
        4, 1024, 823_927_552, 128, 1000, "of 128 x 128 images of 1,000 classes",
        ("TarFlow-4-1024-8-8",),
    ),
    "tarflow-afhq": _published(
        8, 768, 463_481_856, 256, 3, "of 256 x 256 images of cats, dogs and wild animals", ("TarFlow-8-768-8-8",)
    ),
    "tarflow-tiny": Preset(
        config=TarFlow.Config(
            dim=32, depth=4, heads=2, flows=(2, 1, 1), input_size=8, num_classes=5
        ),
        summary="A size of ours for tests and examples.",
    ),
}  # fmt: skip
register_presets(TarFlow, PRESETS, paper="2412.06329")
