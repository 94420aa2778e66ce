"""Forms of layers by measured time: the fastest that is right, and never worse than what went in."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import assert_close
from effformer.compress import choose_kernels
from effformer.compress.kernels import choose
from effformer.compress.kernels.forms import FORMS, BFloat16, Form, available
from effformer.compress.kernels.times import Times, measured
from torch import nn

import effformer
from effformer.checks import CapabilityError

X = torch.linspace(-1, 1, 40 * 64).reshape(40, 64)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)).eval()


class Exact(Form):
    """A form that is right."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.linear, self.bytes = copy.deepcopy(linear), 1000

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


class Wrong(Exact):
    """One that is not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * 1.2


class Large(Exact):
    """One that is right and large."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.bytes = 10**9


@pytest.fixture
def staged(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Forms whose times are given, and a model whose time is what is said."""
    forms = {"exact": Exact, "wrong": Wrong, "large": Large}
    monkeypatch.setattr(choose, "FORMS", forms)
    monkeypatch.setattr(choose, "available", lambda: [*forms])

    def set_up(ratios: list[float], **seconds: float) -> None:
        table = {"float32": 1.0, "float32-packed": 1.0, **seconds}
        monkeypatch.setattr(
            Times, "of", lambda self, key, some: {name: table[name] for name in some}
        )
        left = iter(ratios)
        monkeypatch.setattr(choose, "_ratio", lambda *_: next(left))

    return set_up


def test_the_fastest_right_form_is_taken(staged: Any, tmp_path: Path) -> None:
    staged([0.6], exact=0.5, wrong=0.2, large=0.7)
    model = net()
    ready, report = choose_kernels(model, X, cache=tmp_path)
    assert [type(ready[0]), type(ready[2])] == [Exact, Exact]
    assert [layer.form for layer in report.layers] == ["exact", "exact"]
    assert report.layers[0].wrong == {"wrong": pytest.approx(0.2, rel=1e-4)}
    assert report.layers[0].rows == 40
    assert report.verdict == "2 in exact, the others in float32"
    assert report.error < 1e-6
    assert [type(m) for m in model] == [nn.Linear, nn.GELU, nn.Linear]
    assert "exact" in str(report)
    json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    ("ratios", "seconds", "words"),
    [
        ([1.0], {"exact": 1.5, "wrong": 0.2, "large": 1.1}, "float32 is fastest here; prepacked"),
        ([1.3, 0.9], {"exact": 0.5, "wrong": 2, "large": 2}, "float32 is fastest here; prepacked"),
        ([1.3, 1.1], {"exact": 0.5, "wrong": 2, "large": 2}, "nothing was changed"),
    ],
    ids=["no form is faster", "the model is not", "not even prepacked"],
)
def test_a_result_is_never_slower_and_says_that_float32_is_fastest(
    staged: Any, tmp_path: Path, ratios: list[float], seconds: dict[str, float], words: str
) -> None:
    staged(ratios, **seconds)
    ready, report = choose_kernels(net(), X, cache=tmp_path)
    assert words in report.verdict
    assert report.ratio <= 1.02
    assert {layer.form for layer in report.layers} == {"float32"}
    assert report.bytes_after == report.bytes_before
    with torch.no_grad():
        assert_close(ready(X), net()(X), rtol=1e-5, atol=1e-5)


def test_asked_for_size_it_is_never_larger(staged: Any, tmp_path: Path) -> None:
    staged([3.0], exact=9.0, wrong=0.2, large=0.1)
    ready, report = choose_kernels(net(), X, goal="size", cache=tmp_path)
    assert [layer.form for layer in report.layers] == ["exact", "exact"]
    assert report.bytes_after < report.bytes_before
    staged([1.0], exact=9.0, wrong=0.2, large=0.1)
    ready, report = choose_kernels(net(), X, goal="size", cache=tmp_path, forms=["large"])
    assert "no right form is smaller" in report.verdict
    assert type(ready[0]) is nn.Linear
    tied = net()
    tied.append(nn.Linear(64, 96))
    tied[3].weight = tied[0].weight
    staged([1.0], exact=9.0, wrong=0.2, large=0.1)
    _, report = choose_kernels(tied, X, goal="size", cache=tmp_path)
    assert [layer.form for layer in report.layers] == ["float32", "exact", "float32"]


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("bias", [False, True])
def test_every_form_of_this_machine_computes_about_the_same(name: str, bias: bool) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48, bias=bias), torch.randn(3, 5, 64)
    engine = torch.backends.quantized.engine
    form = FORMS[name](linear)
    assert torch.backends.quantized.engine == engine
    with torch.no_grad():
        y = copy.deepcopy(form)(x)
        assert y.dtype == torch.float32
        limit = (
            1.0 if name == "int8-onnxruntime" else 0.05
        )  # signed sums saturate on some processors
        assert_close(y, linear(x), rtol=0, atol=limit if "int8" in name else 1e-2)
        assert torch.equal(form(x), y)
    whole = sum(4 * p.numel() for p in linear.parameters())
    assert form.bytes <= whole * (0.4 if "int8" in name else 1)


def test_bfloat16() -> None:
    linear = nn.Linear(64, 48)
    with torch.no_grad():
        assert_close(BFloat16(linear)(X), linear(X), rtol=0, atol=1e-2)
    assert BFloat16(linear).bytes == 2 * (64 + 1) * 48


def test_real_times_are_remembered(tmp_path: Path) -> None:
    model = effformer.build_model("vit-nano", depth=1).eval()
    forms = [name for name in available() if name == "int8-fbgemm"]
    _, report = choose_kernels(model, model.example_inputs(2), forms=forms, cache=tmp_path)
    assert report.ratio <= 1.02
    assert all(seconds > 0 for layer in report.layers for seconds in layer.seconds.values())
    _, second = choose_kernels(model, model.example_inputs(2), forms=forms, cache=tmp_path)
    assert [a.seconds for a in second.layers] == [a.seconds for a in report.layers]


@pytest.mark.parametrize(
    ("ratios", "exact", "changed"),
    [([0.6], 0.5, True), ([1.0], 1.5, True), ([1.3, 1.1], 0.5, False)],
    ids=["another form", "prepacked", "nothing was changed"],
)
def test_only_a_plain_copy_is_saved(
    staged: Any, tmp_path: Path, ratios: list[float], exact: float, changed: bool
) -> None:
    staged(ratios, exact=exact, wrong=2.0, large=2.0)
    model = effformer.build_model("vit-nano", depth=1).eval()
    ready, _ = choose_kernels(model, model.example_inputs(2), cache=tmp_path)
    if not changed:
        effformer.save_pretrained(ready, tmp_path / "model")
        return
    with pytest.raises(ValueError, match="save the original"):
        effformer.save_pretrained(ready, tmp_path / "model")


def candidates(calls: list[str]) -> Mapping[str, Any]:
    return {"a": lambda: [lambda: calls.append("a")], "b": lambda: [lambda: calls.append("b")]}


def test_the_cache_of_this_machine_is_read_and_others_are_ignored(tmp_path: Path) -> None:
    calls: list[str] = []
    times = Times(tmp_path)
    first = times.of("1x2@3", candidates(calls))
    assert {*calls} == {"a", "b"}
    times.save()
    calls.clear()
    assert Times(tmp_path).of("1x2@3", candidates(calls)) == first
    assert not calls
    data = json.loads(times.path.read_text())
    for wrong, words in (
        (json.dumps(data | {"machine": {**data["machine"], "threads": 99}}), "another machine"),
        ("{", "is damaged"),
        ("[]", "is damaged"),
        (json.dumps(data | {"times": {"1x2@3": {"a": "fast"}}}), "is damaged"),
        (json.dumps(data | {"times": {"1x2@3": {"a": -1.0, "b": 1.0}}}), "is damaged"),
        (json.dumps(data | {"times": [1]}), "is damaged"),
    ):
        times.path.write_text(wrong)
        with pytest.warns(UserWarning, match=f"{words}.*it is ignored"):
            new = Times(tmp_path)
        new.of("1x2@3", candidates(calls))
        assert {*calls} == {"a", "b"}
        new.save()
        assert Times(tmp_path).known.keys() == {"1x2@3"}
        calls.clear()


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    times = Times(tmp_path / "file" / "below")
    times.of("1x2@3", candidates([]))
    times.save()
    assert (tmp_path / "file").read_text() == "mine"


def test_the_cache_lies_where_users_have_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Times().path.parent == tmp_path / "effformer"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Times().path.parent == tmp_path / "home/.cache/effformer"


def test_a_median_is_measured_per_call() -> None:
    import time

    found = measured({"slow": [lambda: time.sleep(0.004)] * 2, "none": [lambda: None] * 2})
    assert found["slow"] > found["none"]


def test_wrong_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown form 'int9-fbgemm'; did you mean 'int8-fbgemm'"):
        choose_kernels(net(), X, forms=["int9-fbgemm"], cache=tmp_path)
    with pytest.raises(
        CapabilityError, match=r"float32 weights on the CPU only, got torch.float64"
    ):
        choose_kernels(net().double(), X.double(), cache=tmp_path)
    if absent := [name for name in FORMS if name not in available()]:
        with pytest.raises(ValueError, match="does not exist on this machine; available"):
            choose_kernels(net(), X, forms=absent[:1], cache=tmp_path)
    assert not list(tmp_path.iterdir())
