"""What compression did: errors and bytes per layer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from effformer.notebook import Shown
from effformer.weights import once

__all__ = ["KeptLayer", "PackedLayer", "Report", "file_bytes", "relative_error", "size_text"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayer:
    """One packed layer.

    Attributes:
        name: path in the model.
        scheme: name of the scheme.
        shape: shape of the weight.
        error: relative weight error ``||W - W'|| / ||W||`` (0 for a zero weight).
        bytes_before: bytes of the weight.
        bytes_after: bytes of its packed tensors.
    """

    name: str
    scheme: str
    shape: tuple[int, ...]
    error: float
    bytes_before: int
    bytes_after: int

    @property
    def ratio(self) -> float:
        """Bytes after / bytes before."""
        return self.bytes_after / self.bytes_before


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KeptLayer:
    """One layer whose weight stays as it was.

    Attributes:
        name: path in the model.
        kind: class of the layer.
        bytes: bytes of its own parameters and buffers.
        reason: why it stays.
    """

    name: str
    kind: str
    bytes: int
    reason: str


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Report(Shown):
    """What `quantize` did.

    Attributes:
        layers: packed layers.
        kept: layers with weights that stay as they were, and why.
        bytes_before: size of the model's safetensors file before.
        bytes_after: and after.
        output_error: relative error of the output on the given inputs, None without inputs.
    """

    layers: tuple[PackedLayer, ...]
    kept: tuple[KeptLayer, ...]
    bytes_before: int
    bytes_after: int
    output_error: float | None = None

    @property
    def ratio(self) -> float:
        """File bytes after / before."""
        return self.bytes_after / self.bytes_before

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, ratios included."""
        data = dataclasses.asdict(self) | {"ratio": self.ratio}
        for row, layer in zip(data["layers"], self.layers, strict=True):
            row["ratio"] = layer.ratio
        return data

    def __str__(self) -> str:
        names = [layer.name for layer in self.layers] + [kept.name for kept in self.kept]
        wide = max(len(name) for name in ("layer", *names))
        lines = [f"{'layer':<{wide}}  {'scheme':<12}  {'shape':>12}  {'error':>8}  {'ratio':>6}"]
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            lines.append(
                f"{layer.name:<{wide}}  {layer.scheme:<12}  {shape:>12}  "
                f"{layer.error:>8.2%}  {layer.ratio:>5.3f}x"
            )
        for kept in self.kept:
            lines.append(f"{kept.name:<{wide}}  kept: {kept.reason} ({size_text(kept.bytes)})")
        lines.append(
            f"file: {size_text(self.bytes_before)} -> {size_text(self.bytes_after)} ({self.ratio:.3f}x)"
        )
        if self.output_error is not None:
            lines.append(f"relative output error: {self.output_error:.2%}")
        return "\n".join(lines)


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """``||a - e|| / ||e||`` over all tensors, 0 if both are zero."""
    square = sum(
        float((a.double() - e).square().sum()) for a, e in zip(actual, expected, strict=True)
    )
    norm = sum(float(e.double().square().sum()) for e in expected)
    return (square / norm) ** 0.5 if norm > 0 else square**0.5


def size_text(count: int) -> str:
    """Bytes in words."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


# Names of the types in a safetensors header, whose length counts.
_DTYPES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def file_bytes(state: Mapping[str, Tensor]) -> int:
    """Size of a state dict as a safetensors file, header included; tied tensors are written once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in once(state).items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = str(tensor.dtype).removeprefix("torch.")
        header[name] = {
            "dtype": _DTYPES.get(dtype, dtype),
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    length = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + -(-length // 8) * 8 + end
