"""What can be cut in a model: groups of units, each with the slices of tensors that go with it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from effformer.arguments import checked
from effformer.attention import Attention, Mixer
from effformer.blocks import BackboneConfig, Joint
from effformer.checks import CapabilityError
from effformer.ffn import FFN
from effformer.nn.cut import put
from effformer.wrapped import unwrapping

from .rebuild import check_width, removable, width_group
from .where import Where, check, covers

__all__ = ["Group", "Member", "Plan", "plan"]

Kind = Literal["heads", "channels", "experts", "blocks", "width"]
KINDS: tuple[Kind, ...] = ("heads", "channels", "experts", "blocks", "width")
PARTS = ("heads", "channels", "experts")
"""Kinds of units inside of a part, which its ``select`` takes out."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Member:
    """A tensor with slices that go with units.

    Attributes:
        module: path of the module that holds it.
        name: its name there.
        axis: along which it is cut.
        owner: unit of every slice along the axis (int64), -1 for slices that stay.
    """

    module: str
    name: str
    axis: int
    owner: Tensor

    @property
    def path(self) -> str:
        """Path of the tensor in the model."""
        return f"{self.module}.{self.name}" if self.module else self.name

    def per_unit(self, values: Tensor, units: int) -> Tensor:
        """Sums of values (shaped as the tensor) over what each unit owns, (units,)."""
        others = [i for i in range(values.dim()) if i != self.axis]
        along = values.sum(dim=others) if others else values
        return self.gathered(along, units)

    def gathered(self, along: Tensor, units: int) -> Tensor:
        """Sums of values of the slices (length of the axis,) over those of each unit, (units,)."""
        owner = self.owner.to(along.device)
        mine = owner >= 0
        return along.new_zeros(units).index_add(0, owner[mine], along[mine])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Units of which any may go, each with everything that belongs to it.

    Attributes:
        path: the module that is cut; "" for the model.
        kind: "heads", "channels" or "experts" of an FFN, "blocks", or the "width" of the residual stream.
        units: how many there are.
        least: how many of them stay, whatever is asked.
        bundle: heads of a unit: those that share a key.
        fixed: units that stay.
        members: the slices that go with units; none for whole blocks.
    """

    path: str
    kind: Kind
    units: int
    least: int = 1
    bundle: int = 1
    fixed: tuple[int, ...] = ()
    members: tuple[Member, ...] = ()

    @property
    def paths(self) -> set[str]:
        """Modules that patterns of ``where`` may name for it."""
        return {self.path or self.kind, *(m.module for m in self.members if self.kind != "width")}

    @property
    def outgoing(self) -> tuple[Member, ...]:
        """Columns of linear layers that read the units."""
        return tuple(m for m in self.members if m.axis == 1 and m.name == "weight")

    def rows(self, units: Tensor) -> Tensor:
        """Indices that the module's ``select`` takes for units."""
        if self.bundle == 1:
            return units
        return (units[:, None] * self.bundle + torch.arange(self.bundle)).flatten()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What can be cut in a model.

    Attributes:
        groups: the groups, in the order of the model.
        kept: path of a part that cannot be cut -> why.
    """

    groups: tuple[Group, ...]
    kept: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, path: str) -> Group:
        return next(g for g in self.groups if (g.path or g.kind) == path)

    def __str__(self) -> str:
        names = [g.path or g.kind for g in self.groups] + list(self.kept)
        wide = max(map(len, ("part", *names)))
        lines = [f"{'part':<{wide}}  {'kind':<9}  units"]
        for name, group in zip(names, self.groups, strict=False):
            heads = f" of {group.bundle} heads that share a key" if group.bundle > 1 else ""
            lines.append(f"{name:<{wide}}  {group.kind:<9}  {group.units}{heads}")
        lines += [f"{path:<{wide}}  kept: {why}" for path, why in self.kept.items()]
        return "\n".join(lines)


@checked
@unwrapping
def plan(model: nn.Module, where: Where = "*", kinds: tuple[Kind, ...] = KINDS) -> Plan:
    """What can be cut in a model.

    Args:
        model: a model of ours, perhaps with weights of another library (`effformer.load_weights`).
        where: glob patterns of module paths; "width" is the residual stream.
        kinds: which kinds of units.

    Raises:
        ValueError: a pattern matches nothing that could be cut.

    Example:
        >>> import effformer
        >>> from effformer.compress import plan
        >>> [g.units for g in plan(effformer.build_model("vit-nano"), "blocks.0").groups]
        [2, 192]
    """
    groups, kept = [], dict[str, str]()
    for path, part in _parts(model):
        kind: Kind = part.UNITS if isinstance(part, FFN) else "heads"
        if kind not in kinds:
            continue
        try:
            groups.append(_group(path, part, kind))
        except CapabilityError as error:
            kept[path] = str(error)
    if "blocks" in kinds and isinstance(getattr(model, "config", None), BackboneConfig):
        try:
            groups.append(_blocks(model))
        except CapabilityError as error:
            kept["blocks"] = str(error)
    if "width" in kinds and isinstance(getattr(model, "config", None), BackboneConfig):
        try:
            groups.append(_width(model))
        except CapabilityError as error:
            kept["width"] = str(error)
    able = {path for g in groups for path in g.paths}
    if able:
        paths = [*able, *(name for name, _ in model.named_modules())]
        check(where, paths, able=able, what="part to cut", where="prune: where")
    chosen = tuple(g for g in groups if any(covers(where, p) for p in g.paths))
    return Plan(groups=chosen, kept={p: why for p, why in kept.items() if covers(where, p)})


def cuttable(part: nn.Module) -> TypeGuard[Any]:
    """A part that knows how to be cut to some of its units."""
    return hasattr(part, "select") and hasattr(part, "units") and hasattr(part, "macs")


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Parts with heads or hidden channels; those inside of such parts belong to them."""
    inside: set[nn.Module] = set()
    for path, module in model.named_modules():
        if module in inside:
            continue
        if isinstance(module, Joint):
            yield path, module
            for heads in module.meeting.heads:
                inside.update(heads.modules())
        elif isinstance(module, (Mixer, FFN)):
            held = any(isinstance(m, Attention) for m in module.modules() if m is not module)
            if held and not cuttable(module):
                continue  # a view of the tokens, around a part that can be cut
            yield path, module
            inside.update(module.modules())


