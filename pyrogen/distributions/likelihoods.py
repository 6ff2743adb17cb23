"""What a decoder's output says about data: maps from outputs to distributions."""

__all__ = [
    "BernoulliLogits",
    "CorrelatedGaussian",
    "HeteroscedasticGaussian",
    "HomoscedasticGaussian",
    "Likelihood",
]

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.nn.functional import softplus

from ..inputs import check_batch
from .standard import standard_units


class Likelihood(nn.Module, ABC):
    r"""The law of data given a decoder's output: :math:`p(x \mid z) = p(x \mid \mathrm{output})`.

    Called with the output, it gives a Pyro distribution. It holds the units of the data, so that
    an output of zero is a fair first guess; :meth:`standardize` sets them.

    Args:
        event_shape: Shape of one datum.
        outputs: Shape of the decoder's output for one datum.

    Shape:
        ``(*batch, *outputs)`` to a distribution of batch shape ``(*batch,)`` and event shape
        ``event_shape``.
    """

    def __init__(self, event_shape: Sequence[int], outputs: Sequence[int]) -> None:
        super().__init__()
        self.event_shape = Size(event_shape)
        self.outputs = Size(outputs)

    @abstractmethod
    def forward(self, output: Tensor) -> dist.TorchDistribution: ...

    @abstractmethod
    def standardize(self, x: Tensor) -> Self:
        """Set the units from data, shape ``(*batch, *event_shape)``."""

    def _check(self, output: Tensor) -> None:
        if output.shape[max(output.ndim - len(self.outputs), 0) :] != self.outputs:
            raise ValueError(
                f"{type(self).__name__} expected decoder outputs of shape (*batch, "
                f"{', '.join(map(str, self.outputs))}), got {tuple(output.shape)}. Change the "
                "decoder's output."
            )


class BernoulliLogits(Likelihood):
    r"""Likelihood of binary data, :math:`\operatorname{logit} P(x = 1) = a + \mathrm{output}`.

    Args:
        event_shape: Shape of one datum, also that of the decoder's output.

    Example:
        >>> likelihood = BernoulliLogits((2,)).standardize(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        >>> likelihood(torch.zeros(2)).mean
        tensor([0.0010, 0.5000])
    """

    shift: Tensor

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape, event_shape)
        self.register_buffer("shift", torch.zeros(self.event_shape))

    @torch.no_grad()
    def standardize(self, x: Tensor) -> Self:
        """Set :math:`a` to the log-odds of the data's means, which are held within 0.001 of 0, 1.

        Raises:
            ValueError: If values are outside [0, 1], or do not fit.
        """
        check_batch(x, self.event_shape, owner="BernoulliLogits", like=self.shift)
        if (x < 0).any() or (x > 1).any():
            raise ValueError(
                f"BernoulliLogits expected data in [0, 1], got {x.min():.4g} to {x.max():.4g}. "
                "Rescale or binarise them."
            )
        mean = x.reshape(-1, *self.event_shape).mean(0)
        self.shift.copy_(mean.clamp(1e-3, 1 - 1e-3).logit())
        return self

    def forward(self, output: Tensor) -> dist.TorchDistribution:
        self._check(output)
        return dist.Bernoulli(logits=self.shift + output).to_event(len(self.event_shape))


class _Gaussian(Likelihood):
    """Normal in the units of the data: x = shift + scale * u, u normal around the output."""

    shift: Tensor
    scale: Tensor

    def __init__(self, event_shape: Sequence[int], outputs: Sequence[int], floor: float) -> None:
        super().__init__(event_shape, outputs)
        if not floor > 0:
            raise ValueError(
                f"{type(self).__name__} expected floor > 0, got {floor}. A noise of zero "
                "makes the density infinite: pass the measurement's relative precision."
            )
        self.floor = floor
        self.register_buffer("shift", torch.zeros(self.event_shape))
        self.register_buffer("scale", torch.ones(self.event_shape))

    def standardize(self, x: Tensor) -> Self:
        owner = type(self).__name__
        shift, scale = standard_units(x, self.event_shape, owner=owner, like=self.shift)
        self.shift.copy_(shift)
        self.scale.copy_(scale)
        return self

    def _raw(self, noise: float) -> Tensor:
        """The inverse of ``floor + softplus``."""
        if not noise > self.floor:
            raise ValueError(
                f"{type(self).__name__} expected noise > floor, got noise={noise} and "
                f"floor={self.floor}. Raise noise or lower floor."
            )
        above = torch.tensor(noise - self.floor)
        return above + (-torch.expm1(-above)).log()

    def _normal(self, mean: Tensor, raw: Tensor) -> dist.TorchDistribution:
        noise = self.floor + softplus(raw)
        return dist.Normal(self.shift + self.scale * mean, self.scale * noise).to_event(
            len(self.event_shape)
        )


