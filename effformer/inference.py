"""An inference-ready form of a model: weights prepacked for the CPU, fewer temporaries."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import Branch
from .checks import CapabilityError
from .ffn import MLP

__all__ = ["PackedLinear", "optimize"]

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_,
    "gelu-tanh": partial(torch.ops.aten.gelu_, approximate="tanh"),
    "silu": partial(F.silu, inplace=True),
}


class PackedLinear(nn.Module):
    """A linear layer whose weight lies in oneDNN's blocked order.

    Float32 inference only: there is no gradient, and the weight is not part of the state dict.

    Args:
        linear: the layer to pack; it is not changed.

    Raises:
        CapabilityError: the layer is not float32 on the CPU, or this build of torch has no oneDNN.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            raise CapabilityError(
                f"optimize: packs float32 weights on the CPU, got {weight.dtype} on {weight.device}"
            )
        if not torch.backends.mkldnn.is_available():
            raise CapabilityError(
                "optimize: this build of torch has no oneDNN; use the model as it is"
            )
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        self._bias = None if linear.bias is None else linear.bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if x.requires_grad and torch.is_grad_enabled():
            raise CapabilityError("an optimized model has no gradients; train the original")
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return out

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def optimize(model: nn.Module) -> nn.Module:
    """An inference-ready copy for the CPU: same results to rounding, faster, float32, no gradients.

    Every `nn.Linear` is prepacked for oneDNN, activations of an `MLP` work in place, constant
    branch factors (Macaron's 0.5) are folded into the last weights. The copy cannot be trained,
    saved or exported: keep the original for that.

    Args:
        model: any module; it is not changed.

    Returns:
        The copy, in eval mode.

    Raises:
        CapabilityError: weights that are not float32 on the CPU, or a torch without oneDNN.

    Example:
        >>> model = effformer.optimize(effformer.build_model("dit-tiny"))
        >>> model(**effformer.build_model("dit-tiny").example_inputs()).shape
        torch.Size([1, 8, 32, 32])
    """
    ready = copy.deepcopy(model).eval().requires_grad_(False)
    ready.inference_only = True  # type: ignore[assignment]
    for module in list(ready.modules()):
        if isinstance(module, Branch):
            _fold_factor(module)
    for module in ready.modules():
        if isinstance(module, MLP) and module.config.act in _IN_PLACE:
            module.act = _IN_PLACE[module.config.act]
    for module in list(ready.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))
    return ready


def _fold_factor(branch: Branch) -> None:
    """Move a constant factor into the last linear layer of an FFN; exact for powers of two."""
    last = getattr(branch.part, "fc2", None)
    if branch.factor == 1.0 or not isinstance(last, nn.Linear):
        return
    last.weight.mul_(branch.factor)
    if last.bias is not None:
        last.bias.mul_(branch.factor)
    branch.factor = 1.0
