"""Gaussian paths from data to noise: one family for diffusions and flow matching."""

__all__ = ["EDM", "OU", "VE", "VP", "Cosine", "GaussianPath", "Linear", "SubVP"]

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class GaussianPath(ABC):
    r"""Noising of data :math:`x` over time :math:`t`, from 0 (data) to 1 (noise).

    .. math:: x_t \mid x \sim \mathcal N(\alpha_t x, \sigma_t^2 I), \qquad
        \mathrm dX = f(t) X \,\mathrm dt + g(t) \,\mathrm dB,

    with :math:`f = \mathrm d\log\alpha / \mathrm dt` and
    :math:`g^2 = \mathrm d\sigma^2 / \mathrm dt - 2 f \sigma^2`. All paths are one path in
    *variance-exploding units*, :math:`x_t / \alpha_t`, at the noise level
    :math:`\sigma_t / \alpha_t`: that is the clock of denoisers and samplers here, and
    :meth:`time` reads it.

    Every method maps a tensor to tensors of its shape and dtype, element by element.

    References:
        Song, Sohl-Dickstein, Kingma, Kumar, Ermon, Poole. Score-based generative modeling through
        stochastic differential equations. ICLR 2021. arXiv:2011.13456
    """

    @abstractmethod
    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        r"""Scales :math:`(\alpha_t, \sigma_t)`."""

    @abstractmethod
    def drift(self, t: Tensor) -> Tensor:
        """Rate f(t), per unit of t."""

    @abstractmethod
    def diffusion(self, t: Tensor) -> Tensor:
        """Squared diffusion g(t)^2, per unit of t."""

    @abstractmethod
    def time(self, ratio: Tensor) -> Tensor:
        r"""Time at which :math:`\sigma_t / \alpha_t` equals ``ratio`` >= 0."""

    def ratio(self, t: Tensor) -> Tensor:
        r"""Noise level :math:`\sigma_t / \alpha_t`, increasing from 0."""
        alpha, sigma = self(t)
        return sigma / alpha


def _positive(owner: object, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"{type(owner).__name__} expected {name} > 0 and finite, got {value}."
            )


def _ordered(owner: object, low: str, a: float, high: str, b: float) -> None:
    if not a < b:
        raise ValueError(
            f"{type(owner).__name__} expected {low} < {high}, got {a} and {b}. Swap them?"
        )


