"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effformer.arguments import checked
from effformer.nn.precision import widened
from effformer.values import Chance, Natural, checker

from ..flow.conventions import recorded
from ..wrapped import unwrapped

__all__ = ["EMA", "ema_decay"]

_SHADOW = checker(Mapping[str, Tensor])
Weights = nn.Module | Mapping[str, Tensor] | Iterable[Tensor]


def ema_decay(decay: float, update: int) -> float:
    """Decay of the given update (counted from 1) with warm-up: min(decay, (1 + n) / (10 + n))."""
    return min(decay, (1 + update) / (10 + update))


class EMA:
    """Exponential moving average: ``shadow = d shadow + (1 - d) weight`` after every training step.

    With warm-up the decay of update n is min(decay, (1 + n) / (10 + n)), so that early averages
    forget the initial weights quickly. The average starts as a copy of the weights. Of a module,
    floating-point parameters are averaged and all buffers are copied; what it was trained to predict
    (``module.trained``) goes where the average goes. Averages are in float32 at least: in half
    precision the steps of a slow average are lost to rounding.

    Args:
        weights: a module, a mapping name -> tensor, or tensors in a fixed order.
        decay: d, in [0, 1).
        warmup: use the warm-up.

    Attributes:
        decay: d.
        warmup: whether the warm-up is used.
        updates: number of updates so far.
        shadow: averaged tensors by name; tensors without names are called "0", "1", ...

    Raises:
        ValueError: decay outside [0, 1).

    Reference: Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow,
    2022, arXiv 2209.03003 (its code's warm-up).

    Example:
        >>> import torch
        >>> from effformer.train.ema import EMA
        >>> ema = EMA([torch.zeros(1)], decay=0.5, warmup=False)
        >>> ema.update([torch.ones(1)])
        >>> ema.shadow["0"]
        tensor([0.5000])
    """

    @checked
    def __init__(self, weights: Weights, decay: Chance = 0.9999, *, warmup: bool = True) -> None:
        self.decay = decay
        self.warmup = warmup
        self.updates = 0
        copied = _copied(weights)
        self.shadow = {
            name: (tensor if name in copied else _wide(tensor)).detach().clone()
            for name, tensor in _named(weights).items()
        }
        self._trained = recorded(weights)

    @torch.no_grad()
    @checked
    def update(self, weights: Weights) -> None:
        """Take the weights after a training step into the average.

        Raises:
            ValueError: other names than at the start.
        """
        named = _named(weights)
        self._check_names(named, "update")
        self._trained = recorded(weights)
        self.updates += 1
        decay = ema_decay(self.decay, self.updates) if self.warmup else self.decay
        copied = _copied(weights)
        for name, tensor in named.items():
            shadow = self.shadow[name]
            if name in copied or not shadow.is_floating_point():
                shadow.copy_(tensor)
            else:
                shadow.lerp_(tensor.to(shadow), 1 - decay)

    @torch.no_grad()
    @checked
    def copy_to(self, weights: Weights) -> None:
        """Overwrite the weights with the average.

        Raises:
            ValueError: other names than at the start.
        """
        named = _named(weights)
        self._check_names(named, "copy_to")
        for name, tensor in named.items():
            tensor.copy_(self.shadow[name])
        if isinstance(weights, nn.Module) and self._trained is not None:
            weights.trained = self._trained  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on exactly: plain values, and tensors under ``shadow``."""
        return {
            "decay": self.decay,
            "warmup": self.warmup,
            "updates": self.updates,
            "trained": self._trained,
            "shadow": {name: tensor.clone() for name, tensor in self.shadow.items()},
        }

    @torch.no_grad()
    @checked
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: a key or a tensor is missing, unexpected or of another shape.
        """
        missing = {"decay", "warmup", "updates", "shadow"} - set(state)
        if missing:
            raise ValueError(f"EMA.load_state_dict: missing {', '.join(sorted(missing))}")
        decay, warmup, updates = (
            checker(hint)(state[key], f"EMA.load_state_dict: {key}")
            for key, hint in (("decay", Chance), ("warmup", bool), ("updates", Natural))
        )
        self._check_names(
            _SHADOW(state["shadow"], "EMA.load_state_dict: shadow"), "load_state_dict"
        )
        for name, tensor in state["shadow"].items():
            if tensor.shape != self.shadow[name].shape:
                raise ValueError(
                    f"EMA.load_state_dict: {name} is {tuple(tensor.shape)}, "
                    f"expected {tuple(self.shadow[name].shape)}"
                )
            self.shadow[name].copy_(tensor)
        self.decay, self.warmup, self.updates = decay, warmup, updates
        self._trained = state.get("trained", self._trained)

    def _check_names(self, given: Mapping[str, Tensor], where: str) -> None:
        missing, extra = sorted(self.shadow.keys() - given), sorted(given.keys() - self.shadow)
        if missing or extra:
            raise ValueError(
                f"EMA.{where}: missing {missing[:3]}, unexpected {extra[:3]} "
                f"({len(missing)} and {len(extra)} in all)"
            )


def _copied(weights: Weights) -> set[str]:
    """Names of what is copied instead of averaged."""
    if not isinstance(weights, nn.Module):
        return set()
    with unwrapped(weights) as plain:
        return {name for name, _ in plain.named_buffers()}


def _wide(tensor: Tensor) -> Tensor:
    return widened(tensor) if tensor.is_floating_point() else tensor


def _named(weights: Weights) -> dict[str, Tensor]:
    if isinstance(weights, nn.Module):
        with unwrapped(weights) as plain:
            return dict(plain.named_parameters()) | dict(plain.named_buffers())
    if isinstance(weights, Mapping):
        return dict(weights)
    return {str(i): tensor for i, tensor in enumerate(weights)}
