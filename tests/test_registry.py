from __future__ import annotations

import pytest
from torch import nn

from effformer import registry
from effformer.registry import Caps, Registry


@pytest.fixture
def parts() -> Registry:
    kind = Registry("gadget", "effformer.ffn")

    @kind.register("plain", caps=Caps(mask="key", cost="n"), aliases=("Simple",), paper="1234.5678")
    class Plain(nn.Module):
        """Does little: ``y = x``.

        More words.
        """

    @kind.register("fancy", caps=Caps(causal="optional", mask="full", rope=True, cost="n^2"))
    class Fancy(nn.Module):
        """Does much."""

    @kind.register("later", caps=Caps(causal="always"))
    class Later(nn.Module):
        """Looks back only."""

    return kind


def test_grids_are_asked_for_as_facts_or_by_their_axes() -> None:
    able = Caps(axes="hw")
    assert able.satisfies(axes=True)
    assert able.satisfies(axes="hw")
    assert not able.satisfies(axes=False)
    assert not able.satisfies(axes="")
    assert Caps().satisfies(axes=False)


def test_names_and_aliases_in_any_case(parts: Registry) -> None:
    assert parts.get("plain") is parts.get("SIMPLE")
    assert parts.get("plain").summary == "Does little: ``y = x``."
    assert "simple" in parts
    assert "nothing" not in parts
    assert 3 not in parts
    assert len(parts) == 3
    assert [e.name for e in parts] == ["plain", "fancy", "later"]


def test_filters(parts: Registry) -> None:
    assert parts.names() == ["fancy", "later", "plain"]
    assert parts.names("F*") == ["fancy"]
    assert parts.names(causal=True) == ["fancy", "later"]
    assert parts.names(causal=False) == ["fancy", "plain"]
    assert parts.names(causal="always") == ["later"]
    assert parts.names(mask="key") == ["fancy", "plain"]
    assert parts.names(mask="full", rope=True, cost="n^2") == ["fancy"]
    assert parts.names(cost="n") == ["later", "plain"]


def test_describe_says_what_a_part_can_do(parts: Registry) -> None:
    text = parts.describe("simple")
    assert text.startswith("gadget plain: Does little")
    assert "can: mask key, onnx, cost n" in text
    assert "paper: 1234.5678" in text
    assert "also: Simple" in text
    assert "causal" not in text


def test_unknown_names_suggest(parts: Registry) -> None:
    with pytest.raises(ValueError, match=r"'plian'; did you mean 'plain'\? \(3 known"):
        parts.get("plian")
    with pytest.raises(TypeError, match="gadget names are strings, got int"):
        parts.get(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown capability 'rop'; did you mean 'rope'"):
        parts.names(rop=True)


def test_duplicates_are_refused(parts: Registry) -> None:
    with pytest.raises(ValueError, match="gadget 'SIMPLE' is already registered"):
        parts.register("other", aliases=("SIMPLE",))(nn.Module)
    assert "other" not in parts


@pytest.mark.parametrize(
    ("given", "known"),
    [("flwo", "flow"), ("Softmax", "softmax"), ("differentail", "differential")],
)
def test_built_in_cores(given: str, known: str) -> None:
    if given.lower() == known:
        assert registry.core.get(given).name == known
    else:
        with pytest.raises(ValueError, match=f"did you mean '{known}'"):
            registry.core.get(given)


def test_plugins_are_loaded_on_the_first_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    kind, calls = Registry("gadget", "effformer.ffn"), []

    class Point:
        def load(self) -> None:
            calls.append(1)
            kind.register("third-party")(nn.Identity)

    monkeypatch.setattr("effformer.registry.entry_points", lambda group: [Point()])
    assert kind.names() == []
    assert kind.get("third-party").build is nn.Identity
    with pytest.raises(ValueError, match="unknown gadget"):
        kind.get("missing")
    assert calls == [1]


@pytest.mark.parametrize("kind", ["core", "attention", "ffn", "block", "model"])
def test_every_entry_is_complete(kind: str) -> None:
    for entry in registry.KINDS[kind]:
        assert entry.name == entry.name.lower()
        assert entry.summary
        assert entry.paper
        assert entry.config is not None
        assert registry.KINDS[kind].describe(entry.name)
