"""From latents back to data through autoregressive maps: token after token, or many at once.

A map turns tokens x into ``z_i = (x_i - shift_i) exp(-log_scale_i)``, where shift and log-scale come
from the tokens before. Its inverse solves ``x = exp(log_scale(x)) z + shift(x)``, a triangular system:
one evaluation on any guess makes one more token exact, so that the number of tokens is enough, and few
are in practice.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from ..arguments import Shape, checked
from ..checks import check_values, unknown
from ..values import Checked, Count, NonNegative, Positive
from ..wrapped import unwrapping
from .paths import widened

__all__ = [
    "Away",
    "Inversion",
    "Inverted",
    "Start",
    "TokenFlow",
    "TokenMap",
    "invert",
    "token_maps",
]

Start = Literal["latents", "zeros"]


class Parameters(Protocol):
    """``x = exp(log_scale) z + shift`` of some tokens, (B, n, D) each."""

    @property
    def log_scale(self) -> Tensor: ...

    @property
    def shift(self) -> Tensor: ...


class TokenMap(Protocol):
    """An autoregressive map of tokens (B, T, D) under given conditions.

    Attributes:
        free: number of tokens that pass unchanged.
        conditioned: the conditions reach it.
    """

    @property
    def free(self) -> int: ...

    @property
    def conditioned(self) -> bool: ...

    def order(self, x: Tensor) -> Tensor:
        """Tokens as the map reads them, or back."""
        ...

    def inputs(self, x: Tensor) -> Tensor:
        """What is read to predict all but the free tokens of x: (B, T - free, D)."""
        ...

    def affine(self, x: Tensor) -> Parameters:
        """The map of all tokens at once."""
        ...

    def init_state(self, batch: int) -> Any:
        """The state before the first input."""
        ...

    def step(self, inputs: Tensor, state: Any) -> tuple[Parameters, Any]:
        """The map of the tokens that follow these inputs, and the state behind them, which is a new
        one; of all inputs without a state if that is None.
        """
        ...

    def matrices(self) -> tuple[Tensor | None, Tensor]:
        """Rows of the last matrix that make log-scales (None: there are none) and shifts."""
        ...


class TokenFlow(Protocol):
    """A normalizing flow made of such maps, such as `effformer.models.TarFlow`."""

    def tokens(self, x: Tensor) -> Tensor:
        """Data (B, C, H, W) to tokens (B, T, D)."""
        ...

    def image(self, tokens: Tensor, like: Tensor) -> Tensor:
        """The inverse of `tokens`, of the shape of ``like``."""
        ...

    def prior(self, z: Tensor) -> Tensor:
        """From tokens of N(0, I) to what the last map made."""
        ...

    def maps(self, like: Tensor, **cond: Any) -> Sequence[TokenMap]:
        """The maps of data of the shape of ``like``, from the data to the latents."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Inversion(Checked):
    """How a map is inverted: segments of tokens one after the other (Gauss-Seidel), and all tokens of
    a segment at once, iterated (Jacobi).

    ``Inversion()`` is exact and goes token by token; ``Inversion(segment=None, iterations=10)`` is
    Jacobi on all tokens; ``Inversion(segment=32, iterations=32)`` is GS-Jacobi. As many iterations as
    a segment has tokens are exact.

    Attributes:
        segment: number of tokens in a segment, the last may be shorter; None: all.
        iterations: most evaluations of a segment, None for as many as it has tokens.
        tolerance: a segment ends when an iteration changes it by no more, see ``measure``.
        measure: of a change, "absolute": its norm over samples and numbers in a token, or "relative":
            its mean square over that of the tokens (STARFlow).
        start: the first guess, the latents or zeros.
        bound: guesses are clamped to [-bound, bound] (3 in the published code of GS-Jacobi), None for
            not at all.

    Reference: Accelerating TarFlow Sampling with GS-Jacobi Iteration, 2025, arXiv 2505.12849.
    """

    segment: Count | None = 1
    iterations: Count | None = None
    tolerance: NonNegative = 0.0
    measure: Literal["absolute", "relative"] = "absolute"
    start: Start = "latents"
    bound: Positive | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Away(Checked):
    """Guidance of token maps away from weaker ones: those of the same model under other conditions.

    "linear" moves log-scale a and shift b: ``a + scale (a - a_weak)``, likewise b. "gaussian" is the
    Gaussian proportional to ``p^(1 + scale) / p_weak^scale``, where that exists: with ``r = min(s /
    s_weak, 1)^2`` and ``d = 1 + scale - scale r`` it has the mean ``((1 + scale) m - scale r m_weak) /
    d`` and the deviation ``s / sqrt(d)``.

    Attributes:
        scale: 0 changes nothing.
        weak: conditions of the weaker maps that differ: ``{"y": None}``, ``{"text": null}``, or
            ``{"temperature": 0.6}``, which sharpens attention.
        rule: "linear" (TarFlow) or "gaussian" (STARFlow).
        moves: what the linear rule moves.
        rising: the scale grows in equal steps from the first token to the last.

    Reference: Normalizing Flows are Capable Generative Models, 2024, arXiv 2412.06329; STARFlow:
    Scaling Latent Normalizing Flows for High-resolution Image Synthesis, 2025, arXiv 2506.06276.
    """

    scale: NonNegative
    weak: Mapping[str, Any] = field(default_factory=dict)
    rule: Literal["linear", "gaussian"] = "linear"
    moves: Literal["both", "scale", "shift"] = "both"
    rising: bool = False

    def check(self) -> None:
        if not self.weak:
            raise ValueError(
                "guidance: nothing makes the maps weaker; give weak, e.g. {'y': None} for no label"
            )

    def mix(self, own: Parameters, weak: Parameters, part: Tensor) -> tuple[Tensor, Tensor]:
        """The guided log-scale and shift; ``part`` (n, 1) is the share of the scale at every token."""
        scale = self.scale * part if self.rising else self.scale
        a, b = own.log_scale, own.shift
        if self.rule == "gaussian":
            ratio = (2 * (a - weak.log_scale)).clamp(max=0).exp()
            total = 1 + scale - scale * ratio
            mean = ((1 + scale) * b - scale * ratio * weak.shift) / total
            return a - 0.5 * torch.as_tensor(total).log(), mean
        if self.moves != "shift":
            a = a + scale * (a - weak.log_scale)
        if self.moves != "scale":
            b = b + scale * (b - weak.shift)
        return a, b


