"""How far a part in half precision, or under autocast, may be from float64.

A part that rounds its weights, its input and what its layers hand on makes an error that float64
can tell: the change when all of these change by one rounding each. A sum in half precision, a guard
that autocast undoes, a number that does not fit make a larger one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["KINDS", "Pass", "assert_near", "lowered", "passed", "rounded"]

KINDS = {
    "float16": (torch.float16, None),
    "bfloat16": (torch.bfloat16, None),
    "autocast-float16": (torch.float32, torch.float16),
    "autocast-bfloat16": (torch.float32, torch.bfloat16),
}
"""Type of weights and inputs, and of autocast."""
LIMIT = 8.0
NOISES = 4
"""Draws of rounding errors, one of which must explain what was found."""

Call = Callable[[nn.Module, Tensor], Tensor]


class Pass(NamedTuple):
    """An output, the gradient of the input, and those of the parameters."""

    out: Tensor
    grad: Tensor | None
    grads: dict[str, Tensor]


def lowered(part: nn.Module, x: Tensor, kind: str) -> tuple[nn.Module, Tensor, nn.Module]:
    """Copies of a part and its input in the precision of a kind, and the same numbers in float64."""
    dtype, _ = KINDS[kind]
    low = copy.deepcopy(part).to(dtype)
    return low, x.to(dtype), copy.deepcopy(low).double()


def passed(
    part: nn.Module, x: Tensor, call: Call, weights: Tensor | None, autocast: torch.dtype | None
) -> Pass:
    """One pass forward, and with weights of the outputs one backward."""
    part.zero_grad()
    x = x.detach().clone().requires_grad_(weights is not None)
    device = x.device.type
    with torch.autocast(device, autocast) if autocast else nullcontext():
        out = call(part, x)
    if weights is None:
        return Pass(out.detach(), None, {})
    (out.double() * weights.to(device)).sum().backward()
    grads = {n: p.grad for n, p in part.named_parameters() if p.grad is not None}
    return Pass(out.detach(), x.grad, grads)


def rounded(part: nn.Module, x: Tensor, eps: float, seed: int) -> tuple[nn.Module, Tensor]:
    """A copy whose weights, and what its modules return, are off by up to one rounding; the same of x."""
    generator, part = torch.Generator().manual_seed(seed), copy.deepcopy(part)

    def off(y: Tensor) -> Tensor:
        noise = torch.rand(y.shape, generator=generator, dtype=y.dtype) * 2 - 1
        return y * (1 + eps * noise.to(y.device))

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        return off(out) if isinstance(out, Tensor) and out.is_floating_point() else out

    with torch.no_grad():
        for p in part.parameters():
            p.copy_(off(p))
    for module in part.modules():
        module.register_forward_hook(hook)
    return part, off(x)


def assert_near(
    part: nn.Module,
    x: Tensor,
    kind: str,
    call: Call,
    *,
    device: str = "cpu",
    exact_on: str = "cpu",
    backward: bool = True,
    skip: tuple[type[nn.Module], ...] = (),
) -> None:
    """A part in the precision of a kind is near itself in float64, forward and backward.

    Args:
        part: in float32.
        x: its input, in float32.
        kind: one of `KINDS`.
        call: how it is called.
        device: where the part of low precision runs.
        exact_on: where float64 runs.
        backward: look at the gradients, too.
        skip: modules whose own parameters are left out.

    Raises:
        AssertionError: it is not.
    """
    dtype, autocast = KINDS[kind]
    eps = torch.finfo(autocast or dtype).eps
    low, x, exact = lowered(part, x, kind)
    exact, wide = exact.to(exact_on), x.double().to(exact_on)
    weights = torch.randn_like(call(exact, wide)) if backward else None
    expected = passed(exact, wide, call, weights, None)
    if weights is not None:  # gradients of a size that half precision can hold
        assert expected.grad is not None
        weights = weights * 4 / expected.grad.abs().max()
        expected = passed(exact, wide, call, weights, None)
    found = passed(low.to(device), x.to(device), call, weights, autocast)
    said = ""
    for seed in range(NOISES):  # one draw may miss what another shows: a result near a kink
        moved = passed(*rounded(exact, wide, eps, seed=seed), call, weights, None)
        said = _unexplained(_pairs(found, expected, moved, part, skip), eps, _floor(expected))
        if not said:
            return
    raise AssertionError(said)


def _unexplained(pairs: dict[str, tuple[Tensor, Tensor, Tensor]], eps: float, floor: float) -> str:
    """The first of what was found that rounding does not explain, in words; empty if there is none."""
    for what, (left, right, other) in pairs.items():
        left = left.double().to(right.device)
        if not left.isfinite().all():
            return f"{what} is not finite"
        least = 0.0 if what in ("output", "gradient of x") else floor
        size = max(right.norm().item(), least)
        change = (other - right).norm().item()
        error = (left - right).norm().item()
        bound = LIMIT * max(change, eps * size / 4, eps * least)
        if error > bound:
            return (
                f"{what}: off by {error / size:.1e} of its size, and rounding explains "
                f"{bound / size:.1e}"
            )
    return ""


def _floor(expected: Pass) -> float:
    """Gradients that cancel are as exact as those around them."""
    return 0.1 * max((g.norm().item() for g in expected.grads.values()), default=0.0)


def _pairs(
    found: Pass, expected: Pass, moved: Pass, part: nn.Module, skip: tuple[type[nn.Module], ...]
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """What was found, what is right, and what rounding makes of it, by name."""
    pairs = {"output": (found.out, expected.out, moved.out)}
    if found.grad is None or expected.grad is None or moved.grad is None:
        return pairs
    pairs["gradient of x"] = (found.grad, expected.grad, moved.grad)
    left_out = set(_own(part, skip))
    for name, grad in expected.grads.items():
        if name not in left_out:
            pairs[f"gradient of {name}"] = (found.grads[name], grad, moved.grads[name])
    return pairs


def _own(part: nn.Module, skip: tuple[type[nn.Module], ...]) -> Iterator[str]:
    for path, module in part.named_modules():
        if isinstance(module, skip):
            for name, _ in module.named_parameters(recurse=False):
                yield f"{path}.{name}" if path else name
