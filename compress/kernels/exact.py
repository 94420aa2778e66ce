"""An inference-ready form of a model: products evaluated as this CPU likes them, fewer temporaries."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.arguments import checked
from effformer.blocks import Block, Branch
from effformer.calls import check_parts
from effformer.checks import CapabilityError
from effformer.ffn import MLP
from effformer.nn.cut import Forms
from effformer.values import Count
from effformer.wrapped import unwrapping

from ..quant.swap import hooked, tampered
from .times import fastest, several

__all__ = ["LeftLinear", "PackedLinear", "optimize", "prepare", "unnarrowed"]

_Form = Callable[[nn.Linear], nn.Module]

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "gelu": torch.ops.aten.gelu_,
    "gelu-tanh": partial(torch.ops.aten.gelu_, approximate="tanh"),
    "silu": partial(F.silu, inplace=True),
}


class _Frozen(nn.Module):
    """A linear layer for float32 inference on the CPU; the weight is not part of the state dict."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight
        if weight.device.type != "cpu" or weight.dtype != torch.float32:
            raise CapabilityError(
                f"optimize: float32 weights on the CPU only, got {weight.dtype} on {weight.device}"
            )
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def _check(self, x: Tensor) -> None:
        if x.requires_grad and torch.is_grad_enabled():
            raise CapabilityError("an optimized model has no gradients; train the original")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class PackedLinear(_Frozen):
    """A linear layer whose weight lies in oneDNN's blocked order.

    Args:
        linear: the layer to pack; it is not changed.

    Raises:
        CapabilityError: the layer is not float32 on the CPU, or this build of torch has no oneDNN;
            at call, an input that wants a gradient.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        if not torch.backends.mkldnn.is_available():
            raise CapabilityError("optimize: this build of torch has no oneDNN")
        weight = linear.weight.detach().contiguous()
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        self._bias = None if linear.bias is None else linear.bias.detach().clone()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        self._check(x)
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, self._bias, "none", [], ""
        )
        return out


class LeftLinear(_Frozen):
    """A linear layer evaluated as ``y^T = W x^T``, with the weight on the left.

    BLAS libraries split a product by its rows; with few tokens and wide layers the weight has more
    of them. The result is a transposed view, which a second such layer reads without a copy.

    Args:
        linear: the layer; its weight is shared.

    Raises:
        CapabilityError: the layer is not float32 on the CPU; at call, an input that wants a
            gradient.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self._weight = linear.weight.detach()
        self._bias = None if linear.bias is None else linear.bias.detach()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        self._check(x)
        out = self._weight @ x.reshape(-1, self.in_features).t()
        if self._bias is not None:
            out.add_(self._bias)
        return out.t().unflatten(0, x.shape[:-1])


@checked
@unwrapping
def optimize(model: nn.Module, *, rows: Count = 256) -> nn.Module:
    """An inference-ready copy for the CPU: same results to rounding, float32, no gradients.

    Every `nn.Linear` becomes the evaluation that is fastest on this machine, found by timing the
    candidates once for each shape, with weights in memory: as it is, prepacked for oneDNN, or, inside an `MLP`, with the
    weight on the left. Activations of an `MLP` work in place, constant branch factors (Macaron's
    0.5) are folded into the last weights. Parts of dynamic width are made ready form by form, when a
    pattern of active units first occurs (`effformer.prepare_widths`: ahead of time). The copy
    cannot be trained, saved or exported: keep the original for that.

    Args:
        model: any module; it is not changed.
        rows: tokens times batch that the timing assumes.

    Returns:
        The copy, in eval mode.

    Raises:
        CapabilityError: weights that are not float32 on the CPU.
        ValueError: rows below 1.

    Example:
        >>> model = effformer.optimize(effformer.build_model("dit-tiny"))
        >>> model(**effformer.build_model("dit-tiny").example_inputs()).shape
        torch.Size([1, 8, 32, 32])
    """
    check_parts(model, where="optimize")
    ready = copy.deepcopy(model).eval().requires_grad_(False)
    prepare(ready, rows)
    return ready


