"""Laws that a flow can start from, where the standard normal does not fit.

A flow whose layers are steep only within a region keeps the tails and the topology of its noise:
heavy tails need heavy noise, a circle needs noise on the circle, and far modes need several.
"""

__all__ = ["CircularNoise", "MixtureNoise", "StudentTNoise", "UniformNoise"]

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor, nn

from ..inputs import check_positive
from .supports import Charted, circular, from_reals


class StudentTNoise(nn.Module):
    r"""Student's t for each feature, with learned degrees of freedom: tails of any weight.

    Each degree is :math:`\nu = \mathrm{floor} + \mathrm{softplus}(\rho)`. A draw is differentiable
    in it. To keep them fixed, call ``requires_grad_(False)``.

    Args:
        features: Number of features.
        df: Degrees of freedom to start from: one number, or one for each feature.
        floor: Degrees of freedom stay above it; above 1 the noise has a mean, above 2 a variance.

    Raises:
        ValueError: If there are no features, ``floor`` is negative or not finite, or ``df`` does
            not fit or is not above it.

    References:
        Jaini, Kobyzev, Yu, Brubaker. Tails of Lipschitz Triangular Flows. ICML 2020.
        arXiv:1907.04481
        Laszkiewicz, Lederer, Fischer. Marginal Tail-Adaptive Normalizing Flows. ICML 2022.
        arXiv:2206.10311

    Example:
        >>> from pyrogen.distributions import nsf, Flow
        >>> noise = StudentTNoise(2, df=3.0)
        >>> Flow(2, nsf(2).layers, noise=noise)().log_prob(torch.zeros(2))
        tensor(-2.0018, grad_fn=<AddBackward0>)
    """

    zero: Tensor

    def __init__(
        self, features: int, *, df: float | Sequence[float] = 5.0, floor: float = 1.0
    ) -> None:
        super().__init__()
        check_positive("StudentTNoise", feature=features)
        if not 0 <= floor < math.inf:
            raise ValueError(
                f"StudentTNoise expected a finite floor of at least 0, got {floor}. Take 1 for "
                "noise that has a mean, 2 for a variance."
            )
        start = torch.as_tensor(df, dtype=torch.get_default_dtype())
        if start.shape not in ((), (features,)):
            raise ValueError(
                f"StudentTNoise expected degrees of freedom for all features or for each of "
                f"{features}, got shape {tuple(start.shape)}. Pass one number, or {features}."
            )
        if not ((start > floor) & start.isfinite()).all():
            raise ValueError(
                f"StudentTNoise expected finite degrees of freedom above {floor}, got {df}. Raise "
                "df or lower floor; for normal tails leave the noise of the flow as it is."
            )
        start = start.expand(features)
        self.floor = floor
        above = start - floor
        self.rho = nn.Parameter(above + (-torch.expm1(-above)).log())  # the inverse of softplus
        self.register_buffer("zero", torch.zeros(features))

    @property
    def df(self) -> Tensor:
        """Degrees of freedom, shape ``(features,)``."""
        return self.floor + F.softplus(self.rho)

    def forward(self) -> TorchDistribution:
        one = torch.ones_like(self.zero)
        return dist.StudentT(self.df, self.zero, one, validate_args=False).to_event(1)