def _group(path: str, part: Any, kind: Kind) -> Group:
    if not cuttable(part):
        name = part.config.title if hasattr(part, "config") else type(part).__name__
        raise CapabilityError(f"{name!r} has no units that can be taken out")
    if any(isinstance(m, nn.Linear) and type(m) is not nn.Linear for m in part.modules()) or any(
        hasattr(m, "scheme") for m in part.modules()
    ):
        raise CapabilityError("its weights are packed; prune first, then quantize")
    first = part.meeting.heads[0] if isinstance(part, Joint) else part
    bundle = getattr(first, "bundle", 1)
    group = Group(path=path, kind=kind, units=part.units // bundle, bundle=bundle)
    if kind == "heads" and not first.config.caps().width:
        raise CapabilityError(f"the heads of {first.config.title!r} see each other")
    if kind == "experts":  # every token goes on running as many
        return replace(group, least=part.top_k, members=tuple(_experts(path, part)))
    return replace(group, members=tuple(_members(path, part, group)))


def _experts(path: str, part: Any) -> Iterator[Member]:
    """A row of the router goes with an expert, and the whole of it; its last layer reads it."""
    yield Member(module=f"{path}.router", name="weight", axis=0, owner=torch.arange(part.units))
    for number, expert in enumerate(part.experts):
        for name, tensor in expert.named_parameters():
            module, _, leaf = name.rpartition(".")
            axis = int(name == "fc2.weight")
            owner = torch.full((tensor.shape[axis],), number)
            where = f"{path}.experts.{number}.{module}"
            yield Member(module=where, name=leaf, axis=axis, owner=owner)


def _members(path: str, part: Any, group: Group) -> Iterator[Member]:
    """Whose slices `select` takes: every tensor is replaced by the numbers of its slices, and the part
    cut by the binary digits of the units' numbers.
    """
    small = part.select(group.rows(torch.tensor([0])))
    for name, tensor in (*part.named_parameters(), *part.named_buffers()):
        now = attrgetter(name)(small)
        for axis, size in enumerate(tensor.shape):
            if now.shape[axis] == size:
                continue
            probe = copy.deepcopy(part)
            module, _, leaf = name.rpartition(".")
            numbers = torch.arange(size, dtype=torch.float64)
            shape = [size if i == axis else 1 for i in range(tensor.dim())]
            put(probe.get_submodule(module), leaf, numbers.view(shape).expand(tensor.shape))
            owner = _owners(probe, name, axis, size, group)
            where = ".".join(p for p in (path, module) if p)
            yield Member(module=where, name=leaf, axis=axis, owner=owner)


def _owners(probe: Any, name: str, axis: int, size: int, group: Group) -> Tensor:
    units = torch.arange(group.units)
    owner, seen = torch.zeros(size, dtype=torch.int64), torch.zeros(size, dtype=torch.int64)
    for bit in range(max(1, (group.units - 1).bit_length())):
        for digit in (0, 1):
            chosen = units[(units >> bit) & 1 == digit]
            if not len(chosen):
                continue
            cut = attrgetter(name)(probe.select(group.rows(chosen)))
            found = cut.movedim(axis, 0).reshape(cut.shape[axis], -1)[:, 0].long()
            seen[found] += 1
            owner[found] += digit << bit
    rounds = max(1, (group.units - 1).bit_length())
    owner[seen != rounds] = -1  # in every cut, or in none
    return owner


def _blocks(model: Any) -> Group:
    """The blocks; those without which the others would be of another kind are fixed."""
    depth = model.config.depth
    if getattr(model, "transforms", ()):
        raise CapabilityError("was changed before; drop blocks first")
    if not isinstance(getattr(model, "blocks", None), nn.ModuleList):
        raise CapabilityError("stand in several stacks")
    shapes = [{n: t.shape for n, t in block.state_dict().items()} for block in model.blocks]
    asked = [0] if all(one == shapes[0] for one in shapes) else range(depth)
    fixed = [i for i in asked if not removable(model, i)]
    if fixed and len(asked) < depth:
        fixed = list(range(depth))
    if depth - len(fixed) < 1 or depth < 2:
        raise CapabilityError("none of the blocks can go")
    return Group(path="blocks", kind="blocks", units=depth, fixed=tuple(fixed))


def _width(model: nn.Module) -> Group:
    members = tuple(
        Member(module=module, name=name, axis=axis, owner=owner)
        for module, name, axis, owner in width_group(model)
    )
    check_width(model)
    config: Any = model.config
    return Group(path="", kind="width", units=config.dim, members=members)
