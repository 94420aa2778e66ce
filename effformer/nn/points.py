"""Points in space: frequency features, well-spread choices, and losses of signed distances."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from effformer.arguments import checked
from effformer.checks import check_shape
from effformer.values import Count

from .precision import widened

__all__ = ["FieldLosses", "farthest_points", "field_losses", "octave_features"]


def octave_features(x: Tensor, octaves: int) -> Tensor:
    """``[x, sin(2^k x_j), cos(2^k x_j)]`` for k = 0 .. octaves - 1; k runs fastest.

    Args:
        x: (..., axes) coordinates; computed in float32 at least.
        octaves: number of frequencies.

    Returns:
        (..., axes (1 + 2 octaves)) of the dtype of x.
    """
    wide = widened(x)
    steps = torch.arange(octaves, device=x.device, dtype=wide.dtype)
    angles = (wide[..., None] * 2.0**steps).flatten(-2)
    return torch.cat([wide, angles.sin(), angles.cos()], dim=-1).to(x.dtype)


@checked
@torch.no_grad()
def farthest_points(points: Tensor, count: Count) -> Tensor:
    """Which points lie far from each other: the first one, then always the one that is farthest from
    those chosen before.

    Args:
        points: (B, N, axes).
        count: number of points to choose, at most N.

    Returns:
        (B, count) int64 indices.

    Raises:
        ValueError: there are fewer points.

    Reference: The Farthest Point Strategy for Progressive Image Sampling, 1997.
    """
    check_shape(points, "(B, N, axes)", (None, None, None), where="farthest_points: points")
    if count > points.shape[1]:
        raise ValueError(f"farthest_points: {count} of {points.shape[1]} points; give more points")
    wide, every = widened(points), torch.arange(points.shape[0], device=points.device)
    last = torch.zeros_like(every)
    nearest = wide.new_full(points.shape[:2], torch.inf)
    chosen = [last]
    for _ in range(count - 1):
        nearest = nearest.minimum((wide - wide[every, last][:, None]).square().sum(dim=-1))
        last = nearest.argmax(dim=-1)
        chosen.append(last)
    return torch.stack(chosen, dim=1)


class FieldLosses(NamedTuple):
    """Losses of a field of signed distances, scalars.

    Attributes:
        sdf: ``mean(|e| + e^2)`` of the error e of the distance.
        normal: ``mean(1 - cos(gradient, normal))`` on the surface.
        eikonal: ``mean((|gradient| - 1)^2)``.
    """

    sdf: Tensor
    normal: Tensor
    eikonal: Tensor


def field_losses(
    field: Callable[[Tensor], Tensor],
    points: Tensor,
    sdf: Tensor,
    normals: Tensor,
    *,
    surface: Tensor | None = None,
) -> FieldLosses:
    """How far a field is from a signed distance, in its values and its gradients.

    The gradient with respect to the points is itself differentiated, which fused attention kernels do
    not allow: softmax attention runs by its formula here.

    Args:
        field: points (B, P, 3) -> values (B, P), positive outside.
        points: (B, P, 3).
        sdf: (B, P) distances there.
        normals: (B, P, 3) unit normals; read on the surface alone.
        surface: (B, P) bool, True = a point of the surface; None: all are.

    Returns:
        The losses, each a mean over the points that it is about.

    Raises:
        ValueError: a shape does not fit.

    Differs from the paper: the eikonal term is printed as ``|gradient - 1|^2`` there; the usual form
    is meant.

    Reference: TripoSG: High-Fidelity 3D Shape Synthesis using Large-Scale Rectified Flow Models,
    2025, arXiv 2502.06608, equations 17 to 20.
    """
    count = tuple(points.shape[:2])
    shapes = [
        ("points", points, (*count, 3)),
        ("sdf", sdf, count),
        ("normals", normals, (*count, 3)),
    ]
    if surface is not None:
        shapes.append(("surface", surface, count))
    for name, value, shape in shapes:
        shown = "(B, P)" if len(shape) == 2 else "(B, P, 3)"
        check_shape(value, shown, shape, where=f"field_losses: {name}")
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        at = points.detach().requires_grad_()
        values = field(at)
        (slope,) = torch.autograd.grad(values.sum(), at, create_graph=True)
    error, slope = widened(values) - widened(sdf), widened(slope)
    cosine = F.cosine_similarity(slope, widened(normals), dim=-1)
    on = torch.ones_like(cosine) if surface is None else surface.to(cosine.dtype)
    return FieldLosses(
        sdf=(error.abs() + error.square()).mean(),
        normal=((1 - cosine) * on).sum() / on.sum().clamp(min=1),
        eikonal=(slope.norm(dim=-1) - 1).square().mean(),
    )
