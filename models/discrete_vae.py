"""Autoencoder with binary latents on handwritten digits. A minute on one core.

The bits have no path for a gradient, so the encoder learns by the score function, each draw
measured against the others: VIMCO.

Mnih, Rezende. Variational Inference for Monte Carlo Objectives. ICML 2016. arXiv:1602.06725

    python -m models.discrete_vae --latents 64 --draws 16
"""

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from models import density, vae
from models.command_line import parse
from models.data import Data, load
from pyrogen.distributions import LatentVariable
from pyrogen.evaluation import log_evidence
from pyrogen.nets import mlp
from pyrogen.objectives import Bound, ImportanceWeighted
from pyrogen.training import History

TARGET = 2.03  # bits per pixel of held-out digits, an upper bound


@dataclass(frozen=True)
class Config(vae.Config):
    steps: int = 2000
    decoder: str = "logistic"
    latents: int = 48
    draws: int = 8  # of the bound that is trained, at least 2


class Bits(nn.Module):
    """Independent bits, with probabilities that are learned."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(bits))

    def forward(self, context: None = None) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=self.logits).to_event(1)


class Encoder(nn.Module):
    """The guide: probabilities of the bits, from the data."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        return dist.Bernoulli(logits=self.net(x)).to_event(1)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x))


def fit(c: Config, data: Data, bound: Bound) -> tuple[LatentVariable, Encoder, History]:
    """Fit to data as ``vae.view`` gives them."""
    likelihood = vae.DECODERS[c.decoder].likelihood(data)
    model = LatentVariable(
        mlp(c.latents, likelihood.outputs.numel(), c.hidden),
        c.latents,
        event_shape=(data.features,),
        likelihood=likelihood,
        prior=Bits(c.latents),
    ).standardize(data.dequantize(data.train))
    guide = Encoder(vae.standardized(mlp(data.features, c.latents, c.hidden), data))
    return model, guide, vae.minimise(bound(model.model, guide), c, data)


def main(c: Config) -> float:
    pyro.set_rng_seed(c.seed)
    data = vae.view(c, load(c.data))
    bound = ImportanceWeighted(c.draws, vectorize_particles=True, max_plate_nesting=1)
    model, guide, _ = fit(c, data, bound)
    x = data.dequantize(data.test)
    evidence = log_evidence(model.model, guide, x, particles=c.particles)
    return density.report(f"discrete vae, {c.decoder}", evidence, data)


if __name__ == "__main__":
    main(parse(Config, __doc__))
