"""Hamiltonian Monte Carlo of many chains at once, on any power of several densities."""

__all__ = ["Points", "adapted", "evaluate", "transition"]

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LogDensity = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Points:
    """Points with the values and gradients there of several log-densities.

    Args:
        x: Points, shape ``(points, features)``.
        log_density: Values in nats, shape ``(densities, points)``.
        slope: Gradients, shape ``(densities, points, features)``.
    """

    x: Tensor
    log_density: Tensor
    slope: Tensor

    def where(self, condition: Tensor, other: "Points") -> "Points":
        """These points where the condition holds, the others elsewhere."""
        return Points(
            torch.where(condition[:, None], self.x, other.x),
            torch.where(condition, self.log_density, other.log_density),
            torch.where(condition[:, None], self.slope, other.slope),
        )


def evaluate(x: Tensor, densities: Sequence[LogDensity]) -> Points:
    """Evaluate log-densities and their gradients, without a graph.

    Args:
        x: Points, shape ``(points, features)``.
        densities: Functions from there to ``(points,)``.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        values = [density(x) for density in densities]
        slopes = [torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for v in values]
    return Points(x.detach(), torch.stack(values).detach(), torch.stack(slopes))


@torch.no_grad()
def transition(
    points: Points,
    densities: Sequence[LogDensity],
    powers: Sequence[float],
    step: Tensor,
    *,
    leapfrog: int,
) -> tuple[Points, Tensor]:
    r"""One step of Hamiltonian Monte Carlo, which leaves :math:`\prod_k f_k^{a_k}` invariant.

    Each chain draws its momentum from the standard normal law, moves by the leapfrog rule, and
    stays where it was if the move is rejected. A move that ends where a log-density is NaN or
    infinite is rejected.

    Cost: ``leapfrog`` values and gradients of all densities.

    Args:
        points: Where the chains are.
        densities: Logarithms of :math:`f_k`, up to constants.
        powers: :math:`a_k`, of any sign.
        step: Step size, a scalar or one for each chain, shape ``(points,)``.
        leapfrog: Number of leapfrog steps.

    Returns:
        Where the chains go, and the probability with which each was to move, shape ``(points,)``.

    References:
        Neal. MCMC using Hamiltonian dynamics. Handbook of Markov Chain Monte Carlo, 2011.
        arXiv:1206.1901
    """
    a = points.x.new_tensor(list(powers))
    step = step[..., None] if step.ndim else step
    moved = points
    start = momentum = torch.randn_like(points.x)
    lost = torch.zeros_like(points.x[:, 0], dtype=torch.bool)
    for _ in range(leapfrog):
        momentum = momentum + step / 2 * _slope(moved, a)
        x = moved.x + step * momentum
        lost = lost | ~x.isfinite().all(-1)
        moved = evaluate(torch.where(lost[:, None], points.x, x), densities)
        momentum = momentum + step / 2 * _slope(moved, a)
    gain = _log_density(moved, a) - _log_density(points, a)
    log_ratio = gain + (start.square() - momentum.square()).sum(-1) / 2
    lost = lost | log_ratio.isnan() | ~moved.log_density.isfinite().all(0)
    accept = torch.where(lost, -torch.inf, log_ratio).clamp(max=0).exp()
    return moved.where(torch.rand_like(accept) < accept, points), accept


def adapted(step: Tensor, accept: Tensor, *, target: float = 0.8, rate: float = 0.5) -> Tensor:
    """A step size whose acceptance is nearer to the target.

    Args:
        step: Step size.
        accept: Acceptance with it, in its shape.
        target: Acceptance to reach.
        rate: Change of the logarithm for a difference of one.
    """
    return step * (rate * (accept - target)).exp()


def _log_density(points: Points, powers: Tensor) -> Tensor:
    return powers @ points.log_density


def _slope(points: Points, powers: Tensor) -> Tensor:
    return torch.einsum("k,knd->nd", powers, points.slope)
