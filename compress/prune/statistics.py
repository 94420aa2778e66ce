"""What linear layers read while batches run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from effformer.calls import evaluating
from effformer.context import Ledger

from ..samples import calls

if TYPE_CHECKING:
    from effformer.train import Objective

__all__ = ["Statistics", "observed"]


class Statistics:
    """Sums over the rows that a linear layer reads: their number, their sum, their products.

    Args:
        gram: keep all products of two channels, not the squares alone.
    """

    def __init__(self, gram: bool) -> None:
        self.gram = gram
        self.count = 0
        self.total: Tensor | None = None
        self.products: Tensor | None = None

    def add(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A forward hook: the rows of one more call."""
        x = args[0].detach().flatten(0, -2).double()
        products = x.T @ x if self.gram else x.square().sum(dim=0)
        self.total = x.sum(dim=0) if self.total is None else self.total + x.sum(dim=0)
        self.products = products if self.products is None else self.products + products
        self.count += len(x)

    @property
    def mean(self) -> Tensor:
        """Mean row."""
        assert self.total is not None
        return self.total / self.count

    @property
    def norms(self) -> Tensor:
        """Norm of each channel over all rows."""
        assert self.products is not None
        squares = self.products.diagonal() if self.gram else self.products
        return squares.sqrt()


def observed(
    model: nn.Module, found: list[Any], paths: Iterable[str], *, gram: bool = False, where: str,
    also: Callable[[str, nn.Module], Callable[..., None] | None] | None = None,
    objective: Objective | None = None, rare: Collection[str] = (),
) -> dict[str, Statistics]:  # fmt: skip
    """Run the batches and sum up what linear layers read.

    Args:
        model: the model; it runs in evaluation mode.
        found: the batches.
        paths: of the layers.
        gram: as `Statistics`.
        where: the public entry point, for messages.
        also: further forward hooks, by path and module.
        objective: what calls the model; None: batches are its arguments.
        rare: paths that the data need not reach; those that it does not are left out.
    """
    modules = dict(model.named_modules())
    sums = {path: Statistics(gram) for path in paths}
    with ExitStack() as hooks, torch.no_grad(), evaluating(model):
        for path, one in sums.items():
            hooks.callback(modules[path].register_forward_pre_hook(one.add).remove)
        for path, module in modules.items() if also else ():
            if (hook := also(path, module)) is not None:  # type: ignore[misc]
                hooks.callback(module.register_forward_hook(hook).remove)
        generator = torch.Generator().manual_seed(0)
        for batch in found if objective else ():
            objective(model, batch, generator, Ledger())  # type: ignore[misc]
        for call in calls(model, found, where=where) if not objective else ():
            call(model)
    unseen = [path for path, one in sums.items() if not one.count and path not in rare]
    if unseen:
        raise ValueError(f"{where}: the data never reaches {unseen[0]}; leave it out of where=")
    return {path: one for path, one in sums.items() if one.count}