class UniformNoise(nn.Module):
    """Uniform noise on a box, both ends included: for layers that keep the box.

    Args:
        features: Number of features.
        low: Lower end of every feature.
        high: Upper end of every feature.

    Raises:
        ValueError: If there are no features, ``low`` is not below ``high``, or one is infinite.

    Example:
        >>> UniformNoise(2, low=0.0)().log_prob(torch.tensor([1.0, 0.5]))
        tensor(0.)
    """

    zero: Tensor

    def __init__(self, features: int, *, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__()
        check_positive("UniformNoise", feature=features)
        if not -math.inf < low < high < math.inf:
            raise ValueError(
                f"UniformNoise expected finite low < high, got {low} and {high}. Pass the ends of "
                "the box that the layers keep."
            )
        self.low = low
        self.high = high
        self.register_buffer("zero", torch.zeros(features))

    def forward(self) -> TorchDistribution:
        everywhere = torch.ones_like(self.zero, dtype=torch.bool)
        support = constraints.independent(constraints.interval(self.low, self.high), 1)
        return _Box(self.zero, everywhere, self.low, self.high, support)


class CircularNoise(nn.Module):
    """Uniform noise on the circle for angles, beside standard normal noise for the rest.

    Args:
        angles: Whether each feature is an angle.

    Raises:
        ValueError: If there are no features, or the flags are not in a row.

    Example:
        >>> CircularNoise([True, True])().log_prob(torch.zeros(2))  # -2 log(2 pi)
        tensor(-3.6758)
    """

    zero: Tensor
    angles: Tensor

    def __init__(self, angles: Sequence[bool] | Tensor) -> None:
        super().__init__()
        angles = torch.as_tensor(angles, dtype=torch.bool)
        if angles.ndim != 1:
            raise ValueError(
                f"CircularNoise expected a flag for each feature, got shape {tuple(angles.shape)}."
                " Pass a list such as [True, False]."
            )
        check_positive("CircularNoise", feature=len(angles))
        each = [circular if angle else constraints.real for angle in angles.tolist()]
        support = constraints.stack(each, dim=-1)
        # A site of this noise keeps its angles; a sampler on the reals gets the cut circle.
        self.support = from_reals(support, keep_angles=True).codomain
        assert isinstance(self.support, Charted)
        self.register_buffer("zero", torch.zeros(len(angles)))
        self.register_buffer("angles", angles, persistent=False)

    def forward(self) -> TorchDistribution:
        return _Box(self.zero, self.angles, -math.pi, math.pi, self.support)


class MixtureNoise(nn.Module):
    """A learned mixture of normals with diagonal covariances: for modes that lie far apart.

    Draws carry no gradient, so it serves maximum likelihood and not a reparameterized guide.

    Args:
        features: Number of features.
        components: Number of normals; their means start as standard normal draws.

    Raises:
        ValueError: If there are no features or fewer than 2 components.

    References:
        Izmailov, Kirichenko, Finzi, Wilson. Semi-Supervised Learning with Normalizing Flows.
        ICML 2020. arXiv:1912.13025

    Example:
        >>> noise = MixtureNoise(2, components=3)
        >>> noise().sample((5,)).shape
        torch.Size([5, 2])
    """

    def __init__(self, features: int, *, components: int = 8) -> None:
        super().__init__()
        check_positive("MixtureNoise", feature=features)
        if components < 2:
            raise ValueError(
                f"MixtureNoise expected at least 2 components, got {components}. For one, leave "
                "the noise of the flow as it is."
            )
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, features))
        self.log_scale = nn.Parameter(torch.zeros(components, features))

    def forward(self) -> TorchDistribution:
        which = dist.Categorical(logits=self.logits, validate_args=False)
        each = dist.Normal(self.loc, self.log_scale.exp(), validate_args=False).to_event(1)
        return dist.MixtureSameFamily(which, each, validate_args=False)


class _Box(TorchDistribution):
    """Uniform on ``[low, high]`` where marked, standard normal elsewhere."""

    arg_constraints = {}  # noqa: RUF012
    has_rsample = True

    def __init__(
        self,
        zero: Tensor,
        uniform: Tensor,
        low: float,
        high: float,
        support: constraints.Constraint,
    ) -> None:
        self.zero = zero
        self.uniform = uniform
        self.low = low
        self.high = high
        self._support = support
        super().__init__(zero.shape[:-1], zero.shape[-1:], validate_args=False)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        return self._support

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> "_Box":
        zero = self.zero.expand(*batch_shape, *self.event_shape)
        return _Box(zero, self.uniform, self.low, self.high, self._support)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        zero = self.zero.expand(self.shape(Size(sample_shape)))
        within = self.low + (self.high - self.low) * torch.rand_like(zero)
        return torch.where(self.uniform, within, torch.randn_like(zero))

    def log_prob(self, value: Tensor) -> Tensor:
        end = max(abs(self.low), abs(self.high))
        slack = 8 * torch.finfo(value.dtype).eps * end  # what rounding may add to a border
        inside = (value >= self.low - slack) & (value <= self.high + slack)
        flat = torch.full_like(value, -math.log(self.high - self.low))
        normal = -0.5 * value.square() - 0.5 * math.log(2 * math.pi)
        each = torch.where(self.uniform, flat.masked_fill(~inside, -math.inf), normal)
        return each.sum(-1).expand(torch.broadcast_shapes(each.shape[:-1], self.batch_shape))
