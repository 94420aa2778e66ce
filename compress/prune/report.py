"""What pruning did: units, multiply-adds, parameters and bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from effformer.notebook import Shown

from ..report import size_text

__all__ = ["PruneReport", "PrunedPart"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PrunedPart:
    """One part that was cut.

    Attributes:
        name: path in the model, "width" for its residual stream.
        kind: of its units.
        before: units before.
        after: and after.
        kept: the units that stayed, in their old numbering.
        lost: share of the importance of all units that went.
    """

    name: str
    kind: str
    before: int
    after: int
    kept: tuple[int, ...]
    lost: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PruneReport(Shown):
    """What `prune` did.

    Attributes:
        parts: what was cut.
        kept: path -> why a part could not be cut.
        macs_before: multiply-adds of one forward.
        macs_after: and after.
        params_before: parameters.
        params_after: and after.
        bytes_before: size of the model's safetensors file.
        bytes_after: and after.
        said_by: "config", or "record" where the config cannot say the new sizes.
        recovered: what the layers behind lost units were given.
        output_error: relative error of the output on the first batch of the data (with an objective: on
            the model's own example); None without data, or for outputs that are narrower now.
    """

    parts: tuple[PrunedPart, ...]
    kept: Mapping[str, str]
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    bytes_before: int
    bytes_after: int
    said_by: str
    recovered: str
    output_error: float | None = None

    @property
    def macs_ratio(self) -> float:
        """Multiply-adds after / before."""
        return self.macs_after / self.macs_before if self.macs_before else 1.0

    @property
    def params_ratio(self) -> float:
        """Parameters after / before."""
        return self.params_after / self.params_before if self.params_before else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, ratios included."""
        ratios = {"macs_ratio": self.macs_ratio, "params_ratio": self.params_ratio}
        return dataclasses.asdict(self) | {"kept": dict(self.kept)} | ratios

    def __str__(self) -> str:
        wide = max(map(len, ("part", *(p.name for p in self.parts), *self.kept)))
        lines = [f"{'part':<{wide}}  {'units':<9} {'before':>7} {'after':>7}  importance lost"]
        lines += [
            f"{p.name:<{wide}}  {p.kind:<9} {p.before:>7} {p.after:>7}  {p.lost:.1%}"
            for p in self.parts
        ]
        lines += [f"{path:<{wide}}  kept: {why}" for path, why in self.kept.items()]
        lines.append(f"MACs: {self.macs_before:,} -> {self.macs_after:,} ({self.macs_ratio:.3f}x)")
        lines.append(
            f"parameters: {self.params_before:,} -> {self.params_after:,} ({self.params_ratio:.3f}x)"
        )
        lines.append(f"file: {size_text(self.bytes_before)} -> {size_text(self.bytes_after)}")
        lines.append(f"new sizes: in the {self.said_by}; layers behind: {self.recovered}")
        if self.output_error is not None:
            lines.append(f"relative output error: {self.output_error:.2%}")
        return "\n".join(lines)
