"""LMUFormer: a sequence classifier without attention that reads its input frame by frame.

Reference: LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units, 2024,
arXiv 2402.04882.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from effformer.attention import LMU, SpikingLMU
from effformer.blocks import (
    BackboneConfig,
    LMUBlock,
    Needs,
    SpikingLMUBlock,
    build_stack,
    init_states,
)
from effformer.checks import check_batch, check_shape, check_state
from effformer.config import Config as BaseConfig
from effformer.config import part
from effformer.context import Context, Ledger, Stream, Tap, explained
from effformer.ffn import ConvChannel, SpikingConvChannel
from effformer.layout import Layout
from effformer.nn.frames import ConvEmbed, EmbedState, SpikingConvEmbed
from effformer.nn.lif import LIF
from effformer.nn.norms import TokenBatchNorm
from effformer.nn.precision import running_mean, widened
from effformer.site import Site
from effformer.values import Count

from .base import Model, Preset, register_presets
from .layouts.lmuformer import DENSE, SPIKING

__all__ = ["PRESETS", "SPIKING_PRESETS", "LMUFormer", "LMUFormerState", "SpikingLMUFormer"]


class LMUFormerState(NamedTuple):
    """What a model keeps of the frames that it has read; its size does not depend on their number.

    Attributes:
        embed: state of the embedding.
        parts: state of every part in the blocks that keeps one, by its path.
        total: (B, D) sum of the features so far.
        positions: number of terms in it.
        head: (B, D) potentials of the neurons before the head, None in the dense model.
    """

    embed: EmbedState
    parts: dict[str, Any]
    total: Tensor
    positions: int
    head: Tensor | None = None


class LMUFormer(Model):
    """Classifier of sequences: ``head(mean_t blocks(embed(x))_t)`` with Legendre memory units.

    The embedding looks five frames ahead, everything behind it looks back only. So the model gives
    logits after every frame (`prefix_logits`), and reads a clip piece by piece with a state of
    constant size: `init_state`, `step`, and `finish`, which stands for the end of the clip.
    Streaming needs evaluation mode, where batch norms are affine maps.

    Differs from the paper: any number of frames (the published code fixes 128); the mean is taken
    over features instead of logits, which is the same number.

    Args:
        config: the config.
        name: preset name.

    Example:
        >>> model = effformer.build_model("lmuformer-tiny").eval()
        >>> model(torch.randn(2, 30, 16)).shape
        torch.Size([2, 10])

    Reference: LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units,
    2024, arXiv 2402.04882.
    """

    FAMILY: ClassVar[str] = "lmuformer"
    ROLES: ClassVar[Mapping[str, str]] = {"embed": "patch_embed", "head": "head"}
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (DENSE,)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BackboneConfig):
        """Knobs of `LMUFormer`, beside `BackboneConfig`.

        Attributes:
            heads: of attentions, if there are any; Legendre memory units have none.
            channels: width of a frame, for instance mel bands.
            frames: frames of an example input; any other number is accepted.
            num_classes: number of classes.
        """

        attn: BaseConfig = part("attention", LMU.Config())
        ffn: BaseConfig = part("ffn", ConvChannel.Config())
        block: BaseConfig = part("block", LMUBlock.Config())
        heads: Count = 1
        channels: Count = 128
        frames: Count = 128
        num_classes: Count = 35

    def __init__(self, config: LMUFormer.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        self.embed = self._make_embed()
        site = Site(dim=config.dim, heads=config.heads)
        self.blocks = build_stack(config, site, Needs(causal=True), name=self.name)
        self.head = nn.Linear(config.dim, config.num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Truncated normal weights of 0.02 and zero biases where the published code has linear
        layers: what a memory unit writes and reads, and the head.
        """
        units = [m for m in self.modules() if isinstance(m, (LMU, SpikingLMU))]
        for layer in (self.head, *(x for unit in units for x in (unit.write, unit.read))):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Tensor,
        *,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """Class logits.

        Args:
            x: (B, N, channels) frames, any N >= 1.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work, as if the model had none.

        Returns:
            (B, num_classes).

        Raises:
            ValueError: a shape does not fit.
        """
        logits: Tensor = self.head(
            self._features(x, Context(ledger=ledger, tap=tap, complete=complete)).mean(dim=1)
        )
        return logits

    def prefix_logits(self, x: Tensor) -> Tensor:
        """Logits (B, N, num_classes) of every prefix: row t is what the model says when the mean
        ends at position t. The last row is `forward`.
        """
        h = self._features(x, Context())
        logits: Tensor = self.head(running_mean(h)[0])
        return logits

    @explained
    def init_state(self, batch: int) -> LMUFormerState:
        """The state before the first frame.

        Raises:
            CapabilityError: a token mixer cannot stream.
        """
        check_batch(batch, where=f"{self.name}: init_state")
        like = self.head.weight
        return LMUFormerState(
            self.embed.init_state(batch, like=like),
            init_states(self, batch, like=like),
            widened(like.new_zeros(batch, self.config.dim)),
            0,
        )

    @explained
    def step(self, x: Tensor, state: LMUFormerState) -> tuple[Tensor, LMUFormerState]:
        """Read the next frames.

        Args:
            x: (B, n, channels), n >= 1: one frame, or a chunk.
            state: from `init_state` or the step before; it is not changed.

        Returns:
            Logits (B, m, num_classes) of the prefixes that are complete now, equal to those rows of
            `prefix_logits`, and the new state. The answer lags five frames behind: m is 0 until the
            sixth.

        Raises:
            ValueError: a shape does not fit, or the model is in training mode.
        """
        self._check(x, "step")
        check_state(state, LMUFormerState, x.shape[0], where=f"{self.name}: step")
        return self._advance(x, state, last=False)

    def finish(self, state: LMUFormerState) -> Tensor:
        """Logits (B, m, num_classes) of the prefixes that were waiting for later frames; the last
        row is `forward` on the whole clip.

        Raises:
            ValueError: nothing was read, or the model is in training mode.
        """
        if state.embed.pasts[0].shape[1] < 2:
            raise ValueError(f"{self.name}: finish needs at least one frame; call step before")
        nothing = state.embed.pasts[0][:, :0]
        return self._advance(nothing, state, last=True)[0]

    def _make_embed(self) -> ConvEmbed:
        return ConvEmbed(self.config.channels, self.config.dim)

    def _read_out(self, h: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What is averaged, from the tokens behind the last block."""
        return h, None

    def _features(self, x: Tensor, ctx: Context) -> Tensor:
        self._check(x, "x")
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, ctx)
        return self._read_out(h, None)[0]

    def _advance(
        self, x: Tensor, state: LMUFormerState, *, last: bool
    ) -> tuple[Tensor, LMUFormerState]:
        if self.training:
            raise ValueError(f"{self.name}: batch norms need whole clips in training; call eval()")
        h, embed = self.embed.step(x, state.embed, last=last)
        if not h.shape[1]:
            return h.new_zeros(h.shape[0], 0, self.config.num_classes), state._replace(embed=embed)
        stream = Stream(state.parts)
        for block in self.blocks:
            h = block(h, Context(stream=stream))
        h, head = self._read_out(h, state.head)
        means, total = running_mean(h, state.total, state.positions)
        end = state.positions + h.shape[1]
        return self.head(means), LMUFormerState(embed, stream.after, total, end, head)

    def _check(self, x: Tensor, what: str) -> None:
        channels = self.config.channels
        where = f"{self.name}: {what}"
        check_shape(x, f"(B, N, {channels})", (None, None, channels), where=where)
        if x.shape[1] < 1:
            raise ValueError(f"{where}: expected at least one frame, got {tuple(x.shape)}")

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        weight, shape = self.head.weight, (batch, self.config.frames, self.config.channels)
        return {
            "x": torch.randn(shape, dtype=weight.dtype, device=weight.device, generator=generator)
        }

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return {"x": {0: "batch", 1: "frames"}}


class SpikingLMUFormer(LMUFormer):
    """Spiking classifier of sequences: an `LMUFormer` whose parts exchange spikes.

    Membrane shortcuts: what is added between blocks are real numbers, what parts see are spikes.
    The time of all neurons is the sequence; a stream carries their potentials and gives the very
    spikes of the parallel form. Nothing has to be reset between batches: state goes in and comes
    out.

    Args:
        config: the config.
        name: preset name.

    Example:
        >>> model = effformer.build_model("spiking-lmuformer-tiny").eval()
        >>> model(torch.randn(2, 30, 16)).shape
        torch.Size([2, 10])

    Reference: LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units,
    2024, arXiv 2402.04882.
    """

    FAMILY: ClassVar[str] = "spiking-lmuformer"
    LAYOUTS: ClassVar[tuple[Layout, ...]] = (SPIKING,)

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(LMUFormer.Config):
        """Knobs of `SpikingLMUFormer`, beside those of `LMUFormer`.

        Attributes:
            lif: neurons of embedding and head; parts and blocks have their own.
        """

        attn: BaseConfig = part("attention", SpikingLMU.Config())
        ffn: BaseConfig = part("ffn", SpikingConvChannel.Config())
        block: BaseConfig = part("block", SpikingLMUBlock.Config())
        lif: LIF.Config = field(default_factory=LIF.Config)

    def __init__(self, config: SpikingLMUFormer.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        self.head_norm = TokenBatchNorm(config.dim)
        self.head_lif = LIF(config.lif)

    @explained
    def init_state(self, batch: int) -> LMUFormerState:
        rest = self.head_lif.init_state(batch, self.config.dim, like=self.head.weight)
        return super().init_state(batch)._replace(head=rest)

    def _make_embed(self) -> ConvEmbed:
        config = self.config
        return SpikingConvEmbed(config.channels, config.dim, config.lif)

    def _read_out(self, h: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
        spikes, v = self.head_lif(self.head_norm(h), v)
        return spikes, v


_SOURCE = "repository of the paper, Speech Commands v2; parameters counted there"
_TINY: dict[str, Any] = {
    "dim": 48, "depth": 2, "channels": 16, "frames": 24, "num_classes": 10,
}  # fmt: skip

PRESETS = {
    "lmuformer-speech": Preset(
        config=LMUFormer.Config(dim=256, depth=1),
        params=1_621_796,
        source=_SOURCE,
        aliases=("lmuformer", "lmu_rnn_conv1d"),
    ),
    "lmuformer-tiny": Preset(
        config=LMUFormer.Config(**_TINY, attn=LMU.Config(theta=24.0)),
        summary="A size of ours for tests and examples.",
    ),
}
SPIKING_PRESETS = {
    "spiking-lmuformer-speech": Preset(
        config=SpikingLMUFormer.Config(dim=256, depth=1, attn=SpikingLMU.Config(memory=512)),
        params=1_689_894,
        source=_SOURCE,
        aliases=("spiking-lmuformer", "slmu_rnn_ms_conv1d"),
    ),
    "spiking-lmuformer-tiny": Preset(
        config=SpikingLMUFormer.Config(**_TINY, attn=SpikingLMU.Config(memory=96, theta=24.0)),
        summary="A size of ours for tests and examples.",
    ),
}
register_presets(LMUFormer, PRESETS, paper="2402.04882")
register_presets(SpikingLMUFormer, SPIKING_PRESETS, paper="2402.04882")
