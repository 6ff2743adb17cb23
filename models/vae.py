"""Variational autoencoder on handwritten digits. A quarter of a minute on two cores.

Kingma, Welling. Auto-Encoding Variational Bayes. ICLR 2014. arXiv:1312.6114

    python -m models.vae --latents 8 --data mine.npy
"""

from dataclasses import dataclass

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch.optim.lr_scheduler import CosineAnnealingLR

from models import density
from models.command_line import parse
from models.data import Data, load
from pyrogen.distributions import HeteroscedasticGaussian, LatentVariable
from pyrogen.evaluation import Evidence, log_evidence
from pyrogen.guides import Amortized
from pyrogen.nets import Standardized, mlp
from pyrogen.training import History, Trainer

TARGET = 2.45  # bits per pixel of held-out digits, an upper bound


@dataclass(frozen=True)
class Config(density.Config):
    steps: int = 3000
    weight_decay: float = 1e-3
    latents: int = 16
    hidden: tuple[int, ...] = (256, 256)
    particles: int = 500  # of the bound on held-out rows


def fit(c: Config, data: Data) -> tuple[LatentVariable, Amortized, History]:
    likelihood = HeteroscedasticGaussian((data.features,))
    vae = LatentVariable(
        mlp(c.latents, 2 * data.features, c.hidden),
        c.latents,
        event_shape=(data.features,),
        likelihood=likelihood,
    ).standardize(data.dequantize(data.train))
    encoder = mlp(data.features, 2 * c.latents, c.hidden)
    guide = Amortized(vae.model, Standardized(encoder, likelihood.shift, likelihood.scale))

    elbo = Trace_ELBO()(vae.model, guide)
    optimizer = torch.optim.AdamW(elbo.parameters(), c.lr, weight_decay=c.weight_decay)
    schedule = CosineAnnealingLR(optimizer, c.steps)
    held = data.dequantize(data.validation.repeat(4, 1))
    history = Trainer(elbo, optimizer, clip=1e4, schedule=schedule, average=0.99).fit(
        data.batches(c.batch), steps=c.steps, validation=lambda: elbo(held).item()
    )
    return vae, guide, history


def held_out(vae: LatentVariable, guide: Amortized, data: Data, particles: int) -> Evidence:
    """Bound the density of the test rows from below."""
    return log_evidence(vae.model, guide, data.dequantize(data.test), particles=particles)


def main(c: Config) -> float:
    pyro.set_rng_seed(c.seed)
    data = load(c.data)
    vae, guide, _ = fit(c, data)
    return density.report("vae", held_out(vae, guide, data, c.particles), data)


if __name__ == "__main__":
    main(parse(Config, __doc__))
