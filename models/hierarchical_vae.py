"""Variational autoencoder whose prior is a variational autoencoder. Half a minute on one core.

The prior of the latents is itself a latent-variable model, an integral without a density.
NoiseReparam opens it: the sites become the latents of the top and the noise of the level below.

Rezende, Mohamed, Wierstra. Stochastic Backpropagation and Approximate Inference in Deep
Generative Models. ICML 2014. arXiv:1401.4082

    python -m models.hierarchical_vae --latents 24 --top 8
"""

from dataclasses import dataclass

import pyro
import torch
from pyro import poutine
from torch import nn

from models import density, vae
from models.command_line import parse
from models.data import Data, load
from pyrogen.distributions import HeteroscedasticGaussian, LatentVariable
from pyrogen.evaluation import log_evidence
from pyrogen.guides import Amortized
from pyrogen.inference import NoiseReparam
from pyrogen.nets import mlp
from pyrogen.objectives import ELBO
from pyrogen.training import History

TARGET = 2.0  # bits per pixel of held-out digits, an upper bound


@dataclass(frozen=True)
class Config(vae.Config):
    decoder: str = "logistic"
    top: int = 8  # latents above the latents


class Opened(nn.Module):
    """A program whose latents are drawn level by level, each with a density."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with poutine.reparam(config={"z": NoiseReparam()}):
            return self.program(x)


def fit(c: Config, data: Data) -> tuple[LatentVariable, Opened, Amortized, History]:
    """Fit to data as ``vae.view`` gives them."""
    likelihood = vae.DECODERS[c.decoder].likelihood(data)
    prior = LatentVariable(
        mlp(c.top, 2 * c.latents, (64,)),
        c.top,
        event_shape=(c.latents,),
        likelihood=HeteroscedasticGaussian((c.latents,)),
    )
    law = LatentVariable(
        mlp(c.latents, likelihood.outputs.numel(), c.hidden),
        c.latents,
        event_shape=(data.features,),
        likelihood=likelihood,
        prior=prior,
    ).standardize(data.dequantize(data.train))
    model = Opened(law.model)
    encoder = mlp(data.features, 2 * (c.latents + c.top), c.hidden)
    guide = Amortized(model, vae.standardized(encoder, data))
    return law, model, guide, vae.minimise(ELBO()(model, guide), c, data)


def main(c: Config) -> float:
    pyro.set_rng_seed(c.seed)
    data = vae.view(c, load(c.data))
    _, model, guide, _ = fit(c, data)
    x = data.dequantize(data.test)
    evidence = log_evidence(model, guide, x, particles=c.particles)
    return density.report(f"hierarchical vae, {c.decoder}", evidence, data)


if __name__ == "__main__":
    main(parse(Config, __doc__))