class HomoscedasticGaussian(_Gaussian):
    r"""Likelihood :math:`\mathcal N(x;\, a + b\,\mu,\, (b\,s)^2)`, one learned s per feature.

    Args:
        event_shape: Shape of one datum, also that of the decoder's output :math:`\mu`.
        noise: Initial :math:`s`, in standardised units.
        floor: Least :math:`s`, in standardised units; keeps the density bounded.

    Raises:
        ValueError: If ``noise > floor > 0`` does not hold.

    References:
        Rybkin, Daniilidis, Levine. Simple and effective VAE training with calibrated decoders.
        ICML 2021. arXiv:2006.13202

    Example:
        >>> likelihood = HomoscedasticGaussian((2,), noise=0.5)
        >>> likelihood(torch.zeros(5, 2)).stddev[0]
        tensor([0.5000, 0.5000], grad_fn=<SelectBackward0>)
    """

    def __init__(
        self, event_shape: Sequence[int], *, noise: float = 0.5, floor: float = 1e-3
    ) -> None:
        super().__init__(event_shape, event_shape, floor)
        self.raw = nn.Parameter(self._raw(noise).expand(self.event_shape).clone())

    def forward(self, output: Tensor) -> dist.TorchDistribution:
        self._check(output)
        return self._normal(output, self.raw)


class HeteroscedasticGaussian(_Gaussian):
    r"""Likelihood :math:`\mathcal N(x;\, a + b\,\mu(z),\, (b\,s(z))^2)`, noise from the decoder.

    The decoder's output is ``mean`` and ``raw`` stacked along the first event dimension, so it
    is twice as long there; :math:`s = \mathrm{floor} + \log(1 + e^{\mathrm{raw}})`.

    Args:
        event_shape: Shape of one datum, with at least one dimension.
        floor: Least :math:`s`, in standardised units; keeps the density bounded.

    Raises:
        ValueError: If ``floor`` is not positive, or a datum is a scalar.

    Example:
        >>> likelihood = HeteroscedasticGaussian((2,))
        >>> likelihood(torch.zeros(5, 4)).event_shape
        torch.Size([2])
    """

    def __init__(self, event_shape: Sequence[int], *, floor: float = 1e-3) -> None:
        if not len(event_shape):
            raise ValueError(
                "HeteroscedasticGaussian expected data with at least one dimension, got "
                "event_shape=(). Use event_shape=(1,)."
            )
        super().__init__(event_shape, (2 * event_shape[0], *event_shape[1:]), floor)

    def forward(self, output: Tensor) -> dist.TorchDistribution:
        self._check(output)
        mean, raw = output.chunk(2, dim=-len(self.event_shape))
        return self._normal(mean, raw)


class CorrelatedGaussian(_Gaussian):
    r"""Likelihood :math:`\mathcal N(x;\, a + b\,\mu,\, b\,\Sigma\,b)`, one learned covariance.

    What the decoder leaves unexplained may be correlated between features, in the same way for
    all data: :math:`\Sigma = LL^\top`, or :math:`WW^\top + \operatorname{diag} s^2` with
    ``rank`` columns.

    Cost: :math:`O(D^2)` for each datum and :math:`D(D + 1)/2` numbers to learn; with ``rank``
    :math:`r`, :math:`O(Dr)` and :math:`D(r + 1)`.

    Args:
        event_shape: ``(features,)``, also the shape of the decoder's output :math:`\mu`.
        rank: Number of columns of :math:`W`; None for a full covariance.
        noise: Initial standard deviation of every feature, in standardised units.
        floor: Least diagonal of :math:`L`, or least :math:`s`; keeps the density bounded.

    Raises:
        ValueError: If a datum is not a vector, ``noise > floor > 0`` does not hold, or the rank
            is not positive.

    References:
        Dorta, Vicente, Agapito, Campbell, Simpson. Structured Uncertainty Prediction Networks.
        CVPR 2018. arXiv:1802.07079

    Example:
        >>> likelihood = CorrelatedGaussian((2,), noise=0.5)
        >>> likelihood(torch.zeros(5, 2)).covariance_matrix[0].detach()
        tensor([[0.2500, 0.0000],
                [0.0000, 0.2500]])
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        *,
        rank: int | None = None,
        noise: float = 0.5,
        floor: float = 1e-3,
    ) -> None:
        if len(event_shape) != 1:
            raise ValueError(
                f"CorrelatedGaussian expected event_shape=(features,), got {tuple(event_shape)}. "
                "Flatten the data."
            )
        if rank is not None and rank < 1:
            raise ValueError(
                f"CorrelatedGaussian expected rank >= 1, got {rank}. Without correlations, use "
                "HomoscedasticGaussian."
            )
        super().__init__(event_shape, event_shape, floor)
        (features,) = self.event_shape
        self.rank = rank
        self.raw = nn.Parameter(self._raw(noise).expand(features).clone())
        # Columns of zero would keep a gradient of zero, so they start small and apart.
        self.factor = nn.Parameter(
            torch.zeros(features, features)
            if rank is None
            else 0.01 * noise * torch.randn(features, rank)
        )

    def forward(self, output: Tensor) -> dist.TorchDistribution:
        self._check(output)
        mean = self.shift + self.scale * output
        factor = self.scale[:, None] * self.factor
        diagonal = self.scale * (self.floor + softplus(self.raw))
        if self.rank is None:
            return dist.MultivariateNormal(mean, scale_tril=factor.tril(-1) + diagonal.diag())
        return dist.LowRankMultivariateNormal(mean, factor, diagonal.square())
