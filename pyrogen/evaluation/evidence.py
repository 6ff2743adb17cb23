"""Density of held-out data under models that cannot be scored directly, and its comparison."""

__all__ = ["Evidence", "Kind", "bits_per_dim", "log_evidence", "monte_carlo_evidence"]

import math
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import torch
from pyro.poutine import Trace
from torch import Tensor

from ..distributions import Marginal
from ..inputs import check_batch
from .vectorized import (
    Program,
    log_prob_over,
    nesting,
    over_draws,
    refuse_subsampling,
    refuse_unmatched_sites,
    run_pair,
    sites,
)

Nats = TypeVar("Nats", float, Tensor)


class Kind(Enum):
    """What a number called log p(x) is; only numbers of one kind are comparable."""

    EXACT = "exact"  #: change of variables, closed form
    LOWER_BOUND = "lower bound"  #: on average at most the truth, for every number of particles
    ODE = "ODE estimate"  #: probability-flow ODE of a learned score, with solver and trace error


@dataclass(frozen=True)
class Evidence:
    """Log-density of held-out data, one number per datum.

    Args:
        log_prob: Log-density or bound per datum, nats, shape ``(data,)``.
        kind: Whether it is exact, a lower bound, or an estimate by an ODE.

    Example:
        >>> exact = Evidence(dist.Normal(0.0, 1.0).log_prob(torch.zeros(4)), Kind.EXACT)
        >>> print(exact)
        log p(x) = -0.919 ± 0.000 nats per datum (exact, 4 data)
    """

    log_prob: Tensor
    kind: Kind

    def __post_init__(self) -> None:
        if self.log_prob.ndim != 1 or not len(self.log_prob):
            raise ValueError(
                "Evidence expected one log-density per datum, shape (data,), got "
                f"{tuple(self.log_prob.shape)}. Pass log_prob(x), not its sum."
            )

    @property
    def value(self) -> float:
        """Mean over data, nats per datum."""
        return self.log_prob.mean().item()

    @property
    def error(self) -> float:
        """Standard error of ``value`` over data, nats; nan for a single datum."""
        if len(self.log_prob) < 2:
            return math.nan
        return (self.log_prob.std() / math.sqrt(len(self.log_prob))).item()

    def __str__(self) -> str:
        relation = {Kind.EXACT: "=", Kind.LOWER_BOUND: ">=", Kind.ODE: "~"}[self.kind]
        return (
            f"log p(x) {relation} {self.value:.3f} ± {self.error:.3f} nats per datum "
            f"({self.kind.value}, {len(self.log_prob)} data)"
        )


@torch.no_grad()
def log_evidence(
    model: Program, guide: Program, *batch: Tensor, particles: int = 256, batch_size: int = 256
) -> Evidence:
    r"""Bound the log-density of every datum from below by importance weights.

    .. math:: \log p(x) \ge \mathrm E \log \frac1K \sum_{k=1}^K
        \frac{p(x, z_k)}{q(z_k \mid x)}, \qquad z_k \sim q(z \mid x)

    The bound grows with :math:`K` and is tight when the guide is the posterior. The average is
    taken inside the logarithm for each datum on its own.

    Cost: ``particles`` runs of model and guide per datum, ``particles * batch_size`` at once.

    Args:
        model: Pyro program; all its sites lie in one plate over the batch.
        guide: Pyro program for the same latent sites, in the same plate.
        batch: What both are called with; data come first in every tensor. The first is ``x``.
        particles: Number :math:`K` of draws per datum.
        batch_size: Number of data worked on at once.

    Raises:
        ValueError: If a site lies outside the plate over the batch, a plate is subsampled, or
            the sites of model and guide differ.
        FloatingPointError: If a datum has no finite bound.

    References:
        Burda, Grosse, Salakhutdinov. Importance Weighted Autoencoders. ICLR 2016.
        arXiv:1509.00519

    Example:
        >>> from pyrogen.distributions import LatentVariable
        >>> vae = LatentVariable(nn.Linear(2, 3), latents=2, event_shape=(3,))
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> log_evidence(vae.model, guide, torch.zeros(10, 3), particles=50).kind.value
        'lower bound'
    """
    _check_sizes(particles=particles, batch_size=batch_size)
    if not batch:
        raise ValueError("log_evidence expected data, got none. Pass x after the guide.")
    if batch[0].is_floating_point() or not len(batch[0]):  # counts and labels are data too
        check_batch(batch[0], (), owner="log_evidence")
    if any(len(part) != len(batch[0]) for part in batch):
        raise ValueError(
            f"log_evidence expected tensors with {len(batch[0])} data each, got "
            f"{[len(part) for part in batch]}. The first dimension counts the data."
        )
    parts = zip(*(part.split(batch_size) for part in batch), strict=True)
    log_prob = torch.cat([_bound(model, guide, part, particles) for part in parts])
    return _lower_bound(log_prob, owner="log_evidence")


