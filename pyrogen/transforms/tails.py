"""Increasing maps that change how heavy the tails are."""

__all__ = ["HeavyTails", "SinhArcsinh"]

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import constraints

from .base import Bijection
from .univariate import Univariate, bounded


@dataclass(frozen=True)
class HeavyTails(Univariate):
    r"""Gives Gaussian noise power-law tails, with an index for each side.

    .. math:: x = \mu + \sqrt{\tfrac{\pi}{2}}\, \sigma s\,
        \frac{e^{\lambda_s E(|z|)} - 1}{\lambda_s}, \qquad
        E(z) = -\log \operatorname{erfc}(z / \sqrt 2), \qquad s = \operatorname{sign} z,

    so that a side of standard normal noise is a side of the generalized Pareto law of shape
    :math:`\lambda_s`: :math:`P(|x| > r)` falls as :math:`r^{-1/\lambda_s}`, as Student's law of
    :math:`\nu` degrees of freedom does at :math:`\lambda_s = 1/\nu`. At :math:`\lambda_s = 0` the
    tail is exponential. The slope is continuous, and :math:`\sigma` at the origin.

    A spline flow's tails are those of its noise, whatever its training. Put this layer next to the
    data, with layers that shape the bulk between it and the noise; give splines among them a
    bound of 2 or so, since within their bound they could stand in for the index. The parameters
    of a feature are both indices, the left one first, :math:`\mu` and :math:`\log\sigma`. None
    give the identity: at zero both indices are ``start``.

    Cost: closed form from noise to data; eight evaluations of :math:`E` from data to noise.

    Args:
        start: Index :math:`\lambda` at parameters of zero, within ``(0, limit)``.
        limit: Largest index, which is never reached; from index 1 on a law has no mean.

    References:
        Hickling, Prangle. Flexible Tails for Normalizing Flows. ICML 2025. arXiv:2406.16971

    Example:
        >>> tails = HeavyTails(start=0.5)(torch.zeros(4))
        >>> tails(torch.tensor([-4.0, 0.0, 4.0])).round()
        tensor([-312.,    0.,  312.])
    """

    start: float = 0.1
    limit: float = 1.5

    def __post_init__(self) -> None:
        if not 0 < self.start < self.limit <= 4:
            raise ValueError(
                f"HeavyTails expected 0 < start < limit <= 4, got start={self.start} and "
                f"limit={self.limit}. Try 0.1 and 1.5."
            )

    @property
    def parameters(self) -> int:
        return 4

    def __call__(self, params: Tensor) -> Bijection:
        left, right, shift, log_scale = params.unbind(-1)
        odds = math.log(self.start / (self.limit - self.start))
        left = self.limit * torch.sigmoid(left + odds)
        right = self.limit * torch.sigmoid(right + odds)
        return _HeavyTails(left, right, shift, bounded(log_scale, 5.0))


class _HeavyTails(Bijection):
    domain = constraints.real
    codomain = constraints.real

    def __init__(self, left: Tensor, right: Tensor, shift: Tensor, log_scale: Tensor) -> None:
        super().__init__(left.shape)
        self.left = left
        self.right = right
        self.shift = shift
        self.log_scale = log_scale + math.log(math.pi / 2) / 2

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        negative = x < 0
        index = torch.where(negative, self.left, self.right)
        size = torch.where(negative, -x, x)  # not x.abs(), which has no slope at 0
        exponent, log_hazard = _exponent_and_log_slope(size)
        y = self.log_scale.exp() * exponent * _expm1_ratio(index * exponent)
        ladj = index * exponent + log_hazard + self.log_scale
        return torch.where(negative, -y, y) + self.shift, ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y = (y - self.shift) * torch.exp(-self.log_scale)
        negative = y < 0
        index = torch.where(negative, self.left, self.right)
        size = torch.where(negative, -y, y)
        exponent = size * _log1p_ratio(index * size)
        x, log_hazard = _quantile_and_log_slope(exponent)
        return torch.where(negative, -x, x), -index * exponent - log_hazard - self.log_scale


