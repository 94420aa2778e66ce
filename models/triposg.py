"""TripoSG: shapes in three dimensions from an image, by rectified flow on sets of latent vectors.

Reference: TripoSG: High-Fidelity 3D Shape Synthesis using Large-Scale Rectified Flow Models, 2025,
arXiv 2502.06608.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from effformer.attention import Attention
from effformer.blocks import BackboneConfig, Needs, build_stack
from effformer.checks import CapabilityError, check_shape
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import Context, Ledger, Tap, explained
from effformer.ffn import MLP
from effformer.layout import Layout
from effformer.nn.embeddings import time_features
from effformer.nn.init import xavier_linears
from effformer.nn.norms import make_norm
from effformer.site import NormRule, Site
from effformer.values import Count

from .base import Model, Preset, register_presets
from .layouts.triposg import OFFICIAL

__all__ = ["PRESETS", "TripoSG"]


class TripoSG(Model):
    """Transformer over a set of latent vectors: no positions, the time as a token in front, attention
    to the features of an image and, if there is one, of a second condition, and long skips from the
    blocks before the middle to those behind it.

    ``forward(x, t, image)`` returns data minus noise (B, N, C) (`FlowConvention` "triposg"): t = 0 is
    data, t = 1000 noise. Any number of latents is taken; those of another order give the same shape.
    With classifier-free guidance the other branch sees zeros: ``guided(v, 7.0, null={"image": 0.0})``.

    Features of the image are the last hidden states of DINOv2-L with the class token. In the paper the
    second condition is CLIP's view of the image; the weights for scribbles attend to a text first and
    to the image second.

    Args:
        config: the config.
        name: preset name.

    Differs from the paper: no mixture of experts was published; "triposg-moe" has one in its last six
    blocks, as the paper says.

    Reference: TripoSG: High-Fidelity 3D Shape Synthesis using Large-Scale Rectified Flow Models, 2025,
    arXiv 2502.06608; All are Worth Words: A ViT Backbone for Diffusion Models, 2022, arXiv 2209.12152
    (long skips).
    """

    FAMILY: ClassVar[str] = "triposg"
    CONVENTION: ClassVar[str | None] = "triposg"
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (OFFICIAL,)
    ROLES: ClassVar[Mapping[str, str]] = {
        "embed": "patch_embed", "skips": "skips", "norm": "head", "head": "head",
    }  # fmt: skip

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BackboneConfig):
        """Knobs of `TripoSG`, beside `BackboneConfig`.

        Attributes:
            attn: token mixer of the latents and the time.
            cross: token mixer of these over the image, and over the second condition.
            channels: channels of a latent.
            latents: number of latents of the example; other numbers are accepted.
            image_dim: width of an image feature.
            image_length: number of features of the example; other numbers are accepted.
            second_dim: width of a feature of the second condition, None if there is none.
            second_length: number of its features in the example.
        """

        attn: BaseConfig = part(
            "attention", Attention.Config(qkv_bias=False, qk_norm=True, qk_norm_eps=1e-6)
        )
        cross: BaseConfig = part(
            "attention", Attention.Config(qkv_bias=False, qk_norm=True, qk_norm_eps=1e-6)
        )
        ffn: BaseConfig | None = part("ffn", MLP.Config(act="gelu"))
        channels: Count = 64
        latents: Count = 2048
        image_dim: Count = 1024
        image_length: Count = 257
        second_dim: Count | None = None
        second_length: Count = 257

        def check(self) -> None:
            if self.dim % 2:
                raise ValueError(f"dim must be even for the features of the time, got {self.dim}")

    def __init__(self, config: TripoSG.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        dim, second = config.dim, config.second_dim
        site = Site(
            dim=dim, heads=config.heads, time_dim=dim, norm=NormRule(eps=1e-5, qk_kind="rms"),
            memory_dim=config.image_dim if second is None else (config.image_dim, second),
        )  # fmt: skip
        self.embed = nn.Linear(config.channels, dim)
        self.time_embed = TimeToken(dim)
        self.blocks = build_stack(config, site, Needs(), name=self.name, cross=config.cross)
        self.skips = nn.ModuleDict({str(i): LongSkip(site) for _, i in self.long_skips})
        self.norm = make_norm(site)
        self.head = nn.Linear(dim, config.channels)
        xavier_linears(self)
        nn.init.zeros_(self.head.weight)

    @property
    def long_skips(self) -> list[tuple[int, int]]:
        """Blocks (i, j): what leaves block i enters block j beside what block j - 1 made."""
        middle = self.config.depth // 2
        return [(2 * middle - j, j) for j in range(middle + 1, self.config.depth)]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        image: Tensor,
        second: Tensor | None = None,
        *,
        image_scale: float = 1.0,
        second_scale: float = 1.0,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Predict data minus noise.

        Args:
            x: (B, N, C) latents.
            t: (B,) time in [0, 1000], 1000 = noise.
            image: (B, L, image_dim) features of the image, zeros for none.
            second: (B, L', second_dim) features of the second condition; None only for a model without.
            image_scale: factor on what the blocks make of the image.
            second_scale: factor on what they make of the second condition.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work.

        Returns:
            (B, N, C).

        Raises:
            ValueError: a shape does not fit, or the second condition is missing.
            CapabilityError: a second condition for a model without.
        """
        self._check(x, t, image, second)
        time = self.time_embed(t, x.dtype)
        if (image_scale, second_scale) != (1.0, 1.0):
            tap = _scaled({"cross": image_scale, "cross_2": second_scale}, tap)
        ctx = Context(
            time=time, memory=image if second is None else (image, second),
            ledger=ledger, tap=tap, complete=complete,
        )  # fmt: skip
        middle = self.config.depth // 2
        left: list[Tensor] = []
        h = torch.cat([time[:, None], self.embed(x)], dim=1)
        for i, block in enumerate(self.blocks):
            if i > middle:
                h = self.skips[str(i)](h, left.pop())
            h = block(h, ctx)
            if i < middle:
                left.append(h)
        return self.head(self.norm(h))[:, 1:]

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        c, like = self.config, self.embed.weight

        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)

        inputs = {
            "x": drawn(batch, c.latents, c.channels),
            "t": drawn(batch).sigmoid() * 1000,
            "image": drawn(batch, c.image_length, c.image_dim),
        }
        if c.second_dim is not None:
            inputs["second"] = drawn(batch, c.second_length, c.second_dim)
        return inputs

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        axes = {
            "x": {0: "batch", 1: "latents"},
            "t": {0: "batch"},
            "image": {0: "batch", 1: "features"},
        }
        second = {"second": {0: "batch", 1: "further"}}
        return axes if self.config.second_dim is None else axes | second

    def _check(self, x: Tensor, t: Tensor, image: Tensor, second: Tensor | None) -> None:
        c, batch = self.config, x.shape[0]
        check_shape(x, f"(B, N, {c.channels})", (None, None, c.channels), where=f"{self.name}: x")
        check_shape(t, "(B,)", (batch,), where=f"{self.name}: t")
        features = [("image", image, c.image_dim)]
        if c.second_dim is None and second is not None:
            raise CapabilityError(
                f"{self.name}: built for the image alone; second_dim={second.shape[-1]} would take "
                "a second condition"
            )
        if c.second_dim is not None:
            if second is None:
                raise ValueError(
                    f"{self.name}: the second condition is missing; give second "
                    f"(B, L, {c.second_dim}), zeros for none"
                )
            features.append(("second", second, c.second_dim))
        for name, value, width in features:
            check_shape(
                value, f"(B, L, {width})", (batch, None, width), where=f"{self.name}: {name}"
            )


