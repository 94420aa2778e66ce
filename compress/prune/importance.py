"""How much every unit matters, by several measures."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from effformer.arguments import checked
from effformer.calls import evaluating
from effformer.checks import unknown
from effformer.context import Ledger
from effformer.wrapped import unwrapping

from ..plan import Group, Member, plan
from ..samples import Data, listed
from ..where import Where
from .statistics import observed

if TYPE_CHECKING:
    from effformer.train import Objective

__all__ = ["METHODS", "Importance", "importance"]

Importance = Literal["magnitude", "taylor", "gradient", "sides", "activation"]
METHODS: tuple[Importance, ...] = get_args(Importance)
_LEARNED = ("taylor", "gradient", "sides")


@checked
@unwrapping
def importance(
    model: nn.Module,
    method: Importance = "magnitude",
    where: Where = "*",
    *,
    data: Data | None = None,
    objective: Objective | None = None,
) -> dict[str, Tensor]:
    """How much every unit of a model matters.

    With w the weights that belong to a unit (the magnitude does not count what is added: biases,
    positions, class tokens), g the gradient of the loss, and h what the layer behind the unit reads of it:

    - "magnitude": ``sum w^2``.
    - "taylor": ``|sum w g|``, g summed over all batches before the absolute value is taken.
    - "gradient": ``sum over batches |d loss / d m|`` of a factor m on the unit's output (Michel),
      which is ``|sum w g|`` over the columns that read it.
    - "sides": ``|sum w g|`` of the rows that make the unit (biases included) plus that of the columns
      that read it, summed over batches (DynaBERT).
    - "activation": ``sqrt(sum_c ||h_c||^2 ||w_c||^2)`` over the unit's channels c, without a loss.

    A block matters by what it does to its tokens, whatever the method: ``1 - cos(x_in, x_out)``, mean
    over the tokens (block influence). Generators should be shown all times.

    Args:
        model: any model of ours; it runs in evaluation mode and does not change.
        method: as above.
        where: glob patterns of module paths.
        data: batches of named tensors.
        objective: the loss, as `effformer.train` minimises it, for the methods with gradients; given to
            the others, it alone calls the model (a generator needs its times).

    Returns:
        Path of a group (see `plan`) -> one number per unit, in float64.

    Raises:
        ValueError: the method needs data or an objective, or the data is empty or not finite.

    Reference: Are Sixteen Heads Really Better than One?, 2019, arXiv 1905.10650; Importance Estimation
    for Neural Network Pruning, 2019, arXiv 1906.10771; DynaBERT, 2020, arXiv 2004.04037; ShortGPT, 2024,
    arXiv 2403.03853.
    """
    groups = [g for g in plan(model, where).groups if g.kind != "blocks" or data is not None]
    return scores(model, method, groups, data=data, objective=objective)


def scores(
    model: nn.Module,
    method: Importance,
    groups: list[Group],
    *,
    data: Data | None = None,
    objective: Objective | None = None,
) -> dict[str, Tensor]:
    """As `importance`, of these groups."""
    where = f"prune: importance {method!r}"
    if method not in METHODS:
        raise unknown("importance", str(method), list(METHODS), where="prune")
    sliced = [g for g in groups if g.kind != "blocks"]
    needs = sliced and method != "magnitude"
    if data is None and (needs or len(sliced) < len(groups)):
        why = where if needs else "prune: units 'blocks'"
        raise ValueError(f"{why} is measured on data=; give some batches, or take 'magnitude'")
    found = [] if data is None else listed(model, data, where=where)
    out: dict[str, Tensor] = {}
    if method == "magnitude":
        state = model.state_dict()
        out = {g.path or g.kind: _magnitude(state, g) for g in sliced}
    elif method == "activation":
        out = _activation(model, sliced, found, where, objective) if sliced else {}
    elif sliced:
        if objective is None:
            raise ValueError(
                f"{where} needs a loss: objective=, such as effformer.train.Classification() or "
                "Generation(); 'magnitude' and 'activation' need none"
            )
        out = _sensitivity(model, method, sliced, found, objective)
    out |= {
        g.path: _influence(model, g, found, where, objective) for g in groups if g.kind == "blocks"
    }
    return {g.path or g.kind: out[g.path or g.kind].double().cpu() for g in groups}


def _magnitude(state: Mapping[str, Tensor], group: Group) -> Tensor:
    total = torch.zeros(group.units, dtype=torch.float64)
    for member in group.members:
        if (
            member.name == "weight"
        ):  # what is added (biases, positions, class tokens) does not count
            weight = state[member.path].double()
            total += member.per_unit(weight.square(), group.units).cpu()
    return total


def _readers(model: nn.Module, group: Group) -> Iterator[Member]:
    """Columns of linear layers that read the units."""
    modules = dict(model.named_modules())
    return (m for m in group.outgoing if isinstance(modules[m.module], nn.Linear))


def _activation(
    model: nn.Module, groups: list[Group], found: list[Any], where: str, objective: Objective | None
) -> dict[str, Tensor]:
    readers = {g.path or g.kind: list(_readers(model, g)) for g in groups}
    paths = {m.module for members in readers.values() for m in members}
    # no token of the data may go to an expert
    rare = {m.module for g in groups if g.kind == "experts" for m in g.members}
    seen = observed(model, found, paths, where=where, objective=objective, rare=rare)
    state, out = model.state_dict(), {}
    for group in groups:
        total = torch.zeros(group.units, dtype=torch.float64)
        for member in readers[group.path or group.kind]:
            if member.module not in seen:
                continue
            weight = state[member.path].double().square().sum(dim=0)
            total += member.gathered(weight * seen[member.module].norms.square(), group.units).cpu()
        out[group.path or group.kind] = total.sqrt()
    return out


def _sensitivity(
    model: nn.Module, method: str, groups: list[Group], found: list[Any], objective: Objective
) -> dict[str, Tensor]:
    """Scores by products of weights and gradients, of each batch alone or of all together."""
    probe = copy.deepcopy(model).requires_grad_(False)
    tensors = dict(probe.named_parameters(remove_duplicate=False))
    members = {m.path for g in groups for m in g.members if m.path in tensors}
    chosen = {path: tensors[path] for path in sorted(members) if tensors[path].is_floating_point()}
    for weight in chosen.values():
        weight.requires_grad_()
    generator = torch.Generator().manual_seed(0)
    totals: dict[str, Tensor] = {}
    out = {g.path or g.kind: torch.zeros(g.units, dtype=torch.float64) for g in groups}
    for batch in found:
        with evaluating(probe), torch.enable_grad():
            loss = objective(probe, batch, generator, Ledger())
            made = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
        products = {
            path: weight.detach().double() * grad.double()
            for (path, weight), grad in zip(chosen.items(), made, strict=True)
            if grad is not None
        }
        for path, product in products.items():
            totals[path] = product if path not in totals else totals[path] + product
        for group in groups if method != "taylor" else ():
            for side in _sides(probe, group, method):
                out[group.path or group.kind] += _summed(side, products, group.units).abs()
    for group in groups if method == "taylor" else ():
        out[group.path or group.kind] = _summed(group.members, totals, group.units).abs()
    return out


def _sides(model: nn.Module, group: Group, method: str) -> list[list[Member]]:
    """The slices whose products are summed before the absolute value is taken."""
    reading = list(_readers(model, group))
    if method == "gradient":
        return [reading]
    return [[m for m in group.members if m not in reading], reading]


def _summed(members: Any, products: Mapping[str, Tensor], units: int) -> Tensor:
    total = torch.zeros(units, dtype=torch.float64)
    for member in members:
        if member.path in products:
            total += member.per_unit(products[member.path], units).cpu()
    return total


def _influence(
    model: nn.Module, group: Group, found: list[Any], where: str, objective: Objective | None
) -> Tensor:
    """``1 - cos(x_in, x_out)`` of every block, mean over the tokens of all streams."""
    sums, counts = torch.zeros(group.units, dtype=torch.float64), torch.zeros(group.units)

    def watch(path: str, module: nn.Module) -> Any:
        head, _, number = path.rpartition(".")
        if head != "blocks" or not number.isdigit():
            return None

        def note(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            outs = out if isinstance(out, tuple) else (out,)
            for before, after in zip(args, outs, strict=False):
                turn = torch.cosine_similarity(before.double(), after.double(), dim=-1)
                sums[int(number)] += (1 - turn).sum().cpu()
                counts[int(number)] += turn.numel()

        return note

    observed(model, found, (), where=where, also=watch, objective=objective)
    return sums / counts.clamp_min(1)
