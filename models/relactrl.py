"""RelaCtrl: a light control branch beside a frozen diffusion transformer.

Reference: RelaCtrl: Relevance-Guided Efficient Control for Diffusion Transformers, 2025, arXiv
2502.14377.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from effformer import registry
from effformer.attention.tdsm import TDSM
from effformer.blocks import Branch
from effformer.checks import CapabilityError, check_shape
from effformer.config import Config as BaseConfig
from effformer.context import EMPTY, Context, Ledger, Tap, explained
from effformer.nn.norms import Modulation
from effformer.site import Site
from effformer.values import Count, Natural

from .base import Model, Preset, register_presets
from .diffusion_parts import LatentTransformer

__all__ = ["PRESETS", "ControlBlock", "ControlBranch", "RelaCtrl", "relevance_scores"]

POSITIONS = (0, 2, 3, 4, 5, 6, 7, 8, 9, 18, 19)
GROUPS = (6, 2, 6, 4, 2, 2, 4, 4, 6, 6, 6)


def relevance_scores(quality: Tensor, fidelity: Tensor) -> Tensor:
    """ControlNet relevance score of every position: how much is lost without its block.

    ``1/2 [(F - min F) / (max F - min F) + (H - min H) / (max H - min H)]``; a measure that is the
    same everywhere counts 0. Control belongs at the positions of the highest scores
    (``scores.topk(k).indices``), with fewer channel groups where they are higher.

    Args:
        quality: (K,) F, distance of generated images from real ones (FID) with the control block at
            one position skipped; higher is worse.
        fidelity: (K,) H, distance from the given control (Hausdorff distance of edges), likewise.

    Returns:
        (K,) in [0, 1], higher is more relevant.

    Raises:
        ValueError: the two are not (K,) with the same K >= 1.

    Reference: RelaCtrl, 2025, arXiv 2502.14377.
    """
    if quality.dim() != 1 or quality.shape != fidelity.shape or not len(quality):
        raise ValueError(
            f"relevance_scores: expected two tensors (K,), got {tuple(quality.shape)} and "
            f"{tuple(fidelity.shape)}"
        )
    return (_normalised(quality) + _normalised(fidelity)) / 2


def _normalised(x: Tensor) -> Tensor:
    low, high = x.aminmax()
    return torch.where(high > low, (x - low) / (high - low), torch.zeros_like(x))


class ControlBlock(nn.Module):
    """Guided control block: the shuffle mixer between two linear layers that start at zero.

    With x the tokens of the backbone and c the state of the branch::

        u = x + before(c)   (first block),   u = c + before(x)   (the others)
        c = u + gate * tdsm(norm(u) * (1 + scale) + shift),   skip = after(c)

    (shift, scale, gate) is the block's own table plus vectors of the time that all blocks share.
    The last three rows of the table are unused, and there for the published weights.

    Args:
        config: config of the mixer.
        site: the place in the model.
        first: the block is the first of its branch.

    Reference: RelaCtrl: Relevance-Guided Efficient Control for Diffusion Transformers, 2025, arXiv
    2502.14377.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"before": "projections", "after": "projections"}

    def __init__(self, config: TDSM.Config, site: Site, *, first: bool) -> None:
        super().__init__()
        self.first = first
        self.before = nn.Linear(site.dim, site.dim)
        self.after = nn.Linear(site.dim, site.dim)
        self.table = nn.Parameter(torch.empty(6, site.dim))
        place = replace(
            site, cond_dim=site.dim, path=f"{site.path}.mixer" if site.path else "mixer"
        )
        self.mixer = Branch(TDSM(config, place), place)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero projections, so that the backbone starts unchanged; a small random table."""
        for linear in (self.before, self.after):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        nn.init.normal_(self.table, std=self.table.shape[1] ** -0.5)

    def entry(self, x: Tensor, c: Tensor) -> Tensor:
        """What the mixer reads: u."""
        return x + self.before(c) if self.first else c + self.before(x)

    def forward(
        self, x: Tensor, c: Tensor, time: Tensor, ctx: Context = EMPTY
    ) -> tuple[Tensor, Tensor]:
        """One step of the branch.

        Args:
            x: (B, N, D) tokens of the backbone.
            c: (B, N, D) state of the branch.
            time: (B, R, D) shared vectors, R >= 3; the first are shift, scale and gate.
            ctx: ledger and tap.

        Returns:
            The new state and the addition to the backbone's tokens, (B, N, D) each.
        """
        mods = (self.table[:3] + time[:, :3]).unsqueeze(2).unbind(1)
        c = self.mixer(
            self.entry(x, c), Context(ledger=ctx.ledger, tap=ctx.tap, complete=ctx.complete), mods
        )
        return c, self.after(c)


class ControlBranch(nn.Module):
    """The control blocks of a `RelaCtrl`, one per position.

    Args:
        config: positions, groups and mixer.
        site: the place in the model.
    """

    def __init__(self, config: RelaCtrl.Config, site: Site) -> None:
        super().__init__()
        blocks = []
        for j, groups in enumerate(config.groups):
            path = f"{site.path}.blocks.{j}" if site.path else f"blocks.{j}"
            place = replace(site, layer=j, path=path)
            blocks.append(ControlBlock(config.mixer.replace(groups=groups), place, first=j == 0))
        self.blocks = nn.ModuleList(blocks)


class RelaCtrl(Model):
    """A frozen DiT, SiT or LightningDiT with a light control branch.

    The condition, an image or latent of the input's size, is embedded like the input. Behind block
    p, for every p in ``positions``, a `ControlBlock` reads the tokens and adds to what block p + 1
    gets. Only the branch learns, and at initialisation the output is that of the backbone for any
    condition.

    ``forward(x, t, y, condition)`` follows the backbone's convention. The number of tokens is
    fixed, see `TDSM`; `effformer.attention.tdsm.reshuffle` draws new permutations in training.

    Differs from the paper: the backbones are ours (no text), and the time vectors that the blocks
    share are the branch's own linear layer. The released loop adds the last addition again at
    positions without a block; ``reuse_skip=True`` does so, too.

    Args:
        config: the config.
        name: preset name.

    Raises:
        CapabilityError: the backbone does not let others run its blocks.
        ValueError: positions and groups do not fit the backbone.

    Example:
        >>> import torch, effformer
        >>> model = effformer.build_model("relactrl-nano").eval()
        >>> given = model.example_inputs(2)
        >>> control = given.pop("condition")
        >>> torch.equal(model(**given, condition=control), model.backbone(**given))
        True

    Reference: RelaCtrl: Relevance-Guided Efficient Control for Diffusion Transformers, 2025, arXiv
    2502.14377.
    """

    FAMILY: ClassVar[str] = "relactrl"
    ROLES: ClassVar[Mapping[str, str]] = {"modulation": "adaln_blocks"}

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(BaseConfig):
        """Knobs of `RelaCtrl`.

        Attributes:
            backbone: name of the backbone.
            changes: changes of the backbone's config, ``{"depth": 6, "attn": "flow"}``.
            positions: indices of the blocks behind which control enters, increasing.
            groups: number of channel groups of the block at each position.
            mixer: the mixer of the blocks; its ``groups`` are replaced.
            reuse_skip: positions without a block add the last addition again.
        """

        backbone: str = "dit-xl-2"
        changes: Mapping[str, Any] = field(default_factory=dict)
        positions: tuple[Natural, ...] = POSITIONS
        groups: tuple[Count, ...] = GROUPS
        mixer: TDSM.Config = TDSM.Config()
        reuse_skip: bool = False

        def check(self) -> None:
            if not self.positions or list(self.positions) != sorted({*self.positions}):
                raise ValueError(f"relactrl: positions must increase, got {self.positions}")
            if len(self.groups) != len(self.positions):
                raise ValueError(
                    f"relactrl: {len(self.groups)} groups for {len(self.positions)} positions; "
                    "give one number of groups per position"
                )

    def __init__(self, config: RelaCtrl.Config, name: str | None = None) -> None:
        super().__init__(config, name)
        self.backbone = _backbone(config, self.name)
        depth = len(self.backbone.blocks)
        if config.positions[0] < 0 or config.positions[-1] > depth - 2:
            raise ValueError(
                f"{self.name}: positions lie in 0..{depth - 2} for {depth} blocks, got "
                f"{config.positions}"
            )
        rows, columns = self.backbone.grid
        dim = self.backbone.config.dim
        self.control = ControlBranch(config, Site(dim=dim, length=rows * columns, path="control"))
        self.modulation = Modulation(dim, dim, 3)
        self.train()

    @property
    def trained(self) -> dict[str, Any] | None:
        """What the backbone was trained to predict; the branch only moves it."""
        return self.backbone.trained

    @trained.setter
    def trained(self, record: BaseConfig | Mapping[str, Any] | None) -> None:
        self.backbone.trained = record

    def assumed(self) -> Mapping[str, Any] | None:
        return self.backbone.assumed()

    def train(self, mode: bool = True) -> Self:
        """Set the branch's mode; the backbone stays frozen and in evaluation."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        condition: Tensor,
        *,
        drop: Tensor | None = None,
        ledger: Ledger | None = None,
        tap: Tap | None = None,
        complete: bool = False,
    ) -> Tensor:
        """The backbone's output under control.

        Args:
            x: (B, C, H, W), of the backbone's input size.
            t: (B,) time in the backbone's convention.
            y: (B,) class ids, int64.
            condition: (B, C, H, W), what controls, as the backbone's input is scaled.
            drop: (B,) bool, labels to replace by the null class.
            ledger: where dynamic parts report.
            tap: reads or replaces values at named places.
            complete: dynamic parts do all of their work, as if the model had none.

        Raises:
            ValueError: a shape does not fit.
        """
        ctx = self.backbone.context(x, t, y, drop=drop, ledger=ledger, tap=tap, complete=complete)
        check_shape(condition, str(tuple(x.shape)), x.shape, where=f"{self.name}: condition")
        assert ctx.time is not None
        time = torch.cat(self.modulation(ctx.time), dim=1)
        h, c = self.backbone.embed(x), self.backbone.embed(condition)
        places = {position: j for j, position in enumerate(self.config.positions)}
        skip: Tensor | None = None
        for k, block in enumerate(self.backbone.blocks):
            h = block(h if skip is None else h + skip, ctx)
            if k in places and k + 1 < len(self.backbone.blocks):
                c, skip = self.control.blocks[places[k]](h, c, time, ctx)
            elif not self.config.reuse_skip:
                skip = None
        return self.backbone.head(h, ctx)

    @explained
    def example_inputs(
        self, batch: int = 1, *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        given = self.backbone.example_inputs(batch, generator=generator)
        x = given["x"]
        condition = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        return {**given, "condition": condition}


def _backbone(config: RelaCtrl.Config, where: str) -> LatentTransformer:
    entry = registry.model.get(config.backbone)
    if not _open(entry):
        able = ", ".join(e.name for e in registry.model if _open(e))
        raise CapabilityError(
            f"{where}: {entry.name!r} has no blocks for control to enter; choices: {able}"
        )
    backbone: Model = entry.build(
        entry.preset.changed(config.changes, where=f"{where} backbone"), name=entry.name
    )
    return cast(LatentTransformer, backbone.requires_grad_(False))


def _open(entry: registry.Entry) -> bool:
    """Others may run the blocks of a model: it offers what `LatentTransformer` does."""
    return all(hasattr(entry.build, name) for name in ("context", "embed", "head"))


PRESETS = {
    "relactrl-dit-xl-2": Preset(
        config=RelaCtrl.Config(),
        source="positions and groups released with arXiv 2502.14377",
        summary="The published branch beside DiT-XL/2, of the width and depth of PixArt-alpha.",
    ),
    "relactrl-nano": Preset(
        config=RelaCtrl.Config(
            backbone="dit-nano",
            changes={"depth": 4, "input_size": 8, "num_classes": 10},
            positions=(0, 1),
            groups=(4, 2),
        ),
        summary="A size of ours for tests and examples.",
    ),
}
register_presets(RelaCtrl, PRESETS, paper="2502.14377")
