r"""Paths from a datum to a draw of noise, and their velocity.

An interpolant gives a point :math:`x_t` between a datum x (t = 0) and noise z (t = 1), and the
velocity :math:`\dot x_t`. The field that flow matching learns is the mean velocity of all paths
through a point, :math:`v(x, t) = \mathbb E[\dot x_t \mid x_t = x]`, and it carries the law of the
noise to that of the data.
"""

__all__ = ["Bridge", "Interpolant", "Stochastic", "Straight", "Trigonometric"]

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor


class Interpolant(ABC):
    """How to go from a datum to noise."""

    @abstractmethod
    def __call__(self, x: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Point and velocity at time ``t``.

        Args:
            x: Data, shape ``(batch, features)``, in standardised units.
            z: Noise, of the shape of ``x``.
            t: Times in (0, 1), shape ``(batch, 1)``.
        """

    def weight(self, t: Tensor) -> Tensor:
        """What an error at time ``t`` counts; any positive weight has the same minimiser."""
        return torch.ones_like(t)


def _at_least_zero(owner: object, name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{type(owner).__name__} expected {name} >= 0, got {value}.")


@dataclass(frozen=True)
class Straight(Interpolant):
    r"""Straight lines: :math:`x_t = (1 - t) x + (t + (1 - t)\sigma_{\min}) z`.

    Args:
        sigma_min: Noise left on the data, in standardised units; it smooths the learned density.

    Raises:
        ValueError: If ``sigma_min`` is negative.

    References:
        Lipman, Chen, Ben-Hamu, Nickel, Le. Flow matching for generative modeling. ICLR 2023.
        arXiv:2210.02747
        Liu, Gong, Liu. Flow straight and fast: learning to generate and transfer data with
        rectified flow. ICLR 2023. arXiv:2209.03003

    Example:
        >>> x_t, velocity = Straight()(torch.zeros(1), torch.ones(1), torch.tensor([0.25]))
        >>> x_t, velocity
        (tensor([0.2500]), tensor([1.]))
    """

    sigma_min: float = 0.0

    def __post_init__(self) -> None:
        _at_least_zero(self, "sigma_min", self.sigma_min)

    def __call__(self, x: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        noise = self.sigma_min + (1 - self.sigma_min) * t
        return (1 - t) * x + noise * z, (1 - self.sigma_min) * z - x


@dataclass(frozen=True)
class Trigonometric(Interpolant):
    r"""A quarter turn: :math:`x_t = \cos(\tfrac\pi2 t)\, x + \sin(\tfrac\pi2 t)\, z`.

    It keeps the variance of standardised data and independent noise at one throughout.

    References:
        Albergo, Vanden-Eijnden. Building normalizing flows with stochastic interpolants. ICLR
        2023. arXiv:2209.15571

    Example:
        >>> x_t, velocity = Trigonometric()(torch.zeros(1), torch.ones(1), torch.tensor([1.0]))
        >>> x_t
        tensor([1.])
    """

    def __call__(self, x: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = torch.pi / 2 * t
        cos, sin = angle.cos(), angle.sin()
        return cos * x + sin * z, torch.pi / 2 * (cos * z - sin * x)


@dataclass(frozen=True)
class Bridge(Interpolant):
    r"""Brownian bridge: :math:`x_t = (1-t)x + tz + \sigma\sqrt{t(1-t)}\,\varepsilon`.

    Its velocity, given both ends, is

    .. math:: \dot x_t = z - x + \frac{1 - 2t}{2t(1-t)}\,\big(x_t - (1-t)x - tz\big),

    of infinite variance at the ends, where a weight of :math:`1/(1 + (1-2t)^2\sigma^2/4t(1-t))`
    keeps the loss and its gradient of finite variance. With
    :class:`SchroedingerBridge` of the same ``sigma`` the field is that of the Schrödinger bridge.

    Args:
        sigma: Standard deviation of the Brownian motion over unit time, in standardised units.

    Raises:
        ValueError: If ``sigma`` is negative.

    References:
        Tong, Malkin, Fatras, Atanackovic, Zhang, Huguet, Wolf, Bengio. Simulation-free
        Schrödinger bridges via score and flow matching. AISTATS 2024. arXiv:2307.03672

    Example:
        >>> x_t, _ = Bridge(0.5)(torch.zeros(9_999, 1), torch.ones(1), torch.tensor([0.5]))
        >>> bool((x_t.mean() - 0.5).abs() < 0.02), bool((x_t.std() - 0.25).abs() < 0.02)
        (True, True)
    """

    sigma: float = 1.0

    def __post_init__(self) -> None:
        _at_least_zero(self, "sigma", self.sigma)

    def __call__(self, x: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        mean, spread = (1 - t) * x + t * z, (t * (1 - t)).sqrt()
        fresh = self.sigma * torch.randn_like(mean)
        return mean + spread * fresh, z - x + (1 - 2 * t) / (2 * spread) * fresh

    def weight(self, t: Tensor) -> Tensor:
        area = 4 * t * (1 - t)
        return area / (area + (self.sigma * (1 - 2 * t)).square())


@dataclass(frozen=True)
class Stochastic(Interpolant):
    r"""Another interpolant, blurred on the way: :math:`x_t + \gamma \sin^2(\pi t)\,\varepsilon`.

    The velocity :math:`\dot x_t + \gamma\pi \sin(2\pi t)\,\varepsilon` is finite at both ends.
    The law of the ends is kept, and that between them gets smoother.

    Args:
        path: What to blur; its own weight stays.
        gamma: Standard deviation of the blur halfway, in standardised units.

    Raises:
        ValueError: If ``gamma`` is negative.

    References:
        Albergo, Boffi, Vanden-Eijnden. Stochastic interpolants: a unifying framework for flows
        and diffusions. 2023. arXiv:2303.08797

    Example:
        >>> x_t, _ = Stochastic(gamma=0.5)(torch.ones(3), torch.zeros(3), torch.zeros(1))
        >>> x_t
        tensor([1., 1., 1.])
    """

    path: Interpolant = field(default_factory=Trigonometric)
    gamma: float = 0.5

    def __post_init__(self) -> None:
        _at_least_zero(self, "gamma", self.gamma)

    def __call__(self, x: Tensor, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x_t, velocity = self.path(x, z, t)
        fresh = self.gamma * torch.randn_like(x_t)
        turn = torch.pi * t
        rate = torch.pi * (2 * turn).sin()
        return x_t + turn.sin().square() * fresh, velocity + rate * fresh

    def weight(self, t: Tensor) -> Tensor:
        return self.path.weight(t)
