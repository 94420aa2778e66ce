from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import effformer
from effformer import registry
from effformer.attention import Softmax
from effformer.checks import is_refusal
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
    assert "can: mask key, cost n" in text
    assert "paper: 1234.5678" in text
    assert "also: Simple" in text
    assert "causal" not in text


def test_unknown_names_suggest(parts: Registry) -> None:
    with pytest.raises(ValueError, match=r"'plian'; did you mean 'plain'\? \(3 known"):
        parts.get("plian")
    with pytest.raises(TypeError, match=r"Registry\.get: name: expected str, got 3"):
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


class _Point:
    """An entry point of an installed package."""

    def __init__(self, name: str, load: Callable[[], None], package: str = "some-package") -> None:
        self.name, self.load, self.value = name, load, "some.module"
        self.dist = SimpleNamespace(name=package)


@pytest.fixture
def plug_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that packages with these entry points are installed."""

    def install(*points: _Point) -> None:
        monkeypatch.setattr("effformer.registry.entry_points", lambda group: points)
        monkeypatch.setattr("effformer.registry._PLUGINS", {})

    return install


def test_plugins_are_loaded_on_the_first_look(plug_in: Callable[..., None]) -> None:
    kind, calls = Registry("gadget", "effformer.ffn"), []

    def load() -> None:
        calls.append(1)
        kind.register("third-party")(nn.Identity)

    plug_in(_Point("p", load))
    assert "third-party" in kind
    assert kind.names() == ["third-party"]
    with pytest.raises(ValueError, match="unknown gadget"):
        kind.get("missing")
    assert calls == [1]


def test_a_broken_plugin_is_named_and_the_others_go_on(plug_in: Callable[..., None]) -> None:
    kind = Registry("gadget", "effformer.ffn")

    def broken() -> None:
        raise ImportError("no module named 'gone'")

    whole = _Point("good", lambda: kind.register("third-party")(nn.Identity))
    plug_in(_Point("bad", broken, package="broken-package"), whole)
    with pytest.warns(UserWarning, match="bad of package broken-package .*ImportError: no module"):
        assert kind.names() == ["third-party"]
    assert registry.plugins() == {
        "bad of package broken-package": "ImportError: no module named 'gone'",
        "good of package some-package": None,
    }


def test_what_a_plugin_raises_is_told_to_users(
    plug_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("effformer.checks._SPEAKERS", {"effformer"})
    there: dict[str, Any] = {"__name__": "some.parts"}
    exec("def say():\n    raise ValueError('too many heads')\ndef slip():\n    int('x')\n", there)

    def caught(call: Callable[[], None]) -> ValueError:
        with pytest.raises(ValueError, match=r"heads|invalid literal") as found:
            call()
        return found.value

    assert not is_refusal(caught(there["say"]))
    kind = Registry("gadget", "effformer.ffn")
    plug_in(_Point("p", lambda: kind.register("third-party")(nn.Identity)))
    assert kind.names() == ["third-party"]
    assert is_refusal(caught(there["say"]))
    assert not is_refusal(caught(there["slip"]))  # of Python's own: a fault of the plug-in


def test_a_core_of_a_plugin_is_an_attention_everywhere(plug_in: Callable[..., None]) -> None:
    @registry.core.register("plugged", caps=Caps(order_free=True), paper="none")
    class Plugged(Softmax):
        """A core of another package.

        Reference: none.
        """

        @dataclass(frozen=True, slots=True, kw_only=True)
        class Config(Softmax.Config):
            """Knobs."""

    try:
        model = effformer.build_model("dit-nano", attn="plugged", layers={"0": {"attn": "flow"}})
        assert model.config.attn.title == "plugged"
        assert type(model.blocks[1].attn.part.core) is Plugged
        assert "plugged" in effformer.list_attention(order_free=True)
        assert "heads around" not in registry.attention.describe("plugged")
        assert model.config.to_dict()["attn"]["core"]["name"] == "plugged"
    finally:
        for kind in (registry.core, registry.attention):
            kind._entries.pop("plugged")
            kind._aliases.pop("plugged")


def test_many_threads_look_at_once() -> None:
    code = (
        "import threading, effformer\n"
        "from effformer import registry\n"
        "found = []\n"
        "def look(): found.append(effformer.build_model('dit-nano').name)\n"
        "def direct(): import effformer.models, effformer.attention\n"
        "def every(): assert all(len(r) for r in registry.KINDS.values())\n"
        "works = [look] * 6 + [direct, every] * 3\n"
        "threads = [threading.Thread(target=w, daemon=True) for w in works]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "assert found == ['dit-nano'] * 6, found\n"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("kind", ["core", "attention", "ffn", "block", "model"])
def test_every_entry_is_complete(kind: str) -> None:
    for entry in registry.KINDS[kind]:
        assert entry.name == entry.name.lower()
        assert entry.summary
        assert entry.paper
        assert entry.config is not None
        assert registry.KINDS[kind].describe(entry.name)