class Inverted(NamedTuple):
    """What `invert` returns.

    Attributes:
        x: the data, of the shape of the latents.
        iterations: for every map in the order of the model, from the data to the latents, the number
            of evaluations of each segment.
        finite: (B,) bool. Scales of a sample far from the data may overflow; draw it again.
    """

    x: Tensor
    iterations: tuple[tuple[int, ...], ...]
    finite: Tensor


@unwrapping
@checked
@torch.no_grad()
def invert(
    model: TokenFlow,
    z: Annotated[Tensor, Shape("(B, C, H, W)")],
    inversion: Inversion | Sequence[Inversion] | None = None,
    *,
    guidance: Away | None = None,
    **cond: Any,
) -> Inverted:
    """Data from latents: the inverse of ``model(x, **cond).z``, and a sample where z is N(0, I).

    Args:
        model: a normalizing flow of token maps.
        z: (B, C, H, W) latents, of the shape of the data.
        inversion: how every map is inverted, or each, in the order of the model from the data to the
            latents; None: exactly, token by token. `inversion_plan` suggests one.
        guidance: towards the conditions.
        cond: conditions of the model, such as labels ``y``.

    Raises:
        TypeError: the model is not made of such maps.
        ValueError: another number of inversions than the model has maps, a condition that it has not,
            or the model is in training mode.
        CapabilityError: segments of a map whose token mixers cannot stream; those that can are named,
            and ``segment=None`` needs none.

    Example:
        >>> import torch
        >>> from effformer.flow import Inversion, invert
        >>> model = effformer.build_model("tarflow-tiny").eval()
        >>> x, y = torch.randn(2, 3, 8, 8), torch.tensor([0, 4])
        >>> again = invert(model, model(x, y=y).z, Inversion(segment=4), y=y).x
        >>> torch.allclose(again, x, atol=1e-4)
        True
    """
    maps = token_maps(model, z, cond, "invert")
    check_values(z, where="invert: z")
    if getattr(model, "training", False):
        raise ValueError("invert: a model in training mode drops out at random; call eval()")
    weak: Sequence[TokenMap | None] = [None] * len(maps)
    if guidance is not None and guidance.scale:
        weak = token_maps(model, z, {**cond, **guidance.weak}, "invert: guidance")
    each = _each(inversion, len(maps))
    x, iterations = model.prior(widened(model.tokens(z))), []
    for own, other, how in reversed(list(zip(maps, weak, each, strict=True))):
        pair = [own] if other is None or not other.conditioned else [own, other]
        found, counts = _solved(pair, own.order(x), how, guidance)
        x = own.order(found)
        iterations.append(counts)
    return Inverted(model.image(x, z), tuple(reversed(iterations)), x.isfinite().flatten(1).all(1))


