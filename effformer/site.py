"""What is decided when a model is built: the place of a part, what the model needs of it, and the
parts of one block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .values import Chance, Checked, Count, Natural, NonNegative, Positive

if TYPE_CHECKING:
    from .config import Config

__all__ = ["Layer", "Needs", "NormRule", "Site"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NormRule(Checked):
    """The norms of a model.

    Attributes:
        kind: "layer" or "rms".
        eps: epsilon.
        affine: they have a learned scale (and bias).
        modulated_affine: those of modulated branches have one, too (LightningDiT).
        ffn_eps: epsilon of the norms before position-wise networks, None for that of all.
        qk_kind: kind of the norms of queries and keys (SD3.5 and FLUX: "rms" beside "layer"), None
            for that of all.
    """

    kind: Literal["layer", "rms"] = "layer"
    eps: Positive = 1e-6
    affine: bool = True
    modulated_affine: bool = False
    ffn_eps: Positive | None = None
    qk_kind: Literal["layer", "rms"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Site(Checked):
    """Where a part is placed: what the model, not the part, decides.

    Attributes:
        dim: width of the tokens.
        heads: number of attention heads.
        cond_dim: width of the conditioning vector, None if the model has none.
        time_dim: width of the time embedding ``ctx.time``, None if the model has none.
        memory_dim: width of ``ctx.memory``; None means that there is no memory. Of a block that attends
            to several memories a width for each; a part attends to one.
        out_dim: width of what a token mixer returns, None for ``dim`` (blocks need ``dim``).
        length: number of tokens where the model fixes it, else None.
        grid: layout of these tokens, see `effformer.context.Context`; an axis whose size the model
            leaves open is None, and so is the grid of tokens that have none.
        norm: the norms.
        dropout: probability after each part.
        drop_path: probability of dropping a whole branch (stochastic depth).
        layer_scale: initial value of a learned per-channel factor on each branch, None for no
            factor.
        layer: index of the block in its stack, for initial values that depend on depth.
        depth: number of blocks in the stack.
        path: dotted name of the part in the model, for messages, taps and the ledger.
    """

    dim: Count
    heads: Count = 1
    cond_dim: Count | None = None
    time_dim: Count | None = None
    memory_dim: Count | tuple[Count, ...] | None = None
    out_dim: Count | None = None
    length: Count | None = None
    grid: tuple[Count | None, ...] | None = None
    norm: NormRule = NormRule()
    dropout: Chance = 0.0
    drop_path: Chance = 0.0
    layer_scale: NonNegative | None = None
    layer: Natural = 0
    depth: Count = 1
    path: str = ""

    @property
    def axes(self) -> str:
        """Letters of the grid's axes, the last ones of "thw"; empty where tokens have no grid."""
        return "thw"[-len(self.grid) :] if self.grid else ""

    @property
    def memories(self) -> tuple[int, ...]:
        """Widths of the memories that there are."""
        width = self.memory_dim
        return width if isinstance(width, tuple) else () if width is None else (width,)

    @property
    def source_dim(self) -> int:
        """Width of what an attention makes keys and values of: the memory, or its own tokens.

        Raises:
            ValueError: there are several memories.
        """
        if len(self.memories) > 1:
            raise ValueError(
                f"{self.path or 'attention'}: memory_dim={self.memory_dim} names {len(self.memories)} "
                "memories, and an attention looks at one; a block has a branch for each"
            )
        return self.memories[0] if self.memories else self.dim

    @property
    def cells(self) -> tuple[int, ...] | None:
        """The grid where all of its sizes are fixed, else None."""
        sizes = tuple(size for size in self.grid or () if size is not None)
        return sizes if self.grid is not None and len(sizes) == len(self.grid) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """The parts of one block.

    Attributes:
        attn: token mixer.
        ffn: position-wise network, None for none.
        block: their arrangement.
        cross: mixer of a further branch that attends to a memory, None for none.
        width: which heads and channels run, None for all.
        tokens: on which tokens the branches work, None for all.
    """

    attn: Config
    ffn: Config | None
    block: Config
    cross: Config | None = None
    width: Config | None = None
    tokens: Config | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a model asks of the parts in its blocks, beside what their `Site` says: which vectors,
    memory and grid there are.

    Attributes:
        causal: tokens must not see later ones (False: the model attends both ways).
        mask: mask that the model passes, "none", "key" or "full".
        rope: width of the heads that the model's rotary tables are made for, None if it passes none.
        front: tokens without a place stand in front of the grid.
        joint: several streams meet in one mixer.
        shrinks: the model goes on with fewer tokens if a block returns fewer.
    """

    causal: bool = False
    mask: str = "none"
    rope: int | None = None
    front: bool = False
    joint: bool = False
    shrinks: bool = False
