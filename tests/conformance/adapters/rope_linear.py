"""Linear attention that rotates its features, and random features of rotated vectors."""

from __future__ import annotations

from typing import Any

from harness import Golden
from rotary import check_core, check_stream, site
from torch import Tensor

from effformer.attention import Linear, Performer, Sana
from effformer.attention.linear import LinearState


class _WholeExponent(Performer):
    """The set's stabilizer is the largest ``w . x' - |x'|^2 / 2``, where that of the published
    package is the largest ``w . x'``; the epsilon of the features makes them differ.
    """

    def _exponents(self, x: Tensor) -> tuple[Tensor, Tensor]:
        exponents, _ = super()._exponents(x)
        return exponents, exponents.amax(dim=-1).detach()


def check(golden: Golden) -> None:
    for case, c in golden.config.items():
        core = _build(golden, case, c)
        check_core(golden, case, c, core)
        if c.get("causal", False):
            sums = golden.tensor(f"in.{case}.k").new_zeros(c["B"], c["H"], c["K"])
            state = LinearState(sums, sums.new_zeros(*sums.shape, c["V"]))
            check_stream(golden, case, c, core, state)


def _build(golden: Golden, case: str, c: dict[str, Any]) -> Any:
    causal = c.get("causal", False)
    golden.only("kind", "elu", "relu", "favor-before", why="no core has another", among=c)
    if c["kind"] == "favor-before":
        golden.only("causal", False, why="the set has no sums of features", among=c)
        golden.only("eps", 0.0, why="the normaliser has none beside that of the features", among=c)
        options = {"features": c["features"]}
        core = _WholeExponent(Performer.Config.from_dict(options), site(c))
        core.projection.copy_(golden.tensor(f"in.{case}.projection"))
        return core
    kind = {"elu": Linear, "relu": Sana}[c["kind"]]
    return kind(kind.Config(causal=causal, eps=c["eps"]), site(c))
