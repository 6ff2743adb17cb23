"""Masked autoregressive flow on handwritten digits. Under a minute on two cores.

Papamakarios, Pavlakou, Murray. Masked Autoregressive Flow for Density Estimation. NeurIPS 2017.
arXiv:1705.07057

    python -m models.maf --layers 5 --data mine.npy
"""

from dataclasses import dataclass

import pyro

from models import density
from models.command_line import parse
from models.data import Data, load
from pyrogen.distributions import Flow, maf
from pyrogen.training import History

TARGET = 2.17  # bits per pixel of held-out digits


@dataclass(frozen=True)
class Config(density.Config):
    layers: int = 5
    hidden: tuple[int, ...] = (256, 256)


def fit(c: Config, data: Data) -> tuple[Flow, History]:
    flow = maf(data.features, layers=c.layers, hidden=c.hidden, support=data.support)
    return flow, density.train(flow, data, c)


def main(c: Config) -> float:
    pyro.set_rng_seed(c.seed)
    data = load(c.data)
    flow, _ = fit(c, data)
    return density.report("maf", density.held_out(flow, data), data)


if __name__ == "__main__":
    main(parse(Config, __doc__))
