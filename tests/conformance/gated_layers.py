"""What the adapters of gated linear layers share: a layer trained, padded and streamed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from harness import Golden
from torch import Tensor
from vision_linear import Weights, check_gradients, close

from effformer.attention import Attention
from effformer.context import Context
from effformer.site import Site

Translate = Callable[[Weights], Weights]
"""Official weights, or their gradients, under our names."""


def check_layer(
    golden: Golden, config: Attention.Config, site: Site, translate: Translate, conv: list[int]
) -> None:
    """Weights in; every case of the set compared.

    Args:
        golden: the set; ``config["cases"]`` names its cases and their kinds.
        config: our layer, causal.
        site: its place.
        translate: official weights under our names.
        conv: our channels of the convolution in the order of the set's.
    """
    kinds = {"train": _train, "grad": _train, "mask": _mask, "stream": _stream}
    for case, options in golden.config["cases"].items():
        golden.only("kind", *kinds, why=f"{case}: the adapter knows these", among=options)
        part = Attention(config, site)
        part.load_state_dict(translate(golden.weights()))
        kinds[options["kind"]](Case(golden, case, part, translate, conv))


@dataclass(frozen=True)
class Case:
    """One case of a set and our layer with its weights; see `check_layer`."""

    golden: Golden
    name: str
    part: Attention
    translate: Translate
    conv: list[int]

    def input(self, key: str) -> Tensor:
        return self.golden.tensor(f"in.{self.name}.{key}")

    def close(self, actual: Tensor, key: str) -> None:
        """Compare with a stored tensor of the case: ``out``, ``out.state``, ``grad.x``, ..."""
        kind, _, rest = key.partition(".")
        key = ".".join(filter(None, (kind, self.name, rest)))
        close(self.golden, actual, self.golden.tensor(key), key)


def _train(case: Case) -> None:
    x = case.input("x").clone().requires_grad_()
    y = case.part(x)
    case.close(y, "out")
    (y * case.input("cotangent")).sum().backward()
    assert x.grad is not None
    case.close(x.grad, "grad.x")
    check_gradients(case.golden, case.name, case.part, case.translate)


def _mask(case: Case) -> None:
    mask = case.input("mask").bool()
    assert not mask.all()
    y = case.part(case.input("x"), Context(mask=mask))
    expected = case.golden.tensor(f"out.{case.name}")
    close(case.golden, y[mask], expected[mask], f"out.{case.name}")


def _stream(case: Case) -> None:
    """Both states after the first piece, and the next token from them. The set holds one input of
    the convolution more than its taps reach back.
    """
    golden, x = case.golden, case.input("x")
    y, state = case.part.step(x, case.part.init_state(len(x), like=x))
    case.close(y, "out")
    case.close(state.core.mT, "out.state")
    names = [f"out.{case.name}.conv{kind}" for kind in ("", "_q", "_k", "_v")]
    kept = torch.cat([golden.tensor(n) for n in names if n in golden.tensors], dim=1)[..., 1:]
    assert state.conv is not None
    close(golden, state.conv.mT[:, torch.tensor(case.conv)], kept, f"out.{case.name}.conv")
    y, state = case.part.step(case.input("x_step"), state)
    case.close(y, "out.step")
    case.close(state.core.mT, "out.step_state")


def joined(official: Weights, *keys: str) -> Tensor:
    """Rows of several matrices, one below the other."""
    return torch.cat([official[key] for key in keys])
