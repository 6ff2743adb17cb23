"""The importance-weighted bound: nearer to the evidence with every particle."""

__all__ = ["ImportanceWeighted"]

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.infer.elbo import ELBO
from pyro.infer.enum import get_importance_trace
from pyro.poutine import Trace
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from pyro.util import check_if_enumerated, warn_if_nan
from torch import Tensor


class ImportanceWeighted(ELBO):
    r"""The importance-weighted bound, per datum, for any guide that can be sampled.

    .. math:: L_K = \sum_i s\, E \log \frac1K \sum_{k=1}^K w_{ik}, \qquad
        w_{ik} = \frac{p(x_i, z_{ik})}{q(z_{ik})}, \qquad L_1 \le L_K \le \log p(x).

    The sum over :math:`i` runs over the cells of the plates that hold *every* site of model and
    guide: given the parameters they are independent, so each has a bound of its own. With a site
    outside, the weights are joint and :math:`i` takes one value. The subsampling scale :math:`s`
    stands outside the logarithm and all particles see one subsample, so that the estimate is a
    bound in expectation. A ``poutine.scale`` that every site shares stands outside too; one that
    they do not share tempers densities, inside.

    The gradient is unbiased. Draws by ``rsample`` are differentiated along their path; for others
    the score of draw :math:`k` is multiplied by the bound less that of the other draws, which
    leaves the mean as it is.

    Cost: ``num_particles`` runs of guide and model, or one vectorized run.

    Args:
        num_particles: Number :math:`K` of draws in each average.
        max_plate_nesting: Depth of the plates; guessed from a run by default.
        vectorize_particles: Whether the draws are made by one run inside a plate.
        retain_graph: Passed to ``backward`` by ``loss_and_grads``.

    Raises:
        ValueError: If ``num_particles`` is not a positive integer.
        NotImplementedError: If a subsampled plate does not hold every site: its scale would stand
            inside the logarithm, and the result would not be a bound.

    References:
        Burda, Grosse, Salakhutdinov. Importance Weighted Autoencoders. ICLR 2016. arXiv:1509.00519
        Mnih, Rezende. Variational Inference for Monte Carlo Objectives. ICML 2016.
        arXiv:1602.06725

    Example:
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
        >>> def guide():
        ...     pyro.sample("z", dist.Normal(0.0, 1.0))
        >>> exact = -dist.Normal(0.0, 2.0**0.5).log_prob(torch.tensor(1.0))
        >>> loss = ImportanceWeighted(10_000, vectorize_particles=True).loss(model, guide)
        >>> print(f"{loss:.2f} {exact:.2f}")
        1.52 1.52
    """

    def __init__(
        self,
        num_particles: int = 2,
        *,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        retain_graph: bool | None = None,
    ) -> None:
        if not isinstance(num_particles, int) or num_particles < 1:
            raise ValueError(
                f"ImportanceWeighted expected a positive number of particles, got {num_particles}."
                " Pass an integer; every one more tightens the bound."
            )
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            retain_graph=retain_graph,
        )

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return an estimate of the negative bound, in nats, as a number."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return an estimate of the negative bound and add its gradient to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return an estimate of the negative bound, in nats, whose gradient is unbiased."""
        with _OneSubsample():
            traces = list(self._get_traces(model, guide, args, kwargs))
        log_weights, scores, scales = zip(*(self._weigh(*pair) for pair in traces), strict=True)
        log_weight, score, scale = self._stack(log_weights), self._stack(scores), scales[0]

        bound = log_weight.logsumexp(0) - math.log(self.num_particles)
        loss = -(scale * bound).sum()
        if score.requires_grad:
            gain = (bound - _bound_of_others(log_weight)).detach()
            surrogate = -(scale * gain * score).sum()
            loss = loss + surrogate - surrogate.detach()
        warn_if_nan(loss, "loss")
        return loss

    def _get_trace(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict
    ) -> tuple[Trace, Trace]:
        model_trace, guide_trace = get_importance_trace(
            "flat", self.max_plate_nesting, model, guide, args, kwargs
        )
        check_if_enumerated(guide_trace)
        return model_trace, guide_trace

    def _weigh(self, model_trace: Trace, guide_trace: Trace) -> tuple[Tensor, Tensor, Any]:
        """Return log-weight and log-score of every cell, and the scale outside the logarithm."""
        p, q = _scored_sites(model_trace), _scored_sites(guide_trace)
        cells = set.intersection(*map(_plates, p + q))
        if self.num_particles > 1:
            _check_subsampling(p + q, cells)

        outside = math.prod(map(_scale, cells))
        inside = [site["scale"] / outside for site in p + q]
        if all(torch.equal(*map(torch.as_tensor, (s, inside[0]))) for s in inside):
            outside, inside = outside * inside[0], [1.0] * len(inside)

        dims = {cell.dim for cell in cells}  # with that of the particles, when vectorized
        log_weight = score = p[0]["log_prob"].new_zeros(())
        for i, (site, power) in enumerate(zip(p + q, inside, strict=True)):
            log_prob = scale_and_mask(site["unscaled_log_prob"], power, site["mask"])
            log_prob = _sum_all_but(dims, log_prob)
            log_weight = log_weight + log_prob if i < len(p) else log_weight - log_prob
        for site in q:
            if not is_identically_zero(site["score_parts"].score_function):
                score = score + _sum_all_but(dims, site["score_parts"].score_function)
        return log_weight, score, outside

    def _stack(self, particles: Sequence[Tensor]) -> Tensor:
        """Lead with the dimension of the particles."""
        if self.vectorize_particles and self.num_particles > 1:
            x = particles[0]
            return x.movedim(-self.max_plate_nesting, 0) if x.ndim else x
        return torch.stack(list(particles))


