"""Token merging: which tokens are alike, their weighted means, and the way back.

Shape legend: B batch, N tokens, M tokens that remain, D token width, K width of the metric.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .precision import exactly, widened

__all__ = ["Matching", "match_every", "match_tokens", "merge_schedule", "most_merges"]


@dataclass(frozen=True, slots=True)
class Matching:
    """Groups of tokens that become one.

    Attributes:
        groups: (B, N) int64, the token 0..count - 1 that each token becomes.
        count: M, the same for all samples.
    """

    groups: Tensor
    count: int

    def merge(self, x: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Mean of every group, weighted by sizes: ``sum s x / sum s``, in float32 at least.

        Args:
            x: (B, N, D).
            sizes: (B, N), how many tokens each of these stands for; None means one.

        Returns:
            (B, M, D). The weighted total of the tokens is kept.
        """
        wide = widened(x)
        if sizes is None:
            return (self.sum(wide) / self.sizes(x)[..., None]).to(x.dtype)
        weights = widened(sizes)[..., None]
        return (self.sum(wide * weights) / self.sum(weights)).to(x.dtype)

    def sum(self, x: Tensor) -> Tensor:
        """Sum of every group: (B, N, D) -> (B, M, D)."""
        out = x.new_zeros(x.shape[0], self.count, x.shape[2])
        return out.scatter_add(1, self.groups[..., None].expand_as(x), x)

    def sizes(self, like: Tensor, sizes: Tensor | None = None) -> Tensor:
        """How many tokens each merged one stands for: (B, M), float32 at least.

        Args:
            like: float64 gives float64.
            sizes: (B, N) before merging; None means one each.
        """
        if sizes is None:
            sizes = widened(torch.ones_like(self.groups, dtype=like.dtype))
        return self.sum(sizes[..., None])[..., 0]

    def unmerge(self, y: Tensor) -> Tensor:
        """Copy every merged token back to all that it stands for: (B, M, D) -> (B, N, D)."""
        return y.gather(1, self.groups[..., None].expand(-1, -1, y.shape[2]))

    def source(self) -> Tensor:
        """(B, M, N) matrix of zeros and ones: which tokens made which."""
        return F.one_hot(self.groups, self.count).transpose(1, 2)


