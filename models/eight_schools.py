"""A flow as the posterior of the eight schools, centred: a funnel. Half a minute on one core.

The funnel's neck is heavier than a normal's tail, so the flow ends in maps with tails to learn.

Rubin. Estimation in Parallel Randomized Experiments. Journal of Educational Statistics, 1981.
Agrawal, Sheldon, Domke. Advances in Black-Box VI. NeurIPS 2020. arXiv:2006.10343
Jones, Pewsey. Sinh-arcsinh distributions. Biometrika 96, 2009.

    python -m models.eight_schools --steps 2000 --seed 1
"""

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor
from torch.distributions import constraints

from models.command_line import parse
from pyrogen.distributions import Flow, realnvp
from pyrogen.guides import AutoFlow
from pyrogen.inference import importance
from pyrogen.objectives import ELBO, DoublyReparameterized
from pyrogen.targets import EightSchools
from pyrogen.training import Trainer
from pyrogen.transforms import Bijection, Elementwise, LULinear, Univariate

TARGET = 0.1  # nats between the evidence and its lower bound


@dataclass(frozen=True)
class Config:
    steps: int = 1500
    particles: int = 256
    layers: int = 8
    hidden: tuple[int, ...] = (32, 32)
    tail: float = 0.42  # log of the power by which tails are heavier at the start
    lr: float = 1e-2
    draws: int = 20_000  # for the final estimate, whose standard error is below 0.002 nats
    seed: int = 0


class Tails(Univariate):
    r"""Maps :math:`x \mapsto \sinh(k \sinh^{-1} x + s)`; tails are heavier where k exceeds 1."""

    parameters = 2

    def __init__(self, tail: float) -> None:
        self.tail = tail

    def __call__(self, params: Tensor) -> Bijection:
        skew, log_power = params.unbind(-1)
        return SinhArcsinh(skew, (log_power + self.tail).tanh())


class SinhArcsinh(Bijection):
    domain = codomain = constraints.real

    def __init__(self, skew: Tensor, log_power: Tensor) -> None:
        super().__init__(skew.shape)
        self.skew, self.log_power = skew, log_power

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        bent = self.log_power.exp() * x.asinh() + self.skew
        return bent.sinh(), self.log_power + bent.cosh().log() - x.square().log1p() / 2

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        x = ((y.asinh() - self.skew) * (-self.log_power).exp()).sinh()
        return x, -self.call_and_ladj(x)[1]


def fit(c: Config, model: Callable[[], None]) -> AutoFlow:
    def recipe(features: int) -> Flow:
        body = realnvp(features, layers=c.layers, hidden=c.hidden).layers
        tails = Elementwise(features, elementwise=Tails(c.tail))
        return Flow(features, [*body, LULinear(features), tails])

    guide = AutoFlow(model, recipe).setup()
    elbo = ELBO(
        c.particles,
        gradient=DoublyReparameterized(),
        vectorize_particles=True,
        max_plate_nesting=1,
    )
    optimizer = torch.optim.Adam(guide.parameters(), c.lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, c.steps, eta_min=c.lr / 50)
    trainer = Trainer(elbo(model, guide), optimizer, clip=10.0, schedule=decay)
    with pyro.validation_enabled(False):  # noqa: FBT003  # a third of the time of such small steps
        trainer.fit([()], steps=c.steps)
    return guide


def main(c: Config) -> float:
    pyro.set_rng_seed(c.seed)
    model = EightSchools().centred
    guide = fit(c, model)
    posterior = importance(model, guide, draws=c.draws)
    exact, evidence = EightSchools().posterior_mean(), EightSchools().log_evidence()
    elbo = posterior.log_weights.mean().item()
    print(f"log evidence {evidence:.3f} nats, its lower bound {elbo:.3f}")
    print(
        f"Pareto k of the weights {posterior.khat:.2f}, reliable below {posterior.threshold:.2f}"
    )
    for site, mean in exact.items():
        print(f"posterior mean of {site} {mean:.2f}, estimate {posterior.mean(site):.2f}")
    return evidence - elbo


if __name__ == "__main__":
    main(parse(Config, __doc__))
