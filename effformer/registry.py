"""One registry class, one instance per kind of part: a name reaches everything.

Every entry carries its class, its config class, what it can do (`Caps`), its paper and a one-line
summary. Lists in the documentation, the command line and the contract tests are generated from
these entries.
"""

from __future__ import annotations

import fnmatch
import importlib
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from typing import Any, Literal, TypeVar

from .arguments import checked
from .checks import speaks, unknown
from .retired import became

__all__ = [
    "Caps", "Entry", "Registry", "attention", "block", "cache", "core", "ffn", "loss", "model", "plugins", "quantizer",
    "sampler", "target", "tokens", "transform", "width",
]  # fmt: skip

T = TypeVar("T")
When = Literal["never", "optional", "always"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """What a part can do. A model states its needs per slot; they are compared before weights are
    allocated.

    Attributes:
        causal: output i may be restricted to tokens <= i ("always": the part has no other form).
        cross: attends to ``ctx.memory`` with another number of tokens.
        order_free: a `Core` for which the tokens are a set: it may mix streams that were put one
            behind the other, or tokens that were merged.
        mask: "none", "key" (B, M) validity of keys, or "full" (any boolean pattern, key masks
            included).
        rope: applies ``ctx.rope``, see `effformer.attention.Core.rotates`.
        packed: honours ``ctx.packing`` (several sequences in one row).
        streaming: has ``init_state`` and ``step``.
        axes: axes of ``ctx.grid`` that it needs, by their letters: the axes of a grid are the last
            ones of "thw" (time, height, width); empty if it needs none.
        front: a part that needs a grid takes tokens that stand in front of it (class token).
        mixer_only: a block that also works without a position-wise network (``ffn=None``).
        cond: uses the conditioning vector ``ctx.cond``.
        time: needs the time embedding ``ctx.time``.
        width: honours ``ctx.width``, factors on its units (heads of a mixer, hidden channels of an
            FFN) that do not see each other, and can be cut to some of them with ``select``.
        sizes: a core that counts keys as often as ``ctx.merging`` says.
        sequential: a block whose branches run one after the other, so that a part of kind "tokens"
            may act between them.
        multihead: a token mixer that is a multi-head attention around a core; a block that needs one.
        joint: a block of two streams that meet in one attention.
        dynamic: executes a part of its work that depends on the input, and reports it to
            ``ctx.ledger``.
        cost: growth with the number of tokens, "n", "n log n", "n^1.5" (a square grid) or "n^2".
    """

    causal: When = "never"
    cross: bool = False
    order_free: bool = False
    mask: Literal["none", "key", "full"] = "none"
    rope: bool = False
    packed: bool = False
    streaming: bool = False
    axes: str = ""
    front: bool = False
    mixer_only: bool = False
    cond: When = "never"
    time: bool = False
    width: bool = False
    sizes: bool = False
    sequential: bool = False
    multihead: bool = False
    joint: bool = False
    dynamic: bool = False
    cost: str = "n"

    def satisfies(self, **wanted: object) -> bool:
        """True if every wanted capability is offered (``causal=True``, ``mask="key"``,
        ``cost="n"``, ...).
        """
        return all(_offers(getattr(self, key), value) for key, value in wanted.items())

    def __str__(self) -> str:
        """What the part can do, in words; what it cannot do is left out."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        shown = {k: v for k, v in values.items() if v not in (False, "", "never", "none")}
        return ", ".join(k if v is True else f"{k} {v}" for k, v in shown.items())


def first_paragraph(thing: object) -> str:
    """The first paragraph of a docstring as one line."""
    return " ".join((thing.__doc__ or "").strip().partition("\n\n")[0].split())


def _offers(have: object, want: object) -> bool:
    if have in ("never", "optional", "always"):
        return (
            have != "never" if want is True else have != "always" if want is False else have == want
        )
    if have in ("none", "key", "full"):
        order = ("none", "key", "full")
        if str(want) not in order:
            raise unknown("mask", str(want), order)
        return order.index(str(have)) >= order.index(str(want))
    return bool(have) == want if isinstance(want, bool) else have == want


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One registered part.

    Attributes:
        name: the name in lower-case kebab.
        kind: the registry it lives in.
        build: the class (or function) behind the name.
        config: its config class, or None.
        preset: a config instance that this name stands for (models), or None.
        caps: what the part can do.
        paper: arXiv id or another stable reference, empty if there is none.
        summary: one line.
        aliases: other accepted spellings.
        core: an attention that is made by putting this core between the heads, else empty.
        heads: a core: options of the heads around it as its paper has them.
        facts: more data about the entry, for instance the published parameter count.
    """

    name: str
    kind: str
    build: Callable[..., Any]
    config: type[Any] | None = None
    preset: Any = None
    caps: Caps = field(default_factory=Caps)
    paper: str = ""
    summary: str = ""
    aliases: tuple[str, ...] = ()
    core: str = ""
    heads: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


class Registry:
    """Names of one kind.

    Args:
        kind: singular noun used in messages.
        home: module that registers the built-in entries when it is imported; loaded on the first
            look-up.
    """

    def __init__(self, kind: str, home: str) -> None:
        self.kind = kind
        self._home = home
        self._entries: dict[str, Entry] = {}
        self._aliases: dict[str, str] = {}
        self._followers: list[Callable[[Entry], None]] = []
        self._state: Literal["new", "loading", "loaded"] = "new"

    @checked
    def register(self, name: str, **facts: Any) -> Callable[[T], T]:
        """Class decorator. Keywords are the fields of `Entry`; config and summary default to the
        class's own.
        """

        def add(part: T) -> T:
            facts.setdefault("config", getattr(part, "Config", None))
            facts.setdefault("caps", Caps())
            part.caps = facts["caps"]  # type: ignore[attr-defined]
            facts.setdefault("summary", first_paragraph(part))
            self.add(Entry(name=name, kind=self.kind, build=part, **facts))  # type: ignore[arg-type]
            return part

        return add

    @checked
    def add(self, entry: Entry) -> None:
        """Add an entry.

        Raises:
            ValueError: the name or an alias is taken.
        """
        for key in (entry.name, *entry.aliases):
            if key.lower() in self._aliases:
                raise ValueError(f"{self.kind} {key!r} is already registered")
        self._entries[entry.name] = entry
        for key in (entry.name, *entry.aliases):
            self._aliases[key.lower()] = entry.name
        if entry.config is not None and entry.preset is None and not entry.core:
            entry.config.ENTRY = entry
        for follow in self._followers:
            follow(entry)

    @checked
    def follow(self, function: Callable[[Entry], None]) -> None:
        """Call ``function`` with every entry, those of the future included."""
        self._followers.append(function)
        for entry in list(self._entries.values()):
            function(entry)

    @checked
    def get(self, name: str, *, where: str = "") -> Entry:
        """Look a name or alias up; ``where`` begins the message of a refusal.

        Raises:
            TypeError: the name is no string.
            ValueError: unknown name; the nearest known one is suggested.
        """
        self._load()
        if name.lower() not in self._aliases:
            if words := became(self.kind, name):
                raise ValueError(f"{where}: {words}" if where else words)
            hint = f"{len(self._entries)} known: effformer list {self.kind}"
            raise unknown(self.kind, name, list(self._aliases), where=where, hint=hint)
        return self._entries[self._aliases[name.lower()]]

    @checked
    def names(self, like: str = "*", **caps: object) -> list[str]:
        """Sorted names matching a glob and offering capabilities: ``names(like="flow*",
        causal=True)``.

        Raises:
            ValueError: a capability that does not exist.
        """
        self._load()
        known = [f.name for f in fields(Caps)]
        for key in caps:
            if key not in known:
                raise unknown("capability", key, known)
        chosen = (n for n, e in self._entries.items() if e.caps.satisfies(**caps))
        return sorted(n for n in chosen if fnmatch.fnmatch(n, like.lower()))

    @checked
    def describe(self, name: str) -> str:
        """One paragraph about an entry: summary, capabilities, paper, aliases."""
        entry = self.get(name)
        lines = [f"{entry.kind} {entry.name}: {entry.summary}", f"  can: {entry.caps}"]
        if entry.paper:
            lines.append(f"  paper: {entry.paper}")
        if entry.aliases:
            lines.append(f"  also: {', '.join(entry.aliases)}")
        return "\n".join(lines)

    def __iter__(self) -> Iterator[Entry]:
        self._load()
        return iter(list(self._entries.values()))

    def __contains__(self, name: object) -> bool:
        self._load()
        return isinstance(name, str) and name.lower() in self._aliases

    def __len__(self) -> int:
        self._load()
        return len(self._entries)

    def _load(self) -> None:
        """Import the built-in entries, then the plug-ins; other threads wait for both."""
        if self._state == "loaded":
            return
        with _LOADING:
            if self._state == "new":
                self._state = "loading"
                try:
                    importlib.import_module(self._home)
                except BaseException:
                    self._state = "new"
                    raise
                _load_plugins()
                self._state = "loaded"


_LOADING = threading.RLock()
_PLUGINS: dict[str, str | None] = {}
"""Entry points that were loaded, with the error of those that could not be."""


def _load_plugins() -> None:
    """Load the entry points of the group ``effformer.parts``, each once; one that fails is named in
    a warning, and everything else goes on.
    """
    for point in entry_points(group="effformer.parts"):
        package = point.dist.name if point.dist is not None else point.value
        key = f"{point.name} of package {package}"
        if key in _PLUGINS:
            continue
        _PLUGINS[key] = None
        try:
            point.load()
            speaks(point.value.partition(":")[0].partition(".")[0])
        except Exception as error:
            _PLUGINS[key] = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"plug-in {key} could not be loaded ({_PLUGINS[key]}); its parts are missing, "
                "everything else works; repair or uninstall the package",
                stacklevel=2,
            )


def plugins() -> dict[str, str | None]:
    """Plug-ins by "<entry point> of package <package>": None, or why one could not be loaded."""
    attention.names()
    return dict(_PLUGINS)


core = Registry("core", "effformer.attention")
attention = Registry("attention", "effformer.attention")
ffn = Registry("ffn", "effformer.ffn")
block = Registry("block", "effformer.blocks")
width = Registry("width", "effformer.blocks")
tokens = Registry("tokens", "effformer.blocks")
model = Registry("model", "effformer.models")
sampler = Registry("sampler", "effformer.flow")
loss = Registry("loss", "effformer.flow")
cache = Registry("cache", "effformer.cache")
transform = Registry("transform", "effformer.compress")
quantizer = Registry("quantizer", "effformer.compress.quant")
target = Registry("target", "effformer.export.targets")

KINDS: dict[str, Registry] = {
    r.kind: r
    for r in (
        core,
        attention,
        ffn,
        block,
        width,
        tokens,
        model,
        sampler,
        loss,
        cache,
        quantizer,
        transform,
        target,
    )
}
