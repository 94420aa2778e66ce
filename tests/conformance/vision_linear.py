"""What the adapters of the linear attentions of images share: cases of one mixer each, with outputs
and all gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from harness import Golden
from torch import Tensor, nn

from effformer.config import Config
from effformer.context import Context
from effformer.site import Site

Options = dict[str, Any]
Weights = dict[str, Tensor]
Configure = Callable[[Options, Weights], Config]
"""Options of a case, and its official weights, to our config."""
Translate = Callable[[Weights, Options], Weights]
"""Official weights, or gradients, under our names."""


def plain(**names: str) -> Translate:
    """A translation that renames the first words of keys; others keep theirs."""

    def translate(official: Weights, _: Options) -> Weights:
        ours = {}
        for key, value in official.items():
            first, _, rest = key.partition(".")
            ours[".".join(filter(None, (names.get(first, first), rest)))] = value
        return ours

    return translate


def check_cases(
    golden: Golden,
    build: type[Any],
    configure: Configure,
    translate: Translate,
    *,
    tables: tuple[str, ...] = (),
    front: str = "cls",
) -> None:
    """Every case of a set: weights in, outputs and gradients compared.

    Args:
        golden: the set; its config has one dict of options per case.
        build: our mixer.
        configure: its config from the options of a case.
        translate: official weights under our names.
        tables: official keys that are no weights.
        front: option that counts the tokens in front of the grid.
    """
    for case, options in golden.config.items():
        weights = golden.weights(f"{case}.")
        for key in tables:
            weights.pop(key, None)
        grid = tuple(options["grid"])
        site = Site(
            dim=options["dim"], heads=options["heads"], grid=grid,
            length=grid[0] * grid[1] + int(options.get(front, 0)),
        )  # fmt: skip
        part = build(configure(options, weights), site)
        ours = translate(weights, options)
        part.load_state_dict({key: fit(ours[key], p) for key, p in part.state_dict().items()})
        assert set(ours) == set(part.state_dict()), f"{golden.name}: {case}: {sorted(ours)}"
        x = golden.tensor(f"in.{case}.x").clone().requires_grad_()
        y = part(as_tokens(x), Context(grid=grid))
        out, cotangent = golden.tensor(f"out.{case}"), golden.tensor(f"in.{case}.cotangent")
        close(golden, y, as_tokens(out), f"out.{case}")
        (y * as_tokens(cotangent)).sum().backward()
        assert x.grad is not None
        close(golden, x.grad, golden.tensor(f"grad.{case}.x"), f"grad.{case}.x")
        check_gradients(golden, case, part, lambda g, o=options: translate(g, o))


def check_gradients(
    golden: Golden, case: str, part: nn.Module, translate: Callable[[Weights], Weights]
) -> None:
    """Compare the gradients of the weights that the set has gradients of."""
    start = f"grad.{case}."
    official = {
        key.removeprefix(start): golden.tensor(key)
        for key in golden.keys(start)
        if key != f"{start}x"
    }
    ours: Mapping[str, nn.Parameter] = dict(part.named_parameters())
    expected = translate(official)
    assert set(expected) == set(ours), f"{golden.name}: {case}: gradients of {sorted(expected)}"
    largest = max(float(value.abs().max()) for value in expected.values())
    for key, value in expected.items():
        found = ours[key].grad
        assert found is not None, key
        close(golden, found, fit(value, found), f"{start}{key}", largest)


ROUNDING = 1e-4
"""A gradient below this share of the largest one is 0 but for rounding: a bias of the only row."""


def close(
    golden: Golden, actual: Tensor, expected: Tensor, name: str, largest: float = 0.0
) -> None:
    """Compare at the set's tolerance, its atol times the largest value.

    Args:
        golden: the set.
        actual: ours.
        expected: the stored tensor.
        name: what is compared.
        largest: largest value of its kind, for tensors that are nothing but rounding.
    """
    rtol, atol = golden.tolerance
    scale = float(expected.abs().max())
    scale = largest if scale < ROUNDING * largest else scale
    difference = (actual.detach().to(expected.dtype) - expected).abs()
    worst = float((difference - rtol * expected.abs()).max())
    assert worst <= atol * scale, (
        f"{golden.name}: {name}: off by {float(difference.max()):.2e}, largest value {scale:.2e}"
    )


def fit(value: Tensor, like: Tensor) -> Tensor:
    """The same numbers in another shape: a 1 x 1 convolution is a matrix, leading ones mean
    nothing.
    """
    return value.reshape(like.shape)


def as_tokens(x: Tensor) -> Tensor:
    """Tokens (B, N, D) of tokens or of an image (B, D, h, w)."""
    return x if x.dim() == 3 else x.flatten(2).transpose(1, 2)
