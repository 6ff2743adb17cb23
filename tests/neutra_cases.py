"""Models with a known posterior, and maps that fit them or hide some of it."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from pyrogen.distributions import Flow, realnvp
from pyrogen.guides import AutoFlow
from pyrogen.objectives import ELBO
from pyrogen.targets import EightSchools
from pyrogen.transforms import Bijection

small = partial(realnvp, layers=4, hidden=(16, 16))


SCHOOLS = EightSchools().non_centred


def funnel():
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    scale = (v / 2).exp().clamp(1e-20, 1e20)[..., None].expand(*v.shape, 9)
    pyro.sample("x", dist.Normal(torch.zeros_like(scale), scale).to_event(1))


def correlated_law():
    covariance = torch.tensor([[4.0, 1.9, 0.5], [1.9, 1.0, 0.1], [0.5, 0.1, 0.3]])
    return dist.MultivariateNormal(torch.tensor([3.0, -1.0, 0.0]), covariance)


def correlated():
    pyro.sample("z", correlated_law())


def two_modes():
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 5.0).to_event(1))[..., 0]
    high, low = (dist.Normal(c, 0.7).log_prob(x) for c in (4.0, -4.0))
    pyro.factor("two", torch.logaddexp(high, low))


def fitted(model, recipe, *, steps, lr=0.01, particles=16, seed=0, gradient=None):
    """A guide after steps of the reverse Kullback-Leibler divergence."""
    pyro.set_rng_seed(seed)
    guide = AutoFlow(model, recipe).setup()
    elbo = ELBO(
        particles,
        gradient=gradient,
        vectorize_particles=particles > 1,
        max_plate_nesting=1,
    )
    optimizer = torch.optim.Adam(guide.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        elbo.differentiable_loss(model, guide).backward()
        nn.utils.clip_grad_norm_(guide.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    return guide


class Map(nn.Module):
    """A layer of one bijection."""

    def __init__(self, bijection):
        super().__init__()
        self.bijection = bijection

    def forward(self, context=None):
        return self.bijection


class FunnelMap(Bijection):
    """The exact map from standard normal noise to the funnel."""

    def call_and_ladj(self, x):
        v = 3 * x[..., :1]
        return torch.cat([v, (v / 2).exp() * x[..., 1:]], -1), math.log(3) + 4.5 * v[..., 0]

    def inverse_and_ladj(self, y):
        v = y[..., :1]
        x = torch.cat([v / 3, (-v / 2).exp() * y[..., 1:]], -1)
        return x, -math.log(3) - 4.5 * v[..., 0]


class BluntFunnelMap(Bijection):
    """The exact map but for the neck, 1.5 % of the mass, where x is far too wide."""

    def log_width(self, v):
        return torch.where(v < -6.5, 1.0, v / 2)

    def call_and_ladj(self, x):
        v = 3 * x[..., :1]
        log_width = self.log_width(v)
        y = torch.cat([v, log_width.exp() * x[..., 1:]], -1)
        return y, math.log(3) + 9 * log_width[..., 0]

    def inverse_and_ladj(self, y):
        v = y[..., :1]
        log_width = self.log_width(v)
        x = torch.cat([v / 3, (-log_width).exp() * y[..., 1:]], -1)
        return x, -math.log(3) - 9 * log_width[..., 0]


class Crooked(Bijection):
    """The identity, whose inverse and log-determinants are off by so much."""

    def __init__(self, shift=0.0, ladj=0.0):
        super().__init__()
        self.shift, self.ladj = shift, ladj

    def call_and_ladj(self, x):
        return x, x.new_full(x.shape[:-1], self.ladj)

    def inverse_and_ladj(self, y):
        return y + self.shift, y.new_zeros(y.shape[:-1])


def mapped(model, bijection):
    """An AutoFlow that is this map."""
    guide = AutoFlow(model, lambda features: Flow(features, [Map(bijection)])).setup()
    guide.flow.shift.zero_()
    return guide


def standard():
    pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
