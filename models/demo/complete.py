"""Infer the lower half of a picture from its noisy upper half, with a learned law as the prior."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyrogen.inference import NoiseReparam

NOISE = 0.1  # standard deviation of what is seen; white is 0, black is 1
CHAINS = 4  # independent copies of every picture, side by side in one plate


@dataclass(frozen=True)
class Completion:
    """Draws of whole pictures given their upper halves, shape (draws, pictures, features)."""

    draws: Tensor
    seconds: float

    def error(self, truth: Tensor) -> float:
        """Root mean square error of the posterior mean over the unseen half, in grey units."""
        unseen = truth.shape[-1] // 2
        difference = self.draws.mean(0)[..., unseen:] - truth[..., unseen:]
        return difference.square().mean().sqrt().item()


def noisy_upper_half(prior: dist.TorchDistribution, y: Tensor) -> None:
    """Pyro model: pictures ``x`` follow the prior, their upper halves ``y`` are seen in noise."""
    pictures, seen = y.shape
    with pyro.plate("chains", CHAINS, dim=-2), pyro.plate("pictures", pictures, dim=-1):
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x[..., :seen], NOISE).to_event(1), obs=y)


@torch.no_grad()
def promising(model: Callable, *args: Any, tries: int = 200) -> dict[str, Tensor]:
    """Noise to start each chain from: of a few draws of the prior, the likeliest.

    A law of ten digits has a posterior of several modes, and a chain seldom leaves its first.
    """
    best, score = {}, None
    for _ in range(tries):
        trace = poutine.trace(model).get_trace(*args)
        trace.compute_log_prob(lambda name, _: name == "y")
        fit = trace.nodes["y"]["log_prob"]
        better = torch.ones_like(fit, dtype=torch.bool) if score is None else fit > score
        for name, node in trace.iter_stochastic_nodes():
            if site_is_subsample(node):
                continue
            old = best.get(name, node["value"])
            best[name] = torch.where(better.unsqueeze(-1), node["value"], old)
        score = fit if score is None else torch.maximum(fit, score)
    return best


def complete(prior: dist.TorchDistribution, y: Tensor, *, draws: int, warmup: int) -> Completion:
    """Sample whole pictures given ``y`` by NUTS, in the noise behind them."""
    start = time.perf_counter()
    model = poutine.reparam(noisy_upper_half, {"x": NoiseReparam()})
    mcmc = MCMC(
        NUTS(model, max_tree_depth=4),
        num_samples=draws,
        warmup_steps=warmup,
        initial_params=promising(model, prior, y),
    )
    mcmc.run(prior, y)
    with torch.no_grad():
        found = Predictive(model, mcmc.get_samples(), return_sites=["x"])(prior, y)
    x = found["x"].reshape(-1, len(y), prior.event_shape.numel())
    return Completion(x, time.perf_counter() - start)
