"""The logistic distribution on whole numbers: grey levels, with an exact probability each."""

__all__ = ["DiscretizedLogistic"]

from collections.abc import Sequence

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn.functional import logsigmoid


class DiscretizedLogistic(TorchDistribution):
    r"""A logistic variable rounded to the nearest of the levels 0, ..., L - 1.

    .. math:: P(x) = \sigma(b) - \sigma(a), \qquad
        a = \frac{x - \frac12 - \mu}{s}, \quad b = \frac{x + \frac12 - \mu}{s},

    with :math:`a = -\infty` at the lowest level and :math:`b = \infty` at the highest, so that the
    probabilities sum to one. Computed as :math:`\sigma(b)\,\sigma(-a)\,(1 - e^{-1/s})`, which
    keeps value and gradient accurate however far :math:`\mu` lies from the data.

    Args:
        loc: Centre :math:`\mu`, in levels; it may lie outside of them.
        scale: Width :math:`s`, in levels.
        levels: Number :math:`L` of levels.

    Shape:
        Batch shape that of ``loc`` and ``scale`` together; draws are whole numbers of their dtype.

    Raises:
        ValueError: If there are fewer than two levels.

    References:
        Kingma, Salimans, Jozefowicz, Chen, Sutskever, Welling. Improving Variational Inference
        with Inverse Autoregressive Flow. NeurIPS 2016. arXiv:1606.04934
        Salimans, Karpathy, Chen, Kingma. PixelCNN++. ICLR 2017. arXiv:1701.05517

    Example:
        >>> p = DiscretizedLogistic(torch.tensor(2.0), torch.tensor(0.5), levels=4)
        >>> p.log_prob(torch.arange(4.0)).exp()
        tensor([0.0474, 0.2215, 0.4621, 0.2689])
        >>> p.mean
        tensor(1.9526)
    """

    arg_constraints = {"loc": constraints.real, "scale": constraints.positive}  # noqa: RUF012
    has_enumerate_support = True

    def __init__(
        self, loc: Tensor, scale: Tensor, levels: int, *, validate_args: bool | None = None
    ) -> None:
        if levels < 2:
            raise ValueError(
                f"DiscretizedLogistic expected at least 2 levels, got {levels}. Pass the number "
                "of values that a pixel can take, such as 256."
            )
        self.loc, self.scale = broadcast_all(loc, scale)
        self.levels = levels
        super().__init__(self.loc.shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> constraints.Constraint:
        return constraints.integer_interval(0, self.levels - 1)

    def expand(
        self, batch_shape: Sequence[int], _instance: object = None
    ) -> "DiscretizedLogistic":
        new = self._get_checked_instance(DiscretizedLogistic, _instance)
        shape = Size(batch_shape)
        new.loc, new.scale = self.loc.expand(shape), self.scale.expand(shape)
        new.levels = self.levels
        super(DiscretizedLogistic, new).__init__(shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        tiny = torch.finfo(self.loc.dtype).tiny
        u = torch.rand(self.shape(sample_shape), dtype=self.loc.dtype, device=self.loc.device)
        x = self.loc + self.scale * u.clamp(min=tiny).logit()
        return (x + 0.5).floor().clamp(0, self.levels - 1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        above = logsigmoid((value + 0.5 - self.loc) / self.scale)
        below = logsigmoid(-(value - 0.5 - self.loc) / self.scale)
        width = (-torch.expm1(-1 / self.scale)).log()
        lowest, highest = value <= 0, value >= self.levels - 1
        return (
            above.masked_fill(highest, 0.0)
            + below.masked_fill(lowest, 0.0)
            + torch.where(lowest | highest, 0.0, width)
        )

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of ``value`` or less."""
        below = ((value.floor() + 0.5 - self.loc) / self.scale).sigmoid()
        below = torch.where(value < 0, 0.0, below)
        return torch.where(value >= self.levels - 1, 1.0, below)

    @property
    def mean(self) -> Tensor:
        """Mean of the rounded variable; cost: one sigmoid for each level."""
        return self._exceeds().sum(0)

    @property
    def variance(self) -> Tensor:
        x = self.enumerate_support()
        return (self.log_prob(x).exp() * (x - self.mean).square()).sum(0)

    def enumerate_support(self, expand: bool = True) -> Tensor:  # noqa: FBT001, FBT002
        x = torch.arange(self.levels).to(self.loc)
        x = x.reshape(-1, *[1] * len(self.batch_shape))
        return x.expand(self.levels, *self.batch_shape) if expand else x

    def _exceeds(self) -> Tensor:
        """P(x > j) for j = 0, ..., L - 2, shape ``(levels - 1, *batch)``."""
        edges = 0.5 + self.enumerate_support(expand=False)[:-1]
        return ((self.loc - edges) / self.scale).sigmoid()
