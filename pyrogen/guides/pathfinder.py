"""A normal approximation found on the way of an optimizer to the mode: the quickest start."""

__all__ = ["Pathfinder"]

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, init_to_uniform
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor
from torch.distributions import biject_to

from .auto import quantiles_from, refuse_subsamples
from .sites import subsampled

TOLERANCE = 1e-8  # of a step's decrease, relative to the log-density; then a path has ended
STRAIGHTEST = 1e12  # largest |y|^2 / s'y of a step whose curvature is believed


class Pathfinder(AutoContinuous):
    r"""Mixture of normals, each the best on one optimization path from a random start.

    A path is that of L-BFGS on the log-density of the latents, mapped to the reals. At each of its
    points :math:`u` the optimizer's inverse Hessian :math:`H` gives a normal

    .. math:: \mathcal N\big(u + H \nabla \log p(u, x),\; H\big),

    and the one of the highest evidence lower bound :math:`L_k` is kept. Paths are mixed with
    weights :math:`e^{L_k} / \sum_j e^{L_j}`, so one that ended in a poor place has none.

    It is a start, not a posterior: for chains, or for an :class:`~pyrogen.guides.AutoFlow` by
    ``warm_start``. Where the posterior is nearly normal the path ends at it. Where it is not, as
    in hierarchies with a scale of their own, the best point comes early, and directions that the
    path has not moved along by then keep a standard deviation of 1: of eight schools, in
    either form, neither the mean nor the spread of ``mu`` can be trusted.
    :func:`~pyrogen.inference.importance` corrects it where its ``reliable`` says so.

    It has no parameters: :meth:`fit` is all there is to do.

    Cost: ``paths * steps`` gradients at most, and ``particles`` densities for each, in one run;
    memory and time of order ``latents ** 2`` and ``latents ** 3`` per point.

    Args:
        model: Model whose latents are continuous. Its batch dimensions are counted from the
            right, so that one more on the left does no harm.
        paths: Number of paths.
        steps: Largest number of steps of a path.
        history: Number of past steps from which curvature is told.
        particles: Draws that estimate each bound.
        init_loc_fn: Where paths start, one of Pyro's ``init_to_...`` functions; by default uniform
            in [-2, 2] for each unconstrained latent.

    Raises:
        ValueError: If a number is not positive, a site is discrete, or the density is constant.
        NotImplementedError: If a plate is subsampled: the density would change at every look.
        RuntimeError: If it is run before it is fitted.
        FloatingPointError: If no path has a point of finite density.

    References:
        Zhang, Carpenter, Gelman, Vehtari. Pathfinder: Parallel quasi-Newton variational
        inference. JMLR 2022. arXiv:2108.03782

    Example:
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> guide = Pathfinder(model).fit(torch.tensor(4.0))
        >>> posterior = guide.get_posterior()
        >>> posterior.mean, posterior.variance  # exactly 2 and 1/2
        (tensor([2.]), tensor([0.5000]))
    """

    loc: Tensor
    scale_tril: Tensor
    elbo: Tensor

    def __init__(
        self,
        model: Callable,
        *,
        paths: int = 4,
        steps: int = 200,
        history: int = 6,
        particles: int = 25,
        init_loc_fn: Callable | None = None,
    ) -> None:
        sizes = {"paths": paths, "steps": steps, "history": history, "particles": particles}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"Pathfinder expected {name} >= 1, got {value}.")
        super().__init__(model, init_loc_fn=init_loc_fn or init_to_uniform)
        self.paths = paths
        self.steps = steps
        self.history = history
        self.particles = particles

    def __getstate__(self) -> dict[str, Any]:
        """Keep the model, which Pyro would forget when the guide is copied."""
        return {**super(AutoGuide, self).__getstate__(), "master": None}

    def fit(self, *args: Any, **kwargs: Any) -> Self:
        """Follow all paths, given the model's arguments; draws anew if called again.

        Returns:
            The guide itself.
        """

        def log_prob(u: Tensor) -> Tensor:
            return self._log_joint(u, *args, **kwargs)

        with poutine.block(), pyro.validation_enabled(False):  # noqa: FBT003  # steps may go far
            self._setup_prototype(*args, **kwargs)  # the data may be others than before
            starts = [self._start(*args, **kwargs) for _ in range(self.paths)]
            found = [self._follow(log_prob, start) for start in starts]
        best = [normal for normal in found if normal is not None]
        if not best:
            raise FloatingPointError(
                f"Pathfinder found no finite density on {self.paths} paths. Pass init_loc_fn, or "
                "look for NaN in the data."
            )
        self._build(*(torch.stack(part).to(starts[0]) for part in zip(*best, strict=True)))
        with torch.no_grad(), poutine.block():
            log_prob(self.loc[self.elbo.argmax()][None])  # validated: may refuse the model's data
        return self

    def get_posterior(self, *args: Any, **kwargs: Any) -> dist.MixtureSameFamily:
        """Return the law of the unconstrained latents, event shape ``(latent_dim,)``."""
        if "loc" not in self._buffers:
            raise RuntimeError(
                "Pathfinder has not been fitted. Call guide.fit(*args) with the model's arguments."
            )
        return dist.MixtureSameFamily(
            dist.Categorical(logits=self.elbo),
            dist.MultivariateNormal(self.loc, scale_tril=self.scale_tril),
        )

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the posterior median of every site, estimated from draws."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return posterior quantiles of every site, estimated from draws.

        Args:
            quantiles: Levels in [0, 1], shape ``(levels,)``.
            *args: Arguments of the model.
            **kwargs: Arguments of the model.

        Returns:
            Values of shape ``(levels, *shape)``: bijections of the unconstrained quantiles.
        """
        law = self.get_posterior()
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return quantiles_from(law, quantiles, self._unpack_latent)

    def _follow(self, log_prob: Callable[[Tensor], Tensor], start: Tensor) -> "_Normal | None":
        """Return the best normal on one path, all in double precision but the model."""
        best, highest = None, -torch.inf
        inverse_hessian = _InverseHessian(len(start), self.history).to(start)
        here = _point(log_prob, start.double(), start)
        for _ in range(self.steps):
            scale_tril, failed = torch.linalg.cholesky_ex(inverse_hessian.dense())
            if failed or not here.loss < torch.inf:
                break
            direction = -scale_tril @ (scale_tril.T @ here.slope)
            law = dist.MultivariateNormal(here.u + direction, scale_tril=scale_tril)
            draws = law.sample((self.particles,))
            with torch.no_grad():
                elbo = (log_prob(draws.to(start)).double() - law.log_prob(draws)).mean()
            if elbo.isfinite() and elbo > highest:
                best, highest = _Normal(law.loc, scale_tril, elbo), elbo.item()

            there = _line_search(log_prob, here, direction, start)
            if not here.loss - there.loss > TOLERANCE * (1 + abs(here.loss)):
                break
            inverse_hessian.update(there.u - here.u, there.slope - here.slope)
            here = there
        return best

    def _log_joint(self, u: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Log-density of unconstrained latents, shape ``(n, latent_dim)`` to ``(n,)``."""
        n, values, log_prob = len(u), {}, u.new_zeros(len(u))
        for site, y in self._unpack_latent(u.reshape(n, *[1] * self._nesting, -1)):
            transform = biject_to(site["fn"].support)
            values[site["name"]] = transform(y)
            ladj = transform.log_abs_det_jacobian(y, values[site["name"]])
            log_prob = log_prob + ladj.reshape(n, -1).sum(1)
        over = pyro.plate("_pathfinder", n, dim=-1 - self._nesting)
        trace = poutine.trace(over(poutine.condition(self.model, data=values))).get_trace(
            *args, **kwargs
        )
        trace.compute_log_prob()
        for site in trace.nodes.values():
            if site["type"] == "sample" and site["name"] != "_pathfinder":
                part = torch.as_tensor(site["log_prob"])
                log_prob = log_prob + part.expand(n, *part.shape[1:]).reshape(n, -1).sum(1)
        return log_prob

    def _start(self, *args: Any, **kwargs: Any) -> Tensor:
        trace = poutine.trace(self.model).get_trace(*args, **kwargs)
        return torch.cat(
            [
                biject_to(site["fn"].support).inv(trace.nodes[name]["value"]).detach().reshape(-1)
                for name, site in cast(Any, self.prototype_trace).iter_stochastic_nodes()
            ]
        )

    @torch.no_grad()  # or the guide could not be copied
    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        trace: Any = self.prototype_trace
        self.prototype_trace = None  # unless all sites pass
        refuse_subsamples(trace, owner="Pathfinder")
        with poutine.block():  # observed sites may lie in more plates
            sites: Any = poutine.trace(self.model).get_trace(*args, **kwargs).nodes.values()
        frames = [f for s in sites if s["type"] == "sample" for f in s["cond_indep_stack"]]
        for frame in filter(subsampled, frames):
            raise NotImplementedError(
                f"Plate {frame.name!r} holds a subsample of {frame.size} of {frame.full_size}, so "
                "the density changes from run to run and its curvature cannot be told. Pass all "
                "data, or use AutoFlow."
            )
        self._nesting = max((-frame.dim for frame in frames if frame.vectorized), default=0)
        self.prototype_trace = trace

    def _build(self, loc: Tensor, scale_tril: Tensor, elbo: Tensor) -> None:
        self.register_buffer("loc", loc)
        self.register_buffer("scale_tril", scale_tril)
        self.register_buffer("elbo", elbo)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Hold what was saved, whatever the number of paths."""
        names = [f"{prefix}{name}" for name in ("loc", "scale_tril", "elbo")]
        if all(name in state_dict for name in names):
            self._build(*(torch.empty_like(state_dict[name]) for name in names))
        super()._load_from_state_dict(state_dict, prefix, *args)


class _Normal(NamedTuple):
    loc: Tensor
    scale_tril: Tensor
    elbo: Tensor


class _Point(NamedTuple):
    u: Tensor
    loss: float  # minus the log-density; infinite where that is not finite
    slope: Tensor


def _point(log_prob: Callable[[Tensor], Tensor], u: Tensor, like: Tensor) -> _Point:
    at = u.to(like).requires_grad_()
    with torch.enable_grad():
        loss = -log_prob(at[None])[0]
        if not loss.requires_grad:
            raise ValueError(
                "Pathfinder expected a density that depends on the latents, got a constant. Give "
                "them a proper prior, and do not detach them."
            )
        (slope,) = torch.autograd.grad(loss, [at])
    fine = loss.isfinite() and slope.isfinite().all()
    return _Point(u, loss.item() if fine else torch.inf, slope.double())


def _line_search(
    log_prob: Callable[[Tensor], Tensor], here: _Point, direction: Tensor, like: Tensor
) -> _Point:
    """Bisect for a step that goes down far enough, to where the slope is flatter.

    The weak Wolfe conditions, by Lewis and Overton. Nonsmooth optimization via quasi-Newton
    methods. Mathematical Programming 2013.
    """
    down = (here.slope @ direction).item()
    step, low, high = 1.0, 0.0, torch.inf
    best = here
    for _ in range(30):
        there = _point(log_prob, here.u + step * direction, like)
        if not there.loss <= here.loss + 1e-4 * step * down:
            high = step
        elif there.slope @ direction < 0.9 * down:
            low, best = step, there
        else:
            return there
        step = (low + high) / 2 if high < torch.inf else 2 * low
    return best


class _InverseHessian:
    """What steps and changes of slope tell of the inverse Hessian: L-BFGS, written out.

    Its diagonal takes in all steps, its correlations the last ones.
    """

    def __init__(self, size: int, history: int) -> None:
        self.diagonal = torch.ones(size, dtype=torch.float64)
        self.history = history
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def to(self, like: Tensor) -> Self:
        """Move to a device."""
        self.diagonal = self.diagonal.to(like.device)
        return self

    def update(self, step: Tensor, change: Tensor) -> None:
        """Take in a step, and the change of the loss's slope along it."""
        along = step @ change
        if not along > 0 or change @ change > STRAIGHTEST * along:
            return
        alpha = self.diagonal
        a, c = change @ (alpha * change), step @ (step / alpha)
        inverse = a / (along * alpha) + change**2 / along
        self.diagonal = 1 / (inverse - a * step**2 / (along * c * alpha**2))
        self.pairs = [*self.pairs, (step, change)][-self.history :]

    def dense(self) -> Tensor:
        """Return the matrix, of order ``latents ** 2``."""
        matrix = self.diagonal.diag()
        for step, change in self.pairs:
            rho = 1 / (step @ change)
            left = torch.eye(len(step)).to(step) - rho * torch.outer(step, change)
            matrix = left @ matrix @ left.T + rho * torch.outer(step, step)
        return (matrix + matrix.T) / 2
