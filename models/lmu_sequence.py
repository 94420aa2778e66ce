"""One Legendre memory unit as a classifier of long scalar sequences (pixels of an image, one by one).

Reference: LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units, 2024,
arXiv 2402.04882.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from effformer.attention import LMU, SpikingLMU
from effformer.checks import check_batch, check_shape, check_state
from effformer.config import Config as BaseConfig
from effformer.context import explained
from effformer.nn.lif import LIF
from effformer.nn.norms import TokenBatchNorm
from effformer.nn.precision import running_mean, widened
from effformer.site import Site
from effformer.values import Chance, Count, Range

from .base import Model, Preset, register_presets

__all__ = ["PRESETS", "LMUSequence", "LMUSequenceState"]


class LMUSequenceState(NamedTuple):
    """What the model keeps of the steps that it has read.

    Attributes:
        unit: state of the memory unit.
        total: (B, hidden) sum of the unit's outputs.
        steps: number of steps read.
    """

    unit: Any
    total: Tensor
    steps: int


class LMUSequence(Model):
    """Classifier of sequences with a single memory unit: ``head(pool_t lmu(relu(BN(W x)))_t)``.

    It reads a sequence in parallel (`forward`, `prefix_logits`) or step by step (`init_state`,
    `step`).

    Args:
        config: the config.
        name: preset name.

    Example:
        >>> model = effformer.build_model("lmu-sequence-tiny").eval()
        >>> model(torch.rand(2, 50, 1)).shape
        torch.Size([2, 10])

    Reference: LMUFormer: Low Complexity Yet Powerful Spiking Model With Legendre Memory Units,
    2024, arXiv 2402.04882.
    """

    FAMILY: ClassVar[str] = "lmu-sequence"
    ROLES: ClassVar[Mapping[str, str]] = {"front": "patch_embed", "head": "head"}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `LMUSequence`.

        Attributes:
            channels: numbers per step.
            front: width that every step is mapped to first, None for no such map.
            memory: number of coefficients.
            theta: window in steps.
            hidden: width of the unit's output.
            num_classes: number of classes.
            pool: the head reads the mean over all steps, or the last one.
            dropout: before the head.
            neurons: neurons of a spiking unit (without norms, its memory read as real numbers), None
                for a dense one.
            length: steps of an example input; any other number is accepted.
        """

        channels: Count = 1
        front: Count | None = 3
        memory: Count = 468
        theta: Annotated[float, Range(1)] = 784.0
        hidden: Count = 346
        num_classes: Count = 10
        pool: Literal["mean", "last"] = "mean"
        dropout: Chance = 0.4
        neurons: LIF.Config | None = None
        length: Count = 784

    def __init__(self, config: LMUSequence.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        width = config.front or config.channels
        site = Site(dim=width, out_dim=config.hidden, path="unit")
        self.front = nn.Identity() if config.front is None else _Front(config.channels, width)
        self.unit = _unit(config, site)
        self.drop = nn.Dropout(config.dropout)
        self.head = nn.Linear(config.hidden, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits.

        Args:
            x: (B, N, channels), any N >= 1.

        Returns:
            (B, num_classes).

        Raises:
            ValueError: a shape does not fit.
        """
        h = self._read(x)
        pooled = h.mean(dim=1) if self.config.pool == "mean" else h[:, -1]
        logits: Tensor = self.head(self.drop(pooled))
        return logits

    def prefix_logits(self, x: Tensor) -> Tensor:
        """Logits (B, N, num_classes) of every prefix; the last row is `forward`."""
        h = self._read(x)
        if self.config.pool == "mean":
            h, _ = running_mean(h)
        logits: Tensor = self.head(self.drop(h))
        return logits

    @explained
    def init_state(self, batch: int) -> LMUSequenceState:
        """The state before the first step."""
        check_batch(batch, where=f"{self.name}: init_state")
        like = self.head.weight
        total = widened(like.new_zeros(batch, self.config.hidden))
        return LMUSequenceState(self.unit.init_state(batch, like=like), total, 0)

    @explained
    def step(self, x: Tensor, state: LMUSequenceState) -> tuple[Tensor, LMUSequenceState]:
        """Read the next steps.

        Args:
            x: (B, n, channels), n >= 1.
            state: from `init_state` or the step before; it is not changed.

        Returns:
            Logits (B, n, num_classes) of every prefix, equal to those of `prefix_logits`, and the
            new state.

        Raises:
            ValueError: a shape does not fit, or the model is in training mode.
        """
        self._check(x, "step")
        check_state(state, LMUSequenceState, x.shape[0], where=f"{self.name}: step")
        if self.training:
            raise ValueError(f"{self.name}: streaming needs evaluation mode; call eval()")
        h, unit = self.unit.step(self.front(x), state.unit)
        means, total = running_mean(h, state.total, state.steps)
        after = LMUSequenceState(unit, total, state.steps + h.shape[1])
        return self.head(means if self.config.pool == "mean" else h), after

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        weight, shape = self.head.weight, (batch, self.config.length, self.config.channels)
        return {
            "x": torch.rand(shape, dtype=weight.dtype, device=weight.device, generator=generator)
        }

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        return {"x": {0: "batch", 1: "steps"}}

    def _read(self, x: Tensor) -> Tensor:
        self._check(x, "x")
        h: Tensor = self.unit(self.front(x))
        return h

    def _check(self, x: Tensor, what: str) -> None:
        channels = self.config.channels
        where = f"{self.name}: {what}"
        check_shape(x, f"(B, N, {channels})", (None, None, channels), where=where)
        if x.shape[1] < 1:
            raise ValueError(f"{where}: expected at least one step, got {tuple(x.shape)}")


class _Front(nn.Module):
    """``relu(BN(W x))`` on every step."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, dim)
        self.norm = TokenBatchNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)).relu()


def _unit(config: LMUSequence.Config, site: Site) -> LMU | SpikingLMU:
    shared: dict[str, Any] = {"memory": config.memory, "theta": config.theta, "proj": False}
    if config.neurons is None:
        return LMU(LMU.Config(**shared), site)
    spiking = SpikingLMU.Config(**shared, normed=False, recall=False, lif=config.neurons)
    return SpikingLMU(spiking, site)


_SOURCE = "notebook of the paper's repository for permuted sequential MNIST"
PRESETS = {
    "lmu-psmnist": Preset(config=LMUSequence.Config(), params=166_798, source=_SOURCE),
    "spiking-lmu-psmnist": Preset(
        config=LMUSequence.Config(front=None, pool="last", dropout=0.5, neurons=LIF.Config()),
        params=166_092,
        source=_SOURCE,
    ),
    "lmu-sequence-tiny": Preset(
        config=LMUSequence.Config(memory=12, theta=40.0, hidden=16, length=40),
        summary="A size of ours for tests and examples.",
    ),
}
register_presets(LMUSequence, PRESETS, paper="2402.04882")