def most_merges(n: int, r: int, front: int = 0) -> int:
    """What of r merges is possible: ``min(r, (n - front) // 2)``."""
    return max(0, min(r, (n - front) // 2))


def match_tokens(metric: Tensor, r: int, *, front: int = 0) -> Matching:
    """Bipartite soft matching: the r most similar pairs of even and odd tokens merge.

    Each even token finds the odd one with the largest cosine; the r even tokens with the largest
    such cosines join theirs. Several may join the same one.

    The order of the result: protected tokens; even tokens that remain, by position (without
    protected ones, by falling cosine); all odd tokens, by position.

    Args:
        metric: (B, N, K), what is compared, for instance keys.
        r: number of tokens to remove, see `most_merges`.
        front: tokens at the front that neither merge nor are merged into (class token, distillation
            token, registers).

    Raises:
        ValueError: r or front is negative.

    Reference: Token Merging: Your ViT But Faster, 2022, arXiv 2210.09461.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.1, 0.9], [1.0, 1.0]]])
        >>> match_tokens(x, 1).groups
        tensor([[0, 1, 1, 2]])
    """
    _check(r=r, front=front)
    n = metric.shape[1]
    r = most_merges(n, r, front)
    if r == 0:
        groups = torch.arange(n, device=metric.device).expand(metric.shape[:2])
        return Matching(groups, n)
    metric = F.normalize(widened(metric), dim=-1)  # cosines near one have no places left in half
    even, odd = metric[:, ::2], metric[:, 1::2]
    with exactly(metric):
        scores = even @ odd.transpose(1, 2)
    scores = F.pad(scores[:, (front + 1) // 2 :], (0, 0, (front + 1) // 2, 0), value=-torch.inf)
    scores = F.pad(scores[:, :, front // 2 :], (front // 2, 0), value=-torch.inf)
    if torch.compiler.is_exporting():
        scores = F.pad(scores, (0, 1), value=-torch.inf)  # a graph serves a lone token, too
    best, target = scores.max(dim=-1)
    order = best.argsort(dim=-1, descending=True)
    gone, kept = order[:, :r], order[:, r:]
    if front:
        kept = kept.sort(dim=-1).values
    places = torch.arange(kept.shape[1], device=metric.device).expand_as(kept)
    first = torch.zeros_like(order).scatter(1, kept, places)
    # the odd tokens stand behind those even ones that are left
    first = first.scatter(1, gone, target.gather(1, gone) + kept.shape[1])
    second = torch.arange(odd.shape[1], device=metric.device).expand(first.shape[0], -1)
    both = [first, F.pad(second + kept.shape[1], (0, n % 2))]
    groups = torch.stack(both, dim=-1).flatten(1)[:, :n]
    return Matching(_front_first(groups, front, kept.shape[1]), n - r)


def _front_first(groups: Tensor, front: int, kept: int) -> Tensor:
    """Number the protected tokens 0..front - 1; they stand at the beginning of either part."""
    evens, odds = (front + 1) // 2, front // 2
    if not odds:
        return groups
    place = torch.where(groups < kept, groups + odds, groups)  # the rest of the even part moves up
    place = torch.where(groups < evens, 2 * groups, place)
    protected = (groups >= kept) & (groups < kept + odds)
    return torch.where(protected, 2 * (groups - kept) + 1, place)


def match_every(metric: Tensor, k: int) -> Matching:
    """Every k-th token stays; all others join the most similar of those.

    Args:
        metric: (B, N, K), N divisible by k.
        k: at least 2; 2 means half of the tokens.

    Raises:
        ValueError: k is below 2, or does not divide N.

    Reference: Token Merging: Your ViT But Faster, 2022, arXiv 2210.09461, official code.
    """
    n = metric.shape[1]
    if k < 2 or n % k:
        raise ValueError(f"match_every: k must be at least 2 and divide the {n} tokens, got {k}")
    cells = F.normalize(widened(metric), dim=-1).unflatten(1, (n // k, k))
    movers, stays = cells[:, :, : k - 1], cells[:, :, k - 1]
    with exactly(metric):
        target = (movers.flatten(1, 2) @ stays.transpose(1, 2)).argmax(dim=-1)
    own = torch.arange(n // k, device=metric.device).expand(metric.shape[0], -1)
    groups = torch.cat([target.unflatten(1, (n // k, k - 1)), own[..., None]], dim=-1)
    return Matching(groups.flatten(1), n // k)


def merge_schedule(
    r: int | tuple[int, ...], depth: int, inflection: float = 0.0
) -> tuple[int, ...]:
    """Tokens to remove in each of ``depth`` blocks.

    ``low = int(r (1 - inflection))``, then ``int(low + (2 r - 2 low) i / (depth - 1))`` in block i:
    constant for 0, rising from 0 to 2 r for +1, falling for -1.

    Args:
        r: mean number, or one number for each block; blocks beyond a list remove none.
        depth: number of blocks.
        inflection: slope, from -1 to 1.

    Raises:
        ValueError: a negative number, or an inflection outside [-1, 1].

    Example:
        >>> merge_schedule(8, 5, -1.0)
        (16, 12, 8, 4, 0)
    """
    if isinstance(r, tuple):
        _check(r=min(r, default=0))
        return (*r, *[0] * depth)[:depth]
    _check(r=r)
    if not -1 <= inflection <= 1:
        raise ValueError(f"merging: inflection must lie in [-1, 1], got {inflection}")
    low = int(r * (1 - inflection))
    high = 2 * r - low
    step = (high - low) / max(depth - 1, 1)
    return tuple(int(low + step * i) for i in range(depth))


def _check(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 0:
            raise ValueError(f"merging: {name} must not be negative, got {value}")
