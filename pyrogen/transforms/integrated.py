"""Increasing maps that are integrals of positive functions."""

__all__ = ["Integrated", "SumOfSquares"]

import math
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .base import Bijection
from .monotone import Monotone
from .univariate import Univariate, bounded


@dataclass(frozen=True)
class Integrated(Univariate):
    r"""Integrals of a positive network of one hidden layer, whose weights are the parameters.

    .. math:: z = b + \int_0^x g(t)\,dt, \qquad
        \log g(t) = \ell \tanh\Big(\frac{1}{\ell}\Big[v_0 + \sum_j v_j
        \tanh\big(a_j(t - c_j)\big)\Big]\Big), \qquad \ell = \log 100,

    within ``[-bound, bound]``, and with the constant slopes :math:`g(\pm\text{bound})` outside.
    Parameters are kept smoothly within a range in which Gauss-Legendre quadrature with four nodes
    to a unit has a relative error of at most 1e-8, whatever they are. The log-slope is exact.

    Cost: ``4 * hidden ** 2`` units per feature from data to noise; its root from noise to data.

    Args:
        hidden: Number of units. A feature has ``3 * hidden + 2`` parameters.
        bound: Half width of the interval, in units of ``x``.

    References:
        Wehenkel, Louppe. Unconstrained Monotonic Neural Networks. NeurIPS 2019.
        arXiv:1908.05164

    Example:
        >>> family = Integrated(hidden=4)
        >>> net = family(torch.randn(5, family.parameters))
        >>> x = torch.linspace(-6, 6, 5)
        >>> torch.allclose(net(net.inv(x)), x, atol=1e-4)
        True
    """

    hidden: int = 8
    bound: float = 5.0
    rule: "_Rule" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 4 <= self.hidden <= 64:
            raise ValueError(
                f"Integrated expected 4 to 64 hidden units, got {self.hidden}. Eight is common."
            )
        if not 0 < self.bound < math.inf:
            raise ValueError(f"Integrated expected a positive bound, got {self.bound}. Try 5.")
        object.__setattr__(self, "rule", _gauss_legendre(4 * self.hidden))

    @property
    def parameters(self) -> int:
        return 3 * self.hidden + 2

    def __call__(self, params: Tensor) -> Bijection:
        heights, slopes, centers, rest = params.split([*[self.hidden] * 3, 2], dim=-1)
        # Units start apart, a distance of twice their width from one another.
        spread = torch.linspace(-1, 1, self.hidden + 2, dtype=params.dtype, device=params.device)
        spread = spread[1:-1] * self.bound
        width = 2 * self.bound / self.hidden
        net = _Net(
            bounded(heights, 3.0) / math.sqrt(self.hidden),
            bounded(slopes, math.log(2)).exp() / width,
            spread + bounded(centers, self.bound / 2),
            rest[..., :1],
        )
        return _Integral(net, rest[..., 1], self.rule, self.bound)


class _Net:
    """The logarithm of a positive function, from ``(*shape, nodes)`` to the same."""

    def __init__(self, heights: Tensor, slopes: Tensor, centers: Tensor, offset: Tensor) -> None:
        self.heights = heights.unsqueeze(-2)
        self.slopes = slopes.unsqueeze(-2)
        self.centers = centers.unsqueeze(-2)
        self.offset = offset

    def __call__(self, t: Tensor) -> Tensor:
        units = torch.tanh((t.unsqueeze(-1) - self.centers) * self.slopes)
        height = self.offset + (units * self.heights).sum(-1)
        return _LIMIT * torch.tanh(height / _LIMIT)


_LIMIT = math.log(100)


