"""Does a map from noise to a posterior's latents make the posterior easy, or does it hide some?"""

__all__ = ["Fidelity", "Limits", "fidelity"]

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.infer.autoguide.guides import AutoContinuous
from torch import Size, Tensor

from ..distributions import Transformed
from ..evaluation.psis import effective_sample_size, psis
from ..guides.log_joint import LogJoint
from .pilot import pilot, pushed, rhat, stuck


@dataclass(frozen=True)
class Limits:
    """How far a map may be from a perfect one before sampling through it is refused.

    Loosen one to go on deliberately: ``Limits(rhat=1.3)``, ``Limits(stuck=math.inf)``.

    Args:
        round_trip: Largest error of noise that goes to latents and back, over one plus its size.
        density: Largest difference, in nats, between the density of a draw when it is made and
            when it is scored.
        rhat: Largest R̂ of the pilot's chains.
        stuck: Largest number of the pilot's chains that stay in a tail of all draws, where
            a second mode, or a neck, holds them.
        khat: Largest k̂ of the guide's importance weights. Without limit by default: weights
            are heavy-tailed under many maps through which chains mix at once, and light under
            maps that miss a mode.

    Raises:
        ValueError: If a limit is negative or NaN.
    """

    round_trip: float = 1e-3
    density: float = 1e-2
    rhat: float = 1.1
    stuck: float = 1
    khat: float = math.inf

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(
                    f"Limits expected {name} >= 0, got {value}. Pass math.inf for no limit."
                )


@dataclass(frozen=True)
class Fidelity:
    """What :func:`fidelity` found.

    Args:
        guide: Name of the guide's class.
        latents: Number of latents.
        round_trip: Largest error of noise that goes to latents and back, over one plus its size.
        density: Largest difference of a draw's density, when made and when scored, nats.
        log_weights: log p(x, z) - log q(z) of draws of the guide, nats, shape ``(draws,)``.
        khat: Shape of the weights' tail.
        rhat: R̂ of the pilot's chains: largest over latents and log-density, of normalised ranks.
        stuck: Number of chains of which all draws lie in a tail of all others'.
        chains: Number of chains of the pilot.
        step: Median step size of the chains, at most 0.25, and the smallest.
        limits: What was asked.
    """

    guide: str
    latents: int
    round_trip: float
    density: float
    log_weights: Tensor = field(repr=False)
    khat: float
    rhat: float
    stuck: int
    chains: int
    step: tuple[float, float]
    limits: Limits = field(default_factory=Limits)

    @property
    def ess(self) -> float:
        """Effective number of the guide's draws, weighed."""
        return effective_sample_size(self.log_weights).item()

    @property
    def faithful(self) -> bool:
        """Whether all is within the limits."""
        return not self.faults

    @property
    def faults(self) -> list[str]:
        """What is not within the limits, in words."""
        own = self.limits
        found = []
        if not self.round_trip <= own.round_trip:
            found.append(
                f"noise comes back from the latents with an error of {self.round_trip:.2g} "
                f"(limit {own.round_trip:.2g})"
            )
        if not self.density <= own.density:
            found.append(
                f"draws have another density when they are scored, by {self.density:.2g} nats "
                f"(limit {own.density:.2g})"
            )
        if not self.rhat <= own.rhat:
            found.append(
                f"chains in noise do not forget where they start, R̂ = {self.rhat:.2f} "
                f"(limit {own.rhat:.2f})"
            )
        if not self.stuck <= own.stuck:
            found.append(
                f"{self.stuck} of {self.chains} chains stay where the others rarely go "
                f"(limit {own.stuck:.0f})"
            )
        if not self.khat <= own.khat:
            found.append(f"importance weights have k̂ = {self.khat:.2f} (limit {own.khat:.2f})")
        return found

    def __str__(self) -> str:
        own = self.limits
        rows = [
            ("round trip", f"{self.round_trip:.1e}", f"{own.round_trip:.1e}"),
            ("density, made and scored", f"{self.density:.1e} nats", f"{own.density:.1e}"),
            (f"R̂ of {self.chains} short chains", f"{self.rhat:.2f}", f"{own.rhat:.2f}"),
            ("chains that are stuck", f"{self.stuck}", f"{own.stuck:.0f}"),
            ("k̂ of importance weights", f"{self.khat:.2f}", f"{own.khat:.2f}"),
        ]
        lines = [
            f"{f'{self.guide} as a map of {self.latents} latents':<36}{'found':>14}{'limit':>10}"
        ]
        lines += [f"{name:<36}{found:>14}{limit:>10}" for name, found, limit in rows]
        draws = len(self.log_weights)
        lines.append(
            f"ESS {self.ess:.0f} of {draws} weighed draws; step size {self.step[0]:.2g}, in the "
            f"worst chain {self.step[1]:.2g}"
        )
        if self.faithful:
            lines.append("Faithful: chains through this map forget their start at once.")
        else:
            lines.append(f"Not faithful: {'; '.join(self.faults)}.")
        return "\n".join(lines)


