"""Bounds that are one function of all particles' weights, datum by datum."""

__all__ = ["MultiSample", "Weighed", "weigh"]

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from .base import Bound
from .gradients import Gradient
from .run import Run, in_plates


class Weighed:
    """A run's log-weight in the cells of the plates that all its sites share.

    ``log_q`` is that of the guide's draws; what draws nothing, a Jacobian, counts in ``log_p``.
    """

    def __init__(self, run: Run, cells: set[CondIndepStackFrame]) -> None:
        self.run = run
        sites = run.sites
        outside = math.prod(map(_scale, cells))
        inside = [site["scale"] / outside for site in sites]
        if inside and all(_equal(scale, inside[0]) for scale in inside):
            outside, inside = outside * inside[0], [1.0] * len(inside)
        self.scale = outside

        powers = dict(zip(map(id, sites), inside, strict=True))

        def in_cells(site: Any, log_prob: Tensor) -> Tensor:
            log_prob = scale_and_mask(log_prob, powers[id(site)], site["mask"])
            return in_plates(torch.as_tensor(log_prob), cells)

        zero = in_plates(sites[0]["log_prob"].new_zeros(()) if sites else torch.zeros(()), cells)
        jacobians = run.jacobians
        p = (in_cells(site, site["unscaled_log_prob"]) for site in run.p.values())
        q = {name: in_cells(site, run.path_log_prob(name)) for name, site in run.q.items()}
        self.log_p = sum(p, zero) - sum((q.pop(name) for name in jacobians), zero)
        self.log_q = sum(q.values(), zero)
        scores = (site["score_parts"].score_function for site in run.scored.values())
        self.score = sum((in_plates(score, cells) for score in scores), zero)


def weigh(runs: Sequence[Run], *, particles: int) -> list[Weighed]:
    """Weigh every run in the cells of the plates that all sites of all runs share.

    Raises:
        NotImplementedError: If a subsampled plate does not hold every site.
    """
    plates = [set(site["cond_indep_stack"]) for run in runs for site in run.sites]
    cells = set.intersection(*plates) if plates else set()
    if particles > 1:
        _check_subsampling(runs[0].sites, plates, cells)
    return [Weighed(run, cells) for run in runs]


