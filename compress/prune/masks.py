"""Masks over weights: which numbers of a matrix are zero, while its shape stays."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from effformer.arguments import checked
from effformer.calls import check_parts
from effformer.config import Config
from effformer.values import Chance, Count
from effformer.wrapped import unwrapping

from ..samples import Data, listed
from ..where import Where, check, covers
from .statistics import observed

__all__ = [
    "Masks", "Movement", "SparseScheme", "block_mask", "block_scores", "cubic", "magnitude_mask",
    "n_of_m_mask", "sparsify", "wanda_scores", "within_rows",
]  # fmt: skip

M = TypeVar("M", bound=nn.Module)


def magnitude_mask(scores: Tensor, sparsity: float) -> Tensor:
    """True for all but the ``int(sparsity * n)`` lowest scores of a tensor."""
    gone = int(scores.numel() * sparsity)
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    mask[scores.flatten().argsort(stable=True)[:gone]] = False
    return mask.view(scores.shape)


def within_rows(scores: Tensor, sparsity: float) -> Tensor:
    """As `magnitude_mask`, in every row (output) alone: (out, in)."""
    gone = int(scores.shape[1] * sparsity)
    lowest = scores.argsort(dim=1, stable=True)[:, :gone]
    return torch.ones_like(scores, dtype=torch.bool).scatter(1, lowest, False)


def n_of_m_mask(scores: Tensor, n: int, m: int) -> Tensor:
    """True for the n highest of every m consecutive inputs: 2 of 4.

    Raises:
        ValueError: the inputs do not divide into runs of m.
    """
    if scores.shape[1] % m or not 0 < n <= m:
        raise ValueError(
            f"n:m: {scores.shape[1]} inputs do not divide into runs of {m} of which {n} stay"
        )
    runs = scores.unflatten(1, (-1, m))
    highest = runs.argsort(dim=2, descending=True, stable=True)[..., :n]
    return torch.zeros_like(runs, dtype=torch.bool).scatter(2, highest, True).flatten(1)


def block_scores(weight: Tensor, tile: tuple[int, int]) -> Tensor:
    """Norm of every tile of a matrix, (rows / tile rows, columns / tile columns).

    Raises:
        ValueError: the matrix does not divide into tiles.
    """
    rows, columns = tile
    if weight.shape[0] % rows or weight.shape[1] % columns:
        raise ValueError(f"block: {tuple(weight.shape)} does not divide into tiles of {tile}")
    tiles = weight.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    return tiles.square().sum(dim=(1, 3)).sqrt()


def block_mask(weight: Tensor, tile: tuple[int, int], sparsity: float) -> Tensor:
    """True inside the tiles of the largest norms."""
    mask = magnitude_mask(block_scores(weight, tile), sparsity)
    return mask.repeat_interleave(tile[0], dim=0).repeat_interleave(tile[1], dim=1)


def wanda_scores(weight: Tensor, norms: Tensor) -> Tensor:
    """``|w_ij| ||x_j||_2``, x the inputs of the layer over all tokens.

    Reference: A Simple and Effective Pruning Approach for Large Language Models, 2023, arXiv 2306.11695.
    """
    return weight.abs() * norms.to(weight.dtype)


class Movement:
    """Movement scores ``S -= lr * grad * w``: weights that training moves away from zero stay.

    Args:
        shape: of the weight.
        lr: step of the scores.

    Reference: Movement Pruning: Adaptive Sparsity by Fine-Tuning, 2020, arXiv 2005.07683.
    """

    def __init__(self, shape: torch.Size, lr: float) -> None:
        self.scores = torch.zeros(shape)
        self.lr = lr

    def update(self, weight: Tensor, grad: Tensor) -> None:
        """One more batch."""
        self.scores = self.scores.to(weight) - self.lr * grad * weight.detach()


def cubic(step: int, start: int, steps: int, first: float, last: float) -> float:
    """Sparsity at a step: ``last + (first - last) (1 - (step - start) / steps)^3``, its ends outside.

    Reference: To prune, or not to prune, 2017, arXiv 1710.01878.

    Example:
        >>> [cubic(s, 0, 4, 0.0, 0.5) for s in (0, 2, 4)]
        [0.0, 0.4375, 0.5]
    """
    done = min(max((step - start) / steps, 0.0), 1.0)
    return last + (first - last) * (1 - done) ** 3


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseScheme(Config):
    """Which weights of linear layers become zero.

    Attributes:
        kind: "magnitude" (the smallest), "wanda" (smallest times the norm of what they multiply, in
            every row), "n:m" (all but n of m consecutive inputs) or "block" (whole tiles).
        sparsity: share that becomes zero; "n:m" says it by itself.
        scope: "layer" compares in every layer, "global" in all of them ("magnitude" alone).
        n: of "n:m".
        m: of "n:m".
        tile: of "block".
    """

    kind: Literal["magnitude", "wanda", "n:m", "block"] = "magnitude"
    sparsity: Chance = 0.5
    scope: Literal["layer", "global"] = "layer"
    n: Count = 2
    m: Count = 4
    tile: tuple[Count, Count] = (4, 4)

    def check(self) -> None:
        if self.scope == "global" and self.kind != "magnitude":
            raise ValueError(
                f"sparsify: scope='global' compares magnitudes, not {self.kind!r}; scope='layer' would do"
            )


class Masks:
    """The masks of a model: what keeps zeros zero while it is trained.

    Attributes:
        masks: path of a linear layer -> bool mask of its weight.
    """

    @checked
    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = dict(masks)

    @property
    def sparsity(self) -> float:
        """Share of zeros in the layers that have a mask."""
        total = sum(mask.numel() for mask in self.masks.values())
        return 1 - sum(int(mask.sum()) for mask in self.masks.values()) / total

    @checked
    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Make the masked weights zero, in place; call it after every step of an optimizer.

        Raises:
            ValueError: the masks are those of another model.
        """
        weights = dict(model.named_parameters())
        for path, mask in self.masks.items():
            weight = weights.get(f"{path}.weight")
            if weight is None or weight.shape != mask.shape:
                found = "none" if weight is None else tuple(weight.shape)
                raise ValueError(
                    f"Masks.apply_: the mask of {path!r} is {tuple(mask.shape)}, the model has {found} "
                    "there; sparsify(model) makes masks for a model"
                )
            weight.mul_(mask.to(weight.device))

    def to_dict(self) -> dict[str, Any]:
        """Share of zeros of every layer."""
        return {path: 1 - float(mask.double().mean()) for path, mask in self.masks.items()}


