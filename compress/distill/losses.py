"""Distances between what a student and a teacher compute, as numbers.

Everywhere the teacher is the target: it gets no gradient, and Kullback-Leibler divergences are
``KL(teacher || student)``. Softmax and sums are taken in float32 at least. A mask (B, N) is True at real
tokens; others count neither as rows nor as columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from effformer.nn.precision import widened

__all__ = [
    "cosine_loss", "flow_loss", "gram_loss", "hard_loss", "hidden_loss", "logits_loss", "mse_loss",
    "patient_loss", "relation_loss", "score_loss", "soft_cross_entropy", "split_heads",
]  # fmt: skip


def logits_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 KL(softmax(z_t / T) || softmax(z_s / T))``, mean over the batch.

    Args:
        student: (B, ..., classes) logits.
        teacher: the same.
        temperature: T.

    Reference: Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531.
    """
    s, t = (widened(x).flatten(0, -2) / temperature for x in (student, teacher.detach()))
    divergence = F.kl_div(
        s.log_softmax(-1), t.log_softmax(-1), reduction="batchmean", log_target=True
    )
    return temperature**2 * divergence


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, *, classes: bool = False
) -> Tensor:
    """``-sum_c softmax(z_t / T)_c log softmax(z_s / T)_c``, mean over the batch; with ``classes`` over the
    classes as well, as TinyBERT's code does.
    """
    s, t = (widened(x) / temperature for x in (student, teacher.detach()))
    products = -t.softmax(-1) * s.log_softmax(-1)
    return products.mean() if classes else products.sum(-1).mean()


def hard_loss(student: Tensor, distilled: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """``(CE(z, y) + CE(z_d, argmax z_t)) / 2``: class token and distillation token (DeiT).

    Reference: Training data-efficient image transformers & distillation through attention, 2020, arXiv
    2012.12877.
    """
    own = F.cross_entropy(widened(student), labels)
    return (own + F.cross_entropy(widened(distilled), teacher.argmax(-1))) / 2


def mse_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean square of the difference of logits, or of velocities."""
    return F.mse_loss(widened(student), widened(teacher.detach()))


def hidden_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, fit: Tensor | None = None
) -> Tensor:
    """``mean (h_s W^T - h_t)^2`` over real tokens.

    Args:
        student: (B, N, D_s).
        teacher: (B, N, D_t).
        mask: (B, N), None: all tokens are real.
        fit: W (D_t, D_s), None for states of equal width.
    """
    s, t = widened(student), widened(teacher.detach())
    if fit is not None:
        s = s @ widened(fit).T
    return _over_tokens((s - t).square().mean(-1), mask)


def cosine_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """``1 - cos(h_s, h_t)``, mean over real tokens (DistilBERT).

    Reference: DistilBERT, a distilled version of BERT, 2019, arXiv 1910.01108.
    """
    s, t = widened(student), widened(teacher.detach())
    return _over_tokens(1 - F.cosine_similarity(s, t, dim=-1), mask)


def patient_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the first tokens' states at unit length, mean over the batch (PKD).

    Reference: Patient Knowledge Distillation for BERT Model Compression, 2019, arXiv 1908.09355.
    """
    s, t = (F.normalize(widened(x)[:, 0], dim=-1) for x in (student, teacher.detach()))
    return (s - t).square().sum(-1).mean()


def gram_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Mean square of the difference of ``A B^T / D`` of two states (B, N, D) each (NST)."""
    s, t = (widened(a) @ widened(b).mT / a.shape[-1] for a, b in (student, teacher))
    return F.mse_loss(s, t.detach())


def flow_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Mean square of the difference of ``A^T B / N`` of two states (B, N, D) each (FSP)."""
    s, t = (widened(a).mT @ widened(b) / a.shape[1] for a, b in (student, teacher))
    return F.mse_loss(s, t.detach())


def score_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean square of the difference of attention scores (B, H, N, N) before the softmax, those of masked
    keys being 0 (TinyBERT). Scores of -100 and less are those of masked keys.

    Reference: TinyBERT: Distilling BERT for Natural Language Understanding, 2019, arXiv 1909.10351.
    """
    both = [widened(student), widened(teacher.detach())]
    both = [x.masked_fill(x <= -100, 0.0) for x in both]
    if mask is not None:
        both = [x.masked_fill(~mask.bool()[:, None, None], 0.0) for x in both]
    return F.mse_loss(both[0], both[1])


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, H, N, K) with all heads side by side, cut into as many as asked: (B, heads, N, H K / heads).

    Raises:
        ValueError: the channels do not divide.
    """
    joined = x.transpose(1, 2).flatten(2)
    if joined.shape[-1] % heads:
        raise ValueError(
            f"relations: {joined.shape[-1]} channels of all heads do not divide into heads={heads}"
        )
    return joined.unflatten(-1, (heads, -1)).transpose(1, 2)


def relation_loss(
    student: tuple[Tensor, Tensor],
    teacher: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    *,
    rows: str = "valid",
) -> Tensor:
    """``KL`` of relations ``softmax(A B^T / sqrt(d))``, mean over heads and rows.

    With queries and keys it is MiniLM's attention transfer, with one tensor twice a self-relation.

    Args:
        student: A and B, (B, H, N, d_s) each.
        teacher: the same, (B, H, N, d_t).
        mask: (B, N).
        rows: "valid" counts real queries, "all" those of padding as well, as public ports do.

    Raises:
        ValueError: student and teacher have not as many heads.

    Reference: MiniLM, 2020, arXiv 2002.10957; MiniLMv2, 2020, arXiv 2012.15828.
    """
    if student[0].shape[1] != teacher[0].shape[1]:
        raise ValueError(
            f"relations: {student[0].shape[1]} heads of the student do not compare with the teacher's "
            f"{teacher[0].shape[1]}; MiniLM(version=2, heads=...) cuts both anew"
        )
    logs = []
    for a, b in (student, teacher):
        scores = widened(a) @ widened(b).mT / a.shape[-1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~mask.bool()[:, None, None], -1e9)
        logs.append(scores.log_softmax(-1))
    target = logs[1].detach()
    divergence = (target.exp() * (target - logs[0])).sum(-1).mean(1)
    return _over_tokens(divergence, mask if rows == "valid" else None)


def _over_tokens(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over real tokens of values (B, N)."""
    if mask is None:
        return values.mean()
    real = mask.to(values.dtype)
    return torch.where(mask.bool(), values, 0.0).sum() / real.sum()
