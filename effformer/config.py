"""Frozen configs: typed, comparable, JSON-able; strings and dicts resolve to the parts that they
name.

A component owns a nested ``Config`` with its own knobs only. Fields that hold another part are
declared with `part`, so that ``attn="flow"``, ``attn={"name": "flow", "eps": 1e-6}`` and
``attn=Attention.Config(core=Flow.Config())`` mean the same thing everywhere: in Python, in JSON and
on the command line.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Self, get_args

from . import registry
from .arguments import checked
from .checks import unknown
from .retired import read_changes
from .values import Check, Checked, held, plain

__all__ = ["Config", "Spec", "part", "resolve"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config(Checked):
    """Base of all configs. Unknown keys, values of the wrong type and numbers out of their range are
    errors, however a config is made. What a field accepts stands in its type (`effformer.values`);
    what fields demand of each other, a class says in a method ``check``.

    Attributes:
        ENTRY: the registered part that this class configures; the registry writes it.
    """

    ENTRY: ClassVar[registry.Entry | None] = None

    def __init_subclass__(cls) -> None:
        if "__post_init__" in cls.__dict__:
            raise TypeError(
                f"{cls.__qualname__}: __post_init__ checks the fields of every config; name what this "
                "one adds `check`"
            )

    @classmethod
    @checked
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "") -> Self:
        """Build from plain values; nested parts may be names, dicts or configs.

        Raises:
            ValueError: an unknown or missing key, or a value outside its choices.
            TypeError: a value of the wrong type.
        """
        given = {k: v for k, v in data.items() if k != "name"}
        missing = [f.name for f in dataclasses.fields(cls) if _required(f) and f.name not in given]
        if missing:
            raise ValueError(f"{where or cls.__qualname__}: missing options {', '.join(missing)}")
        where = where or cls.__qualname__
        converted = _convert(cls, given, None, where)
        with _named(where, cls):
            return cls(**converted)

    @property
    def entry(self) -> registry.Entry:
        """The registered part of this config.

        Raises:
            TypeError: the class belongs to no registered part.
        """
        found = type(self).__dict__.get("ENTRY")
        if found is None:
            raise TypeError(f"{type(self).__qualname__} is not the config of a registered part")
        return typing.cast(registry.Entry, found)

    def build(self, *place: Any, **parts: Any) -> Any:
        """The part of this config: ``config.build(site)``, for a block with its parts by keyword."""
        return self.entry.build(self, *place, **parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; ``"name"`` is added if the config belongs to a registered part."""
        found = type(self).__dict__.get("ENTRY")
        named = {} if found is None else {"name": found.name}
        return named | {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def meanings(cls) -> dict[str, str]:
        """What each field means, by name: what the docstrings of the class and its bases say under
        "Attributes".
        """
        said: dict[str, str] = {}
        for base in reversed(cls.__mro__):
            text = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")[2]
            for name, words in re.findall(r"^ {4}(\w+): ?(.*(?:\n {8,}.*)*)", text, flags=re.M):
                said[name] = " ".join(words.split())
        return {f.name: said[f.name] for f in dataclasses.fields(cls) if f.name in said}

    def caps(self) -> registry.Caps:
        """What the part of this config can do: what its entry declares. The config of a part that
        works through another one answers for both.
        """
        found = type(self).__dict__.get("ENTRY")
        return registry.Caps() if found is None else found.caps

    @property
    def title(self) -> str:
        """The name that a user writes for this part, "axes of flow" for one that holds another."""
        inner = [one.title for one in self.parts("attention", "core").values()]
        return " of ".join([self.entry.name, *inner])

    @checked
    def at(self, path: str) -> Any:
        """The value at a dotted path: ``config.at("attn.core.eps")``.

        Raises:
            ValueError: there is nothing at the path.
        """
        name, _, rest = path.partition(".")
        if name not in {f.name for f in dataclasses.fields(self)}:
            raise unknown("option", name, [f.name for f in dataclasses.fields(self)], where=path)
        value = getattr(self, name)
        if not rest:
            return value
        if not isinstance(value, Config):
            raise ValueError(f"{path}: {name!r} is {value!r}, which has no options of its own")
        return value.at(rest)

    @checked
    def put(self, path: str, value: Any) -> Self:
        """A copy with another value at a dotted path: ``config.put("attn.core", "flow")``; a name,
        a dict or a config where a part stands.

        Raises:
            ValueError: there is nothing at the path, or the value does not fit.
            TypeError: a value of the wrong type.
        """
        name, _, rest = path.partition(".")
        if rest:
            inner = self.at(name)
            if not isinstance(inner, Config):
                raise ValueError(f"{path}: {name!r} is {inner!r}, which has no options of its own")
            value = inner.put(rest, value)
        return self.replace(**{name: value})

    def parts(self, *kinds: str) -> dict[str, Config]:
        """The parts of these kinds that this one is made of, by field."""
        own = [f.name for f in dataclasses.fields(self) if f.metadata.get("kind") in kinds]
        found = {name: getattr(self, name) for name in own}
        return {name: one for name, one in found.items() if one is not None}

    def nested(self, *kinds: str) -> list[Config]:
        """This part and those of these kinds inside of it, the outermost first."""
        inner = self.parts(*kinds).values()
        return [self, *(deeper for one in inner for deeper in one.nested(*kinds))]

    @checked
    def replace(self, *, where: str = "", **changes: Any) -> Self:
        """A copy with changes; a change to a nested config starts from the present one."""
        return self.changed(changes, where=where)

    @checked
    def changed(self, changes: Mapping[str, Any], *, where: str = "") -> Self:
        """`replace` with changes of any name, which a user may have typed."""
        where = where or type(self).__qualname__
        converted = _convert(type(self), changes, self, where)
        with _named(where, type(self)):
            return dataclasses.replace(self, **converted)


Spec = str | Mapping[str, Any] | Config


def part(kind: str, default: Config | None = None, *, optional: bool = False) -> Any:
    """Declare a dataclass field that holds a registered part of ``kind`` (None: the field is
    required, or with ``optional`` empty).
    """
    metadata = {"kind": kind, "checker": functools.partial(_part, kind, default)}
    if default is None and not optional:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _part(kind: str, default: Config | None, hint: Any) -> Check:
    """The check of a field that holds a part."""

    def read(value: Any, where: str) -> Any:
        if value is not None:
            return resolve(kind, value, default, where=where)
        raise TypeError(f"{where}: a model cannot be without it; name one, or leave it out")

    return held(kind, read, optional=type(None) in get_args(hint))


def resolve(kind: str, spec: Spec, base: Config | None = None, *, where: str = "") -> Config:
    """Turn a name, a dict or a config into the config of a registered part.

    Args:
        kind: registry, for instance ``"attention"``. The name of a core is accepted as an
            attention: it becomes a multi-head attention around that core and keeps the projections
            of ``base``. A part that holds another one of its kind holds ``base`` unless the options
            say otherwise.
        spec: what was given. A dict without ``"name"`` changes ``base``.
        base: what stands there now.
        where: prefix of error messages.

    Raises:
        ValueError: unknown name or option.
        TypeError: ``spec`` is none of the accepted forms.
    """
    if kind not in registry.KINDS:
        raise unknown("kind of parts", kind, list(registry.KINDS), where=where)
    entries = registry.KINDS[kind]
    if isinstance(spec, Config):
        return _accept(kind, spec, base, where)
    if isinstance(spec, str):
        spec = {"name": spec}
    if not isinstance(spec, Mapping):
        raise TypeError(
            f"{where or kind}: expected a name, a dict or a Config, got {type(spec).__name__}"
        )
    options = {k: v for k, v in spec.items() if k != "name"}
    if "name" in spec:
        entry = entries.get(spec["name"], where=where)
    elif base is not None:
        entry = base.entry
    else:
        raise ValueError(
            f"{where or kind}: the dict has no 'name' ({entries.kind} names: effformer list {kind})"
        )
    if entry.config is None:
        raise TypeError(f"{where or kind}: {entry.name!r} takes no config")
    if entry.core:
        return _around(registry.core.get(entry.core), entry.config, options, base, where)
    return _made(entry, options, base, where)


def _made(
    entry: registry.Entry, options: Mapping[str, Any], base: Config | None, where: str
) -> Config:
    """The config of an entry, from the one that stands there now if it is of the same part."""
    assert entry.config is not None
    if base is not None and type(base) is entry.config:
        return _changed(base, options, where)
    where = where or f"{entry.kind} {entry.name!r}"
    kept = {} if base is None else _kept(entry, options, base, where)
    return typing.cast(Config, entry.config.from_dict({**options, **kept}, where=where))


def _kept(
    entry: registry.Entry, options: Mapping[str, Any], base: Config, where: str
) -> dict[str, Config]:
    """What stands there now goes into a part that is put around it."""
    assert entry.config is not None
    fields = dataclasses.fields(entry.config)
    inner = [f.name for f in fields if f.metadata.get("kind") == entry.kind]
    return {
        name: resolve(entry.kind, options.get(name, base), base, where=f"{where}.{name}")
        for name in inner
    }


def _accept(kind: str, spec: Config, base: Config | None, where: str) -> Config:
    """A config of the kind as it is; that of a core with an attention around it."""
    found = type(spec).__dict__.get("ENTRY")
    if found is not None and found.kind == kind:
        return spec
    if found is not None and found.kind == "core" and kind == "attention":
        around = registry.attention.get(found.name)
        assert around.config is not None
        return _around(found, around.config, {"core": spec}, base, where)
    raise TypeError(
        f"{where or kind}: {type(spec).__qualname__} is not the config of a registered {kind}"
    )


def _around(
    core: registry.Entry,
    heads: type[Config],
    options: Mapping[str, Any],
    base: Config | None,
    where: str,
) -> Config:
    """Put a core between heads. The heads of ``base`` stay, but for what their core brought along;
    the new core brings what its paper has.
    """
    if (other := _core_named(options, core, where)) is not core:
        raise ValueError(f"{where}: both {core.name!r} and {other.name!r} are named; leave one out")
    if base is None or type(base) is not heads:
        base = heads()
    present: Any = base.core  # type: ignore[attr-defined]
    if present.entry is core:
        return _between(base, core, options, where)
    brought = _returned(present, base) | dict(core.heads)
    return _between(base.replace(**brought) if brought else base, core, options, where)


def _returned(core: Config, base: Config) -> dict[str, Any]:
    """Options of heads that their core brought along, as they are without it."""
    if not core.entry.heads:
        return {}
    plain = type(base)()
    brought = plain.replace(**core.entry.heads)
    same = [name for name in core.entry.heads if getattr(base, name) == getattr(brought, name)]
    return {name: getattr(plain, name) for name in same}


def _changed(base: Config, options: Mapping[str, Any], where: str) -> Config:
    """A config with changed options; those of the core that it holds go there."""
    present = getattr(base, "core", None)
    if not isinstance(present, Config):
        return base.changed(options, where=where)
    return _between(base, _core_named(options, present.entry, where), options, where)


def _core_named(options: Mapping[str, Any], default: registry.Entry, where: str) -> registry.Entry:
    """The core that the options of an attention name, if they do."""
    chosen = options.get("core", {})
    if isinstance(chosen, Config):
        return chosen.entry
    name = chosen.get("name") if isinstance(chosen, Mapping) else chosen
    return default if name is None else registry.core.get(name, where=where)


def _between(base: Config, core: registry.Entry, options: Mapping[str, Any], where: str) -> Config:
    """Heads with a core between them; options go to whichever of the two owns them, those of both
    to the core.
    """
    assert core.config is not None
    of_core = {f.name for f in dataclasses.fields(core.config)}
    own = {f.name for f in dataclasses.fields(base)} - of_core
    outer = {k: v for k, v in options.items() if k in own}
    inner = {k: v for k, v in options.items() if k not in own}
    chosen = outer.pop("core", {})
    if isinstance(chosen, Config):
        made = chosen.changed(inner, where=where)
    else:
        given = chosen if isinstance(chosen, Mapping) else {}
        given = {k: v for k, v in given.items() if k != "name"}
        present: Any = base.core  # type: ignore[attr-defined]
        made = _made(core, given | inner, present, where)
    return base.changed(outer | {"core": made}, where=where)


@contextmanager
def _named(where: str, cls: type[Config] | None = None) -> Iterator[None]:
    """Begin the refusals of a config's own checks with the place where it was given."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if str(error).startswith(where):
            raise
        field = str(error).removeprefix(cls.__qualname__) if cls else ""
        raise type(error)(where + (field if field[:1] == "." else f": {error}")) from error


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(
    cls: type[Config], given: Mapping[str, Any], base: Config | None, where: str
) -> dict[str, Any]:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    kinds = {f.metadata["kind"] for f in fields.values() if f.name == f.metadata.get("kind")}
    if not {"block", "ffn", "layers"}.isdisjoint(given):
        given = read_changes(given, kinds, base, where)
    out = {}
    for key, value in given.items():
        if key not in fields:
            raise unknown("option", key, sorted(fields), where=where)
        field, path = fields[key], f"{where}.{key}"
        if "kind" in field.metadata:
            if base is not None:
                present = getattr(base, key)
            else:
                present = None if field.default is dataclasses.MISSING else field.default
            if value is not None:
                value = resolve(field.metadata["kind"], value, present, where=path)
            out[key] = value
        elif isinstance(value, Mapping) and isinstance(getattr(base, key, None), Config):
            out[key] = getattr(base, key).changed(value, where=path)
        else:
            out[key] = value
    return out
