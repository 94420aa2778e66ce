"""SANA and SANA-Sprint: text to image with linear attention.

Reference: SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers, 2024,
arXiv 2410.10629; SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation, 2025,
arXiv 2503.09641.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.attention import Attention, Sana
from effformer.blocks import AdaLNSingle, Needs, build_stack
from effformer.checks import check_shape
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import Context, Ledger, Tap, explained
from effformer.ffn import GLUMBConv
from effformer.layout import Layout
from effformer.nn.embeddings import TimeEmbedding
from effformer.nn.norms import SharedModulation
from effformer.nn.patch import PatchEmbed, unpatchify
from effformer.nn.precision import widened
from effformer.site import NormRule, Site
from effformer.values import Count, Positive

from .base import Model, Preset, register_presets
from .diffusion_parts import FinalLayer, reset_parameters
from .layouts.sana import DIFFUSERS
from .twostream_parts import TwoStreamConfig, check_inputs, example_inputs, open_axes

__all__ = ["PRESETS", "SANA"]


class SANA(Model):
    """Text-to-image transformer whose token mixer is linear in the number of patches: ReLU linear
    attention, cross-attention to the text, and an FFN with a convolution, which alone knows where a
    token stands. All blocks share the vectors that modulate them (adaLN-single).

    ``forward(x, t, text)`` returns the velocity (B, C, H, W) as SD3 writes it (`FlowConvention`
    "sd3"): t = 0 is data, t = 1000 noise, and the velocity points to the noise. ``text`` are features
    of Gemma-2-2B-IT, of up to 300 tokens; the latent is that of a DC-AE, 32 times smaller than the
    image. SANA-Sprint normalises queries and keys, and is told the scale of guidance.

    Args:
        config: the config.
        name: preset name.

    Reference: SANA: Efficient High-Resolution Image Synthesis with Linear Diffusion Transformers,
    2024, arXiv 2410.10629.
    """

    FAMILY: ClassVar[str] = "sana"
    CONVENTION: ClassVar[str | None] = "sd3"
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (DIFFUSERS,)
    ROLES: ClassVar[Mapping[str, str]] = {
        "text_embed": "patch_embed", "text_norm": "patch_embed", "modulation": "adaln_blocks",
    }  # fmt: skip

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(TwoStreamConfig):
        """Knobs of `SANA`, beside `TwoStreamConfig`.

        Attributes:
            cross: token mixer of the patches over the text.
            guidance: the network is told the scale of guidance times this factor; None: it is not
                told.
        """

        attn: BaseConfig = part(
            "attention", Attention.Config(core=Sana.Config(), qkv_bias=False, qk_norm_eps=1e-5)
        )
        cross: BaseConfig = part("attention", Attention.Config(qk_norm_eps=1e-5))
        ffn: BaseConfig | None = part("ffn", GLUMBConv.Config())
        block: BaseConfig = part("block", AdaLNSingle.Config())
        patch: Count = 1
        pooled_dim: None = None
        guidance: Positive | None = None

        def check(self) -> None:
            if self.input_size % self.patch:
                raise ValueError(
                    f"input_size {self.input_size} is not divisible by patch {self.patch}"
                )

    def __init__(self, config: SANA.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        dim = config.dim
        site = Site(
            dim=dim, heads=config.heads, cond_dim=6 * dim, time_dim=dim, memory_dim=dim,
            grid=(None, None), norm=NormRule(qk_kind="rms"),
        )  # fmt: skip
        self.patch_embed = PatchEmbed(config.channels, dim, config.patch)
        self.text_embed = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.text_norm = nn.RMSNorm(dim, eps=1e-5)
        self.time_embed = TimeEmbedding(dim)
        if config.guidance is not None:
            self.guidance_embed = TimeEmbedding(dim)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.blocks = build_stack(config, site, Needs(), name=self.name, cross=config.cross)
        self.final = FinalLayer(
            replace(site, cond_dim=2 * dim), config.patch, config.channels, by=SharedModulation
        )
        reset_parameters(
            self, self.patch_embed, self.final, self.time_embed.fc1, self.time_embed.fc2
        )

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        text: Tensor,
        guidance_scale: Tensor | None = None,
        *,
        text_mask: Tensor | None = None,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            x: (B, C, H, W) latents, H and W divisible by the patch.
            t: (B,) time in [0, 1000], 1000 = noise.
            text: (B, L, text_dim) tokens of the text.
            guidance_scale: (B,) such as 4.5; None only for a model that is not told.
            text_mask: (B, L) bool, True = a token of the text.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work.

        Returns:
            (B, C, H, W).

        Raises:
            ValueError: a shape does not fit, or the scale of guidance is missing.
            CapabilityError: a mask of the text, but the mixer over it cannot.
        """
        self._check(x, t, text, guidance_scale, text_mask)
        grid = x.shape[2] // self.config.patch, x.shape[3] // self.config.patch
        time = self.time_embed(t, x.dtype)
        cond = time
        if self.config.guidance is not None and guidance_scale is not None:
            cond = time + self.guidance_embed(
                self.config.guidance * widened(guidance_scale), x.dtype
            )
        ctx = Context(
            cond=self.modulation(F.silu(cond)), time=time, grid=grid,
            memory=self.text_norm(self.text_embed(text)), memory_mask=text_mask,
            ledger=ledger, tap=tap, complete=complete,
        )  # fmt: skip
        h = self.patch_embed(x)
        for block in self.blocks:
            h = block(h, ctx)
        return unpatchify(self.final(h, torch.cat([cond, cond], -1)), *grid, self.config.patch)

    def assumed(self) -> Mapping[str, Any] | None:
        return {"convention": self.CONVENTION, "latent_scale": 0.41407}

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        like = self.patch_embed.proj.weight
        inputs = example_inputs(self.config, like, batch, scale=1000.0, generator=generator)
        if self.config.guidance is not None:
            drawn = torch.rand(batch, dtype=like.dtype, device=like.device, generator=generator)
            inputs["guidance_scale"] = 1 + 4 * drawn
        return inputs

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        axes = open_axes(self.config)
        return axes if self.config.guidance is None else axes | {"guidance_scale": {0: "batch"}}

    def _check(
        self, x: Tensor, t: Tensor, text: Tensor, scale: Tensor | None, mask: Tensor | None
    ) -> None:
        check_inputs(self.config, x, t, text, None, mask, where=self.name)
        told = self.config.guidance is not None
        if told and scale is None:
            raise ValueError(
                f"{self.name}: the scale of guidance is missing; give guidance_scale (B,), such as 4.5"
            )
        if scale is not None:
            if not told:
                raise ValueError(
                    f"{self.name}: this model is not told the scale of guidance (guidance=None); "
                    "leave guidance_scale out"
                )
            check_shape(scale, "(B,)", (x.shape[0],), where=f"{self.name}: guidance_scale")


