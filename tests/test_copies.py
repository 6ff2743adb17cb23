"""Copies of guides stand alone, and leave the original whole."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from amortized_cases import DATA
from torch import nn

from pyrogen.distributions import maf
from pyrogen.guides import (
    Amortized,
    AutoFlow,
    Descent,
    Local,
    Mixed,
    Pathfinder,
    Refined,
    VariationalEM,
)
from pyrogen.objectives import ELBO


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Linear(1, 1)

    def forward(self, x, loc=0.0):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            mean = self.weight(z.unsqueeze(-1)).squeeze(-1)
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 0])


class Shared(Decoder):
    def forward(self, x):
        super().forward(x, pyro.sample("m", dist.Normal(0.0, 1.0)))


def amortized(model):
    return Amortized(model, nn.Linear(1, 2))


def refined(model):
    return Refined(amortized(model), Descent(ELBO(2), steps=2))


def mixed(model):
    return Mixed(model, globals=lambda m: AutoFlow(m, maf), locals=amortized)


def pathfinder(model):
    return Pathfinder(model, steps=3).fit(DATA)


MAKERS = {
    "amortized": (Decoder, amortized),
    "local": (Decoder, Local),
    "refined": (Decoder, refined),
    "flow": (Decoder, lambda m: AutoFlow(m, maf)),
    "pathfinder": (Decoder, pathfinder),
    "mixed": (Shared, mixed),
}


@pytest.mark.parametrize("ran", [False, True], ids=["new", "ran"])
@pytest.mark.parametrize(("model", "make"), MAKERS.values(), ids=MAKERS)
def test_copy_stands_alone_and_leaves_the_original(model, make, ran):
    model = model()
    guide = make(model)
    if ran:
        guide(DATA)
        ELBO()(model, guide)(DATA).backward()
    other = copy.deepcopy(guide)

    def loss(guide):
        pyro.set_rng_seed(0)
        return ELBO().loss(model, guide, DATA)

    for each in (other, guide):
        assert math.isfinite(loss(each))  # sets it up
    before = loss(other)
    assert loss(guide) == before or not ran
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(1.0)
    assert loss(other) == before


def test_copy_of_a_bound_has_one_model():
    """The guide's is the one that the copy trains."""
    model = Decoder()
    bound = ELBO()(model, amortized(model))
    bound(DATA)
    other = copy.deepcopy(bound)
    assert bound.guide.model is model
    assert other.guide.model is other.model
    assert other.model is not model


def test_copy_of_variational_em_keeps_to_its_own_table():
    model = Decoder()
    em = VariationalEM(ELBO()(model, Local(model)), Descent(ELBO(2), steps=2))
    em(DATA)
    before = em.bound.guide.table.detach().clone()
    other = copy.deepcopy(em)
    other(DATA)
    assert torch.equal(em.bound.guide.table, before)
    assert not torch.equal(other.bound.guide.table, before)
