"""Infer the lower half of a picture from its noisy upper half, with a learned law as the prior."""

import time
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive
from pyro.infer.reparam.reparam import Reparam
from torch import Tensor

NOISE = 0.05  # standard deviation of what is seen; white is 0, black is 1
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


def complete(
    prior: dist.TorchDistribution, y: Tensor, *, reparam: Reparam | None, draws: int, warmup: int
) -> Completion:
    """Sample whole pictures given ``y`` by NUTS, in noise space where ``reparam`` opens it."""
    start = time.perf_counter()
    config = {} if reparam is None else {"x": reparam}
    model = poutine.reparam(noisy_upper_half, config)
    mcmc = MCMC(NUTS(model, max_tree_depth=5), num_samples=draws, warmup_steps=warmup)
    mcmc.run(prior, y)
    posterior = mcmc.get_samples()
    if "x" not in posterior:
        with torch.no_grad():
            posterior = Predictive(model, posterior, return_sites=["x"])(prior, y)
    x = posterior["x"].reshape(-1, len(y), prior.event_shape.numel())
    return Completion(x, time.perf_counter() - start)
