"""`adapt`: a frozen model with small trainable changes, which merge into its weights or travel alone."""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from effformer import registry
from effformer.arguments import checked
from effformer.blocks import Block
from effformer.calls import check_parts
from effformer.checks import CapabilityError, FormatError
from effformer.config import Config
from effformer.flow import trained_of
from effformer.notebook import Shown
from effformer.values import Chance, Count, Positive, Real, checker
from effformer.wrapped import unwrapping

from ..quant import QuantLinear
from ..quant.swap import irreplaceable, swap, tampered
from ..transforms import forget, record
from ..where import Where, check, covers
from .layers import KINDS, Adapted, adapted, plain
from .timed import Moment, TimedLoRALinear, timed, unwatched

__all__ = ["AdaptReport", "LoRA", "adapt", "adapter_scale", "merge", "unadapt"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA(Config):
    """Low-rank changes ``W + s B A``.

    Attributes:
        rank: r, of A (r, in) and B (out, r).
        alpha: s = alpha / r; None: alpha = r.
        kind: "lora"; "rs", s = alpha / sqrt(r); "dora", with trained lengths of the rows; "td" (TD-LoRA),
            B a mixture of ``experts`` that follows the time of a diffusion transformer.
        experts: matrices B of kind "td".
        dropout: of the inputs of A, in training.
        ranks: path or name of a layer (a glob) -> its own rank; alpha stays.
        alphas: path or name of a layer (a glob) -> its own alpha.
        also: glob patterns of modules that are trained as a whole beside the changes.

    Differs from the paper: that does not say what experts of TD-LoRA share; here A is shared, and all B
    start at zero.

    Reference: LoRA, 2021, arXiv 2106.09685; rsLoRA, 2023, arXiv 2312.03732; DoRA, 2024, arXiv 2402.09353;
    DyDiT++, 2025, arXiv 2504.06803.
    """

    rank: Count = 8
    alpha: Positive | None = None
    kind: Literal["lora", "rs", "dora", "td"] = "lora"
    experts: Count = 4
    dropout: Chance = 0.0
    ranks: Mapping[str, Any] | None = None
    alphas: Mapping[str, Any] | None = None
    also: tuple[str, ...] = ()

    def check(self) -> None:
        for name, kind in (("ranks", Count), ("alphas", Positive)):
            for key, value in (getattr(self, name) or {}).items():
                checker(kind)(value, f"LoRA.{name}[{key!r}]")

    def of(self, path: str) -> tuple[int, float]:
        """Rank and scale of a layer."""
        rank: int = _named(self.ranks, path, self.rank)
        alpha = _named(self.alphas, path, rank if self.alpha is None else self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.kind == "rs" else rank)


def _named(given: Mapping[str, Any] | None, path: str, default: Any) -> Any:
    found = [v for k, v in (given or {}).items() if fnmatch.fnmatchcase(path, k) or _ends(path, k)]
    return found[-1] if found else default


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptReport(Shown):
    """What `adapt` did.

    Attributes:
        layers: path -> rank.
        trainable: parameters that are trained now.
        total: all parameters.
    """

    layers: Mapping[str, int]
    trainable: int
    total: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"layers": dict(self.layers)}

    def __str__(self) -> str:
        share = self.trainable / self.total
        return (
            f"{len(self.layers)} layers adapted; {self.trainable:,} of {self.total:,} parameters are "
            f"trained ({share:.2%})"
        )


