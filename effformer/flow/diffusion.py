"""The discrete diffusion that DiT is trained and sampled with: DDPM, learned variances, DDIM."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .paths import DDPM, expand, widened

__all__ = ["Diffusion", "DiffusionLoss", "PosteriorMean", "space_timesteps"]

Network = Callable[..., Tensor]
Variance = Literal["learned-range", "fixed-large", "fixed-small"]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class PosteriorMean:
    """p(x_{t-1} | x_t) as the network sees it, all (B, C, ...).

    Attributes:
        mean: its mean.
        variance: its variance.
        log_variance: the logarithm of it.
        data: the data that the network expects.
    """

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    data: Tensor


@dataclass(frozen=True, slots=True)
class DiffusionLoss:
    """Training losses, per sample (B,).

    Attributes:
        loss: mse + vb.
        mse: mean squared error of the noise.
        vb: the variational bound in bits per dimension that trains the variance; None if it is
            fixed.
        x: x_t, the network's input.
    """

    loss: Tensor
    mse: Tensor
    vb: Tensor | None
    x: Tensor


def space_timesteps(steps: int, sections: int | str | Sequence[int]) -> tuple[int, ...]:
    """Choose the steps of a shorter process.

    Args:
        steps: steps of the original process.
        sections: k, or "k": k steps spread evenly, both ends included; (a, b, ...) or "a,b,...": so
            many from each equal section; "ddimK": K steps with an integer stride from 0.

    Returns:
        The chosen steps, increasing.

    Raises:
        ValueError: more steps asked for than there are, or no integer stride gives K.

    Example:
        >>> from effformer.flow.diffusion import space_timesteps
        >>> space_timesteps(1000, "4"), space_timesteps(1000, "ddim4")
        ((0, 333, 666, 999), (0, 250, 500, 750))
    """
    if isinstance(sections, str) and sections.startswith("ddim"):
        wanted = _number(sections.removeprefix("ddim"), sections)
        for stride in range(1, steps):
            if len(range(0, steps, stride)) == wanted:
                return tuple(range(0, steps, stride))
        raise ValueError(f"space_timesteps: no integer stride gives {wanted} of {steps} steps")
    if isinstance(sections, str):
        sections = [_number(part, sections) for part in sections.split(",")]
    counts = [sections] if isinstance(sections, int) else list(sections)
    size, extra = divmod(steps, len(counts))
    chosen: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        length = size + (i < extra)
        if not 1 <= count <= length:
            raise ValueError(f"space_timesteps: cannot take {count} of a section of {length} steps")
        gap = 1.0 if count == 1 else (length - 1) / (count - 1)
        position = 0.0
        for _ in range(count):
            chosen.append(start + round(position))
            position += gap  # accumulated, not multiplied: published samples round like this
        start += length
    return tuple(sorted(set(chosen)))


def _number(text: str, given: str) -> int:
    if not text.strip().isdigit():
        raise ValueError(f"space_timesteps: expected '50', '10,20' or 'ddim50', got {given!r}")
    return int(text)


class Diffusion:
    """q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I) in discrete steps, noise prediction.

    Coefficients are computed in float64 and used in float32, step indices count 0..T-1 towards
    noise.

    Args:
        betas: (T,) noise added by each step, in (0, 1).
        timesteps: (T,) what the network is told at each step; None: 0..T-1.
        variance: "learned-range": the second half of the network's channels interpolates between
            the logarithms of the posterior variance (-1) and of beta (1); or a fixed variance, beta
            ("fixed-large") or the posterior's ("fixed-small").

    Raises:
        ValueError: betas outside (0, 1), or another number of timesteps.

    Example:
        >>> from effformer.flow import Diffusion
        >>> Diffusion.linear(respacing="4").timesteps
        (0, 333, 666, 999)

    Reference: Improved Denoising Diffusion Probabilistic Models, 2021, arXiv 2102.09672; Scalable
    Diffusion Models with Transformers, 2022, arXiv 2212.09748.
    """

    def __init__(
        self,
        betas: Tensor,
        timesteps: Sequence[int] | None = None,
        variance: Variance = "learned-range",
    ) -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.dim() != 1 or not len(betas) or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError("Diffusion: betas is a vector of numbers strictly between 0 and 1")
        self.betas = betas
        self.timesteps = tuple(range(len(betas))) if timesteps is None else tuple(timesteps)
        if len(self.timesteps) != len(betas):
            raise ValueError(f"Diffusion: {len(betas)} betas, {len(self.timesteps)} timesteps")
        self.variance: Variance = variance
        self.alphas_cumprod = torch.cumprod(1 - betas, 0)
        self._previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        self._posterior = betas * (1 - self._previous) / (1 - self.alphas_cumprod)
        # the posterior of step 0 has no variance; its logarithm is that of step 1
        clipped = torch.cat([self._posterior[1:2], self._posterior[1:]])
        self._log_posterior = torch.log(clipped if len(betas) > 1 else betas)
        self._large = torch.cat([self._posterior[1:2], betas[1:]]) if len(betas) > 1 else betas

    @classmethod
    def linear(
        cls,
        steps: int = 1000,
        respacing: int | str | Sequence[int] | None = None,
        variance: Variance = "learned-range",
    ) -> Diffusion:
        """DiT's process: betas from 1e-4 to 2e-2 (times 1000 / steps), optionally respaced.

        Raises:
            ValueError: 20 steps or fewer, or a respacing that does not fit.
        """
        if steps <= 20:
            raise ValueError(
                f"Diffusion.linear: a process of {steps} steps would need betas of 1 and more; "
                f"respace a longer one: Diffusion.linear(1000, '{steps}')"
            )
        scale = 1000 / steps
        full = cls(
            torch.linspace(scale * 1e-4, scale * 2e-2, steps, dtype=torch.float64),
            variance=variance,
        )
        return full if respacing is None else full.respace(space_timesteps(steps, respacing))

    @classmethod
    def from_path(cls, path: DDPM, variance: Variance = "learned-range") -> Diffusion:
        """The discrete process that a `DDPM` path passes through."""
        t = 1 - torch.arange(path.steps + 1, dtype=torch.float64) / path.steps
        return cls(-torch.expm1(2 * path.log_alpha(t).diff()), variance=variance)

    def respace(self, keep: Sequence[int]) -> Diffusion:
        """The process through some of the steps: betas from ratios of kept abar, labels kept."""
        kept = self.alphas_cumprod[list(keep)]
        before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        return Diffusion(1 - kept / before, [self.timesteps[i] for i in keep], self.variance)

    def __len__(self) -> int:
        return len(self.betas)

    def q_sample(self, x0: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar) x0 + sqrt(1 - abar) noise at the steps (B,)."""
        abar = self.alphas_cumprod
        return self._at(abar.sqrt(), step, x0) * x0 + self._at((1 - abar).sqrt(), step, x0) * noise

    def p_mean_variance(
        self, network: Network, x: Tensor, step: Tensor, *, clip: bool = False, **cond: Any
    ) -> PosteriorMean:
        """What the network expects one step before.

        Args:
            network: called as ``network(x, label, **cond)`` with the original labels of the steps
                (B,).
            x: x_t (B, C, ...).
            step: indices (B,) in 0..T-1.
            clip: keep the expected data in [-1, 1].
            cond: conditions.
        """
        return self._posterior_of(network(x, self._labels(step), **cond), x, step, clip)

    def training_losses(
        self, network: Network, x0: Tensor, step: Tensor, noise: Tensor, **cond: Any
    ) -> DiffusionLoss:
        """Mean squared error of the noise, plus the variational bound of a learned variance.

        The noise prediction is detached inside the bound, so that the bound trains the variance
        alone.

        Args:
            network: called as ``network(x_t, label, **cond)``.
            x0: data (B, C, ...).
            step: indices (B,).
            noise: standard normal, the shape of x0.
            cond: conditions.
        """
        x = self.q_sample(x0, step, noise)
        out = network(x.to(x0.dtype), self._labels(step), **cond)
        eps = self._split(out, x)[0]
        mse = (noise - eps).square().flatten(1).mean(1)
        if self.variance != "learned-range":
            return DiffusionLoss(mse, mse, None, x)
        frozen = torch.cat([eps.detach(), self._split(out, x)[1]], dim=1)
        vb = self._bound(self._posterior_of(frozen, x, step, False), x0, x, step)
        return DiffusionLoss(mse + vb, mse, vb, x)

    def ddim_step(
        self,
        network: Network,
        x: Tensor,
        step: Tensor,
        *,
        eta: float = 0.0,
        noise: Tensor | None = None,
        clip: bool = False,
        **cond: Any,
    ) -> Tensor:
        """One DDIM step from x_t to x_{t-1}; eta 0 is deterministic, eta 1 as noisy as DDPM.

        Reference: Denoising Diffusion Implicit Models, 2020, arXiv 2010.02502.
        """
        if eta and noise is None:
            raise ValueError(f"ddim_step: eta={eta} needs noise of the shape of x")
        expected = self.p_mean_variance(network, x, step, clip=clip, **cond).data
        abar, before = self.alphas_cumprod, self._previous
        sigma = eta * ((1 - before) / (1 - abar) * (1 - abar / before)).sqrt()
        eps = self._at((1 / abar).sqrt(), step, x) * x - expected
        eps = eps / self._at((1 / abar - 1).sqrt(), step, x)
        mean = self._at(before.sqrt(), step, x) * expected
        mean = mean + self._at((1 - before - sigma**2).clamp_min(0).sqrt(), step, x) * eps
        return mean if noise is None else mean + self._at(sigma, step, x) * noise

    def ancestral_step(
        self,
        network: Network,
        x: Tensor,
        step: Tensor,
        noise: Tensor,
        *,
        clip: bool = False,
        **cond: Any,
    ) -> Tensor:
        """One DDPM step: a draw from p(x_{t-1} | x_t); no noise is added at step 0."""
        out = self.p_mean_variance(network, x, step, clip=clip, **cond)
        return out.mean + expand(step != 0, x) * torch.exp(0.5 * out.log_variance) * noise

    def sample(
        self,
        network: Network,
        x: Tensor,
        *,
        method: Literal["ddim", "ancestral"] = "ancestral",
        eta: float = 0.0,
        generator: torch.Generator | None = None,
        clip: bool = False,
        progress: Progress | None = None,
        **cond: Any,
    ) -> Tensor:
        """Run the whole process from noise x (B, C, ...), without gradients.

        Args:
            network: called as ``network(x, label, **cond)``. Guidance: wrap `forward_with_cfg`.
            x: standard normal noise, of the network's dtype. The state is float32 at least.
            method: "ddim" or "ancestral".
            eta: noise of DDIM.
            generator: randomness.
            clip: keep the expected data in [-1, 1].
            progress: called with (steps done, steps in all).
            cond: conditions.

        Raises:
            ValueError: unknown method.
        """
        if method not in ("ddim", "ancestral"):
            raise ValueError(
                f"Diffusion.sample: unknown method {method!r} (choices: ddim, ancestral)"
            )
        dtype, x = x.dtype, widened(x)

        def asked(state: Tensor, label: Tensor, **cond: Any) -> Tensor:
            return network(state.to(dtype), label, **cond)

        with torch.no_grad():
            for index in reversed(range(len(self))):
                step = torch.full((x.shape[0],), index, device=x.device)
                noise = None
                if method == "ancestral" or eta:
                    source = x.device if generator is None else generator.device
                    noise = torch.randn(x.shape, generator=generator, device=source).to(x)
                if method == "ddim":
                    x = self.ddim_step(asked, x, step, eta=eta, noise=noise, clip=clip, **cond)
                elif noise is not None:
                    x = self.ancestral_step(asked, x, step, noise, clip=clip, **cond)
                if progress is not None:
                    progress(len(self) - index, len(self))
        return x.to(dtype)

    def _at(self, values: Tensor, step: Tensor, x: Tensor) -> Tensor:
        chosen = values.to(step.device)[step]
        return expand(chosen.to(torch.promote_types(x.dtype, torch.float32)), x)

    def _labels(self, step: Tensor) -> Tensor:
        if step.is_floating_point():
            raise TypeError(
                f"Diffusion: steps are integer indices 0..{len(self) - 1}, got {step.dtype}"
            )
        return torch.tensor(self.timesteps, device=step.device)[step]

    def _split(self, out: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        learned = self.variance == "learned-range"
        channels = x.shape[1] * (2 if learned else 1)
        if out.shape[1] != channels:
            raise ValueError(
                f"Diffusion: variance={self.variance!r} expects {channels} channels for x "
                f"{tuple(x.shape)}, the network answered {tuple(out.shape)}"
            )
        out = widened(out)
        return (out[:, : x.shape[1]], out[:, x.shape[1] :])

    def _posterior_of(self, out: Tensor, x: Tensor, step: Tensor, clip: bool) -> PosteriorMean:
        eps, logits = self._split(out, x)
        recip = 1 / self.alphas_cumprod
        expected = self._at(recip.sqrt(), step, x) * x - self._at((recip - 1).sqrt(), step, x) * eps
        expected = expected.clamp(-1, 1) if clip else expected
        mean = self._posterior_mean(expected, x, step)
        if self.variance == "learned-range":
            low, high = self._at(self._log_posterior, step, x), self._at(self.betas.log(), step, x)
            fraction = (logits + 1) / 2
            log_variance = fraction * high + (1 - fraction) * low
        else:
            fixed = self._large.log() if self.variance == "fixed-large" else self._log_posterior
            log_variance = self._at(fixed, step, x).expand_as(mean)
        return PosteriorMean(mean, log_variance.exp(), log_variance, expected)

    def _posterior_mean(self, x0: Tensor, x: Tensor, step: Tensor) -> Tensor:
        abar, before = self.alphas_cumprod, self._previous
        of_data = self.betas * before.sqrt() / (1 - abar)
        of_x = (1 - before) * (1 - self.betas).sqrt() / (1 - abar)
        return self._at(of_data, step, x) * x0 + self._at(of_x, step, x) * x

    def _bound(self, model: PosteriorMean, x0: Tensor, x: Tensor, step: Tensor) -> Tensor:
        """KL of posterior and model in bits per dimension; at step 0 the decoder's likelihood."""
        mean, log_variance = (
            self._posterior_mean(x0, x, step),
            self._at(self._log_posterior, step, x),
        )
        kl = 0.5 * (
            model.log_variance - log_variance - 1
            + torch.exp(log_variance - model.log_variance)
            + (mean - model.mean).square() * torch.exp(-model.log_variance)
        )  # fmt: skip
        decoder = -_discretized_log_likelihood(x0, model.mean, 0.5 * model.log_variance)
        bits = torch.where(expand(step == 0, x), decoder, kl) / math.log(2)
        return bits.flatten(1).mean(1)


def _discretized_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability of the bin x +- 1/255 under a Gaussian; the outer bins are open."""
    centred, inverse = x - mean, torch.exp(-log_scale)
    upper = _normal_cdf(inverse * (centred + 1 / 255))
    lower = _normal_cdf(inverse * (centred - 1 / 255))
    inner = (upper - lower).clamp_min(1e-12).log()
    first, last = upper.clamp_min(1e-12).log(), (1 - lower).clamp_min(1e-12).log()
    return torch.where(x < -0.999, first, torch.where(x > 0.999, last, inner))


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation with which the published variances were trained."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