@checked
@unwrapping
def sparsify(
    model: M,
    scheme: SparseScheme | Mapping[str, Any] | None = None,
    where: Where = "*",
    *,
    data: Data | None = None,
) -> tuple[M, Masks]:
    """A copy of a model with zeros in its linear layers, and the masks that keep them.

    Shapes stay, and so does the time of dense kernels: what gains are runtimes and files that know
    zeros. `prune` makes models smaller.

    Args:
        model: any module.
        scheme: a `SparseScheme`, or its options.
        where: glob patterns of module paths.
        data: batches, for "wanda".

    Raises:
        ValueError: a pattern matches no linear layer, sizes do not divide, or data is missing.

    Example:
        >>> import torch
        >>> small, masks = sparsify(torch.nn.Sequential(torch.nn.Linear(8, 4)), {"kind": "n:m"})
        >>> masks.sparsity
        0.5
    """
    check_parts(model, where="sparsify")
    chosen = (
        scheme
        if isinstance(scheme, SparseScheme)
        else SparseScheme.from_dict(scheme or {}, where="sparsify: scheme")
    )
    changed = copy.deepcopy(model)
    modules = {path: m for path, m in changed.named_modules() if path}
    layers = {path: m for path, m in modules.items() if type(m) is nn.Linear}
    if not layers:
        raise ValueError(f"sparsify: {type(model).__name__} has no linear layer below it")
    check(where, modules, able=layers, what="linear layer", where="sparsify: where")
    weights = {p: m.weight.detach() for p, m in layers.items() if covers(where, p)}
    masks = Masks(_masks(changed, weights, chosen, data))
    masks.apply_(changed)
    return changed, masks


def _masks(
    model: nn.Module, weights: Mapping[str, Tensor], scheme: SparseScheme, data: Data | None
) -> dict[str, Tensor]:
    if scheme.kind == "wanda":
        if data is None:
            raise ValueError("sparsify: 'wanda' is measured on data=; 'magnitude' needs none")
        seen = observed(model, listed(model, data, where="sparsify"), weights, where="sparsify")
        return {
            path: within_rows(wanda_scores(w, seen[path].norms), scheme.sparsity)
            for path, w in weights.items()
        }
    if scheme.scope == "global":
        every = torch.cat([w.abs().flatten() for w in weights.values()])
        flat = magnitude_mask(every, scheme.sparsity).split([w.numel() for w in weights.values()])
        return {p: one.view(w.shape) for (p, w), one in zip(weights.items(), flat, strict=True)}
    make = {
        "magnitude": lambda w: magnitude_mask(w.abs(), scheme.sparsity),
        "n:m": lambda w: n_of_m_mask(w.abs(), scheme.n, scheme.m),
        "block": lambda w: block_mask(w, scheme.tile, scheme.sparsity),
    }
    out = {}
    for path, weight in weights.items():
        try:
            out[path] = make[scheme.kind](weight)
        except ValueError as error:
            raise ValueError(f"sparsify: {path}: {error}; leave it out with where=") from error
    return out
