"""Triangular map on two moons: the Knothe-Rosenblatt rearrangement. Half a minute on one core.

Marzouk, Moselhy, Parno, Spantini. Sampling via Measure Transport: An Introduction. Handbook of
Uncertainty Quantification, 2016. arXiv:1602.05023

    python -m models.triangular --units 32 --steps 2000
"""

import math
from dataclasses import dataclass

import pyro
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from models.command_line import parse
from pyrogen.distributions import Flow, triangular
from pyrogen.objectives import MaximumLikelihood
from pyrogen.targets import two_moons
from pyrogen.training import Trainer

TARGET = 1.15  # nats per fresh point


@dataclass(frozen=True)
class Config:
    steps: int = 1000
    batch: int = 256
    units: int = 16  # of each integrand
    hidden: tuple[int, ...] = (64, 64)
    lr: float = 5e-3  # at the start of a cosine
    seed: int = 0


def fit(c: Config) -> Flow:
    flow = triangular(2, units=c.units, hidden=c.hidden).standardize(two_moons(10_000))
    optimizer = torch.optim.Adam(flow.parameters(), c.lr)
    schedule = CosineAnnealingLR(optimizer, c.steps)
    trainer = Trainer(MaximumLikelihood(flow), optimizer, schedule=schedule, clip=5.0)
    trainer.fit(((two_moons(c.batch),) for _ in range(c.steps)), steps=c.steps)
    return flow.eval()


def main(c: Config) -> float:
    pyro.set_rng_seed(c.seed)
    flow = fit(c)
    with torch.no_grad():
        nats = -flow().log_prob(two_moons(20_000))
    error = nats.std().item() / math.sqrt(len(nats))
    print(f"triangular: {nats.mean():.3f} ± {error:.3f} nats (exact, 20,000 fresh points)")
    return nats.mean().item()


if __name__ == "__main__":
    main(parse(Config, __doc__))