def _exponent_and_log_slope(z: Tensor) -> tuple[Tensor, Tensor]:
    """``-log P(|noise| > z)`` for z >= 0, and the logarithm of its derivative."""
    ratio = torch.special.erfcx(z / math.sqrt(2))  # which does not underflow
    return 0.5 * z * z - ratio.log(), 0.5 * math.log(2 / math.pi) - ratio.log()


def _quantile_and_log_slope(e: Tensor) -> tuple[Tensor, Tensor]:
    """Solve ``-log P(|noise| > z) = e``; convexity makes Newton's steps from above monotone."""
    with torch.no_grad():
        goal = e.detach()
        z = torch.minimum(
            (2 * goal).sqrt(), math.sqrt(math.pi / 2) * goal
        ).detach()  # above the root
        for _ in range(5):
            value, log_slope = _exponent_and_log_slope(z)
            z = (z - (value - goal) * torch.exp(-log_slope)).clamp(min=0).detach()
    for _ in range(2):  # these carry the derivatives, as in roots.solve
        value, log_slope = _exponent_and_log_slope(z)
        step = (e - value) * torch.exp(-log_slope)
        z = z + (step - step.detach())
    return z, _exponent_and_log_slope(z)[1]


def _expm1_ratio(t: Tensor) -> Tensor:
    """``expm1(t) / t`` for t >= 0, and its limit."""
    small = t < 1e-3
    safe = torch.where(small, 1.0, t)
    series = 1 + t / 2 * (1 + t / 3 * (1 + t / 4 * (1 + t / 5)))
    return torch.where(small, series, torch.expm1(safe) / safe)


def _log1p_ratio(t: Tensor) -> Tensor:
    """``log1p(t) / t`` for t >= 0, and its limit."""
    small = t < 1e-3
    safe = torch.where(small, 1.0, t)
    t = torch.where(small, t, 0.0)
    series = 1 - t * (1 / 2 - t * (1 / 3 - t * (1 / 4 - t * (1 / 5 - t / 6))))
    return torch.where(small, series, torch.log1p(safe) / safe)


@dataclass(frozen=True)
class SinhArcsinh(Univariate):
    r"""Skews, and makes tails heavier or lighter, by one smooth formula.

    .. math:: x = \sinh\Big(\frac{\operatorname{arcsinh} z + \epsilon}{\delta}\Big)

    with skewness :math:`\epsilon` and tail weight :math:`\delta`: below 1 tails are heavier than
    those of the noise, above 1 lighter; they grow as powers of the noise, so Gaussian noise does
    not reach power laws (:class:`HeavyTails` does). Both directions are in closed form.

    Args:
        bound: Largest :math:`|\log \delta|`, reached smoothly; it keeps both directions finite.

    References:
        Jones, Pewsey. Sinh-arcsinh distributions. Biometrika 96(4), 2009.

    Example:
        >>> SinhArcsinh()(torch.zeros(3, 2))(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([-2.,  0.,  2.])
    """

    bound: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.bound <= 3:
            raise ValueError(f"SinhArcsinh expected a bound within (0, 3], got {self.bound}.")

    @property
    def parameters(self) -> int:
        return 2

    def __call__(self, params: Tensor) -> Bijection:
        skewness, log_weight = params.unbind(-1)
        return _SinhArcsinh(bounded(skewness, 5.0), bounded(log_weight, self.bound))


class _SinhArcsinh(Bijection):
    domain = constraints.real
    codomain = constraints.real

    def __init__(self, skewness: Tensor, log_weight: Tensor) -> None:
        super().__init__(skewness.shape)
        self.skewness = skewness
        self.log_weight = log_weight

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        before = torch.asinh(x)
        after = (before + self.skewness) * torch.exp(-self.log_weight)
        return torch.sinh(after), _log_cosh(after) - _log_cosh(before) - self.log_weight

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        after = torch.asinh(y)
        before = after * torch.exp(self.log_weight) - self.skewness
        return torch.sinh(before), _log_cosh(before) - _log_cosh(after) + self.log_weight


def _log_cosh(x: Tensor) -> Tensor:
    return torch.logaddexp(x, -x) - math.log(2)
