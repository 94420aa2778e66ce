"""`approximate`: parts, heads and channels that a measured loss does not miss go, and queries attend to
fewer keys.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from effformer import registry
from effformer.arguments import checked
from effformer.attention import Attention, Mixer
from effformer.blocks import BackboneConfig, Block, Branch
from effformer.calls import check_parts, evaluating, half_of
from effformer.checks import CapabilityError, FormatError, shown
from effformer.config import Config
from effformer.context import EMPTY, Context, Ledger
from effformer.nn.cut import Forms, twin
from effformer.notebook import Shown
from effformer.profile.profiler import count_parameters, profile
from effformer.registry import Caps
from effformer.train import Objective
from effformer.train.datasets import placed
from effformer.values import Count, NonNegative
from effformer.wrapped import unwrapping

from ..plan import Group, plan
from ..samples import Data
from ..stages import described, gathered, transferred
from ..transforms import record
from ..where import Where, check, covers
from .cut import cut
from .greedy import Found, Visit, greedy

__all__ = ["ApproximateReport", "ApproximateScheme", "approximate"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class ApproximateScheme(Config):
    """How `approximate` searches.

    Attributes:
        threshold: a part whose loss would rise by more is not looked into.
        slack: by how much the loss may exceed the least so far; 0: it never rises.
        group: hidden channels that go together.
        keys: numbers of keys that a query attends to, descending; none: attention stays as it is.
        most: largest number of passes over the data; None: as many as it takes.
        batch: samples of one call.
    """

    threshold: NonNegative = 0.1
    slack: NonNegative = 0.0
    group: Count = 64
    keys: tuple[Count, ...] = (64, 32, 16, 8)
    most: Count | None = None
    batch: Count = 64

    def check(self) -> None:
        if list(self.keys) != sorted(set(self.keys), reverse=True):
            raise ValueError(
                f"ApproximateScheme: keys must descend, such as (64, 32, 16), got {self.keys}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ApproximateReport(Shown):
    """What `approximate` did.

    Attributes:
        visits: every measurement, in order.
        removed: parts and units that went.
        keys: paths of attentions -> keys that their queries attend to.
        loss_before: of the model on the data.
        loss_after: of the result.
        macs_before: multiply-adds of one forward on the model's own example.
        macs_after: and after.
        params_before: parameters.
        params_after: and after.
    """

    visits: tuple[Visit, ...]
    removed: tuple[str, ...]
    keys: Mapping[str, int]
    loss_before: float
    loss_after: float
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"keys": dict(self.keys)}

    def __str__(self) -> str:
        wide = max(len(v.element) for v in self.visits) if self.visits else 0
        lines = [
            f"{v.element:<{wide}}  {v.loss:>9.4f}  {'out' if v.accepted else 'stays'}"
            for v in self.visits
        ]
        lines.append(
            f"loss: {self.loss_before:.4f} -> {self.loss_after:.4f} in {len(self.visits) + 1} passes"
        )
        macs = self.macs_after / self.macs_before
        lines.append(f"MACs: {self.macs_before:,} -> {self.macs_after:,} ({macs:.3f}x)")
        lines.append(f"parameters: {self.params_before:,} -> {self.params_after:,}")
        return "\n".join(lines)


@checked
@unwrapping
def approximate(
    model: M,
    scheme: ApproximateScheme | Mapping[str, Any] | None = None,
    where: Where = "*",
    *,
    data: Data,
    objective: Objective,
) -> tuple[M, ApproximateReport]:
    """A smaller copy of a fine-tuned model without what its loss on validation data does not miss.

    Whole attentions and FFNs are tried first, from the last block to the first, then heads and groups of
    hidden channels of those that stay, then attention to fewer keys; each once, by one pass over the data.
    What is out is cut out of the weights. Choose on other samples than those that judge the result.

    Args:
        model: a model whose config is a `effformer.blocks.BackboneConfig`; it stays as it is.
        scheme: how far the search goes.
        where: glob patterns of the parts that may go ("blocks.*.attn", "blocks.3").
        data: validation data: a data set, named tensors whose first axis counts samples, or batches.
        objective: the loss: (model, batch, generator, ledger) -> scalar, such as
            `effformer.train.Classification`. It is given the same randomness every time.

    Returns:
        The new model, in the mode of the old one, and the log of the search.

    Raises:
        ValueError: a pattern covers no part; data that are empty or not finite; a loss that is not finite
            for the model as it is.
        CapabilityError: the model's blocks are not described by its config, it was changed since it was
            built, or its blocks run in part already.

    Example:
        >>> import effformer
        >>> from effformer.compress import approximate
        >>> from effformer.train import Classification, load_data
        >>> options = {"image_size": 8, "patch": 4, "channels": 1, "num_classes": 10}
        >>> model, data = effformer.build_model("vit-nano", **options), load_data("digits").split(0.1)[1]
        >>> scheme = {"keys": [], "threshold": 0.0}
        >>> small, report = approximate(model, scheme, data=data, objective=Classification())
        >>> report.loss_after <= report.loss_before
        True

    Differs from the paper: no code was published. A part counts as removed with its biases, the norm behind
    a sum stays, and the order and the rules are our reading of it.

    Reference: AxFormer: Accuracy-driven Approximation of Transformers for Faster, Smaller and more Accurate
    NLP Models, 2020, arXiv 2010.03688.
    """
    check_parts(model, where="approximate")
    if not isinstance(scheme, ApproximateScheme):
        scheme = ApproximateScheme.from_dict(scheme or {}, where="approximate: scheme")
    search = _Search(model, scheme, where)
    samples = gathered(model, data, objective, "approximate")
    device = next(model.parameters()).device

    def measure(removed: Sequence[str], keys: Mapping[str, int]) -> float:
        search.place(removed, keys)
        return _loss(search.probe, samples, objective, scheme.batch, device)

    before = measure((), {})
    if not math.isfinite(before):
        raise ValueError(f"approximate: the loss of the model as it is is {before}")
    found = greedy(
        search.parts, search.units, search.hard, measure, threshold=scheme.threshold,
        slack=scheme.slack, most=scheme.most,
    )  # fmt: skip
    small = search.made(model, found)
    return small, ApproximateReport(
        visits=tuple(found.visits), removed=tuple(found.removed), keys=found.keys, loss_before=before,
        loss_after=_loss(small, samples, objective, scheme.batch, device),
        macs_before=profile(model, memory=False).total, macs_after=profile(small, memory=False).total,
        params_before=count_parameters(model), params_after=count_parameters(small),
    )  # fmt: skip


def _loss(
    model: nn.Module, data: Any, objective: Objective, batch: int, device: torch.device
) -> float:
    """Mean over the samples; NaN counts as infinite."""
    total, generator = 0.0, torch.Generator().manual_seed(0)
    half = half_of(model)
    with evaluating(model), torch.no_grad():
        for rows in torch.arange(len(data)).split(batch):
            some = placed(data.rows(rows), device, half)
            value = objective(model, some, generator, Ledger())
            if not isinstance(value, Tensor) or value.dim():
                raise TypeError(
                    f"approximate: the objective must return one real number, got {shown(value)}"
                )
            total += float(value) * len(rows)
    return total / len(data) if math.isfinite(total) else math.inf


class Skipped(nn.Module):
    """A part that adds nothing: its branch leaves the tokens as they are, up to a norm behind the sum."""

    caps: ClassVar[Caps] = Caps()

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        """Zeros."""
        return torch.zeros_like(x)

    def macs(self, n: int) -> int:
        """None."""
        return 0


class _Search:
    """The elements of a model, and the model without some of them.

    Attributes:
        probe: a copy, whose branches get other parts.
        parts: paths of branches in the order of the search.
        units: path -> names of the units of its part, ``<path>/<number>``.
        hard: path -> numbers of keys.
    """

    def __init__(self, model: nn.Module, scheme: ApproximateScheme, where: Where) -> None:
        self.config = described(model, "approximate")
        self.scheme = scheme
        self.probe = copy.deepcopy(model)
        branches = dict(_branches(self.probe))
        paths = [*branches, *(path for path, _ in model.named_modules())]
        check(where, paths, able=branches, what="attention or FFN", where="approximate: where")
        self.branches = {path: b for path, b in branches.items() if covers(where, path)}
        self.whole: dict[str, Any] = {path: b.part for path, b in self.branches.items()}
        groups = plan(self.probe, kinds=("heads", "channels")).groups
        self.groups: dict[str, Group] = {g.path.removesuffix(".part"): g for g in groups}
        self.parts = list(self.branches)
        self.units = {path: self._units(path) for path in self.parts if path in self.groups}
        self.hard = {path: scheme.keys for path in self.parts if self._soft(path)}

    def _units(self, path: str) -> list[str]:
        group = self.groups[path]
        size = self.scheme.group if group.kind == "channels" else 1
        return [f"{path}/{i}" for i in range(math.ceil(group.units / size))]

    def _soft(self, path: str) -> bool:
        """Whether a branch is an attention with a softmax that may see fewer keys."""
        part = self.whole[path]
        own = re.fullmatch(r"blocks\.\d+\.attn", path) is not None
        return own and isinstance(part, Attention) and part.config.core.entry.name == "softmax"

    def kept(self, removed: Sequence[str]) -> dict[str, Tensor]:
        """Path of a branch -> the units of its group that stay, where some went."""
        gone: dict[str, set[int]] = {}
        for name in removed:
            path, _, number = name.partition("/")
            if number:
                gone.setdefault(path, set()).add(int(number))
        return {path: self._left(path, lost) for path, lost in gone.items()}

    def _left(self, path: str, lost: set[int]) -> Tensor:
        group = self.groups[path]
        size = self.scheme.group if group.kind == "channels" else 1
        return torch.tensor([u for u in range(group.units) if u // size not in lost])

    def place(self, removed: Sequence[str], keys: Mapping[str, int]) -> None:
        """Give the branches of the probe the parts that are left."""
        kept = self.kept(removed)
        for path, branch in self.branches.items():
            part = self.whole[path]
            if path in removed:
                part = Skipped()
            if path in kept:
                part = part.select(self.groups[path].rows(kept[path]))
            if path in keys:
                part = twin(part)
                part.core = self._hard(path, keys[path]).at("core").build(part.core.site)
            branch.part = part

    def _hard(self, path: str, count: int) -> Config:
        """The attention of a branch, whose queries attend to so many keys."""
        found: Config = self.config.put(path, {"name": "topk", "keep": count}).at(path)
        return found

    def made(self, model: Any, found: Found) -> Any:
        """An ordinary model without what went."""
        config: BackboneConfig = self.config
        for path, count in found.keys.items():
            config = config.put(path, {"name": "topk", "keep": count})
        small, _ = transferred(model, config, 0)
        units = {
            f"{p}.part": u for p, u in self.kept(found.removed).items() if p not in found.removed
        }
        if units:
            small = cut(small, units)
        if gone := [path for path in self.parts if path in found.removed]:
            _skip(small, gone)
            record(small, "skip", {"branches": gone})
        return small.train(model.training)


def _branches(model: nn.Module) -> Iterator[tuple[str, Branch]]:
    """Branches whose part may go, those of the last block first.

    Raises:
        CapabilityError: there are none, or blocks run less of their branches already.
    """
    found: list[tuple[str, list[tuple[str, Branch]]]] = []
    for path, block in model.named_modules():
        if not isinstance(block, Block):
            continue
        if block.width is not None or block.tokens is not None:
            raise CapabilityError(
                f"approximate: {path} runs in part already (width=, tokens=); approximate the dense model"
            )
        own = [(f"{path}.{name}", getattr(block, name)) for name in block.order]
        found.append((path, [(p, b) for p, b in own if isinstance(b, Branch)]))
    if not any(branches for _, branches in found):
        raise CapabilityError(
            f"approximate: {type(model).__name__} has no blocks with branches of their own"
        )
    for _, branches in reversed(found):
        yield from sorted(branches, key=lambda pair: not isinstance(pair[1].part, Mixer))


def _skip(model: nn.Module, paths: Sequence[str]) -> None:
    for path in paths:
        branch: Any = model.get_submodule(path)
        branch.part, branch.forms = Skipped(), Forms()


@registry.transform.register("skip")
def _replay(model: M, facts: Mapping[str, Any]) -> M:
    """Parts that add nothing: the paths of their ``branches``."""
    paths = facts.get("branches")
    modules = dict(model.named_modules())
    if not isinstance(paths, list) or not all(isinstance(modules.get(p), Branch) for p in paths):
        raise FormatError("transform 'skip': expected the paths of branches of this model")
    _skip(model, paths)
    return model
