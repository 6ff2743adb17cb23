"""The evidence lower bound, and its tempered kin."""

__all__ = ["ELBO", "Annealing", "Tempered"]

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor, nn

from .base import Bound
from .gradients import Gradient
from .run import Run, in_plates, mean_of_others


class SingleSample(Bound):
    """A bound that is a mean over particles of a sum over sites: each draw answers for its own."""

    @abstractmethod
    def _weights(self, runs: Sequence[Run]) -> tuple[dict[str, Any], Any]:
        """Return what multiplies the log-densities of named sites, and what the loss adds."""

    def _evaluate(self, runs: Sequence[Run], args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
        weights, constant = self._weights(runs)
        value = constant - sum(run.value(weights) for run in runs) / self.num_particles
        if not torch.is_grad_enabled():
            return value, value
        surrogate = -sum(run.path(weights) for run in runs) / self.num_particles
        for name in dict.fromkeys(name for run in runs for name in run.scored):
            surrogate = surrogate + self._score(name, runs, weights, args, kwargs)
        return value, surrogate

    def _score(
        self, name: str, runs: Sequence[Run], weights: Mapping, args: tuple, kwargs: dict
    ) -> Tensor:
        """Minus the score term of one site, averaged over particles, and its baseline's loss."""
        sites = [run.scored.get(name) for run in runs]
        frames, *others = {frozenset(site["cond_indep_stack"]) for site in sites if site}
        if others:
            raise ValueError(
                f"The particles disagree on the plates of guide site {name!r}, and share one "
                "baseline. Use one particle a step."
            )
        signals = [run.cost(frames, weights) for run in runs]
        score = [site["score_parts"].score_function if site else None for site in sites]
        if any(site["infer"].get("baseline") for site in sites if site):
            raise NotImplementedError(
                f"Guide site {name!r} asks for a baseline by infer=, as TraceGraph_ELBO reads it. "
                "Leave it out, and pass gradient=Reparameterized(MovingAverage())."
            )
        signal = self._stack(signals)
        rest = mean_of_others(signal) if len(signal) > 1 else None
        guess = self.gradient.baseline(name, signal, rest, *args, **kwargs)
        gain = signal - guess
        self.gradient.observe(name, runs, gain.detach(), self._stack)
        parts = zip(self._unstack(gain.detach()), score, strict=True)
        total = -sum((g * s).sum() for g, s in parts if s is not None)
        if guess.requires_grad:
            total = total + gain.square().sum()
        return total / self.num_particles


class ELBO(SingleSample):
    r"""The evidence lower bound, by any gradient.

    .. math:: L = E_{q(z)} \log \frac{p(x, z)}{q(z)} \le \log p(x)

    The loss is :math:`-L`, in nats, and its value that of :class:`pyro.infer.Trace_ELBO`. By
    default, draws are differentiated along their path where they have one, and by their score,
    with a leave-one-out baseline, where not.

    * ``ELBO(8, gradient=DoublyReparameterized())``: sticking the landing.
    * ``ELBO(8, gradient=ScoreFunction())``: black-box VI, every site by its score.
    * ``ELBO(gradient=Reparameterized(Learned(net)))``: neural variational inference, NVIL.

    Cost: ``num_particles`` runs of guide and model, or one vectorized run.

    Args:
        num_particles: Draws over which value and gradient are averaged.
        gradient: How the gradient is estimated; by default :class:`Reparameterized`.
        max_plate_nesting: Depth of the plates; guessed from a run by default.
        vectorize_particles: Whether the draws are made by one run inside a plate.
        retain_graph: Passed to ``backward`` by ``loss_and_grads``.

    Raises:
        ValueError: If ``num_particles`` is not a positive integer.
        TypeError: If ``gradient`` is not a gradient.

    References:
        Jordan, Ghahramani, Jaakkola, Saul. An Introduction to Variational Methods for Graphical
        Models. Machine Learning 37, 1999.
        Ranganath, Gerrish, Blei. Black Box Variational Inference. AISTATS 2014. arXiv:1401.0118

    Example:
        >>> def model():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(1.0, 1.0))
        >>> loss = ELBO(10_000, vectorize_particles=True).loss(model, guide)
        >>> print(f"{loss:.1f}")  # the divergence between the two
        0.5
    """

    def _weights(self, runs: Sequence[Run]) -> tuple[dict[str, Any], Any]:
        return {}, 0.0


class Annealing(nn.Module):
    r"""A weight that moves linearly from ``start`` to ``stop``, one step a gradient.

    Args:
        steps: Number of gradients until ``stop``.
        start: Weight of the first gradient.
        stop: Weight from then on.

    Raises:
        ValueError: If ``steps`` is not positive, or a weight is negative.

    Example:
        >>> weight = Annealing(2)
        >>> [weight() for _ in range(4)]
        [0.0, 0.5, 1.0, 1.0]
    """

    done: Tensor

    def __init__(self, steps: int, *, start: float = 0.0, stop: float = 1.0) -> None:
        super().__init__()
        if not (steps >= 1 and start >= 0 and stop >= 0):
            raise ValueError(
                f"Annealing expected steps >= 1 and weights >= 0, got steps={steps}, "
                f"start={start} and stop={stop}. Pass the number of steps to anneal over."
            )
        self.steps, self.start, self.stop = steps, start, stop
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))

    def forward(self) -> float:
        share = min(self.done.item() / self.steps, 1.0)
        if torch.is_grad_enabled():
            self.done += 1
        return self.start + share * (self.stop - self.start)