@torch.no_grad()
def fidelity(
    model: Callable,
    guide: AutoContinuous,
    *args: Any,
    limits: Limits | None = None,
    draws: int = 2000,
    chains: int = 128,
    transitions: int = 60,
    **kwargs: Any,
) -> Fidelity:
    r"""Judge a guide as a transport map: from noise to the posterior of a model.

    With a perfect map :math:`T` the noise :math:`z` has the density

    .. math:: \log p\big(x, T(z)\big) + \log |\det \partial T / \partial z|
        = \log \mathcal N(z; 0, I) + \text{const}

    and Hamiltonian Monte Carlo forgets its start within a few steps. So a pilot runs many short
    chains, half of them from draws of the guide, and half from elsewhere: from draws of the
    prior, weighed by their likelihood, and from uniform draws on (-2, 2) in unconstrained units,
    weighed by their density, carried to the noise. On average half of these start in the 2 % of
    their mass for which the guide has least. If the map leaves a neck, a far tail or a mode to
    itself, chains from there stay apart. The importance weights of the guide's own draws cannot
    tell: they are known only where the guide goes, and a guide fitted by the reverse
    Kullback-Leibler divergence does not go where it is wrong.

    The pilot is blind to what neither guide nor prior finds.

    Cost: ``draws`` evaluations, and ``16 transitions`` values and gradients of ``chains`` points
    at once.

    Args:
        model: Model of the guide, which can run many draws in a plate to the left of its own.
        guide: Fitted guide with a transform: ``AutoFlow``, or a normal or IAF guide of Pyro.
        *args: Arguments of the model.
        limits: What the verdict asks for.
        draws: Number of draws of the guide that are weighed.
        chains: Number of chains, half of them from elsewhere.
        transitions: Length of the chains; as many are made before, to find step sizes.
        **kwargs: Keywords of the model.

    Raises:
        TypeError: If the guide is no ``AutoContinuous``.
        ValueError: If ``draws``, ``chains`` or ``transitions`` are too few, or model and guide
            do not belong together.
        NotImplementedError: If the guide has no transform, or it has no inverse.
        FloatingPointError: If the guide draws, or the model scores, NaN or infinity.

    References:
        Hoffman, Sountsov, Dillon, Langmore, Tran, Vasudevan. NeuTra-lizing Bad Geometry in
        Hamiltonian Monte Carlo Using Neural Transport. 2019. arXiv:1903.03704
        Vehtari, Gelman, Simpson, Carpenter, Bürkner. Rank-Normalization, Folding, and
        Localization: An Improved R̂ for Assessing Convergence of MCMC. Bayesian Analysis 2021.
        arXiv:1903.08008
        Margossian, Hoffman, Sountsov, Riou-Durand, Vehtari, Gelman. Nested R̂: Assessing the
        Convergence of Markov Chain Monte Carlo When Running Many Short Chains. Bayesian Analysis
        2024. arXiv:2110.13017

    Example:
        >>> from pyro.infer.autoguide import AutoMultivariateNormal
        >>> def model():
        ...     pyro.sample("z", dist.Normal(torch.zeros(2), 0.1).to_event(1))
        >>> guide = AutoMultivariateNormal(model)  # of scale 0.1 from the start
        >>> _ = guide()
        >>> fidelity(model, guide).faithful
        True
    """
    if draws < 25 or chains < 8 or transitions < 8:
        raise ValueError(
            "fidelity expected draws >= 25, chains >= 8 and transitions >= 8, got "
            f"{draws}, {chains} and {transitions}. Leave them out for the default."
        )
    law = transported(guide)
    log_joint = LogJoint(model, guide, *args, **kwargs)
    noise = law.noise.sample(Size((draws,)))
    u, ladj = pushed(law, noise)
    log_p = log_joint(u)
    if not u.isfinite().all() or log_p.isnan().any() or log_p.isposinf().any():
        raise FloatingPointError(
            f"fidelity found that {type(guide).__name__} draws values, or the model gives them a "
            "log-density, of NaN or infinity. Check the guide's training and the model's scales."
        )
    log_weights = log_p + ladj - law.noise.log_prob(noise)
    if log_weights.isneginf().all():
        raise ValueError(
            "fidelity found no draw of the guide that the model thinks possible. Check the "
            "guide's supports and the data."
        )
    back, density = _consistency(law, noise, u, ladj)
    values, step = pilot(law, log_joint, chains - chains % 2, transitions)
    return Fidelity(
        guide=type(guide).__name__,
        latents=guide.latent_dim,
        round_trip=back,
        density=density,
        log_weights=log_weights,
        khat=psis(log_weights)[1].item(),
        rhat=rhat(values),
        stuck=stuck(values),
        chains=values.shape[1],
        step=(step.median().item(), step.min().item()),
        limits=Limits() if limits is None else limits,
    )


