"""Decoders of grey levels: what an output says about whole numbers, exactly scored."""

__all__ = ["CategoricalLevels", "LogisticLevels"]

from collections.abc import Sequence
from typing import Self

import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.nn.functional import softplus

from ..inputs import check_batch
from .discretized import DiscretizedLogistic
from .likelihoods import Likelihood


class _Levels(Likelihood):
    """Whole numbers 0, ..., levels - 1."""

    def __init__(self, event_shape: Sequence[int], levels: int, numbers: int) -> None:
        name = type(self).__name__
        if not len(event_shape):
            raise ValueError(
                f"{name} expected data with at least one dimension, got event_shape=(). Use "
                "event_shape=(1,)."
            )
        if levels < 2:
            raise ValueError(
                f"{name} expected at least 2 levels, got {levels}. Pass the number of values that "
                "a pixel can take, such as 256."
            )
        super().__init__(event_shape, (numbers * event_shape[0], *event_shape[1:]))
        self.levels = levels
        self.numbers = numbers

    def _rows(self, x: Tensor, like: Tensor) -> Tensor:
        """Data of one batch dimension, once they are known to be levels."""
        owner = type(self).__name__
        check_batch(x, self.event_shape, owner=owner, like=like)
        if (x != x.floor()).any() or (x < 0).any() or (x > self.levels - 1).any():
            raise ValueError(
                f"{owner} expected whole numbers from 0 to {self.levels - 1}, got values from "
                f"{x.min():.4g} to {x.max():.4g}. Undo any scaling or dequantisation."
            )
        return x.detach().reshape(-1, *self.event_shape)

    def _split(self, output: Tensor) -> Tensor:
        """The numbers that describe each feature, in a last dimension."""
        self._check(output)
        dim = output.ndim - len(self.event_shape)
        return output.unflatten(dim, (self.numbers, -1)).movedim(dim, -1)


class LogisticLevels(_Levels):
    r"""Likelihood of grey levels: logistic variables rounded to whole numbers, exactly scored.

    .. math:: P(x \mid z) = \sum_{k} \pi_k(z)\,
        \mathrm{DiscretizedLogistic}\big(x;\, a + b\,\mu_k(z),\, b\,s_k(z)\big)

    for each feature. The decoder's output is :math:`\mu` and ``raw`` stacked along the first
    event dimension, :math:`s = \mathrm{floor} + \log(1 + e^{\mathrm{raw}})`; with several
    components, all :math:`\mu_k`, all ``raw``, then the logits of :math:`\pi_k`. The data are the
    levels themselves, as floating-point numbers, so a bound needs no dequantisation.

    Args:
        event_shape: Shape of one datum, with at least one dimension.
        levels: Number of values of a feature, 256 for bytes.
        components: Number of logistic components.
        floor: Least :math:`s`, in standardised units.

    Raises:
        ValueError: If ``levels``, ``components`` or ``floor`` is too small, or a datum is a
            scalar.

    References:
        Salimans, Karpathy, Chen, Kingma. PixelCNN++. ICLR 2017. arXiv:1701.05517

    Example:
        >>> likelihood = LogisticLevels((2,), levels=17)
        >>> likelihood.outputs
        torch.Size([4])
        >>> likelihood(torch.zeros(5, 4)).log_prob(torch.tensor([0.0, 16.0])).shape
        torch.Size([5])
    """

    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        levels: int,
        *,
        components: int = 1,
        floor: float = 1e-2,
    ) -> None:
        if components < 1 or not floor > 0:
            raise ValueError(
                f"LogisticLevels expected components >= 1 and floor > 0, got {components} and "
                f"{floor}. Pass positive numbers."
            )
        super().__init__(event_shape, levels, 2 if components == 1 else 3 * components)
        self.components = components
        self.floor = floor
        self.register_buffer("shift", torch.full(self.event_shape, (levels - 1) / 2))
        self.register_buffer("scale", torch.full(self.event_shape, levels / 4))

    @torch.no_grad()
    def standardize(self, x: Tensor) -> Self:
        """Set :math:`a` and :math:`b` to mean and deviation, the latter at least half a level."""
        x = self._rows(x, self.shift)
        self.shift.copy_(x.mean(0))
        self.scale.copy_(x.std(0, correction=0).clamp(min=0.5))
        return self

    def forward(self, output: Tensor) -> dist.TorchDistribution:
        parts = self._split(output)
        shift, scale = self.shift.unsqueeze(-1), self.scale.unsqueeze(-1)
        mean, raw, *logits = parts.split(self.components, dim=-1)
        loc, width = shift + scale * mean, scale * (self.floor + softplus(raw))
        p: dist.TorchDistribution
        if logits:
            spread = 2 * torch.linspace(-1, 1, self.components).to(mean)  # components start apart
            p = dist.MixtureSameFamily(
                dist.Categorical(logits=logits[0]),
                DiscretizedLogistic(loc + scale * spread, width, self.levels),
            )
        else:
            p = DiscretizedLogistic(loc.squeeze(-1), width.squeeze(-1), self.levels)
        return p.to_event(len(self.event_shape))


class CategoricalLevels(_Levels):
    r"""Likelihood of grey levels: any law on them, :math:`P(x = l) \propto e^{a_l + o_l(z)}`.

    The decoder's output is the :math:`o_l` of all features for level 0, then for level 1, ...,
    stacked along the first event dimension. It knows nothing of the levels' order, so it needs
    more data than :class:`LogisticLevels`.

    Args:
        event_shape: Shape of one datum, with at least one dimension.
        levels: Number of values of a feature.

    Raises:
        ValueError: If there are fewer than two levels, or a datum is a scalar.

    References:
        van den Oord, Kalchbrenner, Kavukcuoglu. Pixel Recurrent Neural Networks. ICML 2016.
        arXiv:1601.06759

    Example:
        >>> likelihood = CategoricalLevels((2,), levels=4)
        >>> likelihood(torch.zeros(8)).log_prob(torch.tensor([0.0, 3.0])).exp()
        tensor(0.0625)
    """

    shift: Tensor

    def __init__(self, event_shape: Sequence[int], levels: int) -> None:
        super().__init__(event_shape, levels, levels)
        self.register_buffer("shift", torch.zeros(*self.event_shape, levels))

    @torch.no_grad()
    def standardize(self, x: Tensor) -> Self:
        """Set :math:`a` to the log-frequencies of the levels, each seen once more than it was."""
        x = self._rows(x, self.shift)
        counts = [(x == level).sum(0) + 1 for level in range(self.levels)]
        frequency = torch.stack(counts, -1).to(x.dtype) / (len(x) + self.levels)
        self.shift.copy_(frequency.log())
        return self

    def forward(self, output: Tensor) -> dist.TorchDistribution:
        return _Categorical(logits=self.shift + self._split(output)).to_event(
            len(self.event_shape)
        )


class _Categorical(dist.Categorical):
    """A categorical law of numbers: it has a mean, and draws of floating point as data are."""

    @property
    def mean(self) -> Tensor:
        return (self.probs * self._levels).sum(-1)

    @property
    def variance(self) -> Tensor:
        return (self.probs * (self._levels - self.mean.unsqueeze(-1)).square()).sum(-1)

    @property
    def _levels(self) -> Tensor:
        return torch.arange(self.logits.shape[-1]).to(self.logits)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return super().sample(Size(sample_shape)).to(self.logits.dtype)

    def enumerate_support(self, expand: bool = True) -> Tensor:  # noqa: FBT001, FBT002
        return super().enumerate_support(expand=expand).to(self.logits.dtype)
