"""Neural importance sampling: a guide proposes, the model weighs, and the weights judge both."""

__all__ = ["WeightedPosterior", "importance"]

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.poutine import Trace
from pyro.poutine.guide import GuideMessenger
from torch import Tensor

from ..evaluation.psis import effective_sample_size, khat_threshold, psis
from ..evaluation.vectorized import (
    Program,
    is_deterministic,
    latent_sites,
    log_prob_over,
    nesting,
    over_draws,
    refuse_subsampling,
    refuse_unmatched_sites,
    run_pair,
    sites,
    unbatch,
)

SHOWN = 10  # numbers of one site in a summary


@dataclass(frozen=True)
class WeightedPosterior:
    """Draws of a guide with weights that make them draws of the posterior.

    Averages use the Pareto-smoothed weights, which are steadier; the evidence uses the raw
    weights, which are unbiased.

    Args:
        samples: Draws by site, each of shape ``(draws, *shape)``.
        log_weights: log p(x, z) - log q(z) per draw, nats, shape ``(draws,)``.
        smoothed: Pareto-smoothed log-weights, normalised to sum to one, shape ``(draws,)``.
        khat: Shape of the weights' tail; at most ``threshold`` if averages can be trusted.
        args: What the model was called with.
        kwargs: Keywords that the model was called with.
    """

    samples: Mapping[str, Tensor] = field(repr=False)
    log_weights: Tensor = field(repr=False)
    smoothed: Tensor = field(repr=False)
    khat: float
    args: tuple[Any, ...] = field(default=(), repr=False)
    kwargs: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def ess(self) -> float:
        """Number of exact draws with the precision of these; at most the number of draws."""
        return effective_sample_size(self.smoothed).item()

    @property
    def log_evidence(self) -> float:
        """Estimate of log p(x), nats; unbiased for p(x)."""
        return (self.log_weights.logsumexp(0) - math.log(len(self.log_weights))).item()

    @property
    def log_evidence_error(self) -> float:
        """Standard error of ``log_evidence``, nats, by the delta method; too small if unreliable.

        It is std(w) / (mean(w) sqrt(draws)) for the raw weights w.
        """
        draws = len(self.log_weights)
        relative = (self.log_weights - self.log_weights.max()).double().exp()
        return (relative.std() / relative.mean() / math.sqrt(draws)).item()

    @property
    def threshold(self) -> float:
        """Largest ``khat`` at which this number of draws suffices."""
        return khat_threshold(len(self.log_weights))

    @property
    def reliable(self) -> bool:
        """Whether averages and evidence can be trusted."""
        return self.khat <= self.threshold  # nan is not

    def mean(self, site: str) -> Tensor:
        """Posterior mean of a site."""
        x = self._draws(site)
        return torch.tensordot(self.smoothed.exp().to(x), x, 1)

    def std(self, site: str) -> Tensor:
        """Posterior standard deviation of a site."""
        x = self._draws(site)
        return torch.tensordot(self.smoothed.exp().to(x), (x - self.mean(site)).square(), 1).sqrt()

    def resample(self, n: int | None = None) -> dict[str, Tensor]:
        """Draw ``n`` times with the smoothed weights as probabilities; some draws repeat.

        Systematic: a draw of weight w appears floor(nw) or ceil(nw) times. The order is random.

        Args:
            n: Number of draws; as many as there are if not given.

        Returns:
            Draws of equal weight by site, each of shape ``(n, *shape)``.

        Raises:
            ValueError: If ``n`` is not positive.
        """
        n = len(self.smoothed) if n is None else n
        if n < 1:
            raise ValueError(f"resample expected n >= 1, got {n}. Pass a positive number.")
        cumulative = self.smoothed.double().exp().cumsum(0)
        offset = torch.rand((), dtype=torch.double, device=cumulative.device)
        points = (torch.arange(n).to(cumulative) + offset) / n * cumulative[-1]
        index = torch.searchsorted(cumulative, points).clamp(max=len(cumulative) - 1)
        index = index[torch.randperm(n, device=index.device)]
        return {name: x[index] for name, x in self.samples.items()}

    def __str__(self) -> str:
        draws, ess = len(self.log_weights), self.ess
        lines = [f"{'site':<24}{'mean':>12}{'std':>12}"]
        for name, x in self.samples.items():
            mean, std = self.mean(name), self.std(name)
            shown = list(islice(product(*map(range, x.shape[1:])), SHOWN))
            for i in shown:
                label = f"{name}{list(i)}" if i else name
                lines.append(f"{label:<24}{mean[i].item():12.4g}{std[i].item():12.4g}")
            if x[0].numel() > len(shown):
                lines.append(f"{name} has {x[0].numel() - len(shown)} more numbers")
        lines.append(
            f"log evidence {self.log_evidence:.4f} ± {self.log_evidence_error:.4f} nats, "
            f"ESS {ess:.0f} of {draws} draws"
        )
        if self.reliable:
            lines.append(f"Reliable: k̂ = {self.khat:.2f} is within {self.threshold:.2f}.")
        else:
            lines.append(
                f"Not reliable: k̂ = {self.khat:.2f} exceeds {self.threshold:.2f}. The guide "
                "misses part of the posterior: fit a richer guide, or run NUTS."
            )
        return "\n".join(lines)

    def _draws(self, site: str) -> Tensor:
        if site not in self.samples:
            raise ValueError(
                f"WeightedPosterior has no site '{site}'. Choose one of {sorted(self.samples)}."
            )
        x = self.samples[site]
        return x if x.is_floating_point() else x.to(self.smoothed)


