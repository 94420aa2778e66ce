"""A block whose tokens look at a memory and not at each other."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from effformer.blocks import Block, Needs
from effformer.blocks.admission import check_cross
from effformer.blocks.base import cross_branches, ffn_branches
from effformer.config import Config
from effformer.context import EMPTY, Context
from effformer.nn.norms import make_norm
from effformer.site import Site

__all__ = ["Reading"]


class Reading(Block):
    """``x + cross(norm(x), norm(memory))``, then ``x + ffn(norm(x))``, each modulated where the model is
    conditioned: tokens that do not see each other.

    Args:
        cross: config of the mixer over the memory.
        ffn: config of the position-wise network, None for none.
        site: the place in the model, with the width of the memory.
        needs: what the model asks of the mixer; a mask is that of the memory.

    Raises:
        CapabilityError: the mixer cannot do that, or lets tokens compete for the memory; mixers that can are
            named.
    """

    def __init__(self, cross: Config, ffn: Config | None, site: Site, needs: Needs) -> None:
        check_cross(cross, (needs, site), f"{site.path}.cross", one_by_one=True)
        super().__init__(cross_branches(cross, site) | ffn_branches(ffn, site), site)
        (width,) = site.memories
        self.memory_norm = make_norm(site, width)

    def forward(self, x: Tensor, ctx: Context = EMPTY) -> Tensor:
        memory = ctx.remembered
        assert memory is not None
        return super().forward(x, replace(ctx, memory=self.memory_norm(memory)))
