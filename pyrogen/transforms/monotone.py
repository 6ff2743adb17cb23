"""Monotone networks and polynomials: increasing maps given in closed form from data to noise.

They are at their best for densities, which take one pass; draws search for the root of each
feature. :class:`~pyrogen.transforms.Inverted` turns them round, for guides.
"""

__all__ = ["Bernstein", "LogisticMixture", "Monotone"]

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import constraints

from .base import Bijection
from .roots import solve
from .univariate import Univariate, bounded


class Monotone(Bijection):
    """An increasing elementwise map that is known from data to noise, and solved for draws.

    Subclasses implement ``value_and_log_slope``. The other direction finds roots by
    :func:`~pyrogen.transforms.roots.solve`, and is differentiable three times.

    Raises:
        FloatingPointError: If a draw cannot be found, or is asked for at no finite number.

    Example:
        >>> class Cubic(Monotone):
        ...     def value_and_log_slope(self, x):
        ...         return x + x**3, (1 + 3 * x**2).log()
        >>> Cubic()(torch.tensor([2.0, 10.0]))
        tensor([1., 2.])
    """

    domain = constraints.real
    codomain = constraints.real

    @abstractmethod
    def value_and_log_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noise of data ``x``, and the logarithm of its derivative in ``x``."""

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.expand(torch.broadcast_shapes(x.shape, self.batch_shape))
        y, log_slope = solve(self.value_and_log_slope, x)
        return y, -log_slope

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.value_and_log_slope(y)


@dataclass(frozen=True)
class LogisticMixture(Univariate):
    r"""Maps data by the distribution function of a mixture of logistic laws, and back by logit.

    .. math:: z = \frac{1}{1+\epsilon} \Big(\operatorname{logit} \sum_k w_k\,
        \sigma\big(a_k (x - m_k)\big) + \epsilon x\Big), \qquad \epsilon = 10^{-3}.

    It is at once the mixture transform of Flow++, the deep sigmoidal layer of neural
    autoregressive flows and the kernel of Gaussianization flows;
    :class:`~pyrogen.transforms.Stacked` makes a deep one of several. All is done with logarithms,
    so nothing saturates and nothing is clipped: beyond the components it goes on as a straight
    line. The last term keeps slopes above :math:`\epsilon`, which is what single precision can
    invert.

    Parameters of zero give the identity to within 0.17, and its slope to within 9 %: centers
    start spread over ``(-1, 1)``, since equal components would have equal gradients and stay
    equal.

    Cost: three sums over components from data to noise; their root from noise to data.

    Args:
        components: Number :math:`K` of components. A feature has ``3 * components`` parameters.

    References:
        Ho, Chen, Srinivas, Duan, Abbeel. Flow++. ICML 2019. arXiv:1902.00275
        Huang, Krueger, Lacoste, Courville. Neural Autoregressive Flows. ICML 2018.
        arXiv:1804.00779
        Meng, Song, Song, Ermon. Gaussianization Flows. AISTATS 2020. arXiv:2003.01941

    Example:
        >>> family = LogisticMixture(components=4)
        >>> x = torch.linspace(-6, 6, 5)
        >>> mixture = family(torch.randn(5, family.parameters))
        >>> torch.allclose(mixture(mixture.inv(x)), x, atol=1e-4)
        True
    """

    components: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.components <= 256:
            raise ValueError(
                f"LogisticMixture expected 1 to 256 components, got {self.components}. "
                "Eight is common."
            )

    @property
    def parameters(self) -> int:
        return 3 * self.components

    def __call__(self, params: Tensor) -> Bijection:
        weights, slopes, centers = params.unflatten(-1, (3, self.components)).unbind(-2)
        places = torch.arange(self.components, dtype=params.dtype, device=params.device)
        spread = (2 * places + 1) / self.components - 1
        log_slopes = bounded(slopes, math.log(100))
        centers = bounded(centers, 20.0) + spread
        return _LogisticMixture(weights.log_softmax(-1), log_slopes, centers)


class _LogisticMixture(Monotone):
    def __init__(self, log_weights: Tensor, log_slopes: Tensor, centers: Tensor) -> None:
        super().__init__(log_weights.shape[:-1])
        self.log_weights = log_weights
        self.log_slopes = log_slopes
        self.centers = centers

    def value_and_log_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        at = (x.unsqueeze(-1) - self.centers) * self.log_slopes.exp()
        log_below = F.logsigmoid(at)
        log_above = log_below - at
        below = (self.log_weights + log_below).logsumexp(-1)
        above = (self.log_weights + log_above).logsumexp(-1)
        density = (self.log_weights + self.log_slopes + log_below + log_above).logsumexp(-1)
        slope = (density - below - above).exp() + _LEAST_SLOPE
        value = below - above + _LEAST_SLOPE * x
        return value / (1 + _LEAST_SLOPE), slope.log() - math.log1p(_LEAST_SLOPE)


_LEAST_SLOPE = 1e-3


@dataclass(frozen=True)
class Bernstein(Univariate):
    r"""Increasing polynomials in Bernstein form on ``[-bound, bound]``, straight lines outside.

    .. math:: z = \sum_{k=0}^{n} \theta_k \binom{n}{k} t^k (1 - t)^{n - k}, \qquad
        t = \frac{x + \text{bound}}{2\,\text{bound}},

    with :math:`\theta_0 < \dots < \theta_n`, a shift and :math:`n` steps. Its slope is the
    Bernstein polynomial of the steps, a sum of positive terms; the lines take the slopes of
    the ends.

    Cost: two sums over ``degree`` from data to noise; their root from noise to data.

    Args:
        degree: Degree :math:`n`, from 2 to 64. A feature has ``degree + 1`` parameters.
        bound: Half width of the interval, in units of ``x``.

    References:
        Ramasinghe, Fernando, Khan, Barnes. Robust Normalizing Flows using Bernstein-type
        Polynomials. BMVC 2022. arXiv:2102.03509

    Example:
        >>> family = Bernstein(degree=6)
        >>> bernstein = family(torch.randn(5, family.parameters))
        >>> x = torch.linspace(-6, 6, 5)
        >>> torch.allclose(bernstein(bernstein.inv(x)), x, atol=1e-4)
        True
    """

    degree: int = 12
    bound: float = 5.0

    def __post_init__(self) -> None:
        if not 2 <= self.degree <= 64:
            raise ValueError(f"Bernstein expected a degree from 2 to 64, got {self.degree}.")
        if not 0 < self.bound < math.inf:
            raise ValueError(f"Bernstein expected a positive bound, got {self.bound}. Try 5.")

    @property
    def parameters(self) -> int:
        return self.degree + 1

    def __call__(self, params: Tensor) -> Bijection:
        steps, shift = params.split([self.degree, 1], dim=-1)
        slopes = bounded(steps / 2, math.log(100)).exp()
        rises = (2 * self.bound / self.degree) * slopes
        heights = F.pad(rises.cumsum(-1), (1, 0))
        return _Bernstein(heights - heights[..., -1:] / 2 + shift, slopes, self.bound)


class _Bernstein(Monotone):
    def __init__(self, heights: Tensor, slopes: Tensor, bound: float) -> None:
        super().__init__(slopes.shape[:-1])
        self.heights = heights
        self.slopes = slopes
        self.bound = bound

    def value_and_log_slope(self, x: Tensor) -> tuple[Tensor, Tensor]:
        degree = self.slopes.shape[-1]
        at = x.clamp(-self.bound, self.bound)
        t = ((at + self.bound) / (2 * self.bound)).unsqueeze(-1)
        co = ((self.bound - at) / (2 * self.bound)).unsqueeze(-1)
        choose = [math.comb(degree - 1, i) for i in range(degree)]
        lower = torch.cat(  # not powers of tensors, whose second derivative at 0 is NaN
            [c * t**i * co ** (degree - 1 - i) for i, c in enumerate(choose)], dim=-1
        )
        basis = F.pad(lower * co, (0, 1)) + F.pad(lower * t, (1, 0))  # of one degree more
        slope = (self.slopes * lower).sum(-1)
        value = (self.heights * basis).sum(-1) + (x - at) * slope
        return value, slope.log()
