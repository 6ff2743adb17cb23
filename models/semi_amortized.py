"""Semi-amortized variational autoencoder on handwritten digits. Half a minute on one core.

A small encoder leaves a gap between the bound and the best one of its family. Steps of descent on
each held-out picture's own bound close it; importance weights tell how far the evidence is.

Kim, Wiseman, Miller, Sontag, Rush. Semi-Amortized Variational Autoencoders. ICML 2018.
arXiv:1802.02550
Cremer, Li, Duvenaud. Inference Suboptimality in Variational Autoencoders. ICML 2018.
arXiv:1801.03558

    python -m models.semi_amortized --latents 8 --refinement 50
"""

from dataclasses import dataclass

import pyro
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from models import density
from models.command_line import parse
from models.data import Data, load
from pyrogen.distributions import HeteroscedasticGaussian, LatentVariable
from pyrogen.evaluation import log_evidence
from pyrogen.guides import Amortized, Descent, Refined
from pyrogen.nets import Standardized, mlp
from pyrogen.objectives import ELBO
from pyrogen.training import Trainer

TARGET = 0.25  # part of the encoder's gap to the evidence that refinement leaves


@dataclass(frozen=True)
class Config(density.Config):
    steps: int = 2000
    weight_decay: float = 1e-3
    latents: int = 8
    hidden: tuple[int, ...] = (128, 128)  # of the decoder
    encoder: tuple[int, ...] = (16,)  # much smaller, so that it leaves a gap
    refinement: int = 200  # steps
    inner_lr: float = 0.1
    particles: int = 200  # of the bounds on held-out rows


def fit(c: Config, data: Data) -> tuple[nn.Module, Amortized]:
    likelihood = HeteroscedasticGaussian((data.features,))
    vae = LatentVariable(
        mlp(c.latents, 2 * data.features, c.hidden),
        c.latents,
        event_shape=(data.features,),
        likelihood=likelihood,
    ).standardize(data.dequantize(data.train))
    encoder = mlp(data.features, 2 * c.latents, c.encoder)
    guide = Amortized(vae.model, Standardized(encoder, likelihood.shift, likelihood.scale))
    bound = ELBO()(vae.model, guide)
    optimizer = torch.optim.AdamW(bound.parameters(), c.lr, weight_decay=c.weight_decay)
    schedule = CosineAnnealingLR(optimizer, c.steps)
    trainer = Trainer(bound, optimizer, clip=1e4, schedule=schedule, average=0.99)
    trainer.fit(data.batches(c.batch), steps=c.steps)
    return vae.model, guide


def gap(model: nn.Module, guide: nn.Module, x: Tensor, evidence: float) -> float:
    """Return the nats a datum between the evidence and the bound that a guide gives."""
    bound = ELBO(20, vectorize_particles=True).loss(model, guide, x)
    return evidence + bound / len(x)


def main(c: Config) -> float:
    pyro.set_rng_seed(c.seed)
    data = load(c.data)
    model, guide = fit(c, data)
    x = data.dequantize(data.test)
    descent = Descent(ELBO(4, vectorize_particles=True), steps=c.refinement, lr=c.inner_lr)
    refined = Refined(guide, descent)
    evidence = log_evidence(model, refined, x, particles=c.particles, batch_size=len(x)).value
    gaps = [gap(model, g, x, evidence) for g in (guide, refined)]
    print(f"log evidence at least {evidence:.2f} nats a datum, of {len(x)} held-out {data.name}")
    print(f"the encoder's bound lies {gaps[0]:.2f} below, the refined one {gaps[1]:.2f}")
    return gaps[1] / gaps[0]


if __name__ == "__main__":
    main(parse(Config, __doc__))
