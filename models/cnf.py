"""Continuous flow by maximum likelihood (FFJORD) on eight Gaussians. A minute on one core.

Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud. FFJORD: free-form continuous dynamics for
scalable reversible generative models. ICLR 2019. arXiv:1810.01367
Finlay, Jacobsen, Nurbekyan, Oberman. How to train your neural ODE: the world of Jacobian and
kinetic regularization. ICML 2020. arXiv:2002.02798

    python -m models.cnf --steps 2000 --kinetic 0.05
"""

import math
from dataclasses import dataclass

import pyro
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from models.command_line import parse
from pyrogen.distributions import Flow
from pyrogen.distributions.recipes.continuous import cnf, log_prob_and_error
from pyrogen.objectives.continuous import RegularizedLikelihood
from pyrogen.targets import eight_gaussians
from pyrogen.training import History, Trainer
from pyrogen.transforms import Hutchinson
from pyrogen.transforms.ode import RungeKutta4

ENTROPY = 2.833  # nats: no density has a lower expected cost
TARGET = 2.95  # nats per test point


@dataclass(frozen=True)
class Config:
    steps: int = 1000
    batch: int = 256
    hidden: tuple[int, ...] = (64, 64)
    lr: float = 1e-2  # at the start of a cosine
    kinetic: float = 0.01  # nats per squared distance
    jacobian: float = 0.01  # nats
    grid: int = 6  # steps of the solver in training
    test: int = 2000
    seed: int = 0


def fit(c: Config) -> tuple[Flow, History]:
    flow = cnf(2, hidden=c.hidden).standardize(eight_gaussians(10_000))
    objective = RegularizedLikelihood(
        flow,
        kinetic=c.kinetic,
        jacobian=c.jacobian,
        trace=Hutchinson(2),
        solver=RungeKutta4(c.grid),
    )
    optimizer = torch.optim.Adam(flow.parameters(), c.lr)
    schedule = CosineAnnealingLR(optimizer, c.steps)
    trainer = Trainer(objective, optimizer, clip=5.0, schedule=schedule, average=0.99)
    return flow, trainer.fit(((eight_gaussians(c.batch),) for _ in range(c.steps)), steps=c.steps)


def main(c: Config) -> float:
    pyro.set_rng_seed(c.seed)
    flow, _ = fit(c)
    with torch.no_grad():
        log_prob, error = log_prob_and_error(flow, eight_gaussians(c.test))
    nats = -log_prob.mean().item()
    spread = log_prob.std().item() / math.sqrt(c.test)
    print(
        f"cnf: {nats:.3f} ± {spread:.3f} nats (exact to {error.max():.0e}, {c.test} test points; "
        f"entropy {ENTROPY})"
    )
    return nats


if __name__ == "__main__":
    main(parse(Config, __doc__))