@dataclass(frozen=True)
class SumOfSquares(Univariate):
    r"""Integrals of sums of squared polynomials: all increasing polynomials, and so all maps.

    .. math:: z = b + \int_0^x \Big(\epsilon + \sum_k p_k(t)^2\Big) dt,
        \qquad \epsilon = 0.1,

    with polynomials :math:`p_k` in :math:`t / 3`, since features at unit scale lie within 3. Two
    polynomials suffice for any sum. The integral is exact: a Gauss-Legendre rule of
    ``degree + 1`` nodes is, and unlike expanded powers it adds positive terms only.

    Noise grows as the power ``2 * degree + 1`` of data, so light-tailed data are at home here.

    Cost: ``polynomials * degree ** 2`` products from data to noise; a root from noise to data.

    Args:
        degree: Degree of the squared polynomials, from 1 to 5.
        polynomials: Number of squared polynomials. A feature has
            ``polynomials * (degree + 1) + 1`` parameters.

    References:
        Jaini, Selby, Yu. Sum-of-Squares Polynomial Flow. ICML 2019. arXiv:1905.02325

    Example:
        >>> family = SumOfSquares(degree=2)
        >>> x = torch.tensor([-1.0, 0.0, 2.0])
        >>> family(torch.zeros(3, family.parameters)).inv(x)
        tensor([-1.,  0.,  2.])
    """

    degree: int = 3
    polynomials: int = 2
    rule: "_Rule" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.degree <= 5:
            raise ValueError(
                f"SumOfSquares expected a degree from 1 to 5, got {self.degree}. Its powers would "
                "overflow: stack several of lower degree."
            )
        if not 1 <= self.polynomials <= 64:
            raise ValueError(f"SumOfSquares expected 1 to 64 polynomials, got {self.polynomials}.")
        object.__setattr__(self, "rule", _gauss_legendre(self.degree + 1))

    @property
    def parameters(self) -> int:
        return self.polynomials * (self.degree + 1) + 1

    def __call__(self, params: Tensor) -> Bijection:
        coefficients, shift = params.split([self.parameters - 1, 1], dim=-1)
        coefficients = bounded(coefficients / 3, 10.0)
        coefficients = coefficients.unflatten(-1, (self.polynomials, self.degree + 1))
        # At zero the squares add up to 1, in unequal parts: equals would stay equal.
        parts = torch.arange(1, self.polynomials + 1, dtype=params.dtype, device=params.device)
        parts = (parts / parts.sum() * (1 - _LEAST_SLOPE)).sqrt()
        constant = coefficients[..., 0] + parts
        return _Integral(_LogSquares(constant, coefficients), shift.squeeze(-1), self.rule)


class _LogSquares:
    def __init__(self, constant: Tensor, coefficients: Tensor) -> None:
        self.constant = constant
        self.powers = coefficients.unbind(-1)[1:]

    def __call__(self, t: Tensor) -> Tensor:
        t = t.unsqueeze(-1) / 3
        p = torch.zeros_like(t)
        for c in reversed(self.powers):
            p = (p + c.unsqueeze(-2)) * t
        return (_LEAST_SLOPE + (p + self.constant.unsqueeze(-2)).square().sum(-1)).log()


_LEAST_SLOPE = 0.1


class _Integral(Monotone):
    """``shift`` and the integral from 0 of what ``log_slope`` is the logarithm of."""

    def __init__(
        self,
        log_slope: "_Net | _LogSquares",
        shift: Tensor,
        rule: "_Rule",
        bound: float = math.inf,
    ) -> None:
        super().__init__(shift.shape)
        self.log_slope = log_slope
        self.shift = shift
        self.rule = rule
        self.bound = bound

    def value_and_log_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        places, weights = self.rule
        at = x.clamp(-self.bound, self.bound)
        log_slopes = self.log_slope(at.unsqueeze(-1) * x.new_tensor((*places, 1.0)))
        last = log_slopes[..., -1]
        mean = (log_slopes[..., :-1].exp() * x.new_tensor(weights)).sum(-1)
        value = self.shift + at * mean
        if self.bound < math.inf:
            value = value + (x - at) * last.exp()
        return value, last


_Rule = tuple[tuple[float, ...], tuple[float, ...]]
"""Nodes and weights, which a family looks up when it is made: NumPy cannot be compiled."""


@cache
def _gauss_legendre(nodes: int) -> _Rule:
    """Nodes within [0, 1] and weights that add up to 1."""
    places, weights = np.polynomial.legendre.leggauss(nodes)
    return tuple(((places + 1) / 2).tolist()), tuple((weights / 2).tolist())
