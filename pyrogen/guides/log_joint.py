"""The log-joint density of a model, as a function of many unconstrained latents at once."""

__all__ = ["LogJoint"]

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor
from torch.distributions import biject_to

from ..inputs import check_batch
from .sites import subsampled

PLATE = "_pyrogen_draws"


class LogJoint:
    r"""Log-density of a model's latents, in a guide's unconstrained units, with the data held.

    .. math:: u \mapsto \log p\big(x, z(u)\big) + \log |\det \partial z / \partial u|

    The values need no validation: where the model is impossible they are -inf or NaN.

    Cost: one run of the model, in a plate of all draws.

    Args:
        model: The guide's model; no plate shows a part of its data.
        guide: Guide that says how latents are constrained and laid side by side. It has run.
        *args: Arguments of the model.
        **kwargs: Arguments of the model.

    Shape:
        ``(*batch, latents)`` to ``(*batch)``.

    Raises:
        RuntimeError: If the guide has not run.
        ValueError: If a plate is subsampled, the model's latents are not the guide's, or the
            latents have another shape or dtype.
        NotImplementedError: If the support of a site depends on another site.

    Example:
        >>> from pyro.infer.autoguide import AutoMultivariateNormal
        >>> def model():
        ...     pyro.sample("scale", dist.Exponential(1.0))
        >>> guide = AutoMultivariateNormal(model)
        >>> _ = guide()
        >>> LogJoint(model, guide)(torch.zeros(3, 1))  # scale 1: log e^-1 + log 1
        tensor([-1., -1., -1.])
    """

    def __init__(self, model: Callable, guide: AutoContinuous, *args: Any, **kwargs: Any) -> None:
        prototype: Any = guide.prototype_trace
        if prototype is None:
            raise RuntimeError(
                f"{type(guide).__name__} has not seen its model run, so it does not know the "
                "sites. Call guide(*args) with the model's arguments first."
            )
        self.model = model
        self.guide: Any = guide  # Pyro's traces have no types
        self.args = args
        self.kwargs = kwargs
        known_model = poutine.replay(model, trace=prototype)
        with torch.no_grad(), pyro.validation_enabled(False), poutine.block():  # noqa: FBT003
            trace: Any = poutine.trace(known_model).get_trace(*args, **kwargs)
        own = {n for n, site in _laws(trace).items() if not site["is_observed"]}
        known = {name for name, _ in prototype.iter_stochastic_nodes()}
        if own != known:
            odd = sorted(own ^ known)[0]
            there, here = ("model", "guide") if odd in own else ("guide", "model")
            raise ValueError(
                f"LogJoint found latent site {odd!r} in the {there} and not in the {here}. Pass "
                "the model that the guide was made for, and its arguments."
            )
        laws = _laws(trace).values()
        for site in laws:
            for plate in site["cond_indep_stack"]:
                if subsampled(plate):
                    raise ValueError(
                        f"LogJoint needs all data at once, but plate {plate.name!r} shows "
                        f"{plate.size} of {plate.full_size}. Remove subsample_size."
                    )
        frames = [-f.dim for site in laws for f in site["cond_indep_stack"] if f.vectorized]
        self.depth = max(*frames, *(len(site["fn"].batch_shape) for site in laws), 0, 0)

    def __call__(self, u: Tensor) -> Tensor:
        like = next(self._initial())
        check_batch(u[None], (self.guide.latent_dim,), owner="LogJoint", like=like)
        rows = u.reshape(-1, self.guide.latent_dim)
        return self._score(rows).reshape(u.shape[:-1])

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Values of all sites, each of shape ``(*batch, *shape)``, from ``(*batch, latents)``."""
        rows = u.reshape(-1, self.guide.latent_dim)
        shapes: Any = self.guide.prototype_trace
        return {
            name: value.reshape(*u.shape[:-1], *shapes.nodes[name]["value"].shape)
            for name, (value, _) in self._values(rows).items()
        }

    @torch.no_grad()
    def prior(self, draws: int) -> tuple[Tensor, Tensor]:
        """Draw from the model's prior.

        Args:
            draws: Number of draws.

        Returns:
            Unconstrained latents, shape ``(draws, latents)``, and the log-likelihood of the data
            under each, shape ``(draws,)``: its log importance weight for the posterior.

        Raises:
            NotImplementedError: If some site has a density but no draws.
        """
        trace: Any = self._run(self.model, draws)
        parts = []
        for name, site in self.guide.prototype_trace.iter_stochastic_nodes():
            value = trace.nodes[name]["value"]
            value = value.expand(draws, *value.shape[1:]).reshape(draws, *site["value"].shape)
            parts.append(biject_to(site["fn"].support).inv(value).reshape(draws, -1))
        u = torch.cat(parts, dim=-1)
        seen = {n: site for n, site in _laws(trace).items() if site["is_observed"]}
        return u, self._total(seen, u)

    def _score(self, rows: Tensor) -> Tensor:
        values = self._values(rows)
        model = poutine.condition(self.model, {name: z for name, (z, _) in values.items()})
        trace = self._run(model, len(rows))
        laws = _laws(trace)
        for name in values:
            _check_support(laws[name], self.guide.prototype_trace.nodes[name], rows)
        return sum((ladj for _, ladj in values.values()), self._total(laws, rows))

    def _total(self, laws: dict[str, Any], rows: Tensor) -> Tensor:
        """Sum the log-densities of sites, one number a draw."""
        total = rows.new_zeros(len(rows))
        for site in laws.values():
            log_prob = torch.as_tensor(site["log_prob"])
            if log_prob.ndim > self.depth:
                total = total + log_prob.reshape(len(log_prob), -1).sum(-1)
            else:  # the same for all draws
                total = total + log_prob.sum()
        return total

    def _values(self, rows: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Value of every site, and the log-determinant of its constraint, summed."""
        found = {}
        latents = rows.reshape(len(rows), *(1,) * self.depth, -1)
        for site, u in self.guide._unpack_latent(latents):
            transform = biject_to(site["fn"].support)
            z = transform(u)
            ladj = transform.log_abs_det_jacobian(u, z)
            found[site["name"]] = z, ladj.reshape(len(rows), -1).sum(-1)
        return found

    def _run(self, model: Callable, draws: int) -> Any:
        plate = pyro.plate(PLATE, draws, dim=-1 - self.depth)
        # An impossible value has no density; it is no error.
        with pyro.validation_enabled(False), poutine.block():  # noqa: FBT003
            trace: Any = poutine.trace(plate(model)).get_trace(*self.args, **self.kwargs)
            trace.compute_log_prob()
        return trace

    def _initial(self) -> Any:
        for _, site in self.guide.prototype_trace.iter_stochastic_nodes():
            yield site["value"]


def _laws(trace: Any) -> dict[str, Any]:
    """Sample sites, the plates' indices excluded."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"
    }


def _check_support(site: Any, known: Any, rows: Tensor) -> None:
    """Refuse a site whose support is another than when the guide was made."""
    here, there = biject_to(site["fn"].support), biject_to(known["fn"].support)
    if here == there:
        return
    shape = there.inverse_shape(known["value"].shape)
    zero = rows.new_zeros(shape)
    a, b = here(zero), there(zero)
    if not torch.allclose(*torch.broadcast_tensors(a, b)):
        raise NotImplementedError(
            f"Site {known['name']!r} has a support that depends on other sites, and the guide "
            "knows one support only. Draw a fixed quantity, and transform it in the model."
        )