@torch.no_grad()
def importance(
    model: Program, guide: Program, *args: Any, draws: int = 4000, chunk: int = 1000, **kwargs: Any
) -> WeightedPosterior:
    r"""Draw from the guide and weigh each draw, so that averages are those of the posterior.

    .. math:: w = \frac{p(x, z)}{q(z)}, \quad z \sim q, \qquad
        \frac{\sum w f(z)}{\sum w} \to \mathrm E[f(z) \mid x], \qquad
        \frac1S \sum w \to p(x)

    Deterministic sites of the model are kept too.

    Cost: one run of guide and model per draw, ``chunk`` of them at once.

    Args:
        model: Pyro program. Its batch dimensions are counted from the right, so that one more
            on the left does no harm; a model for which this fails needs ``chunk=1``.
        guide: Pyro program for the latent sites, autoguides included.
        args: What both are called with.
        draws: Number :math:`S` of draws.
        chunk: Number of draws in memory at once; 1 runs the programs as written, in a loop.
        kwargs: Keywords that both are called with.

    Raises:
        ValueError: If sites of model and guide differ, the guide is a point, a plate is
            subsampled, no draw has positive weight, or the model mixes draws.
        FloatingPointError: If a weight is NaN or infinite.

    References:
        Vehtari, Simpson, Gelman, Yao, Gabry. Pareto Smoothed Importance Sampling. JMLR 2024.
        arXiv:1507.02646
        Yao, Vehtari, Simpson, Gelman. Yes, but Did It Work? Evaluating Variational Inference.
        ICML 2018. arXiv:1802.02538

    Example:
        >>> def model(x):
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     pyro.sample("z", dist.Normal(0.8, 1.0))
        >>> posterior = importance(model, guide, torch.tensor(2.0))
        >>> round(posterior.mean("z").item(), 1), posterior.reliable  # exactly 1
        (1.0, True)
        >>> round(posterior.log_evidence, 1)  # exactly -2.2655
        -2.3
    """
    if draws < 2 or chunk < 1:
        raise ValueError(
            f"importance expected draws >= 2 and chunk >= 1, got {draws} and {chunk}. "
            "Weights have no spread otherwise."
        )
    plain = run_pair(model, guide, args, kwargs)
    refuse_subsampling(*plain, owner="importance")
    refuse_unmatched_sites(*plain, owner="importance")
    depth = nesting(*plain)

    parts = []
    for start in range(0, draws, chunk):
        size = min(chunk, draws - start)
        pair = _run(model, guide, args, kwargs, size=size, depth=depth)
        if start == 0 and size > 1:
            for name, program, trace, many in zip(
                ("model", "guide"), (model, guide), plain, pair, strict=True
            ):
                if not isinstance(poutine.unwrap(program), GuideMessenger):
                    _refuse_mixing(
                        program, trace, many, args, kwargs, size=size, depth=depth, name=name
                    )
        parts.append(_harvest(*pair, shapes=plain[0], size=size, depth=depth))

    log_weights = torch.cat([log_weights for log_weights, _ in parts])
    names = parts[0][1]
    samples = {name: torch.cat([values[name] for _, values in parts]) for name in names}
    if log_weights.isneginf().all():
        raise ValueError(
            "importance found no draw with positive weight: the guide lies outside the model's "
            "support. Check the guide's supports and the data."
        )
    smoothed, khat = psis(log_weights)
    smoothed = (smoothed - smoothed.logsumexp(0)).to(log_weights)
    return WeightedPosterior(samples, log_weights, smoothed, float(khat), args, kwargs)


