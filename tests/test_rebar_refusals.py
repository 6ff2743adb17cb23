"""REBAR refuses what would bias it, and says what to use instead."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormalMessenger
from torch import nn

from pyrogen.objectives import (
    ELBO,
    ImportanceWeighted,
    Rebar,
    Renyi,
    Reparameterized,
)


def fixed(**laws):
    """A program that draws from these laws."""

    def program():
        for name, law in laws.items():
            pyro.sample(name, law)

    return program


def loss_of(program, by, bound=None):
    return (bound or ELBO(gradient=Rebar())).differentiable_loss(program, by)


HALF = dist.Bernoulli(torch.tensor(0.5))
DEPENDENT = {
    "smoothly": lambda b: dist.Normal(b, 1.0),
    "by an index": lambda b: dist.Normal(torch.tensor([0.0, 1.0])[b.long()], 1.0),
    "discrete": lambda b: dist.Bernoulli(0.2 + 0.5 * b),
    "a point": lambda b: dist.Delta(2 * b),
}


@pytest.mark.parametrize("name", DEPENDENT)
def test_sites_that_depend_on_discrete_draws_are_refused(name):
    second = DEPENDENT[name]

    def program():
        pyro.sample("b", HALF)
        pyro.sample("c", HALF if name == "discrete" else dist.Normal(0.0, 1.0))

    def by():
        pyro.sample("c", second(pyro.sample("b", HALF)))

    with pytest.raises(ValueError, match=r"Guide site 'c' depends on discrete.*LeaveOneOut\(\)"):
        loss_of(program, by)
    if name != "a point":
        loss_of(program, by, ELBO(gradient=Reparameterized()))


def test_a_guide_of_sites_side_by_side_may_drop_units():
    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))

        def forward(self):
            logits = self.net(torch.ones(1))[0]
            pyro.sample("a", dist.Bernoulli(logits=logits))
            pyro.sample("b", dist.Bernoulli(logits=-logits))

    loss_of(fixed(a=HALF, b=HALF), Guide()).backward()


def one_hots(use):
    """A model that uses a one-hot draw, and its guide."""

    def program():
        b = pyro.sample("b", dist.OneHotCategorical(torch.ones(3) / 3))
        pyro.sample("x", dist.Normal(use(b), 1.0), obs=torch.tensor(0.3))

    return program, fixed(b=dist.OneHotCategorical(torch.ones(3) / 3))


TABLE = torch.tensor([0.0, 1.0, 2.0])


@pytest.mark.parametrize(
    "use",
    [
        lambda b: TABLE[b.argmax(-1)],
        lambda b: b.round() @ TABLE,
        lambda b: (b > 0.5).float() @ TABLE,
        lambda b: b.long().float() @ TABLE,
    ],
    ids=["argmax", "round", "threshold", "truncation"],
)
def test_models_that_jump_are_refused(use):
    with pytest.raises(ValueError, match="Model site 'x' depends on 'b' by a jump"):
        loss_of(*one_hots(use))


def test_models_that_ignore_a_draw_are_not_refused():
    loss_of(*one_hots(lambda b: TABLE[0]))


def test_a_chain_in_the_model_is_smooth():
    def program():
        a = pyro.sample("a", HALF)
        b = pyro.sample("b", dist.Bernoulli(0.2 + 0.6 * a))
        pyro.sample("x", dist.Normal(b, 1.0), obs=torch.tensor(1.0))

    loss_of(program, fixed(a=HALF, b=HALF))


def test_auxiliary_draws_need_no_model():
    def by():
        pyro.sample("b", HALF)
        pyro.sample("c", HALF, infer={"is_auxiliary": True})

    loss_of(fixed(b=HALF), by)


def test_models_that_fail_between_the_values_are_refused():
    def impossible(b):
        if not set(b.tolist()) <= {0.0, 1.0}:
            raise RuntimeError("not one of ours.")
        return b @ TABLE

    with pytest.raises(ValueError, match=r"The model fails between the values of 'b': not one of"):
        loss_of(*one_hots(impossible))

    def narrow():
        b = pyro.sample("b", HALF)
        pyro.factor("x", torch.log(((b - 0.5).abs() - 0.4999999).relu()))

    with pytest.raises(ValueError, match=r"Model site 'x' has log-density -inf between"):
        loss_of(narrow, fixed(b=HALF))


def test_sites_that_cannot_be_relaxed_are_refused():
    k = fixed(k=dist.Categorical(torch.ones(3)))
    with pytest.raises(NotImplementedError, match=r"'k' is Categorical.*Rebar needs OneHot"):
        loss_of(k, k)
    k = fixed(k=dist.Poisson(1.0))
    with pytest.raises(NotImplementedError, match=r"'k' is Poisson.*Rebar takes"):
        loss_of(k, k)
    with pytest.raises(NotImplementedError, match=r"Model site 'k' is Binomial.*Rebar needs"):
        loss_of(fixed(k=dist.Binomial(1, torch.tensor(0.5))), fixed(k=HALF))
    normal = fixed(z=dist.Normal(0.0, 1.0))
    with pytest.raises(NotImplementedError, match="AutoNormalMessenger runs only inside"):
        loss_of(normal, AutoNormalMessenger(normal))


@pytest.mark.parametrize("bound", [ImportanceWeighted, lambda **k: Renyi(alpha=0.5, **k)])
def test_bounds_that_join_their_particles_are_refused(bound):
    with pytest.raises(NotImplementedError, match="Rebar is an estimator for the ELBO"):
        bound(gradient=Rebar())


def test_masked_cells_have_no_gradient():
    logits = torch.zeros(4, requires_grad=True)
    mask = torch.tensor([True, False, True, False])

    def program():
        with pyro.plate("n", 4), poutine.mask(mask=mask):
            b = pyro.sample("b", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(b, 1.0), obs=torch.ones(4))

    def by():
        with pyro.plate("n", 4), poutine.mask(mask=mask):
            pyro.sample("b", dist.Bernoulli(logits=logits))

    (got,) = torch.autograd.grad(loss_of(program, by), logits)
    assert ((got != 0) == mask).all()


def test_options_are_checked():
    with pytest.raises(ValueError, match="Rebar expected a positive temperature, got 0"):
        Rebar(temperature=0.0)
    with pytest.raises(ValueError, match="Rebar expected a finite coefficient, got nan"):
        Rebar(coefficient=float("nan"))
    with pytest.raises(TypeError, match="Rebar expected a baseline"):
        Rebar(0.5)
