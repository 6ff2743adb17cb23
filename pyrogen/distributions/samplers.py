r"""Reverse-time samplers: from noise to data, given a denoiser.

All work in variance-exploding units, :math:`x_\sigma = x + \sigma\varepsilon`, where the
denoiser :math:`D(x_\sigma, \sigma) = \mathbb E[x \mid x_\sigma]` gives the score
:math:`(D - x_\sigma)/\sigma^2`, the predicted noise
:math:`\hat\varepsilon = (x_\sigma - D)/\sigma` and the probability-flow ODE
:math:`\mathrm dx/\mathrm d\sigma = \hat\varepsilon`. A sampler is an object:
``sampler(denoise, noise, low, high)`` carries ``noise`` from the level ``high`` to the level
``low``, row by row, so that a draw never depends on its batch mates.
"""

__all__ = ["Ancestral", "Denoise", "FrozenScore", "Heun", "Multistep", "Sampler"]

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..paths import OU

Denoise = Callable[[Tensor, Tensor], Tensor]
"""Map ``(x_sigma, sigma)`` to the expected data; ``sigma`` is a scalar tensor."""


@dataclass(frozen=True)
class Sampler(ABC):
    r"""A solver of the reverse process on the grid that is uniform in :math:`\sigma^{1/\rho}`.

    Args:
        steps: Number of steps.
        rho: Exponent of the grid; larger puts more steps at low noise.
    """

    deterministic: ClassVar[bool]

    steps: int
    rho: float = field(default=7.0, kw_only=True)

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.steps < 1:
            raise ValueError(f"{name} expected steps >= 1, got {self.steps}.")
        if not self.rho > 0:
            raise ValueError(f"{name} expected rho > 0, got {self.rho}.")

    @abstractmethod
    def __call__(self, denoise: Denoise, noise: Tensor, low: float, high: float) -> Tensor:
        """Carry ``noise``, of any shape, from the level ``high`` to the level ``low``."""

    def grid(self, low: float, high: float) -> Tensor:
        """Noise levels from ``high`` to ``low``, shape ``(steps + 1,)``, in double precision.

        Raises:
            ValueError: If not 0 < low < high.
        """
        if not 0 < low < high:
            raise ValueError(
                f"{type(self).__name__} expected noise levels 0 < low < high, got low={low} and "
                f"high={high}."
            )
        fraction = torch.linspace(0, 1, self.steps + 1, dtype=torch.float64)
        start, stop = high ** (1 / self.rho), low ** (1 / self.rho)
        return (start + (stop - start) * fraction) ** self.rho


@dataclass(frozen=True)
class Multistep(Sampler):
    r"""Exponential Adams-Bashforth in the predicted noise: the default.

    Solves :math:`x_s = x_t + \int \hat\varepsilon\, e^\lambda \,\mathrm d\lambda` with
    :math:`\lambda = \log\sigma`: the exponential exactly, and
    :math:`\hat\varepsilon` by the polynomial through its last ``order`` values. Deterministic. The
    first steps have fewer values to use, which is harmless where noise swamps the data.

    Cost: one call of the denoiser per step.

    Args:
        steps: Number of steps.
        order: Order of convergence, from 1 (which is DDIM) to 4.
        rho: Exponent of the grid; larger puts more steps at low noise.

    References:
        Lu, Zhou, Bao, Chen, Li, Zhu. DPM-Solver: a fast ODE solver for diffusion probabilistic
        model sampling in around 10 steps. NeurIPS 2022. arXiv:2206.00927
        Zhang, Chen. Fast sampling of diffusion models with exponential integrator. ICLR 2023.
        arXiv:2204.13902

    Example:
        >>> standard_normal = lambda x, sigma: x / (1 + sigma**2)
        >>> noise = torch.full((1,), 80.0)
        >>> x = Multistep(40)(standard_normal, noise, 2e-3, 80.0)
        >>> round(x.item(), 3)  # the exact flow shrinks by sqrt(1 + 80**2)
        1.0
    """

    deterministic = True

    steps: int = 20
    order: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.order <= 4:
            raise ValueError(f"Multistep expected an order from 1 to 4, got {self.order}.")

    def __call__(self, denoise: Denoise, noise: Tensor, low: float, high: float) -> Tensor:
        levels = self.grid(low, high)
        x, seen = noise, deque[Tensor](maxlen=self.order)  # newest first
        for i, sigma in enumerate(levels[:-1].to(noise)):
            seen.appendleft((x - denoise(x, sigma)) / sigma)
            nodes = levels[max(0, i + 1 - self.order) : i + 2].log().flip(0).tolist()
            for weight, eps in zip(_adams_weights(nodes), seen, strict=True):
                x = x + weight * eps
        return x


def _adams_weights(nodes: Sequence[float]) -> list[float]:
    """Integrals of e^u times each Lagrange polynomial, from ``nodes[1]`` to ``nodes[0]``.

    The polynomials are one at one of ``nodes[1:]`` and zero at the others. Gauss-Legendre is exact
    to rounding here, and loses nothing when the nodes are close.
    """
    target, current, *_ = nodes
    points, weights = np.polynomial.legendre.leggauss(20)
    u = current + (target - current) * (points + 1) / 2
    weights = weights * (target - current) / 2 * np.exp(u)
    integrals = []
    for j in nodes[1:]:
        basis = np.ones_like(u)
        for k in nodes[1:]:
            if k != j:
                basis = basis * (u - k) / (j - k)
        integrals.append(float((weights * basis).sum()))
    return integrals