@dataclass(frozen=True)
class OU(GaussianPath):
    r"""Ornstein-Uhlenbeck: :math:`\mathrm dX = -X\,\mathrm ds + g(s)\,\mathrm dB`, s up to T.

    .. math:: \alpha = e^{-s}, \qquad \sigma^2 = \int_0^s e^{-2(s-u)} g^2(u)\,\mathrm du,
        \qquad s = T t,

    with :math:`g^2` going from ``start`` to ``stop`` in a straight line. Only
    :math:`g^2 = 2` leaves the standard normal law unchanged.

    Args:
        horizon: Duration :math:`T`, in units of the relaxation time.
        start: Value of :math:`g^2` at the data.
        stop: Value of :math:`g^2` at the noise.

    Example:
        >>> alpha, sigma = OU(horizon=1.5, start=0.5, stop=3.5)(torch.tensor(1.0))
        >>> sigma**2
        tensor(1.2624)
    """

    horizon: float = 4.4
    start: float = 2.0
    stop: float = 2.0

    def __post_init__(self) -> None:
        _positive(self, horizon=self.horizon, start=self.start, stop=self.stop)

    @property
    def slope(self) -> float:
        return (self.stop - self.start) / self.horizon

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        s = self.horizon * t
        relaxed = -torch.expm1(-2 * s) / 2  # int_0^s e^{-2(s-u)} du
        variance = self.start * relaxed + self.slope * (s - relaxed) / 2
        return torch.exp(-s), variance.sqrt()

    def drift(self, t: Tensor) -> Tensor:
        return torch.full_like(t, -self.horizon)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.horizon * (self.start + (self.stop - self.start) * t)

    def time(self, ratio: Tensor) -> Tensor:
        if self.start == self.stop:
            return torch.log1p(2 * ratio.square() / self.start) / (2 * self.horizon)
        low, high = torch.zeros_like(ratio), torch.ones_like(ratio)
        for _ in range(64):  # bisection: the ratio increases, and no closed form exists
            middle = (low + high) / 2
            below = self.ratio(middle) < ratio
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def frozen_step(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Solve the reverse SDE from ``t`` back to ``s`` exactly, but for a score held fixed.

        .. math:: Y_s = e^h Y_t + b\,\nabla\log p_t(Y_t) + c\,\xi, \qquad
            b = \int_s^t e^{u-s} g^2(u)\,\mathrm du, \qquad
            c^2 = \int_s^t e^{2(u-s)} g^2(u)\,\mathrm du,

        with :math:`h = t - s`, all in the units of ``horizon``.

        Returns:
            The triple :math:`(e^h, b, c)`.
        """
        h = self.horizon * (t - s)
        g2 = self.start + self.slope * self.horizon * t
        gain = torch.expm1(h) * (g2 - self.slope) + self.slope * h
        variance = torch.expm1(2 * h) * (g2 - self.slope / 2) / 2 + self.slope * h / 2
        return torch.exp(h), gain, variance.sqrt()


@dataclass(frozen=True)
class VP(GaussianPath):
    r"""Variance preserving: :math:`\alpha^2 + \sigma^2 = 1`, with a linear rate.

    .. math:: \alpha = e^{-B/2}, \quad \sigma^2 = 1 - e^{-B}, \quad B(t) = \int_0^t \beta,
        \quad \beta(t) = \beta_0 + (\beta_1 - \beta_0) t

    Args:
        start: Rate :math:`\beta_0` at the data.
        stop: Rate :math:`\beta_1` at the noise.

    References:
        Ho, Jain, Abbeel. Denoising diffusion probabilistic models. NeurIPS 2020. arXiv:2006.11239

    Example:
        >>> path = VP()
        >>> alpha, sigma = path(torch.tensor(0.3))
        >>> path.time(sigma / alpha)
        tensor(0.3000)
    """

    start: float = 0.1
    stop: float = 20.0

    def __post_init__(self) -> None:
        _positive(self, start=self.start, stop=self.stop)

    def rate(self, t: Tensor) -> Tensor:
        return self.start + (self.stop - self.start) * t

    def total(self, t: Tensor) -> Tensor:
        return self.start * t + (self.stop - self.start) * t.square() / 2

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        total = self.total(t)
        return torch.exp(-total / 2), (-torch.expm1(-total)).sqrt()

    def drift(self, t: Tensor) -> Tensor:
        return -self.rate(t) / 2

    def diffusion(self, t: Tensor) -> Tensor:
        return self.rate(t)

    def time(self, ratio: Tensor) -> Tensor:
        return self._when(torch.log1p(ratio.square()))

    def _when(self, total: Tensor) -> Tensor:
        # the root of the quadratic without cancellation
        root = (self.start**2 + 2 * (self.stop - self.start) * total).sqrt()
        return 2 * total / (self.start + root)


@dataclass(frozen=True)
class SubVP(VP):
    r"""Sub-variance preserving: :math:`\alpha = e^{-B/2}`, :math:`\sigma = 1 - e^{-B}`.

    Args:
        start: Rate :math:`\beta_0` at the data.
        stop: Rate :math:`\beta_1` at the noise.
    """

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        total = self.total(t)
        return torch.exp(-total / 2), -torch.expm1(-total)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.rate(t) * -torch.expm1(-2 * self.total(t))

    def time(self, ratio: Tensor) -> Tensor:
        return self._when(2 * torch.asinh(ratio / 2))  # the ratio is 2 sinh(B/2)


@dataclass(frozen=True)
class VE(GaussianPath):
    r"""Variance exploding: :math:`\alpha = 1`, :math:`\sigma^2 = s(t)^2 - s(0)^2`, s geometric.

    Args:
        sigma_min: Scale :math:`s(0)`, in units of the data.
        sigma_max: Scale :math:`s(1)`, in units of the data.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        _positive(self, sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        _ordered(self, "sigma_min", self.sigma_min, "sigma_max", self.sigma_max)

    @property
    def growth(self) -> float:
        return 2 * math.log(self.sigma_max / self.sigma_min)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_min * torch.expm1(self.growth * t).sqrt()

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.growth * self.sigma_min**2 * torch.exp(self.growth * t)

    def time(self, ratio: Tensor) -> Tensor:
        return torch.log1p((ratio / self.sigma_min).square()) / self.growth


@dataclass(frozen=True)
class EDM(GaussianPath):
    r"""Noise in proportion to time: :math:`\alpha = 1`, :math:`\sigma = \sigma_{\max} t`.

    Args:
        sigma_max: Standard deviation of the noise at :math:`t = 1`, in units of the data.

    References:
        Karras, Aittala, Aila, Laine. Elucidating the design space of diffusion-based generative
        models. NeurIPS 2022. arXiv:2206.00364
    """

    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        _positive(self, sigma_max=self.sigma_max)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma_max * t

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return 2 * self.sigma_max**2 * t

    def time(self, ratio: Tensor) -> Tensor:
        return ratio / self.sigma_max


@dataclass(frozen=True)
class Cosine(GaussianPath):
    r"""A quarter turn: :math:`\alpha = \cos(\pi t/2)`, :math:`\sigma = \sin(\pi t/2)`.

    References:
        Nichol, Dhariwal. Improved denoising diffusion probabilistic models. ICML 2021.
        arXiv:2102.09672
    """

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # a sine of 1 - t keeps the relative precision that a cosine near pi/2 loses
        return torch.sin(torch.pi / 2 * (1 - t)), torch.sin(torch.pi / 2 * t)

    def drift(self, t: Tensor) -> Tensor:
        return -torch.pi / 2 * self.ratio(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return torch.pi * self.ratio(t)

    def time(self, ratio: Tensor) -> Tensor:
        return 2 / torch.pi * torch.atan(ratio)


@dataclass(frozen=True)
class Linear(GaussianPath):
    r"""Straight lines, as in flow matching: :math:`\alpha = 1 - t`, :math:`\sigma = t`.

    References:
        Lipman, Chen, Ben-Hamu, Nickel, Le. Flow matching for generative modeling. ICLR 2023.
        arXiv:2210.02747
    """

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1 - t, t

    def drift(self, t: Tensor) -> Tensor:
        return -1 / (1 - t)

    def diffusion(self, t: Tensor) -> Tensor:
        return 2 * t / (1 - t)

    def time(self, ratio: Tensor) -> Tensor:
        return 1 / (1 + 1 / ratio)  # right at 0 and at infinity
