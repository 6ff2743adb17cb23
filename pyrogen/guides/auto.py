"""A normalizing flow as the posterior of all latents of a model together."""

__all__ = ["AutoFlow", "quantiles_from", "refuse_subsamples"]

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoGuide, AutoLaplaceApproximation, init_to_median
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Tensor, nn
from torch.distributions import biject_to

from ..distributions import Flow, Transformed
from ..parameters import announce
from ..transforms import Inverse, LULinear
from .log_joint import LogJoint
from .sites import subsampled

DRAWS = 10_000  # from which medians and quantiles are estimated


class AutoFlow(AutoContinuous):
    r"""Joint posterior of all latents of a model, by a normalizing flow.

    .. math:: q(z) = q_\text{flow}(u)\, |\det \partial u / \partial z|,

    with :math:`u` the latents mapped to the reals and laid side by side. The flow starts near the
    normal distribution at ``init_loc_fn``'s values; :meth:`warm_start` gives it a better start,
    from a simpler guide, and :meth:`standardize` from draws. As a Pyro ``AutoContinuous`` it fits
    ``NeuTraReparam``. A state dict loads into a guide that has not run yet.

    Args:
        model: Model whose latents are continuous; their number may not change between calls.
        recipe: Function from a number of features to a flow, such as
            :func:`~pyrogen.distributions.nsf` or a ``functools.partial`` of it. Flows with fast
            draws suit best; for a single latent use ``maf``.
        init_loc_fn: Initial value of each site, one of Pyro's ``init_to_...`` functions.
        init_scale: Initial standard deviation, in unconstrained units.

    Raises:
        TypeError: If ``recipe`` is a flow and not a function that makes one.
        ValueError: If a site is discrete, or the flow does not fit the model.
        RuntimeError: If the model has no latents.
        NotImplementedError: If a latent lies in a subsampled plate: one joint posterior of all
            minibatches would be learned, and silently so.

    References:
        Rezende, Mohamed. Variational Inference with Normalizing Flows. ICML 2015. arXiv:1505.05770
        Agrawal, Sheldon, Domke. Advances in Black-Box VI: Normalizing Flows, Importance Weighting,
        and Optimization. NeurIPS 2020. arXiv:2006.10343

    Example:
        >>> from pyrogen.distributions import nsf
        >>> def model():
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(0.0, scale))
        >>> guide = AutoFlow(model, nsf).setup()
        >>> {name: value.shape for name, value in guide().items()}
        {'scale': torch.Size([]), 'x': torch.Size([])}
    """

    def __init__(
        self,
        model: Callable,
        recipe: Callable[[int], Flow],
        *,
        init_loc_fn: Callable = init_to_median,
        init_scale: float = 1.0,
    ) -> None:
        if isinstance(recipe, nn.Module) or not callable(recipe):
            raise TypeError(
                f"AutoFlow expected a recipe from features to a flow, got {type(recipe).__name__}."
                " Pass nsf, or functools.partial(nsf, layers=6): the guide counts the latents."
            )
        if not init_scale > 0:
            raise ValueError(
                f"AutoFlow expected a positive init_scale, got {init_scale}. Pass a standard "
                "deviation, in unconstrained units."
            )
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.recipe = recipe
        self.init_scale = init_scale

    def __getstate__(self) -> dict[str, Any]:
        """Keep the model, which Pyro would forget when the guide is copied."""
        return {**super(AutoGuide, self).__getstate__(), "master": None}

    def setup(self, *args: Any, **kwargs: Any) -> Self:
        """Build the flow from a run of the model, so that it has parameters to optimize.

        The first call does it too, but an optimizer often has to be made before.
        """
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self

    def standardize(self, draws: Mapping[str, Tensor]) -> Self:
        """Set the flow's shift and scale from draws of the latents.

        If the recipe ends in :class:`~pyrogen.transforms.LULinear` or its inverse, as ``nsf`` and
        ``maf`` do, the draws' correlations are set too. Layers before it start as the identity,
        so the guide is the normal distribution of the draws' mean and covariance.

        Args:
            draws: Values of every latent site, each of shape ``(draws, *shape)``, as given by
                ``pyro.infer.Predictive`` with a simpler guide; other names are ignored.

        Returns:
            The guide itself.

        Raises:
            RuntimeError: If the guide has not been set up.
            ValueError: If a site is missing, is constant, or is not finite, or the draws are too
                few for their correlations.
        """
        if self.prototype_trace is None:
            raise RuntimeError(
                "AutoFlow has not seen its model run, so it does not know the sites. Call "
                "guide.setup(*args) with the model's arguments first."
            )
        parts = []
        for name, site in self.prototype_trace.iter_stochastic_nodes():
            if name not in draws:
                raise ValueError(
                    f"AutoFlow expected draws of {name!r}, got {', '.join(draws) or 'none'}. Pass "
                    "draws of every latent site."
                )
            value = draws[name].detach()
            value = value.reshape(len(value), *site["value"].shape)
            parts.append(biject_to(site["fn"].support).inv(value).reshape(len(value), -1))
        u = torch.cat(parts, dim=-1)
        self._flow.standardize(u)
        last = self._flow.layers[-1] if len(self._flow.layers) else None
        linear = last.layer if isinstance(last, Inverse) else last
        if isinstance(linear, LULinear):
            factor = _cholesky((u - self._flow.shift) / self._flow.scale)
            _set_lower(linear, factor if linear is last else factor.inverse())
        return self

    def warm_start(self, guide: Callable, *args: Any, draws: int = DRAWS, **kwargs: Any) -> Self:
        """Start from a simpler guide that has been fitted: its mean, scale and correlations.

        Args:
            guide: Guide of the same latents, such as Pyro's ``AutoMultivariateNormal``,
                :class:`~pyrogen.guides.Pathfinder` or an ``AutoLaplaceApproximation``, which
                stands for the normal distribution that it gives.
            *args: Arguments of the model.
            draws: Number of draws that are made of it, in one run.
            **kwargs: Arguments of the model.

        Returns:
            The guide itself.

        Raises:
            ValueError: If the other guide lacks a site, or is a point.

        Example:
            >>> from pyrogen.distributions import nsf
            >>> from pyrogen.guides import Pathfinder
            >>> from pyrogen.targets import EightSchools
            >>> model = EightSchools().non_centred
            >>> guide = AutoFlow(model, nsf).warm_start(Pathfinder(model).fit())
        """
        self.setup(*args, **kwargs)
        if isinstance(guide, AutoLaplaceApproximation):
            guide = guide.laplace_approximation(*args, **kwargs)
        frames = [f for stack in self._cond_indep_stacks.values() for f in stack]
        depth = max((-frame.dim for frame in frames if frame.vectorized), default=0)
        over = pyro.plate("_draws", draws, dim=-1 - depth)
        with torch.no_grad(), poutine.block():
            trace: Any = poutine.trace(over(guide)).get_trace(*args, **kwargs)
        sites = {name: trace.nodes[name]["value"] for name in trace.stochastic_nodes}
        return self.standardize(sites)

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Sample the unconstrained latents, as an auxiliary site."""
        announce(f"{self._pyro_name}.flow", self._flow)
        law = self._flow()
        once = _ScoredOnce(law.noise, law.transforms)
        return pyro.sample(f"_{self._pyro_name}_latent", once, infer={"is_auxiliary": True})

    def get_posterior(self, *args: Any, **kwargs: Any) -> Transformed:
        """Return the law of the unconstrained latents, event shape ``(latent_dim,)``."""
        return self._flow()

    def get_base_dist(self) -> Any:
        """Return the law of the flow's noise."""
        return self._flow().noise

    def get_transform(self, *args: Any, **kwargs: Any) -> Any:
        """Return the flow's bijection, from noise to the unconstrained latents."""
        return self._flow().bijection

    def log_density(self, *args: Any, **kwargs: Any) -> LogJoint:
        """Return the log-joint density of the model, as a function of the unconstrained latents.

        What the flow learns to match, up to a constant: with ``guide.flow`` it makes a
        :class:`~pyrogen.objectives.AnnealedBootstrap`.

        Args:
            *args: Arguments of the model.
            **kwargs: Arguments of the model.

        Example:
            >>> from pyrogen.distributions import nsf
            >>> from pyrogen.targets import EightSchools
            >>> guide = AutoFlow(EightSchools().non_centred, nsf)
            >>> guide.log_density()(torch.zeros(5, 10)).shape
            torch.Size([5])
        """
        self.setup(*args, **kwargs)
        return LogJoint(self.model, self, *args, **kwargs)

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
        self.setup(*args, **kwargs)
        return quantiles_from(self._flow(), quantiles, self._unpack_latent)

    @property
    def _flow(self) -> Flow:
        return cast(Flow, self._modules["flow"])  # see parameters.announce

    @torch.no_grad()  # or the guide could not be copied
    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        trace: Any = self.prototype_trace
        self.prototype_trace = None  # unless all sites pass
        refuse_subsamples(trace, owner="AutoFlow")
        self.prototype_trace = trace
        start = self._init_loc()
        if "flow" not in self._modules:
            self._build(start)
        elif self._flow.shift.shape != start.shape:
            raise ValueError(
                f"AutoFlow holds a flow of {len(self._flow.shift)} latents, and its model has "
                f"{len(start)}. Load the state dict of a guide for this model."
            )

    def _build(self, start: Tensor) -> None:
        flow = self.recipe(len(start))
        if not isinstance(flow, Flow) or flow.shift.shape != start.shape:
            raise ValueError(
                f"AutoFlow expected its recipe to give a Flow of {len(start)} features, got "
                f"{type(flow).__name__}. Pass nsf, or a functools.partial of it."
            )
        flow.to(start)
        flow.shift.copy_(start)
        flow.scale.fill_(self.init_scale)
        self.flow = flow

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        """Build the flow that was saved, if the model has not run yet."""
        shift = state_dict.get(f"{prefix}flow.shift")
        if "flow" not in self._modules and shift is not None:
            self._build(shift)
        super()._load_from_state_dict(state_dict, prefix, *args)


