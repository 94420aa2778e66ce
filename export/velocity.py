"""The graphs of a bundle: a network of any convention as a velocity, written, quantized and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from effformer.compress.quant import recording
from torch import Tensor, nn

from effformer.cache import GivenChange, ToldChange
from effformer.calls import Call, device_of
from effformer.files import workspace
from effformer.flow.conventions import EFFFORMER, FlowConvention, adapt
from effformer.flow.guidance import Guidance
from effformer.flow.samplers import sample

from .onnx import export_onnx
from .quantize import QuantizeReport
from .verify import VerifyReport
from .within import quantize_form

__all__ = [
    "Carrying", "Decoder", "Graphs", "Velocity", "examples", "guidance_of", "seen", "write_graph",
]  # fmt: skip

_SEEN = 16
"""Samples that are drawn to see what a velocity is asked."""


class Velocity(nn.Module):
    """A network of any convention as ``v(x, t, y)`` with t = 0 noise, t = 1 data, so that runners
    need no algebra.
    """

    def __init__(self, network: nn.Module, convention: FlowConvention) -> None:
        super().__init__()
        self.network = network
        self.field = None if convention == EFFFORMER else adapt(self._labelled, convention)

    def _labelled(self, x: Tensor, label: Tensor, *, y: Tensor) -> Tensor:
        out: Tensor = self.network(x, label, y)
        return out

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self._labelled(x, t, y=y) if self.field is None else self.field(x, t, y=y)


class Carrying(nn.Module):
    """The same with the change of all blocks: as a second output, or as an input in their place."""

    def __init__(self, network: nn.Module, convention: FlowConvention, *, given: bool) -> None:
        super().__init__()
        self.parts = GivenChange(network) if given else ToldChange(network)
        self.convention, self.given = convention, given

    def forward(self, x: Tensor, t: Tensor, y: Tensor, change: Tensor | None = None) -> Any:
        told: list[Tensor] = []

        def network(x: Tensor, label: Tensor, *, y: Tensor) -> Tensor:
            if change is not None:
                out: Tensor = self.parts(x, label, change, y=y)
                return out
            out, made = self.parts(x, label, y=y)
            told.append(made)
            return out

        plain = self.convention == EFFFORMER
        v = network(x, t, y=y) if plain else adapt(network, self.convention)(x, t, y=y)
        return (v, told[0]) if told else v


class Decoder(nn.Module):
    """What maps latents to pictures, with one input called x."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.decoder(x)
        return out


def examples(size: tuple[int, int, int], classes: int) -> dict[str, Tensor]:
    """Examples of what the graph of a velocity takes."""
    draws = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(2, *size, generator=draws),
        "t": torch.rand(2, generator=draws),
        "y": torch.randint(0, classes, (2,), generator=draws),
    }


def guidance_of(own: dict[str, Any], null: int | None) -> Guidance | None:
    """The guidance that a bundle records.

    Args:
        own: its sampler's facts.
        null: its null class.
    """
    if own["guidance"] == 1.0:
        return None
    assert null is not None
    channels: Any = own["guidance_channels"] or "all"
    return Guidance(own["guidance"], {"y": null}, channels=channels)


def seen(network: Velocity, facts: dict[str, Any]) -> list[Call]:
    """What a velocity is asked while its bundle samples: calibration data of all times and classes,
    and of both branches of guidance.

    Args:
        network: the velocity.
        facts: what the bundle records of shape, classes and sampler.
    """
    own, draws = facts["sampler"], torch.Generator().manual_seed(0)
    device = device_of(network)
    noise = torch.randn(_SEEN, *facts["shape"], generator=draws).to(device)
    labels = torch.arange(_SEEN, device=device) * facts["num_classes"] // _SEEN
    with recording(network) as calls:
        rule = guidance_of(own, facts["null_label"])
        sample(network, noise, sampler=own["name"], steps=own["steps"], guidance=rule, y=labels)
    return [*calls]


def write_graph(
    network: nn.Module, path: Path, inputs: dict[str, Tensor], *, verify: bool
) -> VerifyReport | None:
    """Export a velocity or a decoder, whose batch varies; the comparison with torch, if it is wanted."""
    names = ["velocity", "change"] if isinstance(network, Carrying) and not network.given else None
    return export_onnx(
        network, path, inputs, dynamic={n: {0: "batch"} for n in inputs}, verify=verify,
        output_names=names,
    ).parity  # fmt: skip


@dataclass(frozen=True, slots=True)
class Graphs:
    """The graphs of a bundle in all its forms."""

    folder: Path
    max_error: float | None
    verify: bool
    knobs: Mapping[str, Mapping[str, Any]]
    files: dict[str, dict[str, str]] = field(default_factory=dict)

    def of(self, form: str) -> dict[str, str]:
        """What is computed by which file."""
        return self.files[form]

    def forms(
        self, network: nn.Module, name: str, inputs: dict[str, Tensor], data: list[dict[str, Tensor]],
        forms: Sequence[str],
    ) -> tuple[VerifyReport | None, QuantizeReport | None]:  # fmt: skip
        """Write a graph in all forms, the first one under its plain name; what was compared and
        quantized in that.
        """
        first: tuple[VerifyReport | None, QuantizeReport | None] = (None, None)
        for form in forms:
            file = f"{name}.onnx" if form == forms[0] else f"{name}.{form}.onnx"
            self.files.setdefault(form, {})[name] = file
        with workspace(self.folder / name) as space:
            plain = self.files.get("float32")
            dense = space / "dense.onnx" if plain is None else self.folder / plain[name]
            parity = write_graph(network, dense, inputs, verify=self.verify)
            for form in forms:
                made = self._form(dense, name, form, network, inputs, data)
                if form == forms[0]:
                    first = (
                        (parity, None)
                        if made is None
                        else (made.parity, replace(made, parity=None))
                    )
        return first

    def _form(
        self, dense: Path, name: str, form: str, network: nn.Module, inputs: dict[str, Tensor],
        data: list[dict[str, Tensor]],
    ) -> QuantizeReport | None:  # fmt: skip
        if form == "float32":
            return None
        return quantize_form(
            dense, self.folder / self.files[form][name], form, data=data, max_error=self.max_error,
            compared=(network, inputs) if self.verify else None,
            more={**({"reduce_range": False} if form.endswith("-int8") else {}), **self.knobs[form]},
        )  # fmt: skip