def prepare(ready: nn.Module, rows: int) -> None:
    """`optimize` in place."""
    ready.inference_only = True  # type: ignore[assignment]
    chosen: dict[tuple[int, ...], _Form] = {}
    modules = list(unnarrowed(ready))
    for module in modules:
        if isinstance(module, Branch):
            _fold_factor(module)
    for module in modules:
        _optimize_layers(module, rows, chosen)
    for forms, _ in _narrow(ready):
        forms.finish = partial(_optimize_form, rows, chosen)


def unnarrowed(model: nn.Module) -> Iterator[nn.Module]:
    """Modules that always run as they are: those outside of the parts of dynamic width."""
    whole = {id(module) for _, part in _narrow(model) for module in part.modules()}
    return (module for module in model.modules() if id(module) not in whole)


def _narrow(model: nn.Module) -> Iterator[tuple[Forms, nn.Module]]:
    """Parts of dynamic width: they stay as they are, and each of their forms is made ready."""
    for module in model.modules():
        if isinstance(module, Block) and module.width is not None:
            for name, branch in zip(module.order, module.branches, strict=True):
                if module.width.narrows(name):
                    yield branch.forms, branch.part


def _optimize_form(rows: int, chosen: dict[tuple[int, ...], _Form], form: nn.Module) -> nn.Module:
    _optimize_layers(form, rows, chosen)
    return form


def _optimize_layers(module: nn.Module, rows: int, chosen: dict[tuple[int, ...], _Form]) -> None:
    """Replace the linear layers that are children of a module."""
    if isinstance(module, MLP) and module.config.act in _IN_PLACE:
        _optimize_mlp(module, rows, chosen)
    for name, child in module.named_children():
        if type(child) is nn.Linear and not hooked(child) and tampered(child) is None:
            setattr(module, name, _optimize_linear(child, rows, chosen))


def _optimize_mlp(mlp: MLP, rows: int, chosen: dict[tuple[int, ...], _Form]) -> None:
    """Replace both layers by the form in which the whole network is fastest."""
    mlp.act = _IN_PLACE[mlp.config.act]
    first, second = mlp.fc1, mlp.fc2
    if type(first) is not nn.Linear or type(second) is not nn.Linear:
        return
    key = (first.in_features, first.out_features, second.out_features)
    if key not in chosen:
        x, pairs = torch.randn(1, rows, first.in_features), several((first, second))
        chosen[key] = fastest(
            {
                form: [partial(_chain, form(a), mlp.act, form(b), x) for a, b in pairs]
                for form in (*_forms(), LeftLinear)
            }
        )
    form = chosen[key]
    mlp.fc1, mlp.fc2 = form(first), form(second)  # type: ignore[assignment]


def _chain(first: nn.Module, act: Callable[[Tensor], Tensor], second: nn.Module, x: Tensor) -> None:
    second(act(first(x)))


def _optimize_linear(
    linear: nn.Linear, rows: int, chosen: dict[tuple[int, ...], _Form]
) -> nn.Module:
    key = (linear.in_features, linear.out_features)
    if key not in chosen:
        x, layers = torch.randn(1, rows, linear.in_features), several(linear)
        chosen[key] = fastest({f: [partial(f(layer), x) for layer in layers] for f in _forms()})
    return chosen[key](linear)


class _Plain(_Frozen):
    """A linear layer as torch evaluates it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self._weight = linear.weight.detach()
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        self._check(x)
        return F.linear(x, self._weight, self._bias)


def _forms() -> tuple[_Form, ...]:
    return (_Plain, PackedLinear) if torch.backends.mkldnn.is_available() else (_Plain,)


def _fold_factor(branch: Branch) -> None:
    """Move a constant factor into the last linear layer of an FFN; exact for powers of two."""
    last = getattr(branch.part, "fc2", None)
    if branch.factor == 1.0 or not isinstance(last, nn.Linear):
        return
    last.weight.mul_(branch.factor)
    if last.bias is not None:
        last.bias.mul_(branch.factor)
    branch.factor = 1.0
