"""Additive couplings on handwritten digits. Half a minute on two cores.

Dinh, Krueger, Bengio. NICE: Non-linear Independent Components Estimation. ICLR 2015 workshop.
arXiv:1410.8516

    python -m models.nice --layers 12 --data mine.npy
"""

from dataclasses import dataclass

import pyro

from models import density
from models.command_line import parse
from models.data import Data, load
from pyrogen.distributions import Flow, nice
from pyrogen.training import History

TARGET = 2.25  # bits per pixel of held-out digits


@dataclass(frozen=True)
class Config(density.Config):
    steps: int = 1500
    layers: int = 8
    hidden: tuple[int, ...] = (128, 128)


def fit(c: Config, data: Data) -> tuple[Flow, History]:
    flow = nice(data.features, layers=c.layers, hidden=c.hidden, support=data.support)
    return flow, density.train(flow, data, c)


def main(c: Config) -> float:
    pyro.set_rng_seed(c.seed)
    data = load(c.data)
    flow, _ = fit(c, data)
    return density.report("nice", density.held_out(flow, data), data)


if __name__ == "__main__":
    main(parse(Config, __doc__))
