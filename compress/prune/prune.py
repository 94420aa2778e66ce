"""`prune`: an ordinary smaller model, chosen by importance, under a budget."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from effformer.arguments import checked
from effformer.calls import Call, bind, check_parts, evaluating, outputs
from effformer.checks import CapabilityError
from effformer.profile.profiler import count_parameters, profile
from effformer.wrapped import unwrapping

from ..plan import Group, Plan, plan
from ..report import file_bytes, relative_error
from ..samples import Data, calls, listed
from ..where import Where
from .allocate import PruneScheme, allocate, budgeted
from .cut import cut_groups
from .importance import scores
from .recover import compensated
from .report import PrunedPart, PruneReport

if TYPE_CHECKING:
    from effformer.train import Objective

__all__ = ["prune"]

M = TypeVar("M", bound=nn.Module)


@checked
@unwrapping
def prune(
    model: M,
    scheme: PruneScheme | Mapping[str, Any] | None = None,
    where: Where = "*",
    *,
    data: Data | None = None,
    objective: Objective | None = None,
) -> tuple[M, PruneReport]:
    """A smaller copy of a model without the units that matter least, and a report.

    The copy is an ordinary model: its config says the new sizes where it can, it saves, loads,
    profiles, exports and trains. What it lost, training or distilling gives back.

    Args:
        model: a model of ours, which stays as it is.
        scheme: a `PruneScheme`, or its options as a dict; None: half of the multiply-adds go.
        where: glob patterns of module paths to cut; "width" and "blocks" name those.
        data: batches of named tensors, for importance and for what the layers behind lost units are
            given.
        objective: the loss, for importance by gradients: (model, batch, generator, ledger) -> scalar. It
            then calls the model on every batch, which a generator needs for its times.

    Returns:
        The new model, in the mode of the old one, and what was done.

    Raises:
        ValueError: a pattern matches nothing that could be cut; a target that cannot be met (the least
            that can is named); data that is empty or not finite.
        CapabilityError: nothing of the model can be cut; the reasons are given.

    Example:
        >>> import effformer
        >>> from effformer.compress import prune
        >>> small, report = prune(effformer.build_model("vit-nano"), {"macs": 0.6})
        >>> report.macs_ratio <= 0.6
        True

    Reference: DepGraph: Towards Any Structural Pruning, 2023, arXiv 2301.12900 (groups); Compact Language
    Models via Pruning and Knowledge Distillation, 2024, arXiv 2407.14679 (activations).
    """
    check_parts(model, where="prune")
    chosen = _scheme(scheme)
    planned = plan(model, where, chosen.kinds)
    _check_plan(model, planned, chosen)
    found = None if data is None else listed(model, data, where="prune: data")
    groups = list(planned.groups)
    by = scores(model, chosen.importance, groups, data=found, objective=objective)
    call = _call(model, found, objective)
    before = _macs(model, call)
    named = {g.path or g.kind: g for g in groups}
    kept = _kept(model, named, by, chosen, call)
    recover = chosen.recover if found is not None else "none"
    whole = model if found is None else _recovered(model, named, kept, found, chosen, objective)
    small = cut_groups(whole, named, kept).train(model.training)
    error = None if found is None or call is None else _error(model, small, call)
    report = PruneReport(
        parts=tuple(_part(named[p], u, by[p]) for p, u in kept.items() if len(u) < named[p].units),
        kept=planned.kept,
        macs_before=before, macs_after=_macs(small, call),
        params_before=count_parameters(model), params_after=count_parameters(small),
        bytes_before=file_bytes(_tensors(model)), bytes_after=file_bytes(_tensors(small)),
        said_by=_said_by(model, small), recovered=recover, output_error=error,
    )  # fmt: skip
    return small, report


def _scheme(given: PruneScheme | Mapping[str, Any] | None) -> PruneScheme:
    if given is None:
        return PruneScheme(macs=0.5)
    if isinstance(given, PruneScheme):
        return given
    return PruneScheme.from_dict(given, where="prune: scheme")


def _check_plan(model: nn.Module, planned: Plan, scheme: PruneScheme) -> None:
    name = getattr(model, "name", type(model).__name__)
    missing = set(scheme.kinds) - {g.kind for g in planned.groups}
    asked = missing & {"blocks", "width"} if isinstance(scheme.keep, Mapping) else set[str]()
    if planned.groups and not asked:
        return
    why = "; ".join(f"{path}: {reason}" for path, reason in list(planned.kept.items())[:3])
    what = ", ".join(sorted(asked)) or ", ".join(scheme.kinds)
    raise CapabilityError(
        f"prune: {name} has no {what} that could go" + (f" ({why})" if why else "")
    )


def _call(model: nn.Module, found: list[Any] | None, objective: Objective | None) -> Call | None:
    """What is counted and compared: the first batch of the data if it is all that the model needs, else
    the model's own example.
    """
    if found and objective is None:
        return next(calls(model, found[:1], where="prune"))
    return bind(model, None, where="prune") if hasattr(model, "example_inputs") else None


def _macs(model: nn.Module, call: Call | None) -> int:
    if call is None:
        return 0
    return profile(model, {**call.arguments}, memory=False).total


def _kept(
    model: nn.Module,
    named: Mapping[str, Group],
    by: Mapping[str, Tensor],
    scheme: PruneScheme,
    call: Call | None,
) -> dict[str, Tensor]:
    groups = list(named.values())
    if scheme.keep is not None:
        return allocate(by, groups, scheme)

    def smaller(kept: Mapping[str, Tensor]) -> nn.Module:
        return cut_groups(model, named, kept, settle=False)

    if scheme.params is not None:
        whole = count_parameters(model)
        return budgeted(
            by, groups, scheme, lambda kept: count_parameters(smaller(kept)) / whole,
            scheme.params, "params",
        )  # fmt: skip
    assert scheme.macs is not None
    if call is None:
        raise ValueError("prune: macs= counts one forward, for which this model needs data=")
    work = _macs(model, call)
    return budgeted(
        by, groups, scheme, lambda kept: _macs(smaller(kept), call) / work, scheme.macs, "macs"
    )


def _recovered(
    model: nn.Module,
    named: Mapping[str, Group],
    kept: Mapping[str, Tensor],
    found: list[Any],
    scheme: PruneScheme,
    objective: Objective | None,
) -> Any:
    """The whole model with what the layers behind lost units are given."""
    if scheme.recover == "none":
        return model
    changed = copy.deepcopy(model)
    new = compensated(model, named, kept, found, scheme.recover, objective)
    with torch.no_grad():
        for path, (weight, bias) in new.items():
            layer: Any = changed.get_submodule(path)
            layer.weight.copy_(weight)
            if bias is not None:
                layer.bias.copy_(bias)
    return changed


def _error(model: nn.Module, small: nn.Module, call: Call) -> float | None:
    """Relative error of the outputs; None if they are as wide as the stream, which is narrower now."""
    before, after = _run(model, call), _run(small, call)
    if [x.shape for x in before] != [x.shape for x in after]:
        return None
    return relative_error(after, before)


def _run(model: nn.Module, call: Call) -> list[Tensor]:
    with torch.no_grad(), evaluating(model):
        return [x.clone() for x in outputs(call(model)) if x.is_floating_point()]


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}


def _part(group: Group, kept: Tensor, score: Tensor) -> PrunedPart:
    total = float(score.sum())
    return PrunedPart(
        name=group.path or group.kind, kind=group.kind, before=group.units, after=len(kept),
        kept=tuple(kept.tolist()), lost=1 - float(score[kept].sum()) / total if total else 0.0,
    )  # fmt: skip


def _said_by(model: nn.Module, small: nn.Module) -> str:
    before, after = (len(getattr(m, "transforms", ())) for m in (model, small))
    return "config" if before == after else "record"
