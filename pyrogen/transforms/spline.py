"""Monotone rational-quadratic splines: on the line, on an interval, on the circle."""

__all__ = ["BoundedSpline", "CircularSpline", "RationalQuadratic"]

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from .base import Bijection
from .univariate import Univariate


@dataclass(frozen=True)
class RationalQuadratic(Univariate):
    r"""Monotone splines of ratios of quadratics on ``[-bound, bound]``, the identity outside.

    The derivative is continuous. From data to noise, with :math:`\xi \in [0, 1]` the place within
    a bin of slope :math:`s`, and :math:`d_0, d_1` the derivatives at its ends, the height within
    the bin is

    .. math:: \eta = \frac{s\xi^2 + d_0\,\xi(1-\xi)}
        {s(\xi^2 + (1-\xi)^2) + (d_0 + d_1)\,\xi(1-\xi)}.

    For draws, the odds :math:`r = \xi / (1 - \xi)` solve :math:`s(1-\eta)r^2 + br - s\eta = 0`
    with :math:`b = d_0(1-\eta) - d_1\eta`. The discriminant :math:`b^2 + 4s^2\eta(1-\eta)` adds
    what is not negative, so it has a root in any precision, and that root is only ever added to
    :math:`|b|`. What is left is the rounding of the knots: in single precision unit-scale
    parameters invert to 2e-5.

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
        _check(self, self.bins, self.bound)

    @property
    def parameters(self) -> int:
        return 3 * self.bins - 1

    def __call__(self, params: Tensor) -> Bijection:
        sizes, slopes = params.split([2 * self.bins, self.bins - 1], dim=-1)
        slopes = F.pad(slopes, (1, 1))  # of zeros, for slope 1: meets the identity of the tails
        return _Spline(sizes, slopes, self.bound).inv


@dataclass(frozen=True)
class BoundedSpline(Univariate):
    """Splines of ``[-bound, bound]`` onto itself, whose slopes at both ends are free.

    For features that live on an interval, with mass up to its borders: a spline that is the
    identity outside must have slope 1 there. Values that rounding put beyond an end move along
    the line with the slope of that end.

    Args:
        bins: Number of bins, at least 2. A feature has ``3 * bins + 1`` parameters.
        bound: Half width of the interval, in units of ``x``.

    References:
        Durkan, Bekasov, Murray, Papamakarios. Neural Spline Flows. NeurIPS 2019.
        arXiv:1906.04032

    Example:
        >>> family = BoundedSpline(bins=4, bound=1.0)
        >>> spline = family(torch.randn(family.parameters))
        >>> spline(torch.tensor([-1.0, 1.0]))
        tensor([-1.,  1.])
    """

    bins: int = 8
    bound: float = 1.0

    def __post_init__(self) -> None:
        _check(self, self.bins, self.bound)

    @property
    def parameters(self) -> int:
        return 3 * self.bins + 1

    def __call__(self, params: Tensor) -> Bijection:
        sizes, slopes = params.split([2 * self.bins, self.bins + 1], dim=-1)
        return _Spline(sizes, slopes, self.bound, domain=_interval(self.bound)).inv


@dataclass(frozen=True)
class CircularSpline(Univariate):
    r"""Splines of the circle :math:`[-\pi, \pi)`, followed by a turn.

    The slopes at both ends are one and the same, so the density has no seam; the turn
    moves the point that the spline holds fixed. Angles may be given modulo :math:`2\pi`.

    Args:
        bins: Number of bins, at least 2. A feature has ``3 * bins + 1`` parameters.

    References:
        Rezende, Papamakarios, Racaniere, Albergo, Kanwar, Shanahan, Cranmer. Normalizing Flows
        on Tori and Spheres. ICML 2020. arXiv:2002.02428

    Example:
        >>> family = CircularSpline(bins=4)
        >>> spline = family(torch.randn(family.parameters))
        >>> a, b = spline(torch.tensor([0.5, 0.5 - 2 * torch.pi]))
        >>> torch.allclose(a, b, atol=1e-5)
        True
    """

    bins: int = 8

    def __post_init__(self) -> None:
        _check(self, self.bins, math.pi)

    @property
    def parameters(self) -> int:
        return 3 * self.bins + 1

    def __call__(self, params: Tensor) -> Bijection:
        sizes, slopes, turn = params.split([2 * self.bins, self.bins, 1], dim=-1)
        slopes = torch.cat([slopes, slopes[..., :1]], dim=-1)
        spline = _Spline(sizes, slopes, math.pi, domain=_interval(math.pi))
        return _Circular(spline.inv, turn.squeeze(-1))


def _check(family: Univariate, bins: int, bound: float) -> None:
    name = type(family).__name__
    if not 2 <= bins <= 256:
        raise ValueError(f"{name} expected 2 to 256 bins, got {bins}. Eight is common.")
    if not 0 < bound < math.inf:
        raise ValueError(f"{name} expected a positive bound, got {bound}. Try 5.")


def _interval(bound: float) -> constraints.Constraint:
    return constraints.interval(-bound, bound)


# Bins differ by a factor of 100 at most, and slopes from 1 too. With the gain of 0.6 below this
# is what keeps single precision: unit-scale parameters invert to 2e-5, any others to no NaN.
_RANGE = math.log(100)


def _positive(x: Tensor, limit: float) -> Tensor:
    """``exp(0.6 x)`` near 0, kept smoothly within a factor of ``exp(limit)`` of 1."""
    x = 0.6 * x
    return (x / (1 + ((1 + x.square()).sqrt() - 1) / limit)).exp()


class _Spline(Bijection):
    """The spline of raw ``sizes``, all widths and then all heights, and raw slopes at knots.

    Most time goes into what touches every bin, so little does: knots stay unscaled sums
    until those of one bin are picked, in one gather; slopes are picked before they are squashed.
    """

    def __init__(
        self,
        sizes: Tensor,
        slopes: Tensor,
        bound: float,
        *,
        domain: constraints.Constraint = constraints.real,
    ) -> None:
        super().__init__(sizes.shape[:-1])
        self.bins = sizes.shape[-1] // 2
        sizes = _positive(sizes, _RANGE / 2).unflatten(-1, (2, self.bins))
        self.sums = sizes.cumsum(-1).flatten(-2)
        self.slopes = slopes
        self.bound = bound
        self.domain = self.codomain = domain

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        at = x.clamp(-self.bound, self.bound)  # before the maths: no NaN from unused branches
        x0, x1, y0, y1, d0, d1 = self._bin(at, self.sums[..., : self.bins])
        width, height = x1 - x0, y1 - y0
        slope = height / width
        xi, co = (at - x0) / width, (x1 - at) / width
        below = _below(xi, co, slope, d0, d1)
        y = y0 + height * xi * (slope * xi + d0 * co) / below
        ladj = _log_slope(xi, co, slope, d0, d1, below)
        return self._beyond(x, at, y, ladj), ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        at = y.clamp(-self.bound, self.bound)
        x0, x1, y0, y1, d0, d1 = self._bin(at, self.sums[..., self.bins :])
        width, height = x1 - x0, y1 - y0
        slope = height / width
        eta, co_eta = (at - y0) / height, (y1 - at) / height
        b = d0 * co_eta - d1 * eta
        lower = b >= 0
        root = (b * b + 4 * slope * slope * eta * co_eta).sqrt()
        large = torch.where(lower, b, -b) + root  # not b.abs(), which has no slope at 0
        small = 2 * slope * torch.where(lower, eta, co_eta)
        xi = torch.where(lower, small, large) / (small + large)
        co = torch.where(lower, large, small) / (small + large)
        ladj = -_log_slope(xi, co, slope, d0, d1, _below(xi, co, slope, d0, d1))
        return self._beyond(y, at, x0 + width * xi, ladj), ladj

    def _bin(self, at: Tensor, sums: Tensor) -> tuple[Tensor, ...]:
        """Ends of the bin that holds ``at``, in x and in y, and the derivatives there."""
        sums = sums.detach()  # a choice of bin has no derivative
        knots = self._scaled(sums[..., :-1], sums[..., -1:])
        index = (at.unsqueeze(-1) >= knots).sum(-1, keepdim=True)
        left, last = (index - 1).clamp(min=0), torch.full_like(index, self.bins - 1)
        row = torch.cat([left, index, last], dim=-1)
        shape = (*index.shape[:-1], -1)
        ends = self.sums.expand(shape).gather(-1, torch.cat([row, row + self.bins], dim=-1))
        x0, x1, width, y0, y1, height = ends.unbind(-1)
        inner = (index > 0).squeeze(-1).to(x0)  # the first bin starts at a sum of nothing
        d0, d1 = self.slopes.expand(shape).gather(-1, torch.cat([index, index + 1], -1)).unbind(-1)
        return (
            self._scaled(x0 * inner, width),
            self._scaled(x1, width),
            self._scaled(y0 * inner, height),
            self._scaled(y1, height),
            _positive(d0, _RANGE),
            _positive(d1, _RANGE),
        )

    def _scaled(self, sums: Tensor, total: Tensor) -> Tensor:
        return 2 * self.bound * (sums / total) - self.bound  # exact at both ends

    def _beyond(self, x: Tensor, at: Tensor, y: Tensor, ladj: Tensor) -> Tensor:
        """Replace ``y`` by a straight line for ``x`` beyond the interval."""
        if self.domain is constraints.real:  # of slope 1
            return torch.where(x == at, y, x)
        return torch.where(x == at, y, y + (x - at) * ladj.exp())


def _below(xi: Tensor, co: Tensor, slope: Tensor, d0: Tensor, d1: Tensor) -> Tensor:
    return slope * (xi * xi + co * co) + (d0 + d1) * xi * co


def _log_slope(
    xi: Tensor, co: Tensor, slope: Tensor, d0: Tensor, d1: Tensor, below: Tensor
) -> Tensor:
    above = d1 * xi * xi + 2 * slope * xi * co + d0 * co * co
    return (above * (slope / below).square()).log()


class _Circular(Bijection):
    """A spline of the circle, then a turn."""

    def __init__(self, spline: Bijection, turn: Tensor) -> None:
        super().__init__(spline.batch_shape)
        self.spline = spline
        self.turn = turn
        self.domain = self.codomain = spline.domain

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self.spline.call_and_ladj(_wrap(x))
        return _wrap(y + self.turn), ladj

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self.spline.inverse_and_ladj(_wrap(y - self.turn))
        return _wrap(x), ladj


def _wrap(angle: Tensor) -> Tensor:
    r"""The same angle within :math:`[-\pi, \pi)`; where it is there already, the very same."""
    turns = torch.floor((angle + math.pi) / (2 * math.pi))
    return (angle - 2 * math.pi * turns).clamp(-math.pi, math.pi)


SPLINE = RationalQuadratic()  # the default of recipes