@dataclass(frozen=True)
class Heun(Sampler):
    """Second-order Runge-Kutta in the noise level. Deterministic.

    Cost: two calls of the denoiser per step.

    Args:
        steps: Number of steps.
        rho: Exponent of the grid; larger puts more steps at low noise.

    References:
        Karras, Aittala, Aila, Laine. Elucidating the design space of diffusion-based generative
        models. NeurIPS 2022. arXiv:2206.00364

    Example:
        >>> standard_normal = lambda x, sigma: x / (1 + sigma**2)
        >>> Heun(400)(standard_normal, torch.full((1,), 5.0), 1e-3, 5.0)
        tensor([0.9806])
    """

    deterministic = True

    steps: int = 20

    def __call__(self, denoise: Denoise, noise: Tensor, low: float, high: float) -> Tensor:
        x = noise
        for sigma, lower in pairwise(self.grid(low, high).to(noise)):
            slope = (x - denoise(x, sigma)) / sigma
            guess = x + (lower - sigma) * slope
            x = x + (lower - sigma) * (slope + (guess - denoise(guess, lower)) / lower) / 2
        return x


@dataclass(frozen=True)
class Ancestral(Sampler):
    r"""The denoising diffusion chain: the denoised value is held over each step.

    .. math:: x_s = D + \sqrt{\sigma_s^2 - \tau^2}\,\hat\varepsilon + \tau\xi, \qquad
        \tau^2 = \eta^2 \sigma_s^2 (1 - \sigma_s^2/\sigma_t^2)

    Stochastic for :math:`\eta = 1` (DDPM); :math:`\eta = 0` is DDIM, of order one.

    Cost: one call of the denoiser per step.

    Args:
        steps: Number of steps.
        eta: Amount of fresh noise, from 0 to 1.
        rho: Exponent of the grid; larger puts more steps at low noise.

    References:
        Ho, Jain, Abbeel. Denoising diffusion probabilistic models. NeurIPS 2020. arXiv:2006.11239
        Song, Meng, Ermon. Denoising diffusion implicit models. ICLR 2021. arXiv:2010.02502

    Example:
        >>> standard_normal = lambda x, sigma: x / (1 + sigma**2)
        >>> x = Ancestral(100)(standard_normal, 5 * torch.randn(10_000), 1e-3, 5.0)
        >>> bool((x.std() - 1).abs() < 0.05)
        True
    """

    deterministic = False

    steps: int = 100
    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.eta <= 1:
            raise ValueError(f"Ancestral expected eta from 0 to 1, got {self.eta}.")

    def __call__(self, denoise: Denoise, noise: Tensor, low: float, high: float) -> Tensor:
        x = noise
        for sigma, lower in pairwise(self.grid(low, high).to(noise)):
            clean = denoise(x, sigma)
            fresh = self.eta * lower * (1 - (lower / sigma).square()).sqrt()
            kept = (lower.square() - fresh.square()).sqrt() / sigma
            x = clean + kept * (x - clean) + fresh * torch.randn_like(x)
        return x


@dataclass(frozen=True)
class FrozenScore(Sampler):
    r"""The reverse SDE of an Ornstein-Uhlenbeck path, its score held over each step.

    .. math:: \mathrm dY = [Y + g^2 \nabla\log p(Y)]\,\mathrm ds + g\,\mathrm dB

    Between two evaluations of the score the equation is linear and solved exactly
    (:meth:`~pyrogen.paths.OU.frozen_step`). Stochastic, of weak order one.

    Cost: one call of the denoiser per step.

    Args:
        steps: Number of steps.
        path: The Ornstein-Uhlenbeck path; its horizon must reach the highest noise level.
        rho: Exponent of the grid; larger puts more steps at low noise.

    Raises:
        ValueError: If the horizon of ``path`` ends before the noise level asked for.

    References:
        Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole. Score-based generative modeling through
        stochastic differential equations. ICLR 2021. arXiv:2011.13456

    Example:
        >>> standard_normal = lambda x, sigma: x / (1 + sigma**2)
        >>> x = FrozenScore(200)(standard_normal, 5 * torch.randn(10_000), 1e-3, 5.0)
        >>> bool((x.std() - 1).abs() < 0.05)
        True
    """

    deterministic = False

    steps: int = 200
    path: OU = field(default_factory=OU)

    def __call__(self, denoise: Denoise, noise: Tensor, low: float, high: float) -> Tensor:
        levels = self.grid(low, high)
        reach = self.path.ratio(levels.new_ones(())).item()
        if high > reach * (1 + 1e-6):
            raise ValueError(
                f"FrozenScore starts at noise level {high:g}, but {self.path} ends at {reach:g}. "
                "Lengthen its horizon."
            )
        times = self.path.time(levels)
        alphas = self.path(times)[0]
        x = alphas[0].to(noise) * noise  # the path's own units
        for i, (t, s) in enumerate(pairwise(times)):
            alpha, sigma = (v.to(noise) for v in self.path(t))
            score = (alpha * denoise(x / alpha, levels[i].to(noise)) - x) / sigma.square()
            growth, gain, fresh = (v.to(noise) for v in self.path.frozen_step(t, s))
            x = growth * x + gain * score + fresh * torch.randn_like(x)
        return x / alphas[-1].to(noise)
