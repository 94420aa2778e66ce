"""Low-rank changes that follow the time, one for each block of a diffusion transformer.

Reference: DyDiT++: Dynamic Diffusion Transformers for Efficient Visual Generation, 2025, arXiv
2504.06803, TD-LoRA.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.checks import CapabilityError
from effformer.context import Context
from effformer.nn.gates import GateLinear, values_known

from .layers import Adapted

__all__ = ["Moment", "TimedLoRALinear", "timed"]


class Moment:
    """The time embedding of a block while it runs, for the layers inside of it."""

    def __init__(self) -> None:
        self.ctx: Context | None = None

    def watch(self, block: nn.Module) -> None:
        """Follow a block."""
        block.register_forward_pre_hook(self.enter, with_kwargs=True)
        block.register_forward_hook(self.leave, always_call=True)

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the block."""
        self.ctx = next((a for a in (*args, *kwargs.values()) if isinstance(a, Context)), None)

    def leave(self, *_: Any) -> None:
        """Behind it."""
        self.ctx = None


def unwatched(model: nn.Module) -> None:
    """Drop what `Moment.watch` hung on the blocks of a model."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [k for k, h in hooks.items() if isinstance(_owner(h), Moment)]:
                del hooks[key]
        for known in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_always_called):
            own = {*module._forward_pre_hooks, *module._forward_hooks}
            for key in [k for k in known if k not in own]:
                del known[key]


def _owner(hook: Any) -> Any:
    return getattr(hook, "__self__", None)


class TimedLoRALinear(nn.Linear, Adapted):
    """A linear layer whose change follows the time: ``y = W x + s sum_i w_i B_i A x`` with ``w =
    softmax(R e_t)``, e_t the embedding of the time alone.

    ``lora_B`` holds the matrices B_i side by side, (out, n r). In evaluation a call whose samples have one
    time merges ``sum_i w_i B_i A`` into W where that is less work.

    Attributes:
        lora_router: R.
        moment: tells the time.
    """

    lora_router: GateLinear
    moment: Moment

    def forward(self, input: Tensor) -> Tensor:
        shares = self._shares()
        single = self._single(shares)
        if single and self._merges(input):
            return F.linear(input, self.weight + self.at(shares[0]).to(self.weight), self.bias)
        return F.linear(input, self.weight, self.bias) + self._beside(input, shares, single)

    def shares_of(self, time: Tensor) -> Tensor:
        """How much each of the n matrices counts: (..., n) for embeddings (..., Dt)."""
        out: Tensor = self.lora_router(time).softmax(dim=-1)
        return out

    def at(self, shares: Tensor) -> Tensor:
        """The change of the weight for shares (n,), (out, in) in float32 at least."""
        a, b = (layer.get_parameter("weight") for layer in (self.lora_A, self.lora_B))
        mixed = torch.einsum(
            "onr,n->or", b.to(shares.dtype).unflatten(1, (len(shares), -1)), shares
        )
        return (self.lora_scale * self.strength) * (mixed @ a.to(shares.dtype))

    def change(self) -> Tensor:
        raise CapabilityError(
            "merge: the changes follow the time, so that there is one weight for each; say which: "
            "merge(model, time=0.5), as the model counts it"
        )

    def _shares(self) -> Tensor:
        """(B, n) of the samples of the block that runs."""
        ctx = self.moment.ctx
        if ctx is None or ctx.time is None:
            raise ValueError(
                "adapt: kind 'td' follows the time, which reaches a layer with its block alone; call the "
                "block, or merge(model, time=...)"
            )
        return self.shares_of(ctx.time)

    def _single(self, shares: Tensor) -> bool:
        """Whether all samples have one time."""
        return shares.shape[0] == 1 or (
            not self.training and values_known(shares) and bool((shares == shares[:1]).all())
        )

    def _merges(self, x: Tensor) -> bool:
        """Whether merging is allowed, and less work than running the change beside the weight."""
        if self.training or torch.is_grad_enabled() or not values_known(x):
            return False
        rows, wide = x.numel() // x.shape[-1], self.lora_B.get_parameter("weight").shape[1]
        experts = self.lora_router.out_features
        beside = rows * (self.in_features * wide // experts + self.out_features * wide)
        return (
            self.out_features * wide + self.out_features * self.in_features * wide // experts
            < beside
        )

    def _beside(self, x: Tensor, shares: Tensor, single: bool) -> Tensor:
        low = self.lora_A(self.lora_drop(x))
        assert self.moment.ctx is not None
        packing = self.moment.ctx.packing
        if single:
            each = shares[0]
        elif packing is not None and low.dim() == 3:
            each = packing.spread(shares)
        elif len(shares) == len(low):
            each = shares.unflatten(0, (-1, *[1] * (low.dim() - 2)))
        else:
            raise CapabilityError(
                f"adapt: kind 'td' cannot tell which of {len(shares)} samples of several times rows "
                f"{tuple(low.shape)} belong to; run samples of one time, or merge(model, time=...)"
            )
        mixed = (each.to(low.dtype).unsqueeze(-1) * low.unsqueeze(-2)).flatten(-2)
        return (self.lora_scale * self.strength) * self.lora_B(mixed)


def timed(layer: nn.Module, moment: Moment, time_dim: int, experts: int) -> nn.Module:
    """An adapted linear layer whose change follows the time: n matrices B, all 0, and a router.

    Args:
        layer: what `adapted` made of a dense linear layer; changed in place.
        moment: of its block.
        time_dim: width of the time embedding.
        experts: n.
    """
    new: Any = layer
    weight = new.lora_B.weight
    new.__class__ = TimedLoRALinear
    new.lora_B = nn.Linear(experts * weight.shape[1], weight.shape[0], bias=False).to(weight)
    nn.init.zeros_(new.lora_B.weight)
    new.lora_router = GateLinear(time_dim, experts).to(weight.device)
    new.moment = moment
    return layer
