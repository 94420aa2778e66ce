"""What stands around the blocks of an autoregressive map: how tokens come in, and how scales and shifts
come out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effformer.nn.precision import widened

__all__ = ["Affine", "Ends", "PlacedEnds", "StartedEnds"]


class Affine(NamedTuple):
    """``x = exp(log_scale) z + shift``, in float32 at least, (B, n, D) each."""

    log_scale: Tensor
    shift: Tensor


class Ends(Protocol):
    """The ends of a map of tokens of width D.

    Attributes:
        free: number of tokens that pass unchanged (1), or 0 if a start token predicts the first one.
        reverses: the map reads the tokens from the last to the first.
    """

    free: int
    reverses: bool

    @property
    def like(self) -> Tensor:
        """A weight that has the dtype and device of the blocks."""
        ...

    def inputs(self, x: Tensor) -> Tensor:
        """What is read to predict all tokens but the free ones: (B, T, D) -> (B, T - free, D)."""
        ...

    def embed(self, inputs: Tensor, start: int) -> Tensor:
        """Inputs (B, n, D) from place ``start`` on to tokens of the blocks (B, n, width)."""
        ...

    def head(self, h: Tensor) -> Affine:
        """From the tokens behind the blocks to the map of the tokens that follow the inputs."""
        ...

    def matrices(self) -> tuple[Tensor | None, Tensor]:
        """The rows of the last matrix that make log-scales (None: there are none) and shifts."""
        ...


class PlacedEnds(nn.Module):
    """TarFlow's: places are learned, labels are added to all tokens, and the first token passes as it
    is.

    Args:
        features: width D of a token.
        dim: width of the blocks.
        places: number of tokens.
        num_classes: number of classes, 0 for none.
        scales: the map scales and shifts; False: it shifts.
        reverses: it reads the tokens from the last to the first.
    """

    ROLES: ClassVar[Mapping[str, str]] = {"proj_in": "patch_embed", "proj_out": "final_linear"}

    free: ClassVar[int] = 1

    def __init__(
        self, features: int, dim: int, *, places: int, num_classes: int, scales: bool, reverses: bool
    ) -> None:  # fmt: skip
        super().__init__()
        self.reverses, self.scales = reverses, scales
        self.pos_embed = nn.Parameter(torch.randn(places, dim) * 0.01)
        if num_classes:
            self.class_embed = nn.Parameter(torch.randn(num_classes, 1, dim) * 0.01)
        self.proj_in = nn.Linear(features, dim)
        self.proj_out = nn.Linear(dim, features * (1 + scales))
        nn.init.zeros_(self.proj_out.weight)

    @property
    def like(self) -> Tensor:
        """A weight that has the dtype and device of the blocks."""
        return self.pos_embed

    def label(self, y: Tensor | None, drop: Tensor | None) -> Tensor | None:
        """What is added to every token, (B or 1, 1, dim): the class, or the mean of all; None in a
        model without classes.
        """
        if not hasattr(self, "class_embed"):
            return None
        mean = self.class_embed.mean(dim=0, keepdim=True)
        if y is None:
            return mean
        rows = nn.functional.embedding(y, self.class_embed.flatten(1))[:, None]
        return rows if drop is None else torch.where(drop[:, None, None], mean, rows)

    def inputs(self, x: Tensor) -> Tensor:
        """All tokens but the last."""
        return x[:, :-1]

    def embed(self, inputs: Tensor, start: int) -> Tensor:
        """Inputs (B, n, D) with their places."""
        places = self.pos_embed.flip(0) if self.reverses else self.pos_embed
        h: Tensor = self.proj_in(inputs.to(places.dtype))
        return h + places[start : start + inputs.shape[1]]

    def head(self, h: Tensor) -> Affine:
        """The map of the tokens that follow."""
        out = widened(self.proj_out(h))
        if not self.scales:
            return Affine(torch.zeros_like(out), out)
        log_scale, shift = out.chunk(2, dim=-1)
        return Affine(log_scale, shift)

    def matrices(self) -> tuple[Tensor | None, Tensor]:
        """Rows of ``proj_out``."""
        rows = _matrix(self.proj_out, self.pos_embed)
        if not self.scales:
            return None, rows
        log_scale, shift = rows.chunk(2)
        return log_scale, shift


class StartedEnds(nn.Module):
    """STARFlow's: a learned token of the data stands in front, so that all others are predicted; what
    comes out is clipped smoothly, ``clip tanh(o / clip)``.

    Args:
        features: width D of a token.
        dim: width of the blocks.
        text_dim: width of a text token in front, None for no text.
        norm: there is a last norm.
        clip: bound of log-scales before the activation, and of shifts; None for none.
        scale: scales are softplus(o + c), which is 1 at o = 0, or exp(o).
        reverses: the map reads the tokens from the last to the first.
    """

    ROLES: ClassVar[Mapping[str, str]] = {
        "proj_in": "patch_embed", "proj_text": "patch_embed", "proj_out": "final_linear",
    }  # fmt: skip

    free: ClassVar[int] = 0

    def __init__(
        self, features: int, dim: int, *, text_dim: int | None, norm: bool, clip: float | None,
        scale: Literal["softplus", "exp"], reverses: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.reverses, self.clip, self.scale = reverses, clip, scale
        self.start = nn.Parameter(torch.randn(1, 1, features))
        self.proj_in = nn.Linear(features, dim)
        if text_dim is not None:
            self.proj_text = nn.Linear(text_dim, dim)
        self.norm = nn.RMSNorm(dim, eps=1e-6) if norm else nn.Identity()
        self.proj_out = nn.Linear(dim, 2 * features)
        nn.init.zeros_(self.proj_out.weight)

    @property
    def like(self) -> Tensor:
        """A weight that has the dtype and device of the blocks."""
        return self.start

    def inputs(self, x: Tensor) -> Tensor:
        """The start token, and all tokens but the last."""
        return torch.cat([self.start.to(x.dtype).expand(x.shape[0], -1, -1), x[:, :-1]], dim=1)

    def embed(self, inputs: Tensor, start: int) -> Tensor:
        """Inputs (B, n, D) without their places, which rotary tables tell."""
        h: Tensor = self.proj_in(inputs.to(self.start.dtype))
        return h

    def head(self, h: Tensor) -> Affine:
        """The map of the tokens that follow."""
        out = self.proj_out(self.norm(h))
        if self.clip is not None:
            out = self.clip * torch.tanh(out / self.clip)
        log_scale, shift = widened(out).chunk(2, dim=-1)
        if self.scale == "softplus":
            log_scale = F.softplus(log_scale + math.log(math.e - 1)).log()
        return Affine(log_scale, shift)

    def matrices(self) -> tuple[Tensor | None, Tensor]:
        """Rows of ``proj_out``."""
        log_scale, shift = _matrix(self.proj_out, self.proj_in.bias).chunk(2)
        return log_scale, shift


def _matrix(linear: nn.Module, like: Tensor) -> Tensor:
    """The matrix (out, width) of a linear layer, whatever it keeps it as; ``like`` (..., width)."""
    width = like.shape[-1]
    points = torch.cat([like.new_zeros(1, width), torch.eye(width).to(like)])
    values: Tensor = linear(points)
    return (values[1:] - values[:1]).mT
