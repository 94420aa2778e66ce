"""Cutting: a smaller model from the units that stay."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from effformer import registry
from effformer.arguments import checked
from effformer.blocks import Branch
from effformer.checks import CapabilityError, FormatError
from effformer.nn.cut import Forms
from effformer.wrapped import unwrapping

from ..plan import PARTS, Group, cuttable, plan
from ..rebuild import fewer_blocks, narrowed, resized
from ..transforms import record

__all__ = ["cut"]

M = TypeVar("M", bound=nn.Module)
Kept = Mapping[str, Sequence[int] | Tensor]


@checked
@unwrapping
def cut(model: M, kept: Kept) -> M:
    """The model with some of its units, everything else of it unchanged.

    Its config says the new sizes where a config can (``layers={"0": {"ffn": {"hidden": 96}}}``); what it
    cannot say is recorded in ``transforms`` and repeated on loading.

    Args:
        model: a model of ours.
        kept: path of a group (see `plan`) -> the units that stay.

    Returns:
        A new model.

    Raises:
        ValueError: no such group or unit, or none would stay.
        CapabilityError: the model cannot be without them.

    Example:
        >>> import effformer
        >>> from effformer.compress import cut
        >>> small = cut(effformer.build_model("vit-nano"), {"blocks.0.attn.part": [1]})
        >>> small.config.at("blocks.0.attn.heads")
        1
    """
    groups = {g.path or g.kind: g for g in plan(model).groups}
    chosen = {path: _checked(groups, path, units) for path, units in kept.items()}
    return cut_groups(model, groups, chosen)


def _checked(groups: Mapping[str, Group], path: str, units: Sequence[int] | Tensor) -> Tensor:
    if path not in groups:
        raise ValueError(f"prune: {path!r} cannot be cut; what can: {', '.join(groups)}")
    indices = torch.as_tensor(units, dtype=torch.int64).unique()
    group = groups[path]
    if not len(indices) or indices[0] < 0 or indices[-1] >= group.units:
        raise ValueError(
            f"prune: {path}: units must be some of 0..{group.units - 1}, got {list(map(int, units))[:8]}"
        )
    if lost := set(group.fixed) - set(indices.tolist()):
        raise CapabilityError(
            f"prune: {path}: {sorted(lost)} must stay, or others would be of another kind"
        )
    return indices


def cut_groups(
    model: M, groups: Mapping[str, Group], kept: Mapping[str, Tensor], *, settle: bool = True
) -> M:
    """As `cut`, of groups that were planned; without ``settle`` neither config nor records say it."""
    fewer = {p: units for p, units in kept.items() if len(units) < groups[p].units}
    small: Any = model
    if "width" in fewer:
        small = narrowed(small, fewer["width"])
    parts = {p: u for p, u in fewer.items() if groups[p].kind in PARTS}
    if "blocks" in fewer:
        blocks = fewer["blocks"].tolist()
        small = fewer_blocks(small, blocks)
        parts = {new: u for p, u in parts.items() if (new := _renumbered(p, blocks)) is not None}
        groups = {new: g for p, g in groups.items() if (new := _renumbered(p, blocks)) is not None}
    small = copy.deepcopy(small) if small is model else small
    if not parts:
        return small
    sizes = {}
    for path, units in parts.items():
        group = groups[path]
        # a config knows how many heads there are, and not which table was computed for which
        settle = settle and not _tabled(small.get_submodule(path), group)
        _replace(small, path, group.rows(units))
        sizes[path] = (group.kind, group.units * group.bundle, len(units) * group.bundle)
    said = resized(small, sizes) if settle else None
    if said is not None:
        return said
    rows = [groups[path].rows(units).tolist() for path, units in parts.items()]
    record(small, "prune", {"layers": list(parts), "kept": rows})
    return small


def _renumbered(path: str, blocks: Sequence[int]) -> str | None:
    """The path behind the loss of some blocks, None for a path in one of those."""
    found = re.match(r"blocks\.(\d+)(.*)", path)
    if found is None:
        return path
    return f"blocks.{blocks.index(int(found[1]))}{found[2]}" if int(found[1]) in blocks else None


def _tabled(part: nn.Module, group: Group) -> bool:
    """Whether a table, no weight, has entries for units."""
    tables = {name for name, _ in part.named_buffers()}
    return any(m.path.removeprefix(f"{group.path}.") in tables for m in group.members)


def _replace(model: nn.Module, path: str, units: Tensor) -> None:
    """Put the part with some of its units in the place of the whole one."""
    part: Any = model.get_submodule(path)
    device = next((p.device for p in part.parameters()), torch.device("cpu"))
    with torch.no_grad():
        small = part.select(units.to(device))
    _own(part, small)
    parent, _, name = path.rpartition(".")
    holder = model.get_submodule(parent)
    setattr(holder, name, small)
    if isinstance(holder, Branch):
        holder.forms = Forms()


def _own(part: nn.Module, small: nn.Module) -> None:
    """Give a cut part weights of its own."""
    present = {path for path, _ in small.named_modules()}
    for name, before in part.named_parameters():
        module, _, leaf = name.rpartition(".")
        if module not in present:  # an expert that went
            continue
        owner, value = small.get_submodule(module), attrgetter(name)(small)
        owner.__dict__.pop(leaf, None)
        fresh = nn.Parameter(value.detach().clone(), requires_grad=before.requires_grad)
        owner.register_parameter(leaf, fresh)


@registry.transform.register("prune")
def _replay(model: M, facts: Mapping[str, Any]) -> M:
    """Parts with some of their units: the paths of the ``layers``, and which are ``kept`` of each."""
    layers, kept = facts.get("layers"), facts.get("kept")
    if not isinstance(layers, list) or not isinstance(kept, list) or len(layers) != len(kept):
        raise FormatError("transform 'prune': expected lists of layers and of what is kept of each")
    modules = dict(model.named_modules())
    for path, units in zip(layers, kept, strict=True):
        part: Any = modules.get(path)
        if not cuttable(part):
            raise FormatError(f"transform 'prune': {path!r} is no part that can be cut")
        count = part.units
        if not units or not all(isinstance(u, int) and 0 <= u < count for u in units):
            raise FormatError(f"transform 'prune': {path!r} has not all of the units {units[:8]}")
        _replace(model, path, torch.tensor(units))
    return model
