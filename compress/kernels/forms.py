"""Forms of a linear layer for inference on the CPU: the same product by other kernels and number types."""

from __future__ import annotations

import importlib.util
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.checks import need
from effformer.profile import machine

from ..quant.linear import QuantLinear

__all__ = ["FORMS", "Form", "available"]


class Form(nn.Module, ABC):
    """A linear layer in another form; the weight is not part of the state dict.

    Args:
        linear: the layer, float32 on the CPU; it is not changed.

    Attributes:
        bytes: that the form holds.
    """

    bytes: int

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _bias_bytes(linear: nn.Linear) -> int:
    return 0 if linear.bias is None else 4 * linear.out_features


class BFloat16(Form):
    """The product in bfloat16, summed in float32 by the processor's own instructions."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self._weight = linear.weight.detach().bfloat16()
        self._bias = None if linear.bias is None else linear.bias.detach().bfloat16()
        self.bytes = 2 * self._weight.numel() + _bias_bytes(linear) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self._weight, self._bias).to(x.dtype)


class TorchInt8(Form):
    """Weights in 8 bits by row, inputs in 8 bits on their range in every call, by an engine of torch."""

    engine: str

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        weight = linear.weight.detach()
        scale = weight.abs().amax(1).clamp(min=1e-30) / 127
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        bias = None if linear.bias is None else linear.bias.detach()
        with _engine(self.engine):
            codes = torch.quantize_per_channel(weight, scale.double(), zeros, 0, torch.qint8)
            self._packed = torch.ops.quantized.linear_prepack(codes, bias)
        # without VNNI pairs of products are summed in 16 bits, which saturate unless inputs have 7
        self._narrow = not any("vnni" in flag for flag in machine().flags)
        self.bytes = weight.numel() + 12 * len(scale) + _bias_bytes(linear)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.quantized.linear_dynamic(x, self._packed, self._narrow)
        return out

    def __deepcopy__(self, memo: dict[int, Any]) -> Form:
        return self  # packed weights are never changed


class FBGEMM(TorchInt8):
    """`TorchInt8` by FBGEMM."""

    engine = "fbgemm"


class OneDNNInt8(TorchInt8):
    """`TorchInt8` by oneDNN."""

    engine = "onednn"


@contextmanager
def _engine(name: str) -> Iterator[None]:
    """Pack for an engine, which torch takes from a setting of the process. It warns that such tensors will
    go some day; `available` sees when they have.
    """
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        torch.backends.quantized.engine = before


class _Session(Form):
    """A graph of one product for ONNX Runtime, whose threads sleep when they have nothing to do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        ort = need("onnxruntime")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4
        made = _graph(*self._node(linear), linear)
        self._session = ort.InferenceSession(
            made.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    @abstractmethod
    def _node(self, linear: nn.Linear) -> tuple[Any, dict[str, Any]]:
        """The node, and the arrays that it reads beside x."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features).contiguous().numpy()
        (out,) = self._session.run(None, {"x": rows})
        return torch.from_numpy(out).unflatten(0, x.shape[:-1])

    def __deepcopy__(self, memo: dict[int, Any]) -> Form:
        return self  # a session cannot be copied, and is never changed


def _graph(node: Any, arrays: dict[str, Any], linear: nn.Linear) -> Any:
    onnx = need("onnx")
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    ends = [
        helper.make_tensor_value_info(name, floats, ["n", size])
        for name, size in (("x", linear.in_features), ("y", linear.out_features))
    ]
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    made = helper.make_graph([node], "linear", ends[:1], ends[1:], stored)
    return helper.make_model(made, opset_imports=opsets, ir_version=9)


class OnnxRuntime(_Session):
    """The product in float32 by ONNX Runtime."""

    def _node(self, linear: nn.Linear) -> tuple[Any, dict[str, Any]]:
        arrays = {"w": linear.weight.detach().numpy()}
        if linear.bias is not None:
            arrays["b"] = linear.bias.detach().numpy()
        self.bytes = sum(array.nbytes for array in arrays.values())
        return need("onnx").helper.make_node("Gemm", ["x", *arrays], ["y"], transB=1), arrays


class OnnxRuntimeInt8(_Session):
    """Weights in 8 bits by column, inputs on their range in every call, by ONNX Runtime."""

    signed = True

    def _node(self, linear: nn.Linear) -> tuple[Any, dict[str, Any]]:
        np = need("numpy")
        weight = linear.weight.detach().t().contiguous().numpy()
        scale = np.maximum(np.abs(weight).max(0), 1e-30).astype("float32") / 127
        codes = np.rint(weight / scale).astype("int16")
        zero = 0 if self.signed else 128
        kind = "int8" if self.signed else "uint8"
        arrays = {
            "w": (codes + zero).astype(kind), "s": scale, "z": np.full(len(scale), zero, kind),
        }  # fmt: skip
        if linear.bias is not None:
            arrays["b"] = linear.bias.detach().numpy()
        self.bytes = sum(array.nbytes for array in arrays.values())
        make = need("onnx").helper.make_node
        return make("DynamicQuantizeMatMul", ["x", *arrays], ["y"], domain="com.microsoft"), arrays


class OnnxRuntimeUInt8(OnnxRuntimeInt8):
    """`OnnxRuntimeInt8` with unsigned weights, whose sums do not saturate without VNNI."""

    signed = False


class BitsAndBytes(Form):
    """LLM.int8 by the kernels of bitsandbytes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.inner = QuantLinear.from_dense(linear, "llm-int8", backend="bitsandbytes")
        self.bytes = sum(t.numel() * t.element_size() for t in self.inner.tensors().values())
        self.bytes += _bias_bytes(linear)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x)
        return out


FORMS: dict[str, type[Form]] = {
    "bfloat16": BFloat16,
    "int8-fbgemm": FBGEMM,
    "int8-onednn": OneDNNInt8,
    "float32-onnxruntime": OnnxRuntime,
    "int8-onnxruntime": OnnxRuntimeInt8,
    "uint8-onnxruntime": OnnxRuntimeUInt8,
    "int8-bitsandbytes": BitsAndBytes,
}
"""Forms by name. "float32" is the layer as it is, or as `optimize` makes it."""


def available() -> list[str]:
    """Names of the forms that this machine has: the processor's instructions, the packages."""
    known = hasattr(torch, "quantize_per_channel") and hasattr(
        torch.ops.quantized, "linear_dynamic"
    )
    engines = torch.backends.quantized.supported_engines if known else []
    flags = machine().flags
    has = {
        "bfloat16": bool({"avx512_bf16", "amx_tile"} & {*flags}),
        "int8-fbgemm": "fbgemm" in engines,
        "int8-onednn": "onednn" in engines,
        "int8-bitsandbytes": importlib.util.find_spec("bitsandbytes") is not None,
    }
    runtime = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))
    return [name for name in FORMS if has.get(name, runtime)]
