"""Draws outside of the data's plates, plates inside of a cell, and what particles share."""

import itertools
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from elbo_cases import BOUNDS, chosen, log_bernoulli
from pyro import poutine
from pyro.distributions.transforms import planar
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyrogen.objectives import (
    ELBO,
    DoublyReparameterized,
    ImportanceWeighted,
    Learned,
    Rebar,
    Renyi,
    Reparameterized,
    ReweightedWakeSleep,
    ScoreFunction,
    Tempered,
)

VECTORIZED = pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorized"])
X = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)


class OneLatent:
    """One or two coins, each seen through a plate of its own or through all data."""

    def __init__(self, cells):
        self.cells = cells  # coins, in a plate outside of the data's; 0 for one coin in no plate
        self.logit = torch.full((max(cells, 1),), 0.3, dtype=torch.float64, requires_grad=True)

    def model(self):
        if self.cells:
            with pyro.plate("coins", self.cells):  # takes dim -1, the inner plate -2
                z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5).double()))
                with pyro.plate("data", len(X)):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=X[:, None].expand(-1, self.cells))
        else:
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5).double()))
            with pyro.plate("data", len(X)):
                pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    def guide_of(self, draws, vectorize):
        shape = {(0, True): (-1, 1), (0, False): (-1,)}.get((self.cells, vectorize))
        shape = shape or ((-1, 1, self.cells) if vectorize else (-1, self.cells))
        coin = chosen(dist.Bernoulli, draws.reshape(shape))

        def guide():
            if self.cells:
                with pyro.plate("coins", self.cells):
                    pyro.sample("z", coin(logits=self.logit))
            else:
                pyro.sample("z", coin(logits=self.logit[0]))

        return guide

    def log_joint(self, z):
        return dist.Normal(z[..., None], 1.0).log_prob(X).sum(-1) + math.log(0.5)


def outcomes(cells):
    for outcome in itertools.product([0.0, 1.0], repeat=2 * max(cells, 1)):
        yield torch.tensor(outcome, dtype=torch.float64).reshape(2, -1)


@VECTORIZED
@pytest.mark.parametrize("cells", [0, 2], ids=["no plate", "plate"])
@pytest.mark.parametrize("gradient", [Reparameterized, ScoreFunction])
@pytest.mark.parametrize("name", BOUNDS)
def test_data_plates_inside_of_a_cell_are_exact(name, gradient, cells, vectorize):
    """All draws of two particles, weighted by their probability."""
    make, value, sign = BOUNDS[name]
    case, exact, mean, loss = OneLatent(cells), 0.0, 0.0, 0.0
    nesting = 2 if cells else 1
    bound = make(2, gradient=gradient(), vectorize_particles=vectorize, max_plate_nesting=nesting)
    for z in outcomes(cells):
        log_q = log_bernoulli(case.logit, z)
        probability = log_q.sum().exp()
        exact = exact + sign * probability * value(case.log_joint(z) - log_q).sum()
        estimate = bound.differentiable_loss(case.model, case.guide_of(z, vectorize))
        loss += (probability * estimate).item()
        mean += probability.detach() * torch.autograd.grad(estimate, case.logit)[0]
    assert loss == pytest.approx(exact.item(), abs=1e-9)
    assert torch.allclose(mean, torch.autograd.grad(exact, case.logit)[0], atol=1e-9)


@VECTORIZED
@pytest.mark.parametrize("cells", [0, 2], ids=["no plate", "plate"])
def test_wake_sleep_weighs_each_cell(cells, vectorize):
    case = OneLatent(cells)
    nesting = 2 if cells else 1
    loss = ReweightedWakeSleep(2, vectorize_particles=vectorize, max_plate_nesting=nesting)
    for z in outcomes(cells):
        log_q = log_bernoulli(case.logit, z)
        log_w = (case.log_joint(z) - log_q).detach()
        expected = -(log_w.softmax(0) * log_q).sum()
        actual = loss.differentiable_loss(case.model, case.guide_of(z, vectorize))
        value = -(log_w.logsumexp(0) - math.log(2)).sum()
        assert actual.item() == pytest.approx(value.item(), abs=1e-9)
        pair = (torch.autograd.grad(a, case.logit)[0] for a in (actual, expected))
        assert torch.allclose(*pair, atol=1e-9)


@pytest.mark.slow
def test_rebar_learns_one_coefficient_looped_and_vectorized():
    logits, y = torch.zeros(2, requires_grad=True), torch.randn(3, 2)

    def model():
        with pyro.plate("a", 2, dim=-1):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            with pyro.plate("b", 3, dim=-2):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide():
        with pyro.plate("a", 2, dim=-1):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    means = []
    for vectorize in (False, True):
        rebar, seen = Rebar(), []
        bound = ELBO(4, gradient=rebar, vectorize_particles=vectorize, max_plate_nesting=2)
        with pyro.validation_enabled(False):
            for _ in range(1500):
                bound.differentiable_loss(model, guide)
                seen.append(rebar.coefficient)
        means.append(sum(seen[100:]) / len(seen[100:]))
    assert means[0] == pytest.approx(means[1], abs=0.08)  # five standard errors of such a mean


def test_particles_may_differ_in_structure():
    x = torch.ones(3)

    def model():
        if pyro.sample("b", dist.Bernoulli(0.5)).item():
            with pyro.plate("data", 3):
                pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide():
        pyro.sample("b", dist.Bernoulli(0.5))

    exact = -math.log(0.5 + 0.5 * dist.Normal(0.0, 1.0).log_prob(x).sum().exp().item())
    for bound in (ImportanceWeighted(400), Renyi(400, alpha=0.01), ReweightedWakeSleep(400)):
        assert bound.loss(model, guide) == pytest.approx(exact, abs=0.3)
    assert ELBO(8).loss(model, guide) > 0


