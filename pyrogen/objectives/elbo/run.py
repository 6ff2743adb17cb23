"""One run of the guide and of the model on its draws, and what the bounds read from it."""

__all__ = [
    "Crossing",
    "Detached",
    "OneSubsample",
    "Run",
    "bare",
    "check_runs_alone",
    "dropouts",
    "in_plates",
    "is_point",
    "mean_of_others",
    "replayed",
]

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.distributions.util import is_identically_zero, scale_and_mask
from pyro.poutine import Trace
from pyro.poutine.guide import GuideMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn
from torch.distributions import Distribution, Independent
from torch.nn.modules.dropout import _DropoutNd

Frames = frozenset[CondIndepStackFrame]


class Run:
    """A guide's trace and the model's trace on the guide's draws, both scored.

    Args:
        model: Trace of the model.
        guide: Trace of the guide. Its sites' ``score_parts`` say how they are differentiated:
            ``score_function`` for draws by their score, ``entropy_term`` for draws by their path.
        held: Trace of the guide with its draws held, where the score is taken out of the gradient.
        crossing: The passage of the draws from guide to model, where there is one.
    """

    def __init__(
        self,
        model: Trace,
        guide: Trace,
        *,
        held: Trace | None = None,
        crossing: "Crossing | None" = None,
    ) -> None:
        self.guide = guide
        self.held = held
        self.crossing = crossing
        self.p = _scored(model)
        self.q = _scored(guide)

    @property
    def sites(self) -> list[Any]:
        """All that has a density, the model's first."""
        return [*self.p.values(), *self.q.values()]

    def value(self, weights: Mapping[str, Any]) -> Tensor:
        """Log p - log q, summed over all sites; ``weights`` multiply the sites that they name."""
        p, q = (
            sum(weights.get(name, 1.0) * site["log_prob_sum"] for name, site in sites.items())
            for sites in (self.p, self.q)
        )
        return torch.as_tensor(p - q)

    def path(self, weights: Mapping[str, Any]) -> Tensor:
        """The part of ``value`` that is differentiated along the path of the draws."""
        path = torch.zeros(())
        for name, site in self.p.items():
            path = path + weights.get(name, 1.0) * site["log_prob_sum"]
        for name, site in self.q.items():
            term = site["score_parts"].entropy_term
            if self.held is not None:
                term = scale_and_mask(self.path_log_prob(name), site["scale"], site["mask"])
            if not is_identically_zero(term):
                path = path - weights.get(name, 1.0) * term.sum()
        return path

    @property
    def scored(self) -> dict[str, Any]:
        """The guide's sites that have a score term."""
        return {
            name: site
            for name, site in self.q.items()
            if not is_identically_zero(site["score_parts"].score_function)
        }

    def cost(self, frames: Frames, weights: Mapping[str, Any]) -> Tensor:
        """Return log p - log q of all that a site in ``frames`` may change, cell by cell.

        Sums over the plates that are not among ``frames``; what lies in another iteration of a
        sequential plate is left out. ``weights`` multiply the sites that they name.
        """
        cost = torch.zeros(())
        for sites, sign in ((self.p, 1.0), (self.q, -1.0)):
            for name, site in sites.items():
                own = frozenset(site["cond_indep_stack"])
                if not _elsewhere(own, frames):
                    other = {f.dim for f in own - frames if f.vectorized}
                    term = _sum_over(other, torch.as_tensor(site["log_prob"]).detach())
                    cost = cost + sign * weights.get(name, 1.0) * in_plates(term, frames)
        return cost

    @property
    def jacobians(self) -> set[str]:
        """The guide's sites that draw nothing: factors, and the Jacobians of ``Delta`` sites.

        They are no laws, so their gradient has no score to leave out.
        """
        return {
            name
            for name, site in self.q.items()
            if (site["is_observed"] or is_point(site["fn"]))
            and is_identically_zero(site["score_parts"].score_function)
        }

    def path_log_prob(self, name: str) -> Tensor:
        """Log q of a guide site, unscaled, with gradient along the draws alone."""
        log_prob = self.q[name]["unscaled_log_prob"]
        if self.held is None or name not in self.held.nodes:
            return log_prob
        score = self.held.nodes[name]["unscaled_log_prob"]
        return log_prob - score + score.detach()


