"""Increasing maps of one variable, and the layer that applies one to each feature.

:class:`Affine` and :class:`RationalQuadratic` are *families*: they say how many parameters one
feature needs, and make a bijection of given parameters. Coupling and autoregressive layers take
a family and predict its parameters; :class:`Elementwise` learns them. In every family,
parameters of zero give the identity.
"""

__all__ = ["Affine", "Elementwise", "RationalQuadratic", "ShiftScale", "Univariate"]

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import constraints

from ..inputs import check_context
from ..nets import mlp
from .base import Bijection


class Univariate(ABC):
    """A family of increasing maps of the line, given by real parameters; zero is the identity."""

    @property
    @abstractmethod
    def parameters(self) -> int:
        """Number of parameters of one feature."""

    @abstractmethod
    def __call__(self, params: Tensor) -> Bijection:
        """Make an elementwise bijection of ``params``, shape ``(*shape, parameters)``."""


@dataclass(frozen=True)
class Affine(Univariate):
    r"""Maps :math:`x \mapsto e^{s} x + t`, with :math:`|s|` kept below ``bound``.

    Args:
        bound: Largest log-scale, reached smoothly; it keeps both directions finite.

    Example:
        >>> affine = Affine()(torch.zeros(3, 2))
        >>> affine(torch.ones(3))
        tensor([1., 1., 1.])
    """

    bound: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.bound < math.inf:
            raise ValueError(f"Affine expected a positive bound, got {self.bound}. Try 3.")

    @property
    def parameters(self) -> int:
        return 2

    def __call__(self, params: Tensor) -> Bijection:
        log_scale, shift = params.unbind(-1)
        return ShiftScale(_bounded(log_scale, self.bound), shift)


class ShiftScale(Bijection):
    """The elementwise map ``exp(log_scale) * x + shift``."""

    domain = constraints.real
    codomain = constraints.real

    def __init__(self, log_scale: Tensor, shift: Tensor) -> None:
        super().__init__(log_scale.shape)
        self.log_scale = log_scale
        self.shift = shift

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * self.log_scale.exp() + self.shift
        return y, self.log_scale.expand_as(y)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = (y - self.shift) * (-self.log_scale).exp()
        return x, -self.log_scale.expand_as(x)


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
        sizes = _bounded(sizes / 2, _RANGE / 2).exp().unflatten(-1, (2, self.bins))
        edges = F.pad(sizes.cumsum(-1), (1, 0))
        x, y = (self.bound * (2 * edges / edges[..., -1:] - 1)).unbind(-2)
        slopes = _bounded(slopes / 2, _RANGE).exp()
        slopes = F.pad(slopes, (1, 1), value=1.0)  # meets the identity of the tails
        return _Spline(x, y, slopes, self.bound)


# Bins differ by a factor of 100 at most, and slopes from 1 too. With the halved parameters above
# this is what keeps single precision: unit-scale parameters invert to 2e-5, any others to no NaN.
_RANGE = math.log(100)


def _bounded(x: Tensor, limit: float) -> Tensor:
    """Squash smoothly into ``(-limit, limit)``, with slope 1 at zero."""
    return x * torch.rsqrt(1 + (x / limit).square())


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


AFFINE = Affine()  # defaults of the layers and recipes
SPLINE = RationalQuadratic()


class Elementwise(nn.Module):
    """Trainable layer that moves each feature by its own increasing map.

    Without context the parameters are learned directly, with context by a network.

    Args:
        features: Number of features.
        context: Number of features to condition on; 0 for none.
        elementwise: Family of maps.
        hidden: Widths of the hidden layers of the network, with context.

    Raises:
        ValueError: If the context does not fit.

    Example:
        >>> layer = Elementwise(3, elementwise=RationalQuadratic())
        >>> y, ladj = layer().call_and_ladj(torch.randn(5, 3))
        >>> ladj.shape
        torch.Size([5])
    """

    def __init__(
        self,
        features: int,
        context: int = 0,
        *,
        elementwise: Univariate = AFFINE,
        hidden: Sequence[int] = (64, 64),
    ) -> None:
        super().__init__()
        self.shape = (features, elementwise.parameters)
        self.context = context
        self.elementwise = elementwise
        if context:
            self.net = start_at_zero(mlp(context, math.prod(self.shape), hidden))
        else:
            self.params = nn.Parameter(torch.zeros(self.shape))

    def forward(self, context: Tensor | None = None) -> Bijection:
        check_context(context, self.context, owner="Elementwise")

        def make() -> Bijection:
            if context is None:
                return self.elementwise(self.params)
            return self.elementwise(self.net(context).unflatten(-1, self.shape))

        return _Elementwise(make, () if context is None else context.shape[:-1])


class _Elementwise(Bijection):
    def __init__(self, make: Callable[[], Bijection], batch_shape: Sequence[int]) -> None:
        super().__init__(batch_shape)
        self.make = make

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, ladj = self.make().call_and_ladj(x)
        return y, ladj.sum(-1)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x, ladj = self.make().inverse_and_ladj(y)
        return x, ladj.sum(-1)


def start_at_zero(net: nn.Sequential) -> nn.Sequential:
    """Set the last linear layer to zero, so that an untrained layer is the identity."""
    last = net[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return net