@torch.no_grad()
def monte_carlo_evidence(
    p: Marginal, x: Tensor, *, particles: int = 1000, batch_size: int = 256
) -> Evidence:
    r"""Bound the log-density of every datum by draws of the prior: the baseline without a guide.

    .. math:: \log p(x) \ge \mathrm E \log \frac1K \sum_{k=1}^K p(x \mid z_k),
        \qquad z_k \sim p(z)

    Hopelessly loose where the posterior is much narrower than the prior; compare with
    ``log_evidence``. All data share the draws.

    Args:
        p: Marginal without batch dimensions.
        x: Data, shape ``(data, *event_shape)``.
        particles: Number :math:`K` of draws.
        batch_size: Number of data worked on at once.

    Raises:
        ValueError: If ``p`` has batch dimensions, or the data do not fit.
        FloatingPointError: If a datum has no finite bound.

    Example:
        >>> p = Marginal(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
        >>> bound = monte_carlo_evidence(p, torch.zeros(1), particles=10_000)
        >>> round(bound.value, 1)  # exactly -1.2655
        -1.3
    """
    _check_sizes(particles=particles, batch_size=batch_size)
    if p.batch_shape:
        raise ValueError(
            f"monte_carlo_evidence expected one distribution, got a batch {tuple(p.batch_shape)}. "
            "Score each context on its own."
        )
    check_batch(x, p.event_shape, owner="monte_carlo_evidence")
    likelihood = p.likelihood(p.prior.sample(torch.Size((particles, 1))))
    log_prob = [
        likelihood.log_prob(part).logsumexp(0) - math.log(particles)
        for part in x.split(batch_size)
    ]
    return _lower_bound(torch.cat(log_prob), owner="monte_carlo_evidence")


def bits_per_dim(log_prob: Nats, dims: int, *, cell: float = 1.0) -> Nats:
    r"""Convert nats per datum into bits per dimension.

    .. math:: -\frac{\log p(x) + D \log \delta}{D \log 2}

    is the code length of data known up to cells of width :math:`\delta`. For data made
    continuous by uniform noise within the cell, it bounds the code length of the integers.

    Args:
        log_prob: Log-density of one datum, or a tensor of several, nats, in the units of the
            data.
        dims: Number :math:`D` of dimensions of one datum.
        cell: Width of a cell in the units of the data: 1 for pixels in 0..255, 1/256 for pixels
            scaled to [0, 1), 2/256 for [-1, 1).

    Raises:
        ValueError: If ``dims`` or ``cell`` is not positive.

    References:
        Theis, van den Oord, Bethge. A note on the evaluation of generative models. ICLR 2016.
        arXiv:1511.01844

    Example:
        >>> bits_per_dim(0.0, 784, cell=1 / 256)  # uniform on [0, 1): eight bits
        8.0
    """
    if dims < 1 or not cell > 0:
        raise ValueError(
            f"bits_per_dim expected dims >= 1 and cell > 0, got {dims} and {cell}. Count the "
            "numbers in one datum, and give the width of a cell in its units."
        )
    return -(log_prob / dims + math.log(cell)) / math.log(2)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"Expected {name} >= 1, got {size}. Pass a positive number.")


def _bound(model: Program, guide: Program, batch: tuple[Tensor, ...], particles: int) -> Tensor:
    plain = run_pair(model, guide, batch, {})
    refuse_subsampling(*plain, owner="log_evidence")
    refuse_unmatched_sites(*plain, owner="log_evidence")
    dim = _data_dim(*plain, data=len(batch[0]))
    depth = nesting(*plain)

    def over(program: Program) -> Program:
        return over_draws(program, particles, nesting=depth)

    model_trace, guide_trace = run_pair(over(model), over(guide), batch, {})
    dims, shape = (-1 - depth, dim), (particles, len(batch[0]))
    model_trace.compute_log_prob()
    guide_trace.compute_log_prob()
    log_weight = log_prob_over(model_trace, dims, shape) - log_prob_over(guide_trace, dims, shape)
    return log_weight.logsumexp(0) - math.log(particles)


def _data_dim(*traces: Trace, data: int) -> int:
    """Dimension of the plate that holds every site, one index per datum."""
    common: set[Any] | None = None
    for name, site in ((n, s) for trace in traces for n, s in sites(trace).items()):
        frames = {f for f in site["cond_indep_stack"] if f.vectorized and f.size == data}
        common = frames if common is None else {f for f in common if f in frames}
        if not common:
            raise ValueError(
                f"log_evidence found site '{name}' outside a plate over the {data} data, so the "
                "density is not one factor per datum. Put every site of model and guide in one "
                "plate over the batch, or use pyrogen.inference.importance for the joint evidence."
            )
    if not common:
        raise ValueError("log_evidence found no sites. Pass a model that observes x.")
    if len({frame.dim for frame in common}) > 1:
        raise ValueError(
            f"log_evidence found two plates of {data} around every site, and {data} data, so it "
            "cannot tell which plate is the batch. Choose another batch_size."
        )
    return next(frame.dim for frame in common)


def _lower_bound(log_prob: Tensor, *, owner: str) -> Evidence:
    if not log_prob.isfinite().all():
        bad = int((~log_prob.isfinite()).sum())
        raise FloatingPointError(
            f"{owner} has no finite bound for {bad} of {len(log_prob)} data. Raise particles, "
            "widen the guide, or look for NaN in the model."
        )
    return Evidence(log_prob, Kind.LOWER_BOUND)
