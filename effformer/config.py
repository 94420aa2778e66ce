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
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin

from . import registry
from .checks import unknown
from .retired import read_changes

__all__ = ["Config", "Spec", "part", "resolve"]

Spec = Union[str, Mapping[str, Any], "Config"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Base of all configs. Unknown keys and values of the wrong type are errors.

    Attributes:
        ENTRY: the registered part that this class configures; the registry writes it.
    """

    ENTRY: ClassVar[registry.Entry | None] = None

    @classmethod
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
        with _named(where):
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
        return named | {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

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

    def replace(self, *, where: str = "", **changes: Any) -> Self:
        """A copy with changes; a change to a nested config starts from the present one."""
        where = where or type(self).__qualname__
        converted = _convert(type(self), changes, self, where)
        with _named(where):
            return dataclasses.replace(self, **converted)


def part(kind: str, default: Config | None = None, *, optional: bool = False) -> Any:
    """Declare a dataclass field that holds a registered part of ``kind`` (None: the field is
    required, or with ``optional`` empty).
    """
    metadata = {"kind": kind}
    if default is None and not optional:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


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
    if type(base) is entry.config and base is not None:
        return _changed(base, options, where)
    if base is not None:
        options |= _kept(kind, entry.config, options, base, where)
    return typing.cast(
        Config, entry.config.from_dict(options, where=where or f"{kind} {entry.name!r}")
    )


def _kept(
    kind: str, wrapper: type[Config], options: Mapping[str, Any], base: Config, where: str
) -> dict[str, Config]:
    """What stands there now goes into a part that is put around it."""
    inner = [f.name for f in dataclasses.fields(wrapper) if f.metadata.get("kind") == kind]
    return {
        name: resolve(kind, options.get(name, base), base, where=f"{where}.{name}")
        for name in inner
    }


def _accept(kind: str, spec: Config, base: Config | None, where: str) -> Config:
    """A config of the kind as it is; that of a core with an attention around it."""
    registry.KINDS[kind].names()  # loads the built-in parts and plug-ins
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
    options: dict[str, Any],
    base: Config | None,
    where: str,
) -> Config:
    """Put a core between heads. The heads of ``base`` stay, but for what their core brought along;
    the new core brings what its paper has; options go to whichever of the two owns them.
    """
    if base is None or type(base) is not heads:
        base = heads()
    present: Any = base.core  # type: ignore[attr-defined]
    outer = {} if present.entry is core else _returned(present, base) | dict(core.heads)
    chosen = options.get("core", {})
    given = options | {
        "core": {"name": core.name, **chosen} if isinstance(chosen, Mapping) else chosen
    }
    return _changed(base.replace(where=where, **outer) if outer else base, given, where)


def _returned(core: Config, base: Config) -> dict[str, Any]:
    """Options of heads that their core brought along, as they are without it."""
    plain = type(base)()
    brought = plain.replace(**core.entry.heads)
    same = [name for name in core.entry.heads if getattr(base, name) == getattr(brought, name)]
    return {name: getattr(plain, name) for name in same}


def _changed(base: Config, options: dict[str, Any], where: str) -> Config:
    """A config with changed options; those of the core that it holds go there."""
    own = {f.name for f in dataclasses.fields(base)}
    if "core" in own:
        own -= _fields_of_core(options.get("core"), base, where)
    if "core" not in own or own >= set(options):
        return base.replace(where=where, **options)
    outer = {k: v for k, v in options.items() if k in own}
    inner = {k: v for k, v in options.items() if k not in own}
    core = outer.pop("core", {})
    if isinstance(core, Config):
        core = core.replace(where=where, **inner)
    elif isinstance(core, str):
        core = {"name": core, **inner}
    elif isinstance(core, Mapping):
        core = {**core, **inner}
    core = resolve("core", core, base.core, where=where)  # type: ignore[attr-defined]
    return base.replace(where=where, core=core, **outer)


def _fields_of_core(spec: Any, base: Config, where: str) -> set[str]:
    """Options that a core has, and the heads around it by the same name."""
    if isinstance(spec, Mapping):
        spec = spec.get("name")
    if isinstance(spec, str):
        spec = registry.core.get(spec, where=where).config
    if not dataclasses.is_dataclass(spec):  # nothing, or what `resolve` will refuse
        spec = base.core  # type: ignore[attr-defined]
    return {f.name for f in dataclasses.fields(spec)}


@contextmanager
def _named(where: str) -> Iterator[None]:
    """Begin the refusals of a config's own checks with the place where it was given."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if str(error).startswith(where):
            raise
        raise type(error)(f"{where}: {error}") from error


def _optional(hint: Any) -> bool:
    return type(None) in get_args(hint)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


@functools.cache
def _hints(cls: type[Config]) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _convert(
    cls: type[Config], given: Mapping[str, Any], base: Config | None, where: str
) -> dict[str, Any]:
    fields = {f.name: f for f in dataclasses.fields(cls)}
    hints = _hints(cls)  # type: ignore[arg-type]
    kinds = {f.metadata["kind"] for f in fields.values() if f.name == f.metadata.get("kind")}
    if not {"block", "ffn", "layers"}.isdisjoint(given):
        given = read_changes(given, kinds, base, where)
    out = {}
    for key, value in given.items():
        if key not in fields:
            raise unknown("option", key, sorted(fields), where=where)
        field, path = fields[key], f"{where}.{key}"
        if isinstance(value, str) and "short" in field.metadata:
            with _named(path):
                value = field.metadata["short"](value)
        if "kind" in field.metadata:
            if base is not None:
                present = getattr(base, key)
            else:
                present = None if field.default is dataclasses.MISSING else field.default
            if value is None and not _optional(hints[key]):
                raise TypeError(f"{path}: a model cannot be without it; name one, or leave it out")
            out[key] = (
                None
                if value is None
                else resolve(field.metadata["kind"], value, present, where=path)
            )
        elif isinstance(value, Mapping) and isinstance(getattr(base, key, None), Config):
            out[key] = getattr(base, key).replace(where=path, **value)
        else:
            out[key] = _check(value, hints[key], path)
    return out


def _check(value: Any, hint: Any, where: str) -> Any:
    """Check a plain value against a type hint; lists become tuples, ints become floats where a
    float is asked for.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _check_union(value, args, where)
    if origin is Literal:
        if value not in args:
            raise unknown("value", str(value), [str(a) for a in args], where=where)
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"{where}: expected a list, got {value!r}")
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise ValueError(f"{where}: expected {len(args)} values, got {len(value)}")
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        return tuple(
            _check(v, k, f"{where}[{i}]") for i, (v, k) in enumerate(zip(value, kinds, strict=True))
        )
    if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise TypeError(f"{where}: expected a dict, got {value!r}")
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(hint, type) and issubclass(hint, Config) and isinstance(value, Mapping):
        return hint.from_dict(value, where=where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise TypeError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _check_union(value: Any, options: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in options:
        return None
    errors = []
    for option in options:
        if option is type(None):
            continue
        try:
            return _check(value, option, where)
        except (TypeError, ValueError) as error:
            errors.append(error)
    if len(errors) == 1 or isinstance(value, Mapping):
        raise errors[0]
    words = " or ".join(_words(option) for option in options if option is not type(None))
    raise TypeError(f"{where}: expected {words}, got {value!r}")


def _words(hint: Any) -> str:
    """What a type hint accepts, for people."""
    if get_origin(hint) is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        return "a list"
    if isinstance(hint, type) and issubclass(hint, Config):
        return f"a dict of {hint.__name__}'s options"
    return str(getattr(hint, "__name__", hint))


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
