"""Monotone rational-quadratic splines."""

__all__ = ["RationalQuadratic"]

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from .base import Bijection
from .univariate import Univariate, bounded


@dataclass(frozen=True)
class RationalQuadratic(Univariate):
    r"""Monotone splines of ratios of quadratics on ``[-bound, bound]``, the identity outside.

    The derivative is continuous. With :math:`\xi \in [0, 1]` the place within a bin of slope
    :math:`s`, and :math:`d_0, d_1` the derivatives at its ends, the height within the bin is

    .. math:: \eta = \frac{s\xi^2 + d_0\,\xi(1-\xi)}
        {s(\xi^2 + (1-\xi)^2) + (d_0 + d_1)\,\xi(1-\xi)}.

    The odds :math:`r = \xi / (1 - \xi)` of its inverse solve :math:`s(1-\eta)r^2 + br - s\eta = 0`
    with :math:`b = d_0(1-\eta) - d_1\eta`. The discriminant :math:`b^2 + 4s^2\eta(1-\eta)` is a
    sum of positive terms, so the inverse neither fails nor cancels in single precision.

    Args:
        bins: Number of bins, at least 2. A feature has ``3 * bins - 1`` parameters.
        bound: Half width of the interval, in units of ``x``.

    References:
        Durkan, Bekasov, Murray, Papamakarios. Neural Spline Flows. NeurIPS 2019.
        arXiv:1906.04032
        Gregory, Delbourgo. Piecewise Rational Quadratic Interpolation to Monotonic Data.
        IMA Journal of Numerical Analysis 2(2), 1982.

    Example:
        >>> family = RationalQuadratic(bins=8)
        >>> spline = family(torch.randn(5, family.parameters))
        >>> x = torch.linspace(-6, 6, 5)
        >>> torch.allclose(spline.inv(spline(x)), x, atol=1e-5)
        True
    """

    bins: int = 8
    bound: float = 5.0

    def __post_init__(self) -> None:
        if not 2 <= self.bins <= 256:
            raise ValueError(
                f"RationalQuadratic expected 2 to 256 bins, got {self.bins}. Eight is common."
            )
        if not 0 < self.bound < math.inf:
            raise ValueError(
                f"RationalQuadratic expected a positive bound, got {self.bound}. Try 5."
            )

    @property
    def parameters(self) -> int:
        return 3 * self.bins - 1

    def __call__(self, params: Tensor) -> Bijection:
        sizes, slopes = params.split([2 * self.bins, self.bins - 1], dim=-1)
        sizes = bounded(sizes / 2, _RANGE / 2).exp().unflatten(-1, (2, self.bins))
        edges = F.pad(sizes.cumsum(-1), (1, 0))
        x, y = (self.bound * (2 * edges / edges[..., -1:] - 1)).unbind(-2)
        slopes = bounded(slopes / 2, _RANGE).exp()
        slopes = F.pad(slopes, (1, 1), value=1.0)  # meets the identity of the tails
        return _Spline(x, y, slopes, self.bound)


# Bins differ by a factor of 100 at most, and slopes from 1 too. With the halved parameters above
# this is what keeps single precision: unit-scale parameters invert to 2e-5, any others to no NaN.
_RANGE = math.log(100)


class _Spline(Bijection):
    domain = constraints.real
    codomain = constraints.real

    def __init__(self, x: Tensor, y: Tensor, slopes: Tensor, bound: float) -> None:
        super().__init__(x.shape[:-1])
        self.x = x
        self.y = y
        self.slopes = slopes
        self.bound = bound

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inside = x.abs() <= self.bound
        at = x.clamp(-self.bound, self.bound)  # before the maths: no NaN from unused branches
        x0, x1, y0, y1, d0, d1 = self._bin(at, self.x)
        width = x1 - x0
        slope = (y1 - y0) / width
        xi, co = (at - x0) / width, (x1 - at) / width
        below = slope * (xi * xi + co * co) + (d0 + d1) * xi * co
        y = y0 + (y1 - y0) * xi * (slope * xi + d0 * co) / below
        ladj = self._log_slope(xi, co, slope, d0, d1, below)
        return torch.where(inside, y, x), ladj  # which is 0 at the clamped ends

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        inside = y.abs() <= self.bound
        at = y.clamp(-self.bound, self.bound)
        x0, x1, y0, y1, d0, d1 = self._bin(at, self.y)
        height = y1 - y0
        slope = height / (x1 - x0)
        eta, co_eta = (at - y0) / height, (y1 - at) / height
        b = d0 * co_eta - d1 * eta
        lower = b >= 0
        root = (b * b + 4 * slope * slope * eta * co_eta).sqrt()
        large = torch.where(lower, b, -b) + root
        small = 2 * slope * torch.where(lower, eta, co_eta)
        xi = torch.where(lower, small, large) / (small + large)
        co = torch.where(lower, large, small) / (small + large)
        below = slope * (xi * xi + co * co) + (d0 + d1) * xi * co
        x = x0 + (x1 - x0) * xi
        ladj = -self._log_slope(xi, co, slope, d0, d1, below)
        return torch.where(inside, x, y), ladj

    def _bin(self, at: Tensor, knots: Tensor) -> tuple[Tensor, ...]:
        """Ends of the bin that holds ``at``, in x and in y, and the derivatives there."""
        index = (at.unsqueeze(-1) >= knots[..., 1:-1]).sum(-1, keepdim=True)
        shape = (*index.shape[:-1], -1)
        ends = []
        for table in (self.x, self.y, self.slopes):
            table = table.expand(shape)
            ends += [table.gather(-1, index).squeeze(-1), table.gather(-1, index + 1).squeeze(-1)]
        return tuple(ends)

    @staticmethod
    def _log_slope(
        xi: Tensor, co: Tensor, slope: Tensor, d0: Tensor, d1: Tensor, below: Tensor
    ) -> Tensor:
        above = d1 * xi * xi + 2 * slope * xi * co + d0 * co * co
        return above.log() + 2 * (slope / below).log()


SPLINE = RationalQuadratic()  # the default of recipes
