"""TarFlow and STARFlow: exact log-determinants, causal maps, streams, sizes, and what they refuse."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.models.flow_parts import TokenMap
from torch import Tensor

import effformer
from effformer.checks import CapabilityError
from effformer.context import Tap
from effformer.flow import invert, log_likelihood
from effformer.train import Dataset, Generation, TrainConfig, train

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tarflow": ("tarflow-tiny", {}),
    "tarflow without labels": ("tarflow-tiny", {"num_classes": 0, "flows": (4,)}),
    "tarflow, volume-preserving": ("tarflow-tiny", {"volume_preserving": True}),
    "tarflow of linear mixers": (
        "tarflow-tiny", {"attn": "flow", "layers": {"0": {"attn": "gated-delta", "ffn": "swiglu"}}},
    ),
    "starflow": ("starflow-tiny", {}),
    "starflow with an empty map": ("starflow-tiny", {"flows": (2, 0, 2), "patch": 2, "input_size": 6}),
    "starflow like a language model": (
        "starflow-tiny",
        {
            "norm": "rms", "scale": "exp", "clip": 1.0, "last_norm": False, "ffn": "geglu",
            "attn": {"qk_norm": True, "qkv_bias": False}, "first": "raster",
        },
    ),
    "starflow without text": ("starflow-tiny", {"text_dim": None, "attn": "linear"}),
}  # fmt: skip
PARAMS = {
    "tarflow-imagenet64": 460.1, "tarflow-imagenet64-class": 466.3, "tarflow-imagenet128": 823.9,
    "tarflow-afhq": 463.5, "starflow-t2i": 3858.3,
}  # fmt: skip
"""Millions, as measured on the official code."""


def awake(case: str) -> Any:
    """A model in float64 whose maps do something."""
    name, options = MODELS[case]
    options = {"input_size": 6 if "tarflow" in name else 3} | options
    torch.manual_seed(0)
    model = effformer.build_model(name, **options).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
        if getattr(model.config, "volume_preserving", False):
            model.variance.copy_(torch.rand_like(model.variance) + 0.5)
    return model


def inputs(model: Any, batch: int = 2) -> dict[str, Tensor]:
    given = model.example_inputs(batch, generator=torch.Generator().manual_seed(0))
    return given  # type: ignore[no-any-return]


def conditions(given: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in given.items() if name != "x"}


def maps(model: Any, given: dict[str, Tensor]) -> list[TokenMap]:
    return model.maps(given["x"], **conditions(given))  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_the_inverse_gives_the_data_back(case: str) -> None:
    model = awake(case)
    given = inputs(model)
    z = model(**given).z
    assert z.shape == given["x"].shape
    assert not torch.allclose(z, given["x"], atol=0.1)
    again = invert(model, z, **conditions(given)).x
    assert_close(again, given["x"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", MODELS)
def test_the_log_determinant_is_that_of_the_jacobian(case: str) -> None:
    """In a model of few tokens, by autograd."""
    model = awake(case)
    given = inputs(model, 1)
    if "starflow" in case:  # a map of any size
        given["x"] = given["x"][:, :, :, :2]
    cond = conditions(given)
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x, **cond).z, given["x"])
    size = given["x"].numel()
    _, expected = torch.linalg.slogdet(jacobian.view(size, size))
    assert_close(model(**given).log_det[0], expected, rtol=1e-7, atol=1e-7)
    normal = torch.distributions.Normal(0, 1).log_prob(model(**given).z).sum()
    assert_close(log_likelihood(model, **given)[0], normal + expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("case", MODELS)
@torch.no_grad()
def test_maps_see_no_later_token_and_stream(case: str) -> None:
    """In opposite orders; token after token, and in pieces, as all at once."""
    model = awake(case)
    given = inputs(model)
    every = maps(model, given)
    x = torch.randn_like(model.tokens(given["x"]))
    for one in every:
        assert one.order(x).equal(x.flip(1) if one.ends.reverses else x)
        whole = one.affine(x)
        moved = x.clone()
        moved[:, 3:] += 1
        for before, after in zip(whole, one.affine(moved), strict=True):
            assert_close(after[:, :4], before[:, :4], rtol=1e-9, atol=1e-9)
            changes = bool(before.any())  # volume-preserving maps have no scales
            assert torch.equal(after[:, 4:], before[:, 4:]) != changes
        state, made = one.init_state(len(x)), []
        for piece in one.inputs(x).split([1, 2, x.shape[1] - 3 - one.free], dim=1):
            part, state = one.step(piece, state)
            made.append(part)
        for i, expected in enumerate(whole):
            found = torch.cat([part[i] for part in made], dim=1)
            assert_close(found, expected[:, one.free :], rtol=1e-8, atol=1e-8)
    if len(every) > 1 and "empty" not in case:
        assert {a.ends.reverses != b.ends.reverses for a, b in pairwise(every)} == {True}


@torch.no_grad()
def test_only_the_last_map_of_starflow_reads_the_text() -> None:
    model = awake("starflow")
    given = inputs(model)
    other = given | {"text": torch.randn_like(given["text"])}
    tokens = model.tokens(given["x"])
    for one, two in zip(maps(model, given), maps(model, other), strict=True):
        assert torch.equal(one(tokens).z, two(tokens).z) != one.conditioned
    assert [one.conditioned for one in maps(model, given)] == [False, False, True]


@torch.no_grad()
def test_tarflow_without_a_label_takes_the_mean_of_all() -> None:
    model = awake("tarflow")
    given = inputs(model)
    drop = torch.tensor([True, False])
    mixed, none, all_ = model(**given, drop=drop).z, model(given["x"]).z, model(**given).z
    assert_close(mixed, torch.stack([none[0], all_[1]]), rtol=1e-9, atol=1e-9)
    assert not torch.allclose(none, all_)


def test_a_new_map_is_almost_the_identity() -> None:
    """The last matrix starts at zero."""
    model = effformer.build_model("starflow-tiny").eval()
    for ends in model.flows:
        torch.nn.init.zeros_(ends.proj_out.bias)
    given = inputs(model)
    z, log_det = model(**given)
    assert_close(z, given["x"], rtol=1e-5, atol=1e-6)
    assert_close(log_det, torch.zeros(2), rtol=0, atol=1e-4, scale=1.0)


@torch.no_grad()
def test_soft_bounds_hold_and_other_sizes_are_taken() -> None:
    model = awake("starflow")
    for ends in model.flows:
        ends.proj_out.weight.mul_(100)
    given = inputs(model)
    given["x"] = torch.randn(2, 4, 2, 5, dtype=torch.float64)
    one = maps(model, given)[0]
    log_scale, shift = one.affine(model.tokens(given["x"]))
    assert shift.abs().max() <= 4
    assert 0.02 < log_scale.exp().min() < log_scale.exp().max() < 4.7
    assert model(**given).z.shape == (2, 4, 2, 5)


@pytest.mark.parametrize("name", PARAMS)
def test_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = effformer.build_model(name)
    count = sum(p.numel() for p in model.parameters())
    assert count == effformer.registry.model.get(name).facts["params"]
    assert count / 1e6 == pytest.approx(PARAMS[name], abs=0.05)


def test_parts_are_chosen_by_name_and_taps_reach_them() -> None:
    with torch.device("meta"):
        model = effformer.build_model(
            "tarflow-imagenet64", attn="flow", layers={"56:": {"attn": "softmax"}}
        )
    titles = [block.attn.part.config.title for block in model.blocks]
    assert titles == ["flow"] * 56 + ["softmax"] * 8
    model, tap = awake("tarflow"), Tap(keep=("blocks.3.attn.q", "blocks.0.ffn"))
    model(**inputs(model), tap=tap)
    assert tap.seen.keys() == {"blocks.3.attn.q", "blocks.0.ffn"}


def test_training_lowers_the_negative_log_likelihood() -> None:
    torch.manual_seed(0)
    options = {"flows": (1, 1), "depth": 2, "input_size": 4, "channels": 1, "num_classes": 2}
    model = effformer.build_model("tarflow-tiny", **options)
    y = torch.arange(64) % 2
    x = (y * 2 - 1).view(-1, 1, 1, 1) * torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    data = Dataset("halves", {"x": x, "y": y})
    goal = Generation(loss="likelihood", label_drop=0.1)
    before = log_likelihood(model, x, y=y).mean()
    train(model, data, goal, TrainConfig(steps=40, batch=32, lr=3e-3, warmup=4))
    after = log_likelihood(model.eval(), x, y=y).mean()
    assert float((after - before).detach()) > 8.0  # nats of 16 pixels


@torch.no_grad()
def test_a_volume_preserving_model_learns_its_prior() -> None:
    """Towards the mean square of what the last map made, in training only."""
    model = awake("tarflow, volume-preserving")
    given, before = inputs(model), model.variance.clone()
    made = model.prior(model.tokens(model(**given).z))
    assert torch.equal(model.variance, before)
    model.train()(**given)
    expected = 0.9 * before + 0.1 * made.square().mean(dim=0)
    assert_close(model.variance, expected, rtol=1e-9, atol=1e-9)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "odd patches": ("tarflow-tiny", {"input_size": 9}, "input_size 9 is not divisible by patch 2"),
    "one patch": ("tarflow-tiny", {"patch": 8}, "one patch leaves nothing to predict"),
    "depth": ("tarflow-tiny", {"depth": 5}, r"flows \(2, 1, 1\) have 4 blocks .* depth is 5"),
    "looks ahead": (
        "tarflow-tiny", {"attn": "nystrom"}, "is not causal, but this model .*; choices: .*softmax",
    ),
    "no rotary": (
        "starflow-tiny", {"attn": "gla"}, "cannot apply rotary embedding; choices: .*flow",
    ),
    "no text map": ("starflow-tiny", {"flows": (2, 2, 0)}, "the last map reads the text"),
    "own units": (
        "starflow-tiny", {"rope": {"kind": "centered"}}, "places are scaled to the config's grid",
    ),
    "narrow heads": ("starflow-tiny", {"heads": 3}, "heads of width 16 leave no pair of channels"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_built_is_refused(case: str) -> None:
    name, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        effformer.build_model(name, **options)


def test_inputs_that_do_not_fit_are_refused() -> None:
    tar, star = (effformer.build_model(f"{name}-tiny").eval() for name in ("tarflow", "starflow"))
    plain = effformer.build_model("tarflow-tiny", num_classes=0).eval()
    x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 5])
    z, text = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 12)
    cases: list[tuple[Any, tuple[Any, ...], str]] = [
        (tar, (x[:, :2],), r"tarflow-tiny: x: expected shape \(B, 3, 8, 8\), got \(2, 2, 8, 8\)"),
        (tar, (x[:, :, :6],), r"x: expected shape \(B, 3, 8, 8\), got \(2, 3, 6, 8\)"),
        (tar, (x, y), r"labels y must lie in 0\.\.4, got 5"),
        (tar, (x, y[:1]), r"tarflow-tiny: y: expected shape \(B,\), got \(1,\)"),
        (plain, (x, y), "built without labels; num_classes is 0"),
        (star, (z,), r"the text is missing; give text \(B, L, 12\)"),
        (star, (z, text[..., :7]), r"text: expected shape \(2, L, 12\), got \(2, 5, 7\)"),
        (star, (z, text[:1]), r"text: expected shape \(2, L, 12\), got \(1, 5, 12\)"),
        (star, (torch.randn(2, 3, 4, 4), text), r"x: expected shape \(B, 4, H, W\)"),
    ]
    for model, given, message in cases:
        with pytest.raises(ValueError, match=message):
            model(*given)
    with pytest.raises(ValueError, match=r"drop: expected shape \(B,\), got \(1,\)"):
        tar(x, y * 0, drop=torch.tensor([True]))
    with pytest.raises(TypeError, match="x must be floating point"):
        tar(x.long())
    with pytest.raises(CapabilityError, match="'flow' has none; temperature=1 would do"):
        effformer.build_model("tarflow-tiny", attn="flow").maps(x, temperature=0.5)
    with pytest.raises(ValueError, match=r"\(3, 4\) is not divisible by patch 2"):
        effformer.build_model("starflow-tiny", patch=2)(torch.randn(2, 4, 3, 4), text)