@checked
@unwrapping
def adapt(
    model: M,
    scheme: LoRA | Mapping[str, Any] | None = None,
    where: Where = ("*attn*", "*ffn*"),
) -> tuple[M, AdaptReport]:
    """A copy of a model whose linear layers have a trainable change beside their frozen weight.

    At the start the outputs are those of the model, to the bit. Everything but the changes is frozen.
    Packed layers (`quantize`) can be adapted as well.

    Args:
        model: any module.
        scheme: a `LoRA`, or its options.
        where: glob patterns of module paths: linear layers, packed ones and convolutions in them.

    Raises:
        ValueError: a pattern matches no such layer.
        CapabilityError: a layer is adapted already, or cannot be.

    Example:
        >>> import effformer
        >>> from effformer.compress import adapt
        >>> small, report = adapt(effformer.build_model("vit-nano"), {"rank": 4}, "blocks.*.attn")
        >>> sorted(report.layers.values())
        [4, 4, 4, 4]
    """
    check_parts(model, where="adapt")
    chosen = (
        scheme if isinstance(scheme, LoRA) else LoRA.from_dict(scheme or {}, where="adapt: scheme")
    )
    changed = copy.deepcopy(model)
    modules = {path: m for path, m in changed.named_modules() if path}
    if any(isinstance(m, Adapted) for m in modules.values()):
        raise CapabilityError(
            "adapt: the model is adapted already; merge it, or unadapt it, and adapt the result"
        )
    able = [path for path, m in modules.items() if type(m) in KINDS and _free(m)]
    if not able:
        raise ValueError(f"adapt: {type(model).__name__} has no linear layer below it")
    check(where, modules, able=able, what="linear layer", where="adapt: where")
    for pattern in chosen.also:
        check(pattern, modules, able=modules, what="module", where="adapt: also")
    layers = {path: chosen.of(path) for path in able if covers(where, path)}
    _adapt(changed, layers, chosen)
    facts: dict[str, Any] = {"layers": list(layers), "ranks": [r for r, _ in layers.values()]}
    facts |= {"scales": [s for _, s in layers.values()], "dora": chosen.kind == "dora"}
    facts |= {"dropout": chosen.dropout, "also": list(chosen.also)}
    record(changed, "lora", facts | ({"experts": chosen.experts} if chosen.kind == "td" else {}))
    return changed, AdaptReport(
        layers={path: rank for path, (rank, _) in layers.items()},
        trainable=sum(p.numel() for p in changed.parameters() if p.requires_grad),
        total=sum(p.numel() for p in changed.parameters()),
    )


def _free(layer: nn.Module) -> bool:
    """Whether another layer could do what this one does."""
    why = tampered(layer) if isinstance(layer, QuantLinear) else irreplaceable(layer)
    return why is None


def _adapt(model: nn.Module, layers: Mapping[str, tuple[int, float]], scheme: LoRA) -> None:
    for name, parameter in model.named_parameters():
        kept = parameter.requires_grad and covers(scheme.also, name)
        parameter.requires_grad_(kept)
    moments: dict[str, Moment] = {}
    for path, (rank, scale) in layers.items():
        layer = model.get_submodule(path)
        dora = scheme.kind == "dora"
        made = adapted(layer, rank, scale, dora=dora, dropout=scheme.dropout, where=path)
        if scheme.kind == "td":
            block, time_dim = _block_of(model, path, layer)
            if block not in moments:
                moments[block] = Moment()
                moments[block].watch(model.get_submodule(block))
            made = timed(made, moments[block], time_dim, scheme.experts)
        swap(model, {layer: made})


def _block_of(model: nn.Module, path: str, layer: nn.Module) -> tuple[str, int]:
    """Path of the block around a layer, and the width of its time embedding.

    Raises:
        CapabilityError: there is no such block, or no dense linear layer.
    """
    parents = [path[:i] for i, letter in enumerate(path) if letter == "."]
    for parent in parents:
        module = model.get_submodule(parent)
        wide = module.site.time_dim if isinstance(module, Block) else None
        if wide is not None and type(layer) is nn.Linear:
            return parent, wide
    raise CapabilityError(
        f"adapt: {path}: kind 'td' changes dense linear layers in blocks that are told the time (the DiT "
        "family); kind 'lora' would do"
    )


def adapted_layers(model: nn.Module, verb: str) -> dict[str, Adapted]:
    """The adapted layers of a model by path.

    Raises:
        ValueError: there are none.
    """
    found = {path: m for path, m in model.named_modules() if isinstance(m, Adapted)}
    if not found:
        raise ValueError(f"{verb}: no layer of this model is adapted; adapt(model) adapts it")
    return found


