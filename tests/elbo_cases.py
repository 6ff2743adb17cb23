"""Guides whose draws are chosen beforehand: expectations are sums, and nothing is left to luck."""

import itertools
import math
from functools import partial

import numpy as np
import pyro.distributions as dist
import torch

from pyrogen import divergences
from pyrogen.objectives import (
    ELBO,
    ChiSquared,
    FDivergence,
    ImportanceWeighted,
    Renyi,
    Thermodynamic,
)

BETAS = (0.0, 0.2, 0.7)


def tvo(log_w):
    widths = [high - low for low, high in itertools.pairwise([*BETAS, 1.0])]
    shares = [(beta * log_w).exp() / (beta * log_w).exp().sum(0) for beta in BETAS]
    return sum(h * (s * log_w).sum(0) for h, s in zip(widths, shares, strict=True))


def power_mean(t):
    return lambda log_w: (t * log_w).exp().mean(0).log() / t


def divergence(f):
    return lambda log_w: f(log_w.exp() / log_w.exp().mean(0)).mean(0)


GENERATORS = {  # as functions of the ratio itself
    "kl": lambda u: u * u.log(),
    "reverse_kl": lambda u: -u.log(),
    "pearson": lambda u: (u - 1) ** 2,
    "neyman": lambda u: (u - 1) ** 2 / u,
    "squared_hellinger": lambda u: (u.sqrt() - 1) ** 2,
    "jensen_shannon": lambda u: (u * u.log() - (1 + u) * ((1 + u) / 2).log()) / 2,
}

BOUNDS = {  # how to make it from K, its F by the definition, and the sign of F in the loss
    "elbo": (ELBO, lambda log_w: log_w.mean(0), -1),
    "importance": (ImportanceWeighted, power_mean(1.0), -1),
    "renyi .5": (partial(Renyi, alpha=0.5), power_mean(0.5), -1),
    "renyi 2": (partial(Renyi, alpha=2.0), power_mean(-1.0), -1),
    "renyi -1": (partial(Renyi, alpha=-1.0), power_mean(2.0), -1),
    "chi": (partial(ChiSquared, order=1.5), power_mean(1.5), 1),
    "thermodynamic": (partial(Thermodynamic, betas=BETAS), tvo, -1),
    "alpha": (
        partial(FDivergence, f=divergences.alpha_divergence(-0.5)),
        divergence(lambda u: (u**-0.5 - 1 + 0.5 * (u - 1)) / 0.75),
        1,
    ),
} | {
    name: (partial(FDivergence, f=getattr(divergences, name)), divergence(f), 1)
    for name, f in GENERATORS.items()
}


def chosen(base, draws):
    """Make a Bernoulli or a Normal of chosen draws, or noise: one slice a run, or all at once."""
    turn = itertools.cycle(range(len(draws)))

    class Chosen(base):
        def sample(self, sample_shape=()):
            given = draws if self.batch_shape == draws.shape else draws[next(turn)]
            assert given.shape == self.batch_shape
            return given.clone()

        def rsample(self, sample_shape=()):
            return self.loc + self.scale * self.sample()

    return Chosen


def hermite(nodes):
    """Nodes and weights of the standard normal: exact for polynomials below twice ``nodes``."""
    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.tensor(x), torch.tensor(w / math.sqrt(2 * math.pi))


def outcomes(particles, *axes):
    """Return what each axis takes in every outcome, shape (axes, particles, outcomes)."""
    grid = torch.cartesian_prod(*(axis for _ in range(particles) for axis in axes))
    return grid.reshape(-1, particles, len(axes)).permute(2, 1, 0)


def log_bernoulli(logit, k):
    return dist.Bernoulli(logits=logit).log_prob(k)


def log_normal(loc, scale, z):
    return -((z - loc) ** 2) / (2 * scale**2) - scale.log() - math.log(2 * math.pi) / 2
