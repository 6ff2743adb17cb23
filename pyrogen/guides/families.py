"""The laws that an encoder chooses from: what one datum's posterior may look like."""

__all__ = ["Diagonal", "Family", "FlowFamily", "FullCovariance", "LowRank"]

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..distributions import Flow, Transformed
from ..transforms.univariate import ShiftScale

WIDEST = 10.0  # bound on |log(scale / init_scale)|, so that no encoder makes it overflow
STEEPEST = 100.0  # bound on shared over own spread: correlations up to 0.99995
DRAWS = 2000  # from which a median is estimated where it is not known


class Family(nn.Module, ABC):
    r"""The posteriors of one datum's unconstrained latents, indexed by vectors of numbers.

    A subclass gives ``outputs``, the length of such a vector, and ``law``. Vectors of zeros mean
    :math:`\mathcal N(0, s_0^2 I)`, and any finite vector means a law with finite density.

    Args:
        init_scale: Standard deviation :math:`s_0` where the numbers are zero.

    Shape:
        ``(*batch, outputs)`` gives a distribution of batch shape ``batch`` and event shape
        ``(latents,)``.

    Raises:
        ValueError: If ``init_scale`` is not positive, or the numbers are not ``outputs`` many.
        RuntimeError: If the family does not know how many latents there are.

    Example:
        >>> family = FullCovariance().setup(latents=3)
        >>> family.outputs
        9
        >>> family(torch.zeros(5, 9)).batch_shape
        torch.Size([5])
    """

    def __init__(self, init_scale: float = 0.1) -> None:
        super().__init__()
        if not 0 < init_scale < math.inf:
            raise ValueError(
                f"{type(self).__name__} expected a positive init_scale, got {init_scale}. Pass a "
                "standard deviation, in unconstrained units."
            )
        self.init_scale = init_scale
        self._latents = 0

    @property
    def latents(self) -> int:
        """Number of unconstrained latents of one datum."""
        if not self._latents:
            raise RuntimeError(
                f"{type(self).__name__} does not know the number of latents. Call "
                "family.setup(latents), or run the guide it belongs to."
            )
        return self._latents

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Numbers that describe one posterior: the width of an encoder's output."""

    @abstractmethod
    def law(self, outputs: Tensor) -> dist.TorchDistribution:
        """Return the law that numbers of shape ``(*batch, outputs)`` stand for."""

    def setup(self, latents: int) -> Self:
        """Learn how many latents there are; builds what the family has of parameters.

        Raises:
            ValueError: If the number is not positive, or not that of an earlier call.
        """
        if latents < 1 or self._latents not in (0, latents):
            raise ValueError(
                f"{type(self).__name__} expected {self._latents or 'at least 1'} latents, got "
                f"{latents}. Give every guide a family of its own."
            )
        self._latents = latents
        return self

    def forward(self, outputs: Tensor) -> dist.TorchDistribution:
        if outputs.ndim < 1 or outputs.shape[-1] != self.outputs:
            raise ValueError(
                f"{type(self).__name__} of {self.latents} latents expected numbers of shape "
                f"(*batch, {self.outputs}), got {tuple(outputs.shape)}. Widen the encoder."
            )
        return self.law(outputs)

    def median(self, outputs: Tensor) -> Tensor:
        """Return each latent's median, shape ``(*batch, latents)``; a law's mean if symmetric."""
        return self(outputs).mean

    def _loc_and_log_scale(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Read the first ``2 * latents`` numbers: locations, then what bends the log-scales."""
        loc, bend = outputs[..., : 2 * self.latents].chunk(2, dim=-1)
        return loc, math.log(self.init_scale) + _bounded(bend, WIDEST)


class Diagonal(Family):
    r"""Independent normals.

    .. math:: \mathcal N\big(\mu, \operatorname{diag} s^2\big), \qquad
        \log s = \log s_0 + b \tanh(r / b), \quad b = 10,

    of the numbers :math:`(\mu, r)`, two for each latent. As one factor per site it is what
    closed-form divergences need.

    Args:
        init_scale: Standard deviation :math:`s_0` where the numbers are zero, in unconstrained
            units.

    References:
        Kingma, Welling. Auto-Encoding Variational Bayes. ICLR 2014. arXiv:1312.6114

    Example:
        >>> Diagonal(init_scale=0.5).setup(2)(torch.zeros(4)).stddev
        tensor([0.5000, 0.5000])
    """

    @property
    def outputs(self) -> int:
        return 2 * self.latents

    def law(self, outputs: Tensor) -> dist.TorchDistribution:
        loc, log_scale = self._loc_and_log_scale(outputs)
        return dist.Normal(loc, log_scale.exp()).to_event(1)


class FullCovariance(Family):
    r"""Normals of any covariance, by its Cholesky factor.

    .. math:: \mathcal N\big(\mu, L L^\top\big), \qquad L = \operatorname{diag}(s)\, U,

    with :math:`U` unit lower triangular, so that rescaling a latent leaves :math:`U` as it is.
    Numbers: location, log-scales as in :class:`Diagonal`, then :math:`U` row by row, bounded by
    100. With ``n`` latents they are ``n (n + 3) / 2``.

    Cost: a triangular solve, of order ``n ** 2``, per density.

    Args:
        init_scale: Standard deviation :math:`s_0` where the numbers are zero, in unconstrained
            units.

    References:
        Kingma, Welling. An Introduction to Variational Autoencoders. 2019. arXiv:1906.02691

    Example:
        >>> family = FullCovariance().setup(2)
        >>> numbers = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.0])
        >>> family(numbers).covariance_matrix
        tensor([[0.0100, 0.0100],
                [0.0100, 0.0200]])
    """

    @property
    def outputs(self) -> int:
        return self.latents * (self.latents + 3) // 2

    def law(self, outputs: Tensor) -> dist.TorchDistribution:
        n = self.latents
        loc, log_scale = self._loc_and_log_scale(outputs)
        row, column = torch.tril_indices(n, n, -1, device=outputs.device)
        unit = torch.eye(n).to(outputs).expand(*outputs.shape[:-1], n, n).clone()
        unit[..., row, column] = _bounded(outputs[..., 2 * n :], STEEPEST)
        return dist.MultivariateNormal(loc, scale_tril=log_scale.exp()[..., None] * unit)


class LowRank(Family):
    r"""Normals whose correlations come from a few shared directions.

    .. math:: \mathcal N\big(\mu, \operatorname{diag}(s) (I + V V^\top) \operatorname{diag}(s)
        \big), \qquad V \in \mathbb R^{n \times k}.

    Numbers: location, log-scales as in :class:`Diagonal`, then :math:`V` row by row, bounded by
    100: ``(2 + rank) n`` for ``n`` latents.

    Cost: of order ``n * rank ** 2`` per density.

    Args:
        rank: Number :math:`k` of shared directions, less than the number of latents.
        init_scale: Standard deviation :math:`s_0` where the numbers are zero, in unconstrained
            units.

    Raises:
        ValueError: If ``rank`` is not in 1, ..., latents - 1.

    References:
        Ong, Nott, Smith. Gaussian Variational Approximation with a Factor Covariance Structure.
        JCGS 2018. arXiv:1701.03208

    Example:
        >>> LowRank(rank=2).setup(10).outputs
        40
    """

    def __init__(self, rank: int, init_scale: float = 0.1) -> None:
        super().__init__(init_scale)
        if rank < 1:
            raise ValueError(f"LowRank expected rank >= 1, got {rank}. For rank 0 use Diagonal.")
        self.rank = rank

    @property
    def outputs(self) -> int:
        return (2 + self.rank) * self.latents

    def setup(self, latents: int) -> Self:
        if self.rank >= latents:
            raise ValueError(
                f"LowRank expected a rank below its {latents} latents, got {self.rank}. Lower it, "
                "or use FullCovariance."
            )
        return super().setup(latents)

    def law(self, outputs: Tensor) -> dist.TorchDistribution:
        n = self.latents
        loc, log_scale = self._loc_and_log_scale(outputs)
        scale = log_scale.exp()
        shared = _bounded(outputs[..., 2 * n :], STEEPEST).unflatten(-1, (n, self.rank))
        return dist.LowRankMultivariateNormal(loc, scale[..., None] * shared, scale.square())


class FlowFamily(Family):
    r"""Laws of any shape: a normalizing flow whose context is given.

    .. math:: z = \mu + s \odot f_c(\varepsilon), \quad \varepsilon \sim \mathcal N(0, I),

    with a bijection :math:`f_c` that starts as the identity, or near it. Numbers: location and
    log-scales as in :class:`Diagonal`, then the context :math:`c`. Only the flow's own parameters
    are learned here; they are shared by all data.

    Args:
        recipe: Function of a number of features and of context to a flow, such as
            :func:`~pyrogen.distributions.nsf` or a ``functools.partial`` of it. Flows with fast
            draws suit best; for a single latent use ``maf``.
        context: Number of features that tell the flow of the datum.
        init_scale: Standard deviation :math:`s_0` where the numbers are zero, in unconstrained
            units.

    Raises:
        TypeError: If ``recipe`` is a flow and not a function that makes one.
        ValueError: If there is no context, or the recipe gives no such flow.

    References:
        Rezende, Mohamed. Variational Inference with Normalizing Flows. ICML 2015. arXiv:1505.05770

    Example:
        >>> from pyrogen.distributions import nsf
        >>> family = FlowFamily(nsf, context=8).setup(3)
        >>> family.outputs, family(torch.zeros(5, 14)).sample().shape
        (14, torch.Size([5, 3]))
    """

    def __init__(
        self, recipe: Callable[[int, int], Flow], context: int, init_scale: float = 0.1
    ) -> None:
        super().__init__(init_scale)
        if isinstance(recipe, nn.Module) or not callable(recipe):
            raise TypeError(
                f"FlowFamily expected a recipe from features and context to a flow, got "
                f"{type(recipe).__name__}. Pass nsf, or functools.partial(nsf, layers=2)."
            )
        if context < 1:
            raise ValueError(
                f"FlowFamily expected context >= 1, got {context}: the flow could not tell data "
                "apart. Pass a width such as 16."
            )
        self.recipe = recipe
        self.context = context

    @property
    def outputs(self) -> int:
        return 2 * self.latents + self.context

    def setup(self, latents: int) -> Self:
        super().setup(latents)
        if "flow" not in self._modules:
            flow = self.recipe(latents, self.context)
            if not isinstance(flow, Flow) or flow.context != self.context:
                raise ValueError(
                    f"FlowFamily expected its recipe to give a Flow of context {self.context}, "
                    f"got {type(flow).__name__}. Pass nsf, or a functools.partial of it."
                )
            self.flow = flow
        return self

    def law(self, outputs: Tensor) -> dist.TorchDistribution:
        loc, log_scale = self._loc_and_log_scale(outputs)
        shape = self.flow(outputs[..., 2 * self.latents :])
        return Transformed(shape.noise, [*shape.bijection.parts, ShiftScale(log_scale, loc)])

    @torch.no_grad()
    def median(self, outputs: Tensor) -> Tensor:
        """Return each latent's median, estimated from draws, shape ``(*batch, latents)``."""
        return self(outputs).sample((DRAWS,)).median(dim=0).values

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Build the flow that was saved, if the number of latents is not known yet."""
        zero = state_dict.get(f"{prefix}flow.zero")
        if zero is not None:
            self.setup(len(zero)).to(zero)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _bounded(x: Tensor, bound: float) -> Tensor:
    """The identity near zero, and never beyond ``bound``."""
    return bound * (x / bound).tanh()