_SPRINT = {
    "attn": {"qk_norm": "across-heads"}, "cross": {"qk_norm": "across-heads"}, "guidance": 0.1,
}  # fmt: skip
_LICENCE = "that of the model cards of NVIDIA (research; text features under the terms of Gemma)"
_OURS = "A size of ours for tests and examples."


def _released(
    name: str, params: int, *, depth: int, heads: int, cross: int, sprint: bool = False
) -> Preset:
    """A published size, for 1024 x 1024 pixels and 300 tokens of text."""
    config = SANA.Config(
        dim=32 * heads, depth=depth, heads=heads, input_size=32, channels=32, text_dim=2304,
        text_length=300,
    ).put("cross", {"heads": cross, "head_dim": 32 * heads // cross})  # fmt: skip
    told = {"steps": 2, "guidance_scale": 4.5, "shift": 1.0}
    return Preset(
        config=config.changed(_SPRINT) if sprint else config,
        params=params,
        source=f"released weights ({name}) in diffusers' layout",
        licence=_LICENCE,
        sampling=told if sprint else {"steps": 20, "guidance": 4.5, "shift": 3.0},
        aliases=(name,),
    )


_TINY = SANA.Config(dim=64, depth=2, heads=4).put("cross", {"heads": 2, "head_dim": 32})
PRESETS = {
    "sana-0.6b": _released("Sana_600M_1024px", 591_747_872, depth=28, heads=36, cross=16),
    "sana-1.6b": _released("Sana_1600M_1024px", 1_604_462_752, depth=20, heads=70, cross=20),
    "sana-sprint-0.6b": _released(
        "Sana_Sprint_0.6B_1024px", 593_501_216, depth=28, heads=36, cross=16, sprint=True
    ),
    "sana-sprint-1.6b": _released(
        "Sana_Sprint_1.6B_1024px", 1_610_237_472, depth=20, heads=70, cross=20, sprint=True
    ),
    "sana-nano": Preset(config=_TINY, summary=_OURS),
    "sana-sprint-nano": Preset(config=_TINY.changed(_SPRINT), summary=_OURS),
}
register_presets(SANA, PRESETS, paper="2410.10629")
