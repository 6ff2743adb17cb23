"""Flows for whole numbers: counts and grey levels as the floor of a continuous variable."""

__all__ = [
    "Dequantized",
    "Dequantizer",
    "Quantized",
    "UniformDequantizer",
    "VariationalDequantizer",
]

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NoReturn, Self

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Size, Tensor, nn

from ..inputs import check_batch
from .base import LikelihoodFree
from .flow import Flow
from .supports import agree


class Dequantizer(nn.Module, ABC):
    """A law of the fraction in [0, 1) that whole numbers lost: the proposal of the bound."""

    @abstractmethod
    def forward(
        self, k: Tensor, context: Tensor | None, draws: int
    ) -> tuple[Tensor, Tensor | float]:
        """Draw fractions, and score them.

        Args:
            k: Whole numbers of a floating dtype, flattened to ``(*batch, numbers)``.
            context: What the law of ``k`` is conditioned on.
            draws: Number of draws.

        Returns:
            Fractions, shape ``(draws, *batch, numbers)``, and their log-densities, ``(draws,
            *batch)``.
        """


class UniformDequantizer(Dequantizer):
    """Uniform fractions: nothing to learn.

    References:
        Theis, van den Oord, Bethge. A note on the evaluation of generative models. ICLR 2016.
        arXiv:1511.01844

    Example:
        >>> u, log_prob = UniformDequantizer()(torch.zeros(5, 2), None, 3)
        >>> u.shape, log_prob
        (torch.Size([3, 5, 2]), 0.0)
    """

    def forward(
        self, k: Tensor, context: Tensor | None, draws: int
    ) -> tuple[Tensor, Tensor | float]:
        return torch.rand(draws, *k.shape, dtype=k.dtype, device=k.device), 0.0