class MultiSample(Bound):
    r"""Minimise :math:`-\sum_i s\, E\, F(\log w_{i1}, \dots, \log w_{iK})` for some :math:`F`.

    .. math:: w_{ik} = \frac{p(x_i, z_{ik})}{q(z_{ik})}

    The sum over :math:`i` runs over the cells of the vectorized plates that hold *every* site of
    model and guide: given the parameters they are independent, so each has a bound of its own.
    With a site outside, the weights are joint and :math:`i` takes one value. The subsampling scale
    :math:`s` stands outside of :math:`F`, so that the estimate is a bound in expectation. A
    ``poutine.scale`` that every site shares stands outside too; one that they do not share tempers
    densities, inside.

    A class of your own gives :meth:`value` and, for :class:`DoublyReparameterized`,
    :meth:`path_weight`.

    Args:
        num_particles: Number :math:`K` of draws in each average.
        gradient: How the gradient is estimated; by default :class:`Reparameterized`, which is
            unbiased for :math:`F` whatever the guide's sites.
        max_plate_nesting: Depth of the plates; guessed from a run by default.
        vectorize_particles: Whether the draws are made by one run inside a plate.
        retain_graph: Passed to ``backward`` by ``loss_and_grads``.

    Raises:
        NotImplementedError: If a subsampled plate does not hold every site: its scale would stand
            inside of :math:`F`, and the result would not be a bound; or if the gradient holds for
            the ELBO alone.
    """

    sign = -1.0  # of F in the loss: F is a lower bound

    def __init__(
        self,
        num_particles: int = 2,
        *,
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
        if self.gradient.single_sample_only:
            raise NotImplementedError(
                f"{type(self.gradient).__name__} is an estimator for the ELBO, whose particles "
                f"answer each for its own, and {type(self).__name__} joins them. Use "
                "Reparameterized() here, or this gradient with ELBO."
            )

    @abstractmethod
    def value(self, log_weight: Tensor) -> Tensor:
        """Return :math:`F`: ``log_weight`` of shape ``(particles, *cells)`` to ``(*cells)``."""

    def path_weight(self, log_weight: Tensor) -> Tensor:
        r"""Return :math:`\partial_k F - \partial_k^2 F`, shape ``(particles, *cells)``.

        It weighs the particles where the guide's score is left out of the gradient.

        Raises:
            NotImplementedError: If the bound does not give it.
        """
        raise NotImplementedError(
            f"{type(self).__name__} gives no path_weight, which DoublyReparameterized needs. Add "
            "the method, or use gradient=Reparameterized()."
        )

    def model_weight(self, log_weight: Tensor) -> Tensor:
        r"""Return :math:`\partial_k F`, the weights of the model's own gradient."""
        with torch.enable_grad():
            leaf = log_weight.detach().requires_grad_()
            return torch.autograd.grad(self.value(leaf).sum(), leaf)[0]

    def leave_one_out(self, log_weight: Tensor) -> Tensor:
        """Return :math:`F` of the particles but one, for each one: ``(particles, *cells)``.

        Cost: the square of the number of particles.
        """
        count = len(log_weight)
        others = torch.arange(count, device=log_weight.device)
        others = others.expand(count, count)[~torch.eye(count, dtype=torch.bool)]
        return self.value(
            log_weight[others.reshape(count, count - 1).T]
        )  # (count - 1, count, *cells)

    def _evaluate(self, runs: Sequence[Run], args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
        weighed = weigh(runs, particles=self.num_particles)
        scale = weighed[0].scale
        log_weight = self._stack([w.log_p - w.log_q for w in weighed])
        fixed = log_weight.detach()

        bound = self.value(log_weight)
        loss = self.sign * (scale * bound).sum()
        if not torch.is_grad_enabled():
            return loss, loss
        surrogate = loss
        if runs[0].held is not None:
            surrogate = self.sign * (scale * self._along_path(weighed, fixed)).sum()
        score = self._stack([w.score for w in weighed])
        if score.requires_grad:
            signal = bound.detach().expand_as(fixed)
            surrogate = surrogate + self._score(signal, fixed, score, scale, args, kwargs)
        return loss, surrogate

    def _along_path(self, weighed: Sequence[Weighed], fixed: Tensor) -> Tensor:
        """The guide by its path weights, the model by its own, each in the plates' cells."""
        path, own = self.path_weight(fixed), self.model_weight(fixed)
        limits = torch.finfo(own.dtype)
        least = limits.eps * path.abs() + limits.tiny  # so that their ratio is finite
        own = torch.where(own.abs() < least, least, own)
        parts = (self._unstack(x) for x in (path, own, fixed.isfinite()))
        total = torch.zeros(())
        for w, c, v, possible in zip(weighed, *parts, strict=True):
            if w.run.crossing is not None:
                w.run.crossing.factor = c / v  # so that what goes through the draws has weight c
            total = total + torch.where(possible, v * w.log_p - c * w.log_q, 0.0)
        return total

    def _score(
        self,
        signal: Tensor,
        fixed: Tensor,
        score: Tensor,
        scale: Any,
        args: tuple,
        kwargs: dict,
    ) -> Tensor:
        others = self.leave_one_out(fixed) if len(fixed) > 1 else None
        name = type(self).__name__
        gain = signal - self.gradient.baseline(name, signal, others, *args, **kwargs)
        loss = self.sign * (scale * gain.detach() * score).sum()
        return loss + gain.square().mean(0).sum() if gain.requires_grad else loss


def _equal(a: Any, b: Any) -> bool:
    same = a == b  # numbers or tensors, on whatever device
    return bool(same.all()) if isinstance(same, Tensor) else same


def _scale(plate: CondIndepStackFrame) -> float:
    return 1.0 if plate.full_size is None else plate.full_size / plate.size


def _check_subsampling(
    sites: Sequence[Any], plates: Sequence[set], cells: set[CondIndepStackFrame]
) -> None:
    for plate in {plate for site in sites for plate in site["cond_indep_stack"]} - cells:
        if _scale(plate) != 1:
            outside = next(
                s["name"] for s, its in zip(sites, plates, strict=False) if plate not in its
            )
            raise NotImplementedError(
                f"Plate {plate.name!r} holds a subsample, {plate.size} of {plate.full_size}, and "
                f"site {outside!r} does not share one cell of it. A scale inside the logarithm "
                "gives no bound: use the whole plate, one particle, or ELBO."
            )