def _run(
    model: Program, guide: Program, args: tuple, kwargs: dict, *, size: int, depth: int
) -> tuple[Trace, Trace]:
    """Score ``size`` draws at once; one draw runs the programs as they are written."""
    if size > 1:
        model = over_draws(model, size, nesting=depth)
        guide = over_draws(guide, size, nesting=depth)
    try:
        pair = run_pair(model, guide, args, kwargs)
        for trace in pair:
            trace.compute_log_prob()
    except (RuntimeError, ValueError, IndexError) as error:
        error.add_note("If model or guide cannot run many draws at once, pass chunk=1.")
        raise
    return pair


def _harvest(
    model_trace: Trace, guide_trace: Trace, *, shapes: Trace, size: int, depth: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log-weights and values of ``size`` draws, values with the shapes of a single run."""
    for trace in (model_trace, guide_trace):
        for name, site in sites(trace).items():
            log_prob = torch.as_tensor(site["log_prob"])
            if log_prob.isnan().any() or log_prob.isposinf().any():
                raise FloatingPointError(
                    f"importance found a log-density of NaN or infinity at site '{name}'. Check "
                    "its parameters and the data; density is infinite where a scale is zero."
                )
    dims, shape = ((-1 - depth,), (size,)) if size > 1 else ((), ())
    log_weights = log_prob_over(model_trace, dims, shape) - log_prob_over(guide_trace, dims, shape)
    values = {}
    for name, site in sites(model_trace).items():
        if not site["is_observed"] or is_deterministic(site):
            plain = sites(shapes)[name]["value"]
            values[name] = unbatch(site["value"], plain, size, name=name)
    return log_weights.reshape(size), values


def _refuse_mixing(
    program: Program,
    plain: Trace,
    many: Trace,
    args: tuple,
    kwargs: dict,
    *,
    size: int,
    depth: int,
    name: str,
) -> None:
    """Run the first draw alone: a program that mixes draws gives it another density."""
    drawn = latent_sites(many)
    values = {
        site: unbatch(drawn[site]["value"], message["value"], size, name=site)[0]
        for site, message in latent_sites(plain).items()
        if not isinstance(message["fn"], Delta)  # computed from the others
    }
    among = log_prob_over(many, (-1 - depth,), (size,))[0].item()
    alone = poutine.trace(poutine.condition(program, data=values))
    first, second = (float(alone.get_trace(*args, **kwargs).log_prob_sum()) for _ in range(2))
    estimated = first != second  # a density that is random in itself settles nothing
    if not estimated and abs(first - among) > 1e-3 * (1 + abs(among)):
        raise ValueError(
            f"importance found that the {name} mixes draws: the log-density of one draw is "
            f"{first:.4g} alone and {among:.4g} among others. Count dimensions "
            "from the right, or pass chunk=1."
        )
