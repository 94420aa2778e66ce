"""AdamW with decay where it belongs, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from effformer.nn.precision import widened

from ..checks import FormatError
from ..loading import unlike
from ..wrapped import unwrapping

__all__ = ["AdamW", "adamw", "learning_rate", "optimizer_tensors", "restore_optimizer"]

_FUSED = frozenset({"cpu", "cuda", "mps", "xpu"})


class AdamW(torch.optim.AdamW):
    """torch's AdamW on a float32 copy of every weight in half precision, which the weight follows:
    steps, sums of gradients and averages of their squares are smaller than its rounding.

    Args:
        groups: as torch's, each a dict.
        options: as torch's.

    Attributes:
        masters: weights in half precision -> their copies.

    Reference: Mixed Precision Training, 2017, arXiv 1710.03740.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], **options: Any) -> None:
        weights: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.masters = {
            p: nn.Parameter(widened(p.detach())) for p in weights if widened(p) is not p
        }
        of = [{**group, "params": [self.stepped(p) for p in group["params"]]} for group in groups]
        super().__init__(of, **options)

    def stepped(self, weight: nn.Parameter) -> nn.Parameter:
        """The parameter that takes the steps of a weight: its copy, or itself."""
        return self.masters.get(weight, weight)

    def collect(self) -> None:
        """Add the gradients of a backward pass to those of the copies."""
        for p, master in self.masters.items():
            if p.grad is not None:
                grad = widened(p.grad)
                master.grad = grad if master.grad is None else master.grad + grad
                p.grad = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """As torch's, of the collected gradients."""
        result = super().step(closure)
        for p, master in self.masters.items():
            p.copy_(master)
        return result


@unwrapping
def adamw(model: nn.Module, *, weight_decay: float, betas: tuple[float, float]) -> AdamW:
    """AdamW over the trainable parameters; the learning rate is set per step.

    ``w <- (1 - lr wd) w - lr m_hat / (sqrt(v_hat) + eps)``. Only matrices that multiply activations
    decay: biases, norms, embedding tables, position tables and learned tokens do not.

    Reference: Decoupled Weight Decay Regularization, 2017, arXiv 1711.05101.

    Raises:
        ValueError: nothing is trainable.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.dim() > 1 and name.endswith("weight") and id(p) not in tables
            (decayed if decays else plain).append(p)
    if not decayed and not plain:
        raise ValueError("train: the model has no trainable parameters")
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    fused = all(p.device.type in _FUSED and p.is_floating_point() for p in decayed + plain)
    return AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, fused=fused)


def learning_rate(step: int, *, peak: float, warmup: int, steps: int, cosine: bool) -> float:
    """Learning rate of a step (counted from 0).

    Linear warm-up ``peak (step + 1) / warmup``, then ``peak`` or ``peak (1 + cos(pi p)) / 2``,
    where p in [0, 1) is the fraction of the steps after the warm-up.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if not cosine:
        return peak
    return 0.5 * peak * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@unwrapping
def optimizer_tensors(optimizer: AdamW, model: nn.Module) -> dict[str, Tensor]:
    """State of the optimizer as named tensors ``<parameter>.<key>``, with the float32 copies of weights
    in half precision as ``<parameter>.master``.
    """
    return {
        f"{name}.{key}": value
        for name, p in model.named_parameters()
        for key, value in (
            *optimizer.state.get(optimizer.stepped(p), {}).items(),
            *([("master", optimizer.masters[p])] if p in optimizer.masters else []),
        )
    }


@unwrapping
@torch.no_grad()
def restore_optimizer(optimizer: AdamW, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`.

    Raises:
        FormatError: a tensor belongs to no parameter, or is of another shape or kind than it.
    """
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        owner = parameters.get(key.rpartition(".")[0])
        fits = owner is not None and value.shape == owner.shape and not unlike(value, owner)
        if owner is None or (value.dim() and not fits):
            raise FormatError(
                f"optimizer: {key} {tuple(value.shape)} fits no parameter of {type(model).__name__}"
            )
    for key, value in tensors.items():
        name, _, kind = key.rpartition(".")
        p = optimizer.stepped(parameters[name])
        if kind == "master":
            p.copy_(value)
            continue
        # the step counter lives where it was made: on the parameter's device for fused AdamW, else
        # on the CPU
        fused = optimizer.defaults.get("fused")
        if value.dim():
            value = value.to(p)
        optimizer.state[p][kind] = value.to(p.device) if fused else value