@checked
@unwrapping
def merge(model: M, time: Real | None = None) -> M:
    """A copy with the changes inside the weights: an ordinary model again, trainable as a whole.

    Args:
        model: an adapted model.
        time: of changes that follow the time, the one for which the copy is meant, as the model counts it.

    Raises:
        ValueError: nothing in the model is adapted; a time, and no change follows it, or it is none that the
            model is told.
        CapabilityError: a changed weight is packed; dequantize first. Changes follow the time, and none is
            given.
    """
    layers = adapted_layers(model, "merge")
    follow = {path: m for path, m in layers.items() if isinstance(m, TimedLoRALinear)}
    changes: dict[str, Tensor | None] = dict.fromkeys(layers)
    if time is not None:
        if not follow:
            raise ValueError(f"merge: time={time:g}, but no change of this model follows the time")
        _check_time(model, time)
        weight = next(model.parameters())
        embed: Any = getattr(model, "time_embed", None)
        if embed is None:
            raise CapabilityError(
                f"merge: {type(model).__name__} has no time_embed, which would say what a time means to it"
            )
        moment = embed(torch.tensor([time], device=weight.device), weight.dtype)
        changes |= {path: m.at(m.shares_of(moment)[0]) for path, m in follow.items()}
    return _without(
        model, "merge",
        {path: layers[path].change() if one is None else one for path, one in changes.items()},
    )  # fmt: skip


def _check_time(model: nn.Module, time: float) -> None:
    """Refuse a time that a model is never told, if it says how it counts."""
    if (record := trained_of(model)) is None:
        return
    ends = record.convention.label(torch.tensor([0.0, 1.0], dtype=torch.float64))
    low, high = float(ends.min()), float(ends.max())
    if not low <= time <= high:
        name = getattr(model, "name", type(model).__name__)
        raise ValueError(
            f"merge: {name} counts the time from {low:g} to {high:g}, got time={time:g}"
        )


@checked
@unwrapping
def unadapt(model: M) -> M:
    """A copy without the changes: the model that was adapted, trainable as a whole.

    Raises:
        ValueError: nothing in the model is adapted.
    """
    return _without(model, "unadapt", {})


def _without(model: M, verb: str, changes: Mapping[str, Tensor]) -> M:
    """A copy whose layers have these changes in their weights, and no others."""
    changed = copy.deepcopy(model)
    layers = adapted_layers(changed, verb)
    swap(changed, {layer: plain(layer, changes.get(path)) for path, layer in layers.items()})
    unwatched(changed)
    forget(changed, "lora")
    return changed.requires_grad_()


@checked
@unwrapping
def adapter_scale(model: nn.Module, strength: float) -> None:
    """Set how much of the changes counts, in place: 1 as trained, 0 none.

    Raises:
        ValueError: nothing in the model is adapted, or magnitudes of rows, which know no half.
    """
    for path, layer in adapted_layers(model, "adapter_scale").items():
        if "lora_magnitude_vector" in layer._parameters and strength != 1:
            raise ValueError(
                f"adapter_scale: {path} has trained lengths of rows (dora), all or nothing"
            )
        layer.strength = float(strength)


@registry.transform.register("lora")
def _replay(model: M, facts: Mapping[str, Any]) -> M:
    """Layers with a change: paths of the ``layers``, and the ``ranks`` and ``scales`` of each."""
    layers, ranks, scales = (facts.get(name) for name in ("layers", "ranks", "scales"))
    if not (isinstance(layers, list) and isinstance(ranks, list) and isinstance(scales, list)):
        raise FormatError("transform 'lora': expected lists of layers, ranks and scales")
    modules = dict(model.named_modules())
    for path in layers:
        if type(modules.get(path)) not in KINDS:
            raise FormatError(f"transform 'lora': {path!r} is no linear layer of this model")
    try:
        experts = facts.get("experts")
        kind = "td" if experts else "dora" if facts.get("dora") else "lora"
        more = {"dropout": facts.get("dropout", 0.0), "also": facts.get("also", ())}
        scheme = LoRA.from_dict({"kind": kind, **more} | ({"experts": experts} if experts else {}))
        sizes = dict(zip(layers, zip(ranks, scales, strict=True), strict=True))
        _adapt(model, sizes, scheme)
    except (TypeError, ValueError) as error:
        raise FormatError(f"transform 'lora': {error}") from error
    return model
