from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import effformer
from effformer.arguments import Shape, checked
from effformer.flow import Linear, Path
from effformer.values import Count

Rows = Annotated[Tensor, Shape("(B, ...)")]


@checked
def called(
    x: Rows,
    other: Rows | None = None,
    /,
    steps: Count = 1,
    *,
    path: Path | str = "linear",
    kind: Literal["a", "b"] = "a",
    net: Callable[..., Tensor] | None = None,
    numbers: Sequence[float] = (),
    named: Mapping[str, Tensor] | None = None,
    **more: Any,
) -> Any:
    return steps, path, more


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        (([1.0],), {}, r"called: x: expected a tensor \(B, ...\) of real numbers, got \[1.0\]"),
        ((torch.ones(2).long(),), {}, "x: expected .* got torch.int64"),
        ((torch.ones(()),), {}, r"x: expected .* got shape \(\)"),
        ((torch.ones(2).to_sparse(),), {}, "got torch.sparse_coo"),
        ((torch.ones(2), torch.ones(3)), {}, r"called: x \(2,\) and other \(3,\) do not fit"),
        ((torch.ones(2), torch.ones(2, 1)), {}, "do not fit together"),
        ((torch.ones(2), torch.ones(2, device="meta")), {}, "x on cpu and other on meta"),
        ((torch.ones(2), None, 0), {}, "called: steps must be at least 1, got 0"),
        ((torch.ones(2),), {"steps": 2.0}, "steps: expected int, got 2.0"),
        ((torch.ones(2),), {"steps": 10**400}, "steps does not fit into 64 bits"),
        ((torch.ones(2),), {"kind": "c"}, "called: kind: unknown value 'c'"),
        ((torch.ones(2),), {"path": 3}, "path: expected Path or a dict of its options or str"),
        ((torch.ones(2),), {"net": 3}, "net: expected a function, got 3"),
        ((torch.ones(2),), {"net": nn.Linear}, "Linear is a class; give a module"),
        ((torch.ones(2),), {"numbers": "12"}, "numbers: expected a list, got '12'"),
        ((torch.ones(2),), {"numbers": [1, "2"]}, r"numbers\[1\]: expected float, got '2'"),
        ((torch.ones(2),), {"named": {"a": 1}}, r"named\['a'\]: expected Tensor, got 1"),
    ],
)
def test_arguments_are_refused_by_their_annotations(
    args: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        called(*args, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: effformer.load_weights(nn.Linear(2, 2), 3),
            "load_weights: source: expected str or ",
        ),  # type: ignore[arg-type]
        (lambda: effformer.load_model("a\0b"), "load_model: folder: no file has the character NUL"),
        (lambda: effformer.build_model(3), "build_model: name: expected str, got 3"),  # type: ignore[arg-type]
        (lambda: effformer.save_pretrained(3, "x"), "expected a model of this library, got 3"),  # type: ignore[arg-type]
        (lambda: effformer.models.ViT(3), r"ViT: config: expected .*Config.* got 3"),
        (lambda: effformer.optimize(nn.Linear(2, 2), rows=0), "optimize: rows must be at least 1"),
        (
            lambda: effformer.profile.profile(nn.Linear(2, 2), memory=1),
            "profile: memory: expected bool",
        ),  # type: ignore[arg-type]
    ],
)
def test_public_entries_say_what_they_were_given(call: Callable[[], Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_numbers_of_numpy_are_numbers() -> None:
    assert called(torch.ones(2), steps=np.int64(3), numbers=[np.float32(0.5)])[0] == 3
    assert effformer.build_model("sit-nano", depth=np.int64(1)).config.depth == 1


def test_arguments_are_handed_on_as_fields_of_configs_are_kept() -> None:
    assert called(torch.ones(2), path={"name": "linear", "sigma_min": 0.5}, other=3) == (
        1,
        Linear(sigma_min=0.5),
        {"other": 3},
    )
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        called()  # type: ignore[call-arg]


def test_checks_cost_nothing_in_a_graph() -> None:
    x = torch.linspace(0, 1, 4)
    graph = torch.compile(Linear().sigma, backend="eager", fullgraph=True)
    assert torch.equal(graph(x), 1 - x)


def test_every_public_name_is_there() -> None:
    for name in effformer.__all__:
        assert getattr(effformer, name) is not None
