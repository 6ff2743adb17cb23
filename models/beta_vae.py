"""A variational autoencoder that pays more for what it stores. Half a minute on one core.

With beta > 1 the latents keep less of a digit, in fewer units. The bound on its density, which
this file reports as the others do, gets worse for it: what is gained is a code that can be read.

Higgins et al. beta-VAE: Learning Basic Visual Concepts with a Constrained Variational Framework.
ICLR 2017.
Burgess et al. Understanding disentangling in beta-VAE. 2018. arXiv:1804.03599

    python -m models.beta_vae --beta 8 --picture traversals.png
"""

from dataclasses import dataclass
from typing import Any

import pyro
import torch

from models import density, vae
from models.command_line import parse
from models.data import Data, load
from pyrogen import plots
from pyrogen.distributions import LatentVariable
from pyrogen.evaluation import active_units, linear_probe, mutual_information
from pyrogen.guides import Amortized
from pyrogen.objectives import Annealing, Tempered

TARGET = 2.25  # bits per pixel of held-out digits, an upper bound


@dataclass(frozen=True)
class Config(vae.Config):
    decoder: str = "logistic"
    beta: float = 4.0  # price of a nat in the latents
    free_nats: float = 0.0  # nats of a datum that cost nothing
    warmup: int = 500  # steps over which the price rises from 0
    picture: str = ""  # file for latent traversals


@torch.no_grad()
def describe(guide: Amortized, data: Data) -> None:
    """Say how much the latents know of a digit, in nats, in units and in classes."""
    x, test = (data.dequantize(part) for part in (data.train, data.test))
    q, test_q = guide.joint(x), guide.joint(test)
    print(f"{active_units(q.mean)} active units. {mutual_information(q)}")
    if data.labels:
        print(linear_probe(q.mean, data.labels[0], test_q.mean, data.labels[2]))


@torch.no_grad()
def traversals(model: LatentVariable, guide: Amortized, data: Data, units: int = 6) -> Any:
    """Picture what each unit does to the digit of an average code."""
    mean = guide.joint(data.dequantize(data.train)).mean
    chosen = mean.var(0).argsort(descending=True)[:units]
    return plots.traversals(
        lambda z: model.decode(z).mean.reshape(-1, *data.shape[-2:]),
        mean.mean(0),
        units=chosen.tolist(),
        high=data.levels - 1 if data.whole else 1.0,
    )


def main(c: Config) -> float:
    pyro.set_rng_seed(c.seed)
    data = vae.view(c, load(c.data))
    if c.picture and len(data.shape) != 2:
        raise ValueError(
            f"--picture draws grey pictures of shape (height, width), and {data.name} has rows of "
            f"shape {data.shape}. Leave it out."
        )
    price = Annealing(c.warmup, stop=c.beta)
    bound = Tempered(beta=price, free_nats=c.free_nats)
    model, guide, _ = vae.fit(c, data, bound)
    describe(guide, data)
    evidence = vae.held_out(model, guide, data, c.particles)
    cost = density.report(f"beta vae, {c.decoder}", evidence, data)
    if c.picture:
        traversals(model, guide, data).savefig(c.picture)
    return cost


if __name__ == "__main__":
    main(parse(Config, __doc__))