def refuse_subsamples(trace: Any, *, owner: str) -> None:
    """Refuse latents in plates that show a part of their data.

    Raises:
        NotImplementedError: If there are any.
    """
    for name, site in trace.iter_stochastic_nodes():
        for plate in site["cond_indep_stack"]:
            if subsampled(plate):
                raise NotImplementedError(
                    f"Site {name!r} lies in plate {plate.name!r}, which holds a subsample of "
                    f"{plate.size} of {plate.full_size}: {owner} would give all minibatches "
                    f"one posterior. Use Amortized for it, and {owner} for the sites outside, "
                    "in a pyrogen.guides.Mixed."
                )


def quantiles_from(
    law: TorchDistribution,
    quantiles: Sequence[float] | Tensor,
    unpack: Callable[[Tensor], Iterable[tuple[Any, Tensor]]],
) -> dict[str, Tensor]:
    """Quantiles of every site, from draws of the unconstrained latents.

    Args:
        law: Law of the unconstrained latents.
        quantiles: Levels in [0, 1].
        unpack: From latents to sites and their unconstrained values.
    """
    draws = law.sample(torch.Size((DRAWS,)))
    levels = torch.as_tensor(quantiles).to(draws)
    slices = [part.quantile(levels, dim=0) for part in draws.split(1000, dim=1)]
    result: dict[str, list[Tensor]] = {}
    for latent in torch.cat(slices, dim=1):
        for site, value in unpack(latent):
            result.setdefault(site["name"], []).append(biject_to(site["fn"].support)(value))
    return {name: torch.stack(values) for name, values in result.items()}