class VariationalDequantizer(Dequantizer):
    r"""Fractions of a learned law :math:`q(u \mid k, c)`: a tighter bound, and a smoother fit.

    Args:
        flow: Flow with ``support=constraints.unit_interval``, conditioned on the numbers ``k``
            followed by the context, all flattened: ``nsf(D, D + context, support=...)``.

    Raises:
        ValueError: If the support of the flow is not the unit interval.

    References:
        Ho, Chen, Srinivas, Duan, Abbeel. Flow++: Improving Flow-Based Generative Models with
        Variational Dequantization and Architecture Design. ICML 2019. arXiv:1902.00275

    Example:
        >>> from torch.distributions import constraints
        >>> from pyrogen.distributions import nsf
        >>> q = VariationalDequantizer(nsf(2, 2, support=constraints.unit_interval))
        >>> q(torch.zeros(5, 2), None, 3)[1].shape
        torch.Size([3, 5])
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        each = _of_each(flow.support)
        if not (agree(each, constraints.unit_interval) or agree(each, HALF_OPEN)):
            raise ValueError(
                "VariationalDequantizer expected a flow of fractions, got one on "
                f"{flow.support}. Build it with support=constraints.unit_interval."
            )
        self.flow = flow
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def forward(
        self, k: Tensor, context: Tensor | None, draws: int
    ) -> tuple[Tensor, Tensor | float]:
        given = (k - self.shift) / self.scale
        if context is not None:
            given = torch.cat([given, context.expand(*k.shape[:-1], -1)], dim=-1)
        return self.flow(given).rsample_and_log_prob((draws,))

    @torch.no_grad()
    def standardize(self, k: Tensor) -> Self:
        """Let the flow see the numbers with mean 0 and standard deviation 1, over all of them.

        Numbers that are all the same keep their unit.

        Args:
            k: Whole numbers of a floating dtype, of any shape.

        Returns:
            The proposal itself.

        Raises:
            TypeError: If the numbers are not of floating point.
            ValueError: If they are not whole, or there are none.
        """
        _check_whole(k, ())
        self.shift.copy_(k.mean())
        self.scale.copy_(k.std() if k.amin() < k.amax() else torch.ones(()))
        return self


HALF_OPEN = constraints.half_open_interval(0.0, 1.0)
UNIFORM = UniformDequantizer()  # it has no state


class Quantized(LikelihoodFree):
    r"""Law of :math:`k = \lfloor x \rfloor` for a continuous :math:`x`, number by number.

    .. math:: P(k) = \int_{[0, 1)^D} p(k + u)\, du
        \ge \exp \mathrm E \log \frac1K \sum_{i=1}^K \frac{p(k + u_i)}{q(u_i \mid k)},
        \qquad u_i \sim q(u \mid k)

    Draws are exact. The probability is an integral over a cube, so ``log_prob`` refuses;
    :meth:`bound` estimates it from below, and :meth:`bounded` is a law that Pyro can observe by
    that bound. For NUTS open the integral instead: make ``u`` a latent site, uniform on the cube,
    and add ``pyro.factor("k", law.continuous.log_prob(k + u))``, which is exact.

    Args:
        continuous: Distribution of :math:`x`.
        dequantizer: Proposal for the fractions.
        context: What the proposal is conditioned on, next to ``k``.

    References:
        Theis, van den Oord, Bethge. A note on the evaluation of generative models. ICLR 2016.
        arXiv:1511.01844
        Hoogeboom, Cohen, Tomczak. Learning Discrete Distributions by Dequantization. AABI 2021.
        arXiv:2001.11235

    Example:
        >>> p = Quantized(dist.Normal(torch.full((1,), 0.5), 1.0).to_event(1))
        >>> round(p.bound(torch.zeros(1), particles=10_000).item(), 2)  # exactly -0.9599
        -0.96
        >>> p.log_prob(torch.zeros(1))
        Traceback (most recent call last):
            ...
        NotImplementedError: Quantized has draws but no density in closed form: a probability ...
    """

    has_rsample = False

    def __init__(
        self,
        continuous: TorchDistribution,
        dequantizer: Dequantizer = UNIFORM,
        *,
        context: Tensor | None = None,
    ) -> None:
        self.continuous = continuous
        self.dequantizer = dequantizer
        self.context = context
        super().__init__(continuous.batch_shape, continuous.event_shape, validate_args=False)

    @constraints.dependent_property(is_discrete=True)
    def support(self) -> constraints.Constraint:
        return _floor_of(self.continuous.support, self.event_dim)

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> "Quantized":
        wide = self.continuous.expand(Size(batch_shape))
        return Quantized(wide, self.dequantizer, context=self.context)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.continuous.sample(Size(sample_shape)).floor()

    def rsample(self, sample_shape: Sequence[int] = ()) -> NoReturn:
        """Refuse: whole numbers have no gradient.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "Quantized has no reparameterized draw: its draws are whole numbers. Use sample."
        )

    def log_prob(self, value: Tensor) -> NoReturn:
        """Refuse, and say what to do instead.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            "Quantized has draws but no density in closed form: a probability is an integral over "
            "a cube. Bound it by bound(k), observe bounded(particles) under SVI, or, for NUTS, "
            "make the fraction a latent site and score continuous.log_prob(k + u)."
        )

    def bound(self, k: Tensor, *, particles: int = 1) -> Tensor:
        """Random lower bound on the log-probability: below it on average, tighter with more.

        Cost: one density of ``particles`` times the data.

        Args:
            k: Whole numbers of a floating dtype, shape ``(*batch, *event_shape)``.
            particles: Number :math:`K` of fractions for each datum.

        Returns:
            The bound in nats, shape ``batch``.

        Raises:
            TypeError: If ``k`` is not of floating point.
            ValueError: If ``k`` does not fit or is not whole, or there are no particles.
        """
        _check_whole(k, self.event_shape)
        if particles < 1:
            raise ValueError(f"Quantized.bound expected particles >= 1, got {particles}.")
        lead = k.shape[: k.ndim - self.event_dim]
        k = k.expand(*torch.broadcast_shapes(lead, self.batch_shape), *self.event_shape)
        flat = k.reshape(*k.shape[: k.ndim - self.event_dim], -1)
        u, log_q = self.dequantizer(flat, self.context, particles)
        x = _within_cell(k, u.reshape(-1, *k.shape))
        return (self.continuous.log_prob(x) - log_q).logsumexp(0) - math.log(particles)

    def bounded(self, *, particles: int = 1) -> "_Bounded":
        """This law with ``log_prob = bound``: what ``pyro.sample(..., obs=k)`` scores under SVI.

        The ELBO stays a lower bound on the evidence, and its gradient unbiased for it. The value
        is random, so samplers that compare two densities, such as NUTS, must not use it.
        """
        return _Bounded(self, particles)


class _Bounded(TorchDistribution):
    arg_constraints = {}  # noqa: RUF012
    has_rsample = False

    def __init__(self, law: Quantized, particles: int) -> None:
        self.law = law
        self.particles = particles
        super().__init__(law.batch_shape, law.event_shape, validate_args=False)

    @constraints.dependent_property(is_discrete=True)
    def support(self) -> constraints.Constraint:
        return self.law.support

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> "_Bounded":
        return _Bounded(self.law.expand(batch_shape), self.particles)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.law.sample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.law.bound(value, particles=self.particles)


class Dequantized(nn.Module):
    """A trainable law of whole numbers: the floor of a flow; call it to get the distribution.

    Fit it by :class:`~pyrogen.objectives.Dequantization`, which moves the flow and the proposal.

    Args:
        flow: Module ``context -> distribution`` with a density. With ``support=interval(0, n)``
            draws are 0, ..., n - 1; with ``positive`` they are counts.
        dequantizer: Proposal for the fractions; uniform if not given.

    Shape:
        Context ``(*batch, context)`` gives a distribution of batch shape ``batch``.

    Example:
        >>> from torch.distributions import constraints
        >>> from pyrogen.distributions import nsf
        >>> pixels = Dequantized(nsf(2, support=constraints.interval(0.0, 256.0)))
        >>> k = pixels().sample((5,))
        >>> pixels().bound(k, particles=8).shape
        torch.Size([5])
    """

    def __init__(self, flow: nn.Module, dequantizer: Dequantizer = UNIFORM) -> None:
        super().__init__()
        self.flow = flow
        self.dequantizer = dequantizer

    def forward(self, context: Tensor | None = None) -> Quantized:
        return Quantized(self.flow(context), self.dequantizer, context=context)

    def standardize(self, k: Tensor) -> Self:
        """Set the units of flow and proposal from data, with uniform fractions added.

        Args:
            k: Whole numbers of a floating dtype, shape ``(*batch, *event_shape)``.

        Returns:
            The module itself.

        Raises:
            TypeError: If the data are not of floating point.
            ValueError: If the data do not fit, are not whole, or are fewer than two.
        """
        _check_whole(k, ())
        u = torch.rand_like(k).clamp(min=1e-3, max=1 - 1e-3)  # off the borders
        self.flow.standardize(_within_cell(k, u))  # type: ignore[operator]
        if isinstance(self.dequantizer, VariationalDequantizer):
            self.dequantizer.standardize(k)
        return self


def _within_cell(k: Tensor, u: Tensor) -> Tensor:
    """``k + u`` strictly inside its cell: rounding may carry it to ``k + 1``, and u may be 0.

    Both can be borders of the support. A draw of exactly 0, one in sixteen million in single
    precision, stands for the smallest that is not.
    """
    x = torch.maximum(k + u.clamp(min=torch.finfo(u.dtype).eps / 2), k.nextafter(k + 1))
    return torch.minimum(x, (k + 1).nextafter(k))


def _check_whole(k: Tensor, event_shape: Sequence[int]) -> None:
    check_batch(k.unsqueeze(0), event_shape, owner="Quantized")
    if not (k == k.floor()).all():
        raise ValueError(
            "Quantized expected whole numbers, got fractions. Undo the scaling: k = x * 255, "
            "for instance."
        )


def _of_each(support: Any) -> Any:
    """The constraint of one number, of a constraint of many alike."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support


def _exact(bound: float | Tensor) -> Tensor:
    """A bound as a tensor: floats in double precision, or large ones would move."""
    return bound if isinstance(bound, Tensor) else torch.tensor(bound, dtype=torch.float64)


def _floor_of(support: Any, event_dim: int) -> constraints.Constraint:
    support = _of_each(support)
    whole: constraints.Constraint = constraints.integer
    if isinstance(support, constraints.interval | constraints.half_open_interval):
        low, high = map(_exact, (support.lower_bound, support.upper_bound))
        whole = constraints.integer_interval(low.floor(), high.ceil() - 1)
    half_line = isinstance(support, constraints.greater_than | constraints.greater_than_eq)
    if half_line and agree(support.lower_bound, 0):
        whole = constraints.nonnegative_integer
    return constraints.independent(whole, event_dim) if event_dim else whole