class _OneSubsample(Messenger):
    """Gives every run inside it the subsamples that the first run drew."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[str | None, Any] = {}

    def _pyro_sample(self, msg: Message) -> None:
        if site_is_subsample(msg) and msg["name"] in self.drawn:
            msg["value"] = self.drawn[msg["name"]]
            msg["done"] = True

    def _pyro_post_sample(self, msg: Message) -> None:
        if site_is_subsample(msg):
            self.drawn[msg["name"]] = msg["value"]


def _scored_sites(trace: Trace) -> list[Any]:
    sites: Iterable[Any] = trace.nodes.values()  # pyro.deterministic sites have no density
    return [s for s in sites if s["type"] == "sample" and not s["infer"].get("_deterministic")]


def _plates(site: Any) -> set[CondIndepStackFrame]:
    return set(site["cond_indep_stack"])


def _scale(plate: CondIndepStackFrame) -> float:
    return 1.0 if plate.full_size is None else plate.full_size / plate.size


def _check_subsampling(sites: list[Any], cells: set[CondIndepStackFrame]) -> None:
    for plate in set.union(*map(_plates, sites)) - cells:
        if _scale(plate) != 1:
            outside = next(site["name"] for site in sites if plate not in _plates(site))
            raise NotImplementedError(
                f"Plate {plate.name!r} holds a subsample, {plate.size} of {plate.full_size}, and "
                f"site {outside!r} does not share one cell of it. A scale inside the logarithm "
                "gives no bound: use the whole plate, one particle, or StickingTheLanding."
            )


def _sum_all_but(dims: set[int | None], x: Tensor) -> Tensor:
    others = [dim for dim in range(-x.ndim, 0) if dim not in dims]
    return x.sum(others, keepdim=True) if others else x


def _bound_of_others(log_weight: Tensor) -> Tensor:
    """The bound that the particles but one give, for each one; zero where there is none.

    Sums over the earlier and over the later particles, so that no rounding lets a particle into
    its own baseline.
    """
    none = torch.full_like(log_weight[:1], -math.inf)
    earlier = torch.cat([none, log_weight[:-1].logcumsumexp(0)])
    later = torch.cat([log_weight[1:].flip(0).logcumsumexp(0).flip(0), none])
    bound = torch.logaddexp(earlier, later) - math.log(max(len(log_weight) - 1, 1))
    return torch.where(bound.isfinite(), bound, 0.0)