class Tempered(SingleSample):
    r"""The evidence lower bound with a weight on its divergence, and nats that are free.

    .. math:: L_\beta = E_q \log p(x \mid z) - \beta \sum_s \max\big(\lambda,\,
        E_q \log \tfrac{q(z_s)}{p(z_s)}\big)

    with :math:`s` over the latent sites. :math:`\beta > 1` is the β-VAE; :math:`\beta` from 0 to 1
    by :class:`Annealing`, or :math:`\lambda > 0`, keep latents alive early on. A site's divergence
    is averaged over the cells of its plates and over particles, estimated from the draws; while it
    is below :math:`\lambda`, it has no gradient. Auxiliary sites of a guide, which the model does
    not have, count with those that are.

    With :math:`\beta < 1` or :math:`\lambda > 0` it is not a bound on the evidence.

    Args:
        num_particles: Draws over which value and gradient are averaged.
        beta: Weight of the divergence, a number or a module that returns one.
        free_nats: Least divergence :math:`\lambda` that costs, in nats a site and a cell of its
            plates.
        gradient: How the gradient is estimated; by default :class:`Reparameterized`.
        max_plate_nesting: Depth of the plates; guessed from a run by default.
        vectorize_particles: Whether the draws are made by one run inside a plate.
        retain_graph: Passed to ``backward`` by ``loss_and_grads``.

    Raises:
        ValueError: If ``beta`` or ``free_nats`` is negative.

    References:
        Higgins et al. beta-VAE: Learning Basic Visual Concepts with a Constrained Variational
        Framework. ICLR 2017.
        Bowman et al. Generating Sentences from a Continuous Space. CoNLL 2016. arXiv:1511.06349
        Kingma et al. Improving Variational Inference with Inverse Autoregressive Flow. NeurIPS
        2016. arXiv:1606.04934

    Example:
        >>> loss = Tempered(beta=Annealing(1000), free_nats=0.5)
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        beta: float | nn.Module = 1.0,
        free_nats: float = 0.0,
        gradient: Gradient | None = None,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        retain_graph: bool | None = None,
    ) -> None:
        if not (isinstance(beta, nn.Module) or beta >= 0) or not free_nats >= 0:
            raise ValueError(
                f"Tempered expected beta >= 0 and free_nats >= 0, got beta={beta} and "
                f"free_nats={free_nats}. beta=1 and free_nats=0 give the ELBO."
            )
        super().__init__(
            num_particles,
            gradient=gradient,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            retain_graph=retain_graph,
        )
        self.beta = beta
        self.free_nats = free_nats

    def _weights(self, runs: Sequence[Run]) -> tuple[dict[str, Any], Any]:
        beta = self.beta() if isinstance(self.beta, nn.Module) else self.beta
        weights: dict[str, float] = {}
        constant = 0.0
        for group in _groups(runs):
            divergence, scale = _divergence(runs, group)
            free = self.free_nats > 0 and divergence < self.free_nats
            weights |= dict.fromkeys(group, 0.0 if free else beta)
            if free:
                constant += beta * self.free_nats * scale / self.num_particles
        return weights, constant


def _groups(runs: Sequence[Run]) -> list[list[str]]:
    """Latent sites whose divergences can be told apart: all together if the guide has others."""
    latents = [name for run in runs for name, site in run.p.items() if not site["is_observed"]]
    names = list(dict.fromkeys([*latents, *(name for run in runs for name in run.q)]))
    return [[name] for name in names] if set(names) == set(latents) else [names]


def _divergence(runs: Sequence[Run], group: Sequence[str]) -> tuple[float, float]:
    """Mean divergence of the cells that count, unscaled; and the sum of these cells' scales."""
    total, count, scales = 0.0, 0.0, 0.0
    for run in runs:
        sites = [part[name] for part in (run.q, run.p) for name in group if name in part]
        if not sites:
            continue
        shared = frozenset.intersection(*(frozenset(s["cond_indep_stack"]) for s in sites))
        for site in sites:
            log_prob = scale_and_mask(site["unscaled_log_prob"].detach(), mask=site["mask"])
            sign = 1.0 if any(site is own for own in run.q.values()) else -1.0
            total += sign * log_prob.sum().item()
        one = torch.ones_like(sites[0]["unscaled_log_prob"])
        seen = in_plates(scale_and_mask(one, mask=sites[0]["mask"]), shared)
        scaled = in_plates(scale_and_mask(one, sites[0]["scale"], sites[0]["mask"]), shared)
        count += (seen > 0).sum().item()
        scales += (scaled[seen > 0] / seen[seen > 0]).sum().item()
    return total / max(count, 1.0), scales