def transported(guide: AutoContinuous) -> Transformed:
    """The guide's law of unconstrained latents, as noise and a map of it."""
    if not isinstance(guide, AutoContinuous):
        raise TypeError(
            f"Expected a guide that maps noise to all latents, got {type(guide).__name__}. Pass "
            "a fitted AutoFlow, or another AutoContinuous of Pyro with a transform."
        )
    if guide.prototype_trace is None:
        raise RuntimeError(
            f"{type(guide).__name__} has not seen its model run. Fit it, or call guide(*args)."
        )
    try:
        return Transformed(guide.get_base_dist(), [guide.get_transform()])
    except (NotImplementedError, TypeError) as error:
        raise NotImplementedError(
            f"{type(guide).__name__} has no transform from noise to latents. Use AutoFlow; of an "
            "AutoLaplaceApproximation, pass laplace_approximation()."
        ) from error


def _consistency(law: Transformed, noise: Tensor, u: Tensor, ladj: Tensor) -> tuple[float, float]:
    """Largest errors of the round trip, and of the density when it is scored."""
    try:
        back, inverse = law.bijection.inverse_and_ladj(u.clone())
    except (NotImplementedError, KeyError) as error:  # Pyro's one-way flows
        raise NotImplementedError(
            "The guide's transform has no inverse, so where it leads cannot be checked. Use a "
            "flow with both directions, such as nsf or maf."
        ) from error
    except FloatingPointError:  # a numeric inverse that found no root
        return math.inf, math.inf
    trip = ((back - noise).abs() / (1 + noise.abs())).max().item()
    base = law.noise.log_prob
    scored = base(back) + inverse.reshape(len(u), -1).sum(-1)
    return trip, (scored - base(noise) + ladj).abs().max().item()
