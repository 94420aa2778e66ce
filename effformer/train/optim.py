"""AdamW with decay where it belongs, and the learning rate as a function of the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..checks import FormatError
from ..loading import unlike
from ..wrapped import unwrapping

__all__ = ["adamw", "learning_rate", "optimizer_tensors", "restore_optimizer"]

_FUSED = frozenset({"cpu", "cuda", "mps", "xpu"})


@unwrapping
def adamw(
    model: nn.Module, *, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; the learning rate is set per step.

    ``w <- (1 - lr wd) w - lr m_hat / (sqrt(v_hat) + eps)``. Only matrices that multiply activations
    decay: biases, norms, embedding tables, position tables and learned tokens do not.

    Reference: Decoupled Weight Decay Regularization, 2017, arXiv 1711.05101.

    Raises:
        ValueError: nothing is trainable, or in half precision, which loses its small steps and the
            averages of its squared gradients.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            if p.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(
                    f"train: {name} is {str(p.dtype).removeprefix('torch.')}, in which the steps of AdamW "
                    "are lost to rounding; train model.float(), under torch.autocast for the speed of "
                    "half precision, and convert the result"
                )
            decays = p.dim() > 1 and name.endswith("weight") and id(p) not in tables
            (decayed if decays else plain).append(p)
    if not decayed and not plain:
        raise ValueError("train: the model has no trainable parameters")
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    fused = all(p.device.type in _FUSED and p.is_floating_point() for p in decayed + plain)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=betas, fused=fused)


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
def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """State of the optimizer as named tensors ``<parameter>.<key>``."""
    return {
        f"{name}.{key}": value
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }


@unwrapping
def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]
) -> None:
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
        p = parameters[name]
        # the step counter lives where it was made: on the parameter's device for fused AdamW, else
        # on the CPU
        fused = optimizer.defaults.get("fused")
        optimizer.state[p][kind] = value.to(p.device) if value.dim() or fused else value
