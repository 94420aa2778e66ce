"""Packed weights in exported graphs: kernels of ONNX Runtime where one fits, decoding in the graph
elsewhere.

Row formats with a block size of the kernel become ``com.microsoft.MatMulNBits``, nf4 and fp4
``com.microsoft.MatMulBnb4``, on targets that ask for it. Every other format exports as the operators of its own ``decode``, which
stay in the graph: the file holds the packed codes, and ONNX Runtime decodes them once, when it loads
the graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from effformer.compress.quant import PackedWeight, QuantLinear
from effformer.compress.quant.schemes import Kernel
from effformer.compress.quant.swap import hooked
from torch import Tensor, nn

from effformer.checks import need

from .guards import BEYOND

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["decodes_codes", "kernels_for", "step_of", "translations"]


class KernelLinear(nn.Module):
    """What stands in for a `QuantLinear` while it is traced."""

    def __init__(self, weight: Kernel, layer: QuantLinear, accuracy_level: int) -> None:
        super().__init__()
        bias, self._layer = layer.bias, (layer,)  # no child: only what is used is traced
        self.op, self.in_features, self.out_features = weight.op, layer.in_features, weight.N
        self.attributes = weight.attributes(accuracy_level)
        self.count = len(weight.inputs)
        for i, tensor in enumerate(weight.inputs):
            self.register_buffer(f"input_{i}", tensor)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.held = sorted(layer.tensors()) if layer.scheme.prepares else []
        for name in self.held:
            self.register_buffer(name, layer.get_buffer(name))

    @property
    def weight(self) -> Tensor:
        """The decoded weight, for modules that read it instead of calling their layer."""
        return self._layer[0].weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if self.held:
            held = {name: self.get_buffer(name) for name in self.held}
            x = self._layer[0].scheme.prepare(x, held)
        y = torch.onnx.ops.symbolic(
            f"com.microsoft::{self.op}",
            (x, *(getattr(self, f"input_{i}") for i in range(self.count))),
            self.attributes,
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )
        return y if self.bias is None else y + self.bias  # type: ignore[operator]


@contextmanager
def kernels_for(model: nn.Module, kernels: Collection[str], accuracy_level: int) -> Iterator[bool]:
    """Put `KernelLinear` in the place of every `QuantLinear` that has that form; undone on leaving.

    Args:
        model: the model.
        kernels: operators that the target has.
        accuracy_level: of MatMulNBits.

    Yields:
        Whether the model holds any packed weight.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    made: dict[nn.Module, KernelLinear] = {}
    try:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if not isinstance(child, QuantLinear) or hooked(child):
                    continue
                if child.dtype != torch.float32:  # the kernel wants scales of the activations' type
                    continue
                weight = None if child in made else child.kernel()
                if weight is not None and weight.op in kernels:
                    made[child] = KernelLinear(weight, child, accuracy_level)
                if child in made:
                    replaced.append((parent, name, child))
                    setattr(parent, name, made[child])
        yield bool(made) or any(isinstance(m, PackedWeight) for m in model.modules())
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)


def step_of(model: nn.Module) -> float:
    """Largest relative step that a packed layer of a model rounds its inputs to, 0 without one."""
    packed = (m for m in model.modules() if isinstance(m, PackedWeight))
    return max((m.scheme.step for m in packed), default=0.0)


@functools.cache
def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Torch operator -> ONNX translation, where torch's own is wasteful or wrong.

    - ``x[:n].mul_(y)``, as in decoding, reaches the exporter as a write into a slice, which it
      translates to ScatterND with an index per element; with step 1 the result is the slice between
      two pieces of x.
    - ``table[codes]`` with int32 codes becomes a GatherND, which takes int64 only; it is a Gather.
    - An embedding refuses ids below 0, where a Gather counts from the end: they become `BEYOND`, which
      no table has (see `effformer.export.guards.guard_ids`).
    """
    op = need("onnxscript").opset20
    core = need("onnxscript.function_libs.torch_lib.ops.core")
    kinds = need("onnx_ir").DataType

    def slice_scatter(self, src, dim=0, start=None, end=None, step=1):  # type: ignore[no-untyped-def]
        size = self.shape[dim]
        low, high = 0 if start is None else start, size if end is None else end
        if step != 1 or not all(isinstance(i, int) and i >= 0 for i in (low, high, size)):
            return core.aten_slice_scatter(self, src, dim, start, end, step)
        before = [] if low == 0 else [op.Slice(self, [0], [low], [dim])]
        after = [] if high >= size else [op.Slice(self, [high], [size], [dim])]
        parts = [*before, src, *after]
        return op.Identity(src) if len(parts) == 1 else op.Concat(*parts, axis=dim)

    def index(self, indices):  # type: ignore[no-untyped-def]
        wide = [
            op.Cast(i, to=kinds.INT64) if i is not None and i.dtype == kinds.INT32 else i
            for i in indices
        ]
        only_first = wide[0] is not None and all(i is None for i in wide[1:])
        if only_first and indices[0].dtype in (kinds.INT32, kinds.INT64):
            return op.Gather(self, indices[0], axis=0)
        return core.aten_index(self, wide)

    def embedding(weight, indices, *unused, **known):  # type: ignore[no-untyped-def]
        within = op.Where(op.Less(indices, 0), BEYOND, indices)
        return op.Gather(weight, within, axis=0)

    aten = torch.ops.aten
    return {
        aten.slice_scatter.default: slice_scatter, aten.index.Tensor: index,
        aten.embedding.default: embedding,
    }  # fmt: skip


def decodes_codes(node: onnx_ir.Node) -> bool | None:
    """Rule for constant folding: never fold the first step of decoding, so that codes stay packed
    in the file, and branches in 16 bit.
    """
    ir = need("onnx_ir")
    narrow = [ir.DataType.UINT8, ir.DataType.INT8]
    if node.op_type == "Cast":
        narrow.append(ir.DataType.FLOAT16)
    packed = any(
        v is not None and v.dtype in narrow and v.const_value is not None for v in node.inputs
    )
    return False if packed else None
