"""Divergences from posterior to guide, by the shape of the importance weights alone."""

__all__ = ["FDivergence", "TailAdaptive"]

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .gradients import DoublyReparameterized, Gradient
from .multi_sample import MultiSample


class FDivergence(MultiSample):
    r"""An f-divergence between posterior and guide, per datum.

    .. math:: D_f(p \,\|\, q) = E_q\, f\Big(\frac{p(z \mid x)}{q(z)}\Big)
        \approx \frac1K \sum_k f\Big(\frac{w_k}{\frac1K \sum_j w_j}\Big)

    The evidence is estimated by the same draws, so the loss is a divergence of normalized laws: at
    the posterior it is zero with every draw, and elsewhere its bias falls as :math:`1/K`. The
    gradient is that of the :math:`K`-particle loss, without bias. It moves the posterior towards
    the guide as much as the guide towards the posterior: learn the model by a lower bound, and
    give this loss's optimizer the guide's parameters alone.

    Cost: ``num_particles`` runs of guide and model, or one vectorized run.

    Args:
        num_particles: Number :math:`K` of draws; at least 2, and as many as can be.
        f: Generator, as a function of the log-ratio: one of :mod:`pyrogen.divergences`, such as
            ``kl`` (covers mass), ``reverse_kl`` (seeks modes) or ``jensen_shannon``.
        gradient: How the gradient is estimated; by default :class:`Reparameterized`.
        max_plate_nesting: Depth of the plates; guessed from a run by default.
        vectorize_particles: Whether the draws are made by one run inside a plate.
        retain_graph: Passed to ``backward`` by ``loss_and_grads``.

    Raises:
        ValueError: If ``num_particles`` is below 2: one draw is always at the estimated evidence.
        TypeError: If ``f`` is not a function.
        NotImplementedError: If a subsampled plate does not hold every site.

    References:
        Wan, Li, Hoffman. f-Divergence Variational Inference. NeurIPS 2020. arXiv:2009.13093

    Example:
        >>> from pyrogen.divergences import squared_hellinger
        >>> loss = FDivergence(64, f=squared_hellinger, vectorize_particles=True)
    """

    sign = 1.0  # a divergence

    def __init__(
        self,
        num_particles: int = 16,
        *,
        f: Callable[[Tensor], Tensor],
        gradient: Gradient | None = None,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        retain_graph: bool | None = None,
    ) -> None:
        super().__init__(
            num_particles,
            gradient=gradient,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            retain_graph=retain_graph,
        )
        if num_particles < 2:
            raise ValueError(
                "FDivergence expected at least 2 particles, got 1. One weight over its own mean "
                "is 1, whatever the guide: pass more particles, or use ELBO."
            )
        if not callable(f):
            raise TypeError(
                f"FDivergence expected a function of the log-ratio, got {f!r}. Pass one of "
                "pyrogen.divergences, such as kl."
            )
        self.f = f

    def value(self, log_weight: Tensor) -> Tensor:
        return self.f(_over_their_mean(log_weight)).mean(0)

    def path_weight(self, log_weight: Tensor) -> Tensor:
        share = log_weight.softmax(0)
        with torch.enable_grad():
            ratio = _over_their_mean(log_weight).detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.f(ratio).sum(), ratio, create_graph=True)
            curvature = torch.zeros_like(slope)
            if slope.requires_grad:
                (curvature,) = torch.autograd.grad(slope.sum(), ratio)
        slope = slope.detach()
        first = slope - share * slope.sum(0)
        second = (
            curvature * (1 - share)
            - share * (1 - share) * slope.sum(0)
            - share * (curvature - share * curvature.sum(0))
        )
        return (first - second) / len(log_weight)


class TailAdaptive(MultiSample):
    r"""Tail-adaptive f-divergence: particles weighed by the rank of their importance weight.

    .. math:: \sum_k \gamma_k \nabla_z \log w_k\, \nabla_\phi z_k, \qquad
        \gamma_k \propto \Big(\tfrac1K \#\{j : w_j \ge w_k\}\Big)^{\beta}

    The best of :math:`K` particles counts :math:`K^{-\beta}` times the worst, however heavy the
    tail of the weights: mass-covering, with a gradient of finite variance. Ties are broken by the
    order of the draws. The gradient goes along
    the path of the draws alone. The value of the loss is that of the negative ELBO; the model's
    parameters are weighed as the guide's.

    Cost: ``num_particles`` runs of model and twice as many of the guide, or one vectorized run.

    Args:
        num_particles: Number :math:`K` of draws.
        beta: Exponent, in [-1, 0); towards 0 it is the ELBO.
        max_plate_nesting: Depth of the plates; guessed from a run by default.
        vectorize_particles: Whether the draws are made by one run inside a plate.
        retain_graph: Passed to ``backward`` by ``loss_and_grads``.

    Raises:
        ValueError: If ``beta`` is not in [-1, 0), or a guide site is not reparameterized.
        NotImplementedError: If a subsampled plate does not hold every site.

    References:
        Wang, Liu, Liu. Variational Inference with Tail-adaptive f-Divergence. NeurIPS 2018.
        arXiv:1810.11943

    Example:
        >>> loss = TailAdaptive(64, vectorize_particles=True)
    """

    def __init__(
        self,
        num_particles: int = 16,
        *,
        beta: float = -1.0,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        retain_graph: bool | None = None,
    ) -> None:
        if not -1 <= beta < 0:
            raise ValueError(
                f"TailAdaptive expected beta in [-1, 0), got {beta}. Pass -1 for the paper's "
                "weights, or use ELBO for beta = 0."
            )
        super().__init__(
            num_particles,
            gradient=DoublyReparameterized(),
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            retain_graph=retain_graph,
        )
        self.beta = beta

    def value(self, log_weight: Tensor) -> Tensor:
        return log_weight.mean(0)

    def path_weight(self, log_weight: Tensor) -> Tensor:
        rank = log_weight.argsort(0, descending=True).argsort(0) + 1  # 1 for the largest weight
        weight = (rank / len(log_weight)).to(log_weight) ** self.beta
        return weight / weight.sum(0)

    def model_weight(self, log_weight: Tensor) -> Tensor:
        return self.path_weight(log_weight)


def _over_their_mean(log_weight: Tensor) -> Tensor:
    return log_weight - log_weight.logsumexp(0) + math.log(len(log_weight))