@torch.no_grad()
def _cholesky(x: Tensor) -> Tensor:
    """Cholesky factor of the covariance of draws."""
    factor, failed = torch.linalg.cholesky_ex(torch.cov(x.T).reshape(x.shape[1], x.shape[1]))
    if failed or len(x) <= x.shape[1]:
        raise ValueError(
            f"AutoFlow expected draws from which {x.shape[1]} latents' correlations can be told, "
            f"got {len(x)}. Pass several times as many draws as latents, and none that are "
            "functions of others."
        )
    return factor


@torch.no_grad()
def _set_lower(layer: LULinear, factor: Tensor) -> None:
    """Let a linear map be that of a lower triangular matrix."""
    diagonal = factor.diagonal()
    layer.entries.copy_((factor / diagonal).tril(-1))
    layer.log_diagonal.copy_(diagonal.log())
    layer.bias.zero_()


class _ScoredOnce(Transformed):
    """Scores its own draw by the pass that made it; lives for one run of the guide."""

    drawn: tuple[Tensor, Tensor] | None = None

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        self.drawn = self.rsample_and_log_prob(sample_shape)
        return self.drawn[0]

    def log_prob(self, value: Tensor) -> Tensor:
        if self.drawn is not None and value is self.drawn[0]:
            return self.drawn[1]
        return super().log_prob(value)
