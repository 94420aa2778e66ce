"""What every model is: a module with a config that rebuilds it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from effformer import registry
from effformer.config import Config
from effformer.context import Callee
from effformer.layout import Layout

__all__ = ["Model", "Preset", "register_presets"]


class Model(Callee, ABC):
    """Base of all models.

    ``forward`` takes named tensors. A model made of blocks also takes ``ledger`` and ``tap``, and
    ``complete``, with which its dynamic parts do all of their work; it hands them to the blocks in
    the `Context`.

    Args:
        config: the config; ``type(model)(model.config)`` rebuilds the model.
        name: preset name, for messages and saved folders.

    Attributes:
        FAMILY: family name, which saved folders carry.
        CONVENTION: name in `effformer.flow.CONVENTIONS` of how a generator counts time and what it
            predicts, None for our own convention and for models that generate nothing.
        LAYOUTS: published key layouts that `effformer.load_weights` understands, beside our own.
        ROLES: child -> part of a transformer, for the profiler; children that name their own need
            not stand here.
        transforms: JSON-able records of structural changes since the build (quantization), in
            order; `load_model` replays them.
    """

    FAMILY: ClassVar[str]
    CONVENTION: ClassVar[str | None] = None
    ROLES: ClassVar[Mapping[str, str]] = {}
    LAYOUTS: ClassVar[tuple[Layout, ...]] = ()

    def __init__(self, config: Config, name: str | None = None) -> None:
        super().__init__()
        self.config: Any = config
        self.name = name or self.FAMILY
        self.transforms: tuple[dict[str, Any], ...] = ()

    @abstractmethod
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Valid keyword arguments of forward, for profiling and export."""

    def fitting(self) -> dict[str, Tensor]:
        """As `Callee.fitting`: the example inputs."""
        return self.example_inputs(2)

    def dynamic_axes(self) -> dict[str, dict[int, str]]:
        """Axes that may vary at run time: input name -> axis -> symbol (equal symbols have equal
        lengths).
        """
        return {name: {0: "batch"} for name in self.example_inputs()}

    def extra_repr(self) -> str:
        return f"{self.name!r}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A published size of a family.

    Attributes:
        config: the config.
        params: expected number of parameters as the source counts them, None for sizes of ours.
        source: where the size comes from.
        aliases: other spellings of the name.
        summary: one line.
    """

    config: Config
    params: int | None = None
    source: str = ""
    aliases: tuple[str, ...] = ()
    summary: str = ""


def register_presets(cls: type[Model], presets: Mapping[str, Preset], *, paper: str) -> None:
    """Register every preset of a family as a model name."""
    for name, preset in presets.items():
        facts = {"params": preset.params, "source": preset.source, "family": cls.FAMILY}
        summary = preset.summary or registry.first_paragraph(cls)
        registry.model.add(
            registry.Entry(
                name=name,
                kind="model",
                build=cls,
                config=type(preset.config),
                preset=preset.config,
                paper=paper,
                summary=summary,
                aliases=preset.aliases,
                facts=facts,
            )
        )
