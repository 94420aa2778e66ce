"""Linear layers in other words: the projections inside `torch.nn.MultiheadAttention`, GPT-2's Conv1D.

While `opened`, they are `torch.nn.Linear` modules with paths of their own, which a verb can replace;
afterwards what was not replaced is what it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import methodcaller
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .swap import swap, tampered

__all__ = ["OpenAttention", "opened"]

_PROJECTIONS = ("in_proj", "q_proj", "k_proj", "v_proj")


class OpenAttention(nn.MultiheadAttention):
    """An attention of torch whose input projections are layers, dense or packed.

    Their weights are also found under the names that torch's own fused paths read.

    Args:
        closed: the attention; parameters, hooks and attributes are shared.
    """

    def __init__(self, closed: nn.MultiheadAttention) -> None:
        nn.Module.__init__(self)
        vars(self).update(_state(closed))
        for name, parameter in closed._parameters.items():
            layer = name.removesuffix("_weight")
            if layer not in _PROJECTIONS:
                self.register_parameter(name, parameter)
            elif parameter is not None:
                self.add_module(layer, _linear(parameter, None))
        self.out_proj = closed.out_proj

    def close(self) -> nn.MultiheadAttention:
        """The attention with its own parameters; every projection must be dense."""
        closed = nn.MultiheadAttention.__new__(nn.MultiheadAttention)
        nn.Module.__init__(closed)
        vars(closed).update(_state(self))
        for layer in _PROJECTIONS:
            closed.register_parameter(f"{layer}_weight", self._weight(layer))
        for name, parameter in self._parameters.items():
            closed.register_parameter(name, parameter)
        closed.out_proj = self.out_proj
        return closed

    def _weight(self, layer: str) -> Any:
        found: Any = self._modules.get(layer)
        return None if found is None else found.weight

    in_proj_weight: Any = property(methodcaller("_weight", "in_proj"))
    q_proj_weight: Any = property(methodcaller("_weight", "q_proj"))
    k_proj_weight: Any = property(methodcaller("_weight", "k_proj"))
    v_proj_weight: Any = property(methodcaller("_weight", "v_proj"))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None,
        average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As `torch.nn.MultiheadAttention`; every weight is read once."""
        turned = self.batch_first and query.dim() == 3
        if turned:
            turns = {id(x): x.transpose(0, 1) for x in (query, key, value)}  # same stays same
            query, key, value = (turns[id(x)] for x in (query, key, value))
        out, weights = F.multi_head_attention_forward(
            query, key, value, self.embed_dim, self.num_heads,
            self.in_proj_weight, self.in_proj_bias, self.bias_k, self.bias_v, self.add_zero_attn,
            self.dropout, self.out_proj.weight, self.out_proj.bias, training=self.training,
            key_padding_mask=key_padding_mask, need_weights=need_weights, attn_mask=attn_mask,
            use_separate_proj_weight="in_proj" not in self._modules,
            q_proj_weight=self.q_proj_weight, k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight, average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )  # fmt: skip
        return (out.transpose(0, 1) if turned else out), weights


def _state(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if k not in ("_parameters", "_modules")}


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """The linear layers in other words as `torch.nn.Linear`, for the time of the block."""
    before: dict[nn.Module, nn.Module] = {}
    module: Any
    for module in model.modules():
        if module is not model and tampered(module) is None:
            if type(module) is nn.MultiheadAttention:
                before[module] = OpenAttention(module)
            elif _is_conv1d(module):
                before[module] = _linear(_turned(module.weight), module.bias)
                before[module].conv1d = type(module)  # type: ignore[assignment]
    swap(model, before)
    try:
        yield
    finally:
        here = set(model.modules())
        same = {new: old for old, new in before.items() if new in here and _untouched(new, old)}
        swap(model, same)
        dense = [m for m in model.modules() if _dense(m)]
        swap(model, {m: _closed(m) for m in dense})


def _dense(module: nn.Module) -> bool:
    """Opened, and what would no longer fit into the closed form was not replaced."""
    if isinstance(module, OpenAttention):
        layers = [module._modules.get(name) for name in _PROJECTIONS]
        return all(layer is None or type(layer) is nn.Linear for layer in layers)
    return type(module) is nn.Linear and hasattr(module, "conv1d")


def _untouched(module: nn.Module, closed: nn.Module) -> bool:
    """Opened, and no layer of it was replaced."""
    return _dense(module) and getattr(module, "out_proj", None) is getattr(closed, "out_proj", None)


def _closed(module: Any) -> Any:
    if isinstance(module, OpenAttention):
        return module.close()
    closed: Any = module.conv1d(module.out_features, module.in_features)
    closed.weight = _turned(module.weight)
    closed.bias = module.bias
    return closed


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    out, features = weight.shape
    layer = nn.Linear(features, out, bias=False, device="meta")
    layer.weight = weight
    layer.register_parameter("bias", bias)
    return layer


def _turned(weight: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(weight.detach().t(), requires_grad=weight.requires_grad)


def _is_conv1d(module: Any) -> bool:
    """Of transformers: ``x W + b``."""
    named = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    return named and getattr(module.weight, "shape", ())[1:] == (module.nf,)