class Crossing:
    """Draws on their way from guide to model, whose gradient is multiplied on the way back.

    The factor is not known before the model has run: it is set after, and before ``backward``.
    """

    def __init__(self) -> None:
        self.factor: Tensor | None = None  # batch shape of the sites

    def __call__(self, value: Tensor, held: Tensor, event_dim: int) -> Tensor:
        """Return ``value``; gradient goes to it by the factor, to ``held`` by one less the factor.

        What remains of a value when the guide's draws are held is a parameter of its own, as in
        ``Delta(loc)``, and its gradient is no path.
        """
        if not value.requires_grad:
            return value
        crossed = value.view_as(value)
        crossed.register_hook(lambda g: self._multiply(g, self.factor, event_dim))
        if held.requires_grad:
            rest = held.view_as(held)
            rest.register_hook(lambda g: self._multiply(g, self._rest, event_dim))
            crossed = crossed + (rest - rest.detach())
        return crossed

    @property
    def _rest(self) -> Tensor:
        return torch.zeros(()) if self.factor is None else 1 - self.factor

    @staticmethod
    def _multiply(gradient: Tensor, factor: Tensor | None, event_dim: int) -> Tensor:
        if factor is None:
            return gradient
        shape = factor.shape + (1,) * event_dim
        return (gradient * factor.to(gradient).reshape(shape)).reshape(gradient.shape)


class OneSubsample(Messenger):
    """Gives every run inside it the subsamples that the first run drew."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[tuple, Any] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg) and self._key(msg) in self.drawn:
            msg["value"] = self.drawn[self._key(msg)]
            msg["done"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            self.drawn[self._key(msg)] = msg["value"]

    @staticmethod
    def _key(msg: Any) -> tuple:
        return msg["name"], msg["fn"].size, msg["fn"].subsample_size  # sizes may be random too


class Detached(Messenger):
    """Cuts the path of every draw, so that only its score remains."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not (msg["is_observed"] or site_is_subsample(msg) or is_point(msg["fn"])):
            msg["value"] = msg["value"].detach()


def bare(fn: Any) -> Distribution:
    """The distribution beneath what plates, masks and ``to_event`` wrap around it."""
    while isinstance(fn, (ExpandedDistribution, Independent, MaskedDistribution)):
        fn = fn.base_dist
    return fn


def is_point(fn: Any) -> bool:
    """Whether a site's distribution is a ``Delta``, which has no score."""
    return isinstance(bare(fn), Delta)


def in_plates(x: Tensor, plates: Iterable[CondIndepStackFrame]) -> Tensor:
    """Sum over all but some plates, to as many dimensions as they need, whatever ``x`` has."""
    dims = {plate.dim for plate in plates if plate.dim is not None}
    x = _sum_over({dim for dim in range(-x.ndim, 0) if dim not in dims}, x)
    depth = max((-dim for dim in dims), default=0)
    return x.reshape((1,) * (depth - x.ndim) + x.shape[max(x.ndim - depth, 0) :])


def mean_of_others(x: Tensor) -> Tensor:
    """The mean of all but one along the first dimension, for each one.

    Sums over the earlier and over the later, so that no rounding lets one into its own mean.
    """
    earlier = x.cumsum(0).roll(1, 0)
    later = x.flip(0).cumsum(0).flip(0).roll(-1, 0)
    earlier[0], later[-1] = 0.0, 0.0
    return (earlier + later) / (len(x) - 1)


def check_runs_alone(guide: Callable, owner: str) -> None:
    """Refuse a guide that runs only inside its model.

    Raises:
        NotImplementedError: If it does.
    """
    guide = poutine.unwrap(guide)
    if isinstance(guide, GuideMessenger):
        raise NotImplementedError(
            f"{type(guide).__name__} runs only inside its model, and {owner} runs the guide "
            "alone. Use another autoguide, or gradient=Reparameterized()."
        )


def dropouts(guide: Callable) -> list[tuple[str, nn.Module]]:
    """Names and modules of a guide that drop units at random, so that no two runs agree."""
    guide = poutine.unwrap(guide)
    if not isinstance(guide, nn.Module):
        return []
    parts = guide.named_modules()
    return [(n, m) for n, m in parts if isinstance(m, _DropoutNd) and m.training and m.p > 0]


def replayed(draws: Mapping[str, Any], trace: Trace, fn: Callable) -> Callable:
    """Let ``fn`` run on these values in place of the trace's."""
    other = Trace()
    for name, value in draws.items():
        site: Any = trace.nodes[name]
        other.add_node(name, **(site | {"value": value}))
    return poutine.replay(fn, trace=other)


def _sum_over(dims: set[int | None], x: Tensor) -> Tensor:
    """Sum over dimensions, counted from the right; the shape keeps them."""
    present = [dim for dim in range(-x.ndim, 0) if dim in dims]
    return x.sum(present, keepdim=True) if present else x


def _scored(trace: Trace) -> dict[str, Any]:
    sites: Iterable[Any] = trace.nodes.values()  # pyro.deterministic sites have no density
    return {
        s["name"]: s
        for s in sites
        if s["type"] == "sample" and not s["infer"].get("_deterministic")
    }


def _elsewhere(own: Frames, frames: Frames) -> bool:
    """Whether a sequential plate separates the two."""
    here = {f.name: f.counter for f in frames if not f.vectorized}
    return any(here.get(f.name, f.counter) != f.counter for f in own if not f.vectorized)