def token_maps(
    model: TokenFlow, like: Tensor, cond: Mapping[str, Any], where: str
) -> Sequence[TokenMap]:
    """The maps of a model under conditions, for data of the shape of ``like``.

    Raises:
        TypeError: the model is not made of maps.
        ValueError: it has no such condition.
    """
    if not all(hasattr(model, name) for name in ("maps", "tokens", "image", "prior")):
        name = getattr(model, "name", type(model).__name__)
        raise TypeError(
            f"{where}: {name} is not made of autoregressive maps of tokens; "
            "effformer.models.TarFlow and STARFlow are"
        )
    known = [*inspect.signature(model.maps).parameters][1:]
    if other := next((name for name in cond if name not in known), None):
        raise unknown("condition", other, known, where=where)
    return model.maps(like, **cond)


def _each(inversion: Inversion | Sequence[Inversion] | None, count: int) -> Sequence[Inversion]:
    """How each map is inverted."""
    if inversion is None or isinstance(inversion, Inversion):
        return [inversion or Inversion()] * count
    if len(inversion) != count:
        raise ValueError(f"invert: {len(inversion)} inversions for a model of {count} maps")
    return inversion


def _solved(
    maps: Sequence[TokenMap], z: Tensor, how: Inversion, guidance: Away | None
) -> tuple[Tensor, tuple[int, ...]]:
    """X from z (B, T, D), in the order of the maps: the one to invert, and perhaps a weaker one."""
    own, counts = maps[0], []
    free, total = own.free, z.shape[1] - own.free
    x = z.clone()
    if how.start == "zeros":
        x[:, 1:] = 0
    length = how.segment or total
    part = torch.arange(1, total + 1, device=z.device, dtype=z.dtype)[:, None] / total
    states: list[Any] = [None] * len(maps)
    if length < total:
        states = [one.init_state(z.shape[0]) for one in maps]
    for start in range(0, total, length):
        here = slice(start, min(start + length, total))
        rows = slice(here.start + free, here.stop + free)
        most = min(how.iterations or length, here.stop - here.start)
        for count in range(1, most + 1):
            given = own.inputs(x)[:, here]
            found = [one.step(given, state) for one, state in zip(maps, states, strict=True)]
            log_scale, shift = found[0][0].log_scale, found[0][0].shift
            if guidance is not None and len(maps) > 1:
                log_scale, shift = guidance.mix(found[0][0], found[1][0], part[here])
            new = z[:, rows] * log_scale.exp() + shift
            if how.bound is not None:
                new = new.clamp(-how.bound, how.bound)
            done = count < most and _change(new, x[:, rows], how.measure) <= how.tolerance
            x[:, rows] = new
            if done:
                break
        counts.append(count)
        states = [state for _, state in found]
    return x, tuple(counts)


def _change(new: Tensor, old: Tensor, measure: str) -> float:
    """How far an iteration moved the tokens (B, n, D) of a segment."""
    if measure == "absolute":
        return float((new - old).norm() / (new.shape[0] * new.shape[2]))
    return float((new - old).square().mean() / new.square().mean())