class TimeToken(nn.Module):
    """``W2 gelu(W1 [sin(t f) | cos(t f)] + b1) + b2`` with as many features as channels.

    Args:
        dim: width of the token, even.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"": "t_mlp"}

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Map t (B,) to (B, D) of ``dtype``, which is that of the weights."""
        cosines, sines = time_features(t, self.fc1.in_features).to(dtype).chunk(2, dim=-1)
        e = self.fc1(torch.cat([sines, cosines], dim=-1))
        return self.fc2(nn.functional.gelu(e))


class LongSkip(nn.Module):
    """``norm(W [s, h] + b)`` of tokens h and those s that left an earlier block.

    The norm stands behind the linear layer, as in the published weights.

    Args:
        site: gives the width and the norm.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * site.dim, site.dim)
        self.norm = make_norm(site)

    def forward(self, x: Tensor, left: Tensor) -> Tensor:
        """Twice (B, N, D) -> (B, N, D)."""
        return self.norm(self.linear(torch.cat([left, x], dim=-1)))


def _scaled(scales: Mapping[str, float], tap: Tap | None) -> Tap:
    """A tap that multiplies what branches of these names make, before ``tap`` sees it."""

    def edit(place: str, value: Tensor) -> Tensor:
        value = value * scales.get(place.rpartition(".")[2], 1.0)
        return value if tap is None else tap(place, value)

    return Tap(edit=edit)


_WEIGHTS: Mapping[str, Any] = {
    "licence": "MIT",
    "sampling": {"steps": 50, "guidance": 7.0},
}
_SIZE: Mapping[str, Any] = {"dim": 2048, "depth": 21, "heads": 16}
_EXPERTS = {"-6:": {"ffn": {"name": "moe", "experts": 8, "top_k": 2, "shared": 1}}}
_TINY: Mapping[str, Any] = {
    "dim": 32, "depth": 5, "heads": 2, "channels": 8, "latents": 15, "image_dim": 24, "image_length": 6,
}  # fmt: skip
_OURS = "A size of ours for tests and examples."
PRESETS = {
    "triposg": Preset(
        config=TripoSG.Config(**_SIZE),
        params=1_439_556_160,
        source="released weights and code of TripoSG (VAST-AI/TripoSG)",
        aliases=("TripoSG",),
        **_WEIGHTS,
    ),
    "triposg-two": Preset(
        config=TripoSG.Config(**_SIZE, second_dim=768),
        params=1_681_911_616,
        source="paper, section 3.1: features of DINOv2 and of CLIP; released code",
        summary="TripoSG with a second condition, of CLIP.",
        **_WEIGHTS,
    ),
    "triposg-moe": Preset(
        config=TripoSG.Config(**_SIZE, latents=4096, layers=_EXPERTS),
        source="paper, section 3.1 (which counts about 4 B parameters); no weights were released",
        summary="TripoSG whose last six FFNs are mixtures of eight experts and a shared one.",
        sampling=_WEIGHTS["sampling"],
    ),
    "triposg-nano": Preset(config=TripoSG.Config(**_TINY), summary=_OURS),
    "triposg-two-nano": Preset(config=TripoSG.Config(**_TINY, second_dim=20), summary=_OURS),
}
register_presets(TripoSG, PRESETS, paper="2502.06608")
