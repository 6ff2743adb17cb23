"""Neural spline flow of couplings on handwritten digits. Half a minute on two cores.

Durkan, Bekasov, Murray, Papamakarios. Neural Spline Flows. NeurIPS 2019. arXiv:1906.04032

    python -m models.nsf --bins 8 --data mine.npy
"""

from dataclasses import dataclass

import pyro

from models import density
from models.command_line import parse
from models.data import Data, load
from pyrogen.distributions import Flow, nsf
from pyrogen.training import History
from pyrogen.transforms import RationalQuadratic

TARGET = 2.05  # bits per pixel of held-out digits


@dataclass(frozen=True)
class Config(density.Config):
    steps: int = 800
    layers: int = 4
    lr: float = 2e-3  # at the start of a cosine
    hidden: tuple[int, ...] = (64, 64)
    bins: int = 8  # of each spline


def fit(c: Config, data: Data) -> tuple[Flow, History]:
    flow = nsf(
        data.features,
        layers=c.layers,
        hidden=c.hidden,
        elementwise=RationalQuadratic(bins=c.bins),
        support=data.support,
    )
    return flow, density.train(flow, data, c)


def main(c: Config) -> float:
    pyro.set_rng_seed(c.seed)
    data = load(c.data)
    flow, _ = fit(c, data)
    return density.report("nsf", density.held_out(flow, data), data)


if __name__ == "__main__":
    main(parse(Config, __doc__))