@pytest.mark.parametrize(
    "loss",
    [
        ImportanceWeighted(8),
        ImportanceWeighted(8, gradient=DoublyReparameterized()),
        ReweightedWakeSleep(8),
    ],
    ids=["importance weighted", "doubly reparameterized", "wake-sleep"],
)
def test_impossible_draws_weigh_nothing(loss):
    loc = torch.zeros((), requires_grad=True)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("hard", torch.where(z > 0, 0.0, -math.inf))

    def guide():
        pyro.sample("z", dist.Normal(loc, 1.0))

    pyro.set_rng_seed(0)
    value = loss.differentiable_loss(model, guide)
    assert value.isfinite()
    assert torch.autograd.grad(value, loc)[0].isfinite()


def test_infinite_loss_is_infinite():
    loc = torch.zeros((), requires_grad=True)

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("never", torch.tensor(-math.inf))

    def guide():
        pyro.sample("z", dist.Normal(loc, 1.0))

    for gradient in (Reparameterized(), DoublyReparameterized(), ScoreFunction()):
        loss = ELBO(gradient=gradient).differentiable_loss(model, guide)
        assert loss.item() == math.inf


KL = 0.5 * 1.5**2


def cells(mask=True, scale=1.0, size=3, sequential=False):
    """Three cells whose divergence is ``KL``."""

    def program(loc):
        rows = pyro.plate("n", 3, subsample_size=size)
        if sequential:
            for i in rows:
                pyro.sample(f"z{i}", dist.Normal(loc, 1.0))
        else:
            with rows, poutine.scale(scale=scale), poutine.mask(mask=mask):
                pyro.sample("z", dist.Normal(loc, 1.0))

    return lambda: program(1.5), lambda: program(0.0)


@pytest.mark.parametrize("free", [0.5, 5.0])
def test_free_nats_are_those_of_a_cell_that_counts(free):
    """Masked cells do not dilute, scales do not shrink, and a minibatch stands for its share."""
    expected = max(KL, free)
    loss = Tempered(4000, free_nats=free, vectorize_particles=True, max_plate_nesting=1)
    looped = Tempered(4000, free_nats=free)
    tolerance = 0.15  # 4000 draws of standard deviation 1.5 a cell: five standard errors
    mask = torch.tensor([True, False, False])
    for options, cells_counted in (
        ({}, 3.0),
        ({"mask": mask}, 1.0),
        ({"scale": 0.01}, 0.03),
        ({"size": 1}, 3.0),
    ):
        value = loss.loss(*cells(**options))
        assert value == pytest.approx(cells_counted * expected, abs=tolerance * cells_counted)
    for size in (1, 3):
        value = looped.loss(*cells(size=size, sequential=True)) if free > KL else 3 * expected
        assert value == pytest.approx(3 * expected, abs=0.5)


def test_dreams_need_a_guide_of_the_models_own_sites():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    loss = ReweightedWakeSleep(4, sleep=lambda dream, x: (dream["x"],))
    x = torch.tensor(1.0)
    guide = AutoNormal(model)
    guide(x)
    with pytest.raises(NotImplementedError, match=r"Guide site '.*' is no draw of the model's"):
        loss.differentiable_loss(model, guide, x)

    def tilted(x):
        model(x)
        pyro.factor("tilt", torch.tensor(0.1))

    def own(x):
        pyro.sample("z", dist.Normal(x / 2, nn.Parameter(torch.ones(()))))

    loss.differentiable_loss(model, own, x)
    with pytest.raises(NotImplementedError, match="'tilt' is a factor, which draws nothing"):
        loss.differentiable_loss(tilted, own, x)


def test_guides_that_score_only_their_own_draws():
    flow = planar(2)

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    def guide():
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    ELBO().differentiable_loss(model, guide)
    for gradient in (ScoreFunction(), DoublyReparameterized()):
        with pytest.raises(NotImplementedError, match="only the very tensors that it drew"):
            ELBO(2, gradient=gradient).differentiable_loss(model, guide)


def test_baselines_of_tracegraph_are_not_ignored():
    logits = torch.zeros((), requires_grad=True)

    def guide():
        infer = {"baseline": {"use_decaying_avg_baseline": True}}
        pyro.sample("b", dist.Bernoulli(logits=logits), infer=infer)

    def model():
        pyro.sample("b", dist.Bernoulli(0.5))

    with pytest.raises(NotImplementedError, match="'b' asks for a baseline by infer="):
        ELBO().differentiable_loss(model, guide)


def test_learned_guesses_lie_as_the_cells_do():
    signal = torch.zeros(2, 5, 10)
    for shape in ((5, 10), (5, 10, 1)):
        net = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, shape))
        assert Learned(net)("z", signal, None, torch.zeros(50)).shape == (5, 10)
    net = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (10, 5)))
    with pytest.raises(ValueError, match=r"Learned expected one number for each of \(5, 10\)"):
        Learned(net)("z", signal, None, torch.zeros(50))


def test_renyi_reaches_the_elbo():
    log_weight = -3000 + torch.randn(8, 50)
    for alpha in (0.999, 0.99999, 1.000001):
        value = Renyi(8, alpha=alpha).value(log_weight)
        assert torch.allclose(value, log_weight.mean(0), atol=2e-3)


def test_losses_can_be_pickled():
    loss = ELBO(4, gradient=Reparameterized(Learned(nn.Linear(2, 1))))
    assert pickle.loads(pickle.dumps(loss)).num_particles == 4
