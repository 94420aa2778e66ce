"""What every model is: a module with a config that rebuilds it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from effformer import registry
from effformer.config import Config
from effformer.context import Callee
from effformer.layout import Layout
from effformer.notebook import fragment, model_tree

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
        CONVENTION: name in `effformer.flow.CONVENTIONS` of how the published generators of the
            family count time and what they predict, None for models that generate nothing.
        LAYOUTS: published key layouts that `effformer.load_weights` understands, beside our own.
        ROLES: child -> part of a transformer, for the profiler; children that name their own need
            not stand here.
        transforms: JSON-able records of structural changes since the build (quantization), in
            order; `load_model` replays them.
        trained: what the weights were trained to predict, JSON values of a `effformer.flow.Trained`
            (which may be assigned as such); None if nobody said so. Training writes it, and it
            travels with the weights: in copies, state dicts, folders and files.
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
        self._drawn: int | None = None
        self._trained: dict[str, Any] | None = None
        self.register_state_dict_post_hook(_tell)
        self.register_load_state_dict_pre_hook(_learn)

    @property
    def drawn(self) -> bool:
        """Whether the weights are still those that were drawn when the model was built by name: no
        training step, no file and no other change has touched them.
        """
        return self._drawn == self._changes()

    def remember_drawn(self) -> None:
        """Take the present weights for the drawn ones."""
        self._drawn = self._changes()

    def _changes(self) -> int:
        """Counts every change in place; tensors that do not count theirs are taken for changed."""
        return sum(-1 if p.is_inference() else p._version for p in self.parameters())

    @property
    def trained(self) -> dict[str, Any] | None:
        return self._trained

    @trained.setter
    def trained(self, record: Config | Mapping[str, Any] | None) -> None:
        if isinstance(record, Config):
            record = record.to_dict()
        if not (record is None or isinstance(record, Mapping)):
            raise TypeError(
                f"{self.name}: trained is an effformer.flow.Trained, its JSON values or None, got "
                f"{record!r}"
            )
        self._trained = None if record is None else dict(record)

    def assumed(self) -> Mapping[str, Any] | None:
        """What weights without a record are taken for: values of a `effformer.flow.Trained` as the
        family was published, None for models that generate nothing.
        """
        return None if self.CONVENTION is None else {"convention": self.CONVENTION}

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
        lengths); of further inputs than `example_inputs` has, if a graph is captured with them.
        """
        return {name: {0: "batch"} for name in self.example_inputs()}

    def extra_repr(self) -> str:
        return f"{self.name!r}"

    def _repr_html_(self) -> str:
        return fragment(model_tree(self, self.name))


def _tell(model: nn.Module, state: Mapping[str, Any], prefix: str, facts: dict[str, Any]) -> None:
    """Let a state dict carry what its weights were trained to predict, beside its tensors."""
    if (record := cast(Model, model).trained) is not None:
        facts["trained"] = record


def _learn(
    model: nn.Module, state: Mapping[str, Any], prefix: str, facts: Mapping[str, Any], *_: Any
) -> None:
    """Take it from a state dict that carries it."""
    if "trained" in facts:
        cast(Model, model).trained = facts["trained"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A published size of a family.

    Attributes:
        config: the config.
        params: expected number of parameters as the source counts them, None for sizes of ours.
        source: where the size comes from.
        licence: of the published weights.
        sampling: how the authors sample: "steps", "guidance", and "shift" of the times
            (`effformer.flow.TimeGrid.shifted`); other names are those of inputs of the model.
        aliases: other spellings of the name.
        summary: one line.
    """

    config: Config
    params: int | None = None
    source: str = ""
    licence: str = ""
    sampling: Mapping[str, float] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    summary: str = ""


def register_presets(cls: type[Model], presets: Mapping[str, Preset], *, paper: str) -> None:
    """Register every preset of a family as a model name."""
    for name, preset in presets.items():
        facts = {
            "params": preset.params, "source": preset.source, "licence": preset.licence,
            "sampling": dict(preset.sampling), "family": cls.FAMILY,
        }  # fmt: skip
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
