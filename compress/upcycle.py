"""`upcycle`: FFNs of a trained model become mixtures of experts that compute the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from effformer.arguments import checked
from effformer.calls import check_parts
from effformer.checks import CapabilityError
from effformer.config import Config
from effformer.ffn import MLP, MoE
from effformer.notebook import Shown
from effformer.values import Count, Natural, NonNegative, Seed
from effformer.wrapped import unwrapping

from .stages import described, transferred
from .where import Where, check, covers

__all__ = ["ExpertScheme", "UpcycleReport", "upcycle"]

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertScheme(Config):
    """The mixtures that `upcycle` makes, see `effformer.ffn.MoE`.

    Attributes:
        experts: number of experts.
        top_k: experts that a token runs.
        shared: experts that every token runs.
        balance: weight of the auxiliary loss that spreads tokens over the experts.
        seed: of the routers.
    """

    experts: Count = 8
    top_k: Count = 2
    shared: Natural = 1
    balance: NonNegative = 0.01
    seed: Seed = 0

    def mixture(self, old: MLP.Config) -> Config:
        """The mixture in the place of a network."""
        return MoE.Config(
            ratio=old.ratio, hidden=old.hidden, bias=old.bias, act=old.act, experts=self.experts,
            top_k=self.top_k, shared=self.shared, balance=self.balance, renormalise=True,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class UpcycleReport(Shown):
    """What `upcycle` did.

    Attributes:
        places: paths of the mixtures.
        params_before: parameters.
        params_after: and after.
    """

    places: tuple[str, ...]
    params_before: int
    params_after: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{len(self.places)} FFNs are mixtures of experts now\n"
            f"parameters: {self.params_before:,} -> {self.params_after:,}"
        )


@checked
@unwrapping
def upcycle(
    model: M, scheme: ExpertScheme | Mapping[str, Any] | None = None, where: Where = "*"
) -> tuple[M, UpcycleReport]:
    """A copy of a model whose FFNs are mixtures of experts, and which computes the same: train it on.

    Every expert, and each shared one, starts as a copy of the FFN. The probabilities of the chosen experts
    are divided by their sum, and where there are shared experts, both halves count half: ``f(x) / 2 +
    sum_e p_e f(x) / 2 = f(x)``.

    Args:
        model: a model whose config is a `effformer.blocks.BackboneConfig`; it stays as it is.
        scheme: the mixtures; None: eight experts, of which a token runs two, and a shared one.
        where: glob patterns of module paths to replace ("blocks.3", "blocks.*.ffn").

    Returns:
        The new model, in the mode of the old one, and what was done.

    Raises:
        ValueError: a pattern covers no FFN.
        CapabilityError: an FFN that is no "mlp"; a model that its config does not describe, or that was
            changed since it was built.

    Example:
        >>> import effformer
        >>> from effformer.compress import upcycle
        >>> wide, report = upcycle(effformer.build_model("vit-nano"), {"experts": 4}, "blocks.1")
        >>> report.places
        ('blocks.1.ffn.part',)

    Differs from the paper: that does not say how the copies are scaled, nor whether probabilities are
    divided by their sum.

    Reference: Sparse Upcycling: Training Mixture-of-Experts from Dense Checkpoints, 2022, arXiv 2212.05055;
    TripoSG, 2025, arXiv 2502.06608.
    """
    check_parts(model, where="upcycle")
    if not isinstance(scheme, ExpertScheme):
        scheme = ExpertScheme.from_dict(scheme or {}, where="upcycle: scheme")
    config: Any = described(model, "upcycle")
    able = [f"blocks.{i}.ffn" for i in range(config.depth) if config.at(f"blocks.{i}.ffn")]
    paths = [*able, *(path for path, _ in model.named_modules())]
    check(where, paths, able=able, what="FFN", where="upcycle: where")
    for path in able:
        if not covers(where, path):
            continue
        if (old := config.at(path)).entry.name != "mlp":
            raise CapabilityError(
                f"upcycle: {path} is {old.title!r}; copies of an 'mlp' become experts: leave others out "
                "with where="
            )
        config = config.put(path, scheme.mixture(old))
    student, _ = transferred(model, config, scheme.seed)
    dense, places = dict(model.named_modules()), []
    for path, module in student.named_modules():
        if isinstance(module, MoE) and isinstance(old := dense[path], MLP):
            places.append(path)
            _fill(module, old)
    sizes = [sum(p.numel() for p in one.parameters()) for one in (model, student)]
    return student, UpcycleReport(
        places=tuple(places), params_before=sizes[0], params_after=sizes[1]
    )


@torch.no_grad()
def _fill(mixture: MoE, old: MLP) -> None:
    """Copies of a network for all experts, which together give its output."""
    state = old.state_dict()
    part = 1.0 if mixture.shared is None else 0.5
    outer = {k: x * part if k.startswith("fc2.") else x for k, x in state.items()}
    for expert in mixture.experts:
        expert.load_state_dict(outer)
    if mixture.shared is None:
        return
    times = mixture.shared.hidden // old.hidden
    wide = {k: torch.cat([x] * times) if k.startswith("fc1.") else x for k, x in outer.items()}
    wide["fc2.weight"] = torch.cat([outer["fc2.weight"] / times] * times, dim=1)
    mixture.shared.load_state_dict(wide)
