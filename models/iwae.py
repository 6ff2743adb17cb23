"""Importance-weighted autoencoder on handwritten digits. A minute on one core.

Burda, Grosse, Salakhutdinov. Importance Weighted Autoencoders. ICLR 2016. arXiv:1509.00519
Tucker, Lawson, Gu, Maddison. Doubly Reparameterized Gradient Estimators for Monte Carlo
Objectives. ICLR 2019. arXiv:1810.04152

    python -m models.iwae --draws 16 --decoder categorical
"""

from dataclasses import dataclass

import pyro

from models import density, vae
from models.command_line import parse
from models.data import load
from pyrogen.objectives import DoublyReparameterized, ImportanceWeighted

TARGET = 1.95  # bits per pixel of held-out digits, an upper bound


@dataclass(frozen=True)
class Config(vae.Config):
    steps: int = 2000
    decoder: str = "logistic"
    draws: int = 8  # of the bound that is trained; 1 is the VAE


def main(c: Config) -> float:
    pyro.set_rng_seed(c.seed)
    data = vae.view(c, load(c.data))
    bound = ImportanceWeighted(
        c.draws,
        gradient=DoublyReparameterized(),  # else the encoder's gradient drowns with more draws
        vectorize_particles=True,
        max_plate_nesting=1,
    )
    model, guide, _ = vae.fit(c, data, bound)
    evidence = vae.held_out(model, guide, data, c.particles)
    return density.report(f"iwae, {c.decoder}", evidence, data)


if __name__ == "__main__":
    main(parse(Config, __doc__))
