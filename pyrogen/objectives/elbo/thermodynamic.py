"""The thermodynamic bound: the evidence as an integral from guide to posterior."""

__all__ = ["Thermodynamic"]

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from .gradients import Gradient
from .multi_sample import MultiSample


class Thermodynamic(MultiSample):
    r"""The thermodynamic variational objective, TVO, per datum.

    .. math:: \log p(x) = \int_0^1 E_{\pi_\beta} \log w\, d\beta \ge
        \sum_j (\beta_{j+1} - \beta_j)\, E_{\pi_{\beta_j}} \log w, \qquad
        \pi_\beta \propto q^{1-\beta} p^\beta,

    with each expectation by importance weights :math:`w^\beta` of the same :math:`K` draws, and
    the last :math:`\beta_{j+1}` equal to 1. The integrand rises, so that the left sum is a bound;
    with :math:`K` draws it lies between the ELBO and :class:`ImportanceWeighted`, draw by draw.
    The gradient is that of the sum with :math:`K` particles, without bias, whatever the guide's
    sites.

    Cost: ``num_particles`` runs of guide and model, or one vectorized run.

    Args:
        num_particles: Number :math:`K` of draws in each average.
        betas: Points :math:`\beta_j` of the sum, increasing from 0 to below 1.
        gradient: How the gradient is estimated; by default :class:`Reparameterized`.
        max_plate_nesting: Depth of the plates; guessed from a run by default.
        vectorize_particles: Whether the draws are made by one run inside a plate.
        retain_graph: Passed to ``backward`` by ``loss_and_grads``.

    Raises:
        ValueError: If ``betas`` do not increase from 0 to below 1, or ``num_particles`` is not a
            positive integer.
        NotImplementedError: If a subsampled plate does not hold every site.

    References:
        Masrani, Le, Wood. The Thermodynamic Variational Objective. NeurIPS 2019. arXiv:1907.00031

    Example:
        >>> loss = Thermodynamic(16, betas=(0.0, 0.1, 0.5), vectorize_particles=True)
    """

    def __init__(
        self,
        num_particles: int = 2,
        *,
        betas: Sequence[float] = (0.0, 0.03, 0.1, 0.3),
        gradient: Gradient | None = None,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        retain_graph: bool | None = None,
    ) -> None:
        points = [*betas, 1.0]
        if points[0] != 0 or not all(low < high for low, high in pairwise(points)):
            raise ValueError(
                f"Thermodynamic expected betas that increase from 0 to below 1, got {betas}. Pass "
                "(0.0,) for the ELBO, and more points for a tighter bound."
            )
        super().__init__(
            num_particles,
            gradient=gradient,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            retain_graph=retain_graph,
        )
        self.steps = [(low, high - low) for low, high in pairwise(points)]

    def value(self, log_weight: Tensor) -> Tensor:
        total = log_weight.new_zeros(())
        for beta, width in self.steps:
            total = total + width * ((beta * log_weight).softmax(0) * log_weight).sum(0)
        return total

    def path_weight(self, log_weight: Tensor) -> Tensor:
        total = log_weight.new_zeros(())
        for beta, width in self.steps:
            share = (beta * log_weight).softmax(0)
            above = 1 + beta * (log_weight - (share * log_weight).sum(0))
            slope = share * above
            curvature = beta * share * ((1 - share) * above + 1 - slope)
            total = total + width * (slope - curvature)
        return total
