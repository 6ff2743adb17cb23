"""Weighted and free nats: closed forms, a schedule that is saved, plates and auxiliary sites."""

import io
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from elbo_cases import chosen, log_bernoulli
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import nn

from pyrogen.objectives import ELBO, Annealing, DoublyReparameterized, ScoreFunction, Tempered

F64 = torch.float64
VECTORIZED = pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorized"])
X = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=F64)


class Problem:
    """Two bits a datum, in a plate of four, of which a subsample; K = 2, in all outcomes."""

    def __init__(self, i):
        self.i = torch.tensor(i)
        self.logits = torch.tensor(
            [[0.4, -0.3, 0.8, 0.2], [1.5, 1.2, -1.0, 2.0]], dtype=F64, requires_grad=True
        )

    def model(self):
        with pyro.plate("data", 4, subsample=self.i) as i:
            a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.5, dtype=F64)))
            b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=X[i])

    def guide(self, first=dist.Bernoulli, second=dist.Bernoulli):
        with pyro.plate("data", 4, subsample=self.i) as i:
            pyro.sample("a", first(logits=self.logits[0, i]))
            pyro.sample("b", second(logits=self.logits[1, i]))

    def terms(self, z):
        """Log-likelihood, and each site's log-ratio, shape (particles, data)."""
        a, b = z
        log_x = dist.Normal(a + b, 1.0).log_prob(X[self.i])
        log_q = log_bernoulli(self.logits[:, None, self.i], torch.stack([a, b]))
        prior = torch.tensor([0.5, 0.3], dtype=F64).logit()[:, None, None]
        return log_x, log_q - log_bernoulli(prior, torch.stack([a, b])), log_q


@VECTORIZED
@pytest.mark.parametrize(
    ("i", "beta"), [([2], 4.0), ([2], 0.3), ([2], 1.0), ([2], 0.0), ([0, 3], 4.0)]
)
def test_weighted_divergence_is_exact(i, beta, vectorize):
    problem = Problem(i)
    loss = Tempered(2, beta=beta, vectorize_particles=vectorize, max_plate_nesting=1)
    exact, mean = 0.0, 0.0
    for outcome in itertools.product(torch.tensor([0.0, 1.0], dtype=F64), repeat=4 * len(i)):
        z = torch.stack(outcome).reshape(2, 2, len(i))
        coins = [chosen(dist.Bernoulli, one) for one in z]
        estimate = loss.differentiable_loss(problem.model, lambda c=coins: problem.guide(*c))
        log_x, ratio, log_q = problem.terms(z)
        probability = log_q.sum().exp()
        one = -4 / len(i) * (log_x - beta * ratio.sum(0)).mean(0).sum()
        assert estimate.item() == pytest.approx(one.item(), rel=1e-12)
        exact = exact + probability * one
        (g,) = torch.autograd.grad(estimate, problem.logits)
        mean = mean + probability.item() * g
    assert torch.allclose(mean, torch.autograd.grad(exact, problem.logits)[0], atol=1e-12)


@VECTORIZED
@pytest.mark.parametrize("gradient", [None, DoublyReparameterized(), ScoreFunction()])
@pytest.mark.parametrize("size", [2, 4])
def test_free_nats_are_counted_by_site_and_cell(size, gradient, vectorize):
    """On one set of draws: each site's mean divergence a cell, or what is free, times beta."""
    loc = torch.tensor([0.2, 3.0], dtype=F64, requires_grad=True)
    shift = torch.zeros((), dtype=F64, requires_grad=True)
    seen = []

    def model():
        with pyro.plate("data", 4, subsample_size=size) as i:
            a = pyro.sample("a", dist.Normal(loc.new_zeros(()), 1.0))
            b = pyro.sample("b", dist.Normal(loc.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(a + b + shift, 1.0), obs=X[i])

    def guide():
        with pyro.plate("data", 4, subsample_size=size) as i:
            a = pyro.sample("a", dist.Normal(loc[0], 1.0))
            b = pyro.sample("b", dist.Normal(loc[1], 1.0))
            seen.append((i, a, b))

    loss = Tempered(
        8,
        beta=2.0,
        free_nats=0.9,
        gradient=gradient,
        vectorize_particles=vectorize,
        max_plate_nesting=1,
    )
    actual = loss.differentiable_loss(model, guide)
    i = seen[0][0]
    if isinstance(gradient, DoublyReparameterized):
        seen = seen[::2]  # the others are its second runs
    a, b = (torch.cat([s[n].detach().reshape(-1, size) for s in seen]) for n in (1, 2))
    noise = a - loc[0].detach(), b - loc[1].detach()
    a, b = loc[0] + noise[0], loc[1] + noise[1]
    likelihood = (X[i] - a - b - shift).square().add(math.log(2 * math.pi)).sum() / 16
    assert (loc[0] * a - loc[0] ** 2 / 2).mean() < 0.9 < (loc[1] * b - loc[1] ** 2 / 2).mean()
    paid = 2.0 * (loc[1] * noise[1] + loc[1] ** 2 / 2).sum() / 8
    expected = 4 / size * (likelihood + paid) + 2.0 * 0.9 * 4
    assert actual.item() == pytest.approx(expected.item(), rel=1e-9)
    parameters = [loc, shift]
    if isinstance(gradient, ScoreFunction):
        parameters = [shift]  # the rest is right in the mean alone
    if isinstance(gradient, DoublyReparameterized):
        score = 2.0 * (noise[1] * (loc[1] - loc[1].detach())).sum() / 8  # mean zero
        expected = expected - 4 / size * score
    for x, y in zip(
        *(torch.autograd.grad(v, parameters) for v in (actual, expected)), strict=True
    ):
        assert torch.allclose(x, y, atol=1e-9)


@pytest.mark.parametrize("auto", [AutoNormal, AutoDiagonalNormal])
def test_auxiliary_sites_count_with_those_that_are(auto):
    """The guide's own noise cannot be matched with one site, so that all are one divergence."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(a + b, 1.0), obs=torch.tensor(1.0))

    guide = auto(model, init_scale=1.0)
    guide()
    losses = []
    for loss in (ELBO(64), Tempered(64, beta=1.0), Tempered(64, beta=3.0, free_nats=1e3)):
        pyro.set_rng_seed(0)
        losses.append(loss.loss(model, guide))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[2] == pytest.approx(3e3, rel=0.1)
    pyro.set_rng_seed(0)
    weighted = [Tempered(64, beta=beta) for beta in (0.0, 2.0)]
    values = []
    for loss in weighted:
        pyro.set_rng_seed(0)
        values.append(loss.loss(model, guide))
    assert sum(values) / 2 == pytest.approx(losses[0], rel=1e-4)  # linear in beta


def test_a_site_of_some_particles_is_weighed_too():
    """The second particle alone has a second latent."""
    coin = chosen(dist.Bernoulli, torch.tensor([0.0, 1.0]))

    def model():
        if pyro.sample("k", dist.Bernoulli(0.3)) == 1:
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        if pyro.sample("k", coin(0.5)) == 1:
            pyro.sample("z", dist.Delta(torch.tensor(2.0)))

    first = torch.tensor([0.5 / 0.7, 0.5 / 0.3]).log().sum()
    second = -dist.Normal(0.0, 1.0).log_prob(torch.tensor(2.0))
    loss = Tempered(2, beta=3.0).loss(model, guide)
    assert loss == pytest.approx(3 * (first + second).item() / 2, rel=1e-6)


class Model(nn.Module):
    def forward(self):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.0))


class Guide(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def forward(self):
        pyro.sample("z", dist.Normal(self.loc, 1.0))


def test_annealing_is_saved_and_resumed():
    def build():
        return Tempered(beta=Annealing(4, start=0.5, stop=2.0))(Model(), Guide())

    module = build()
    for _ in range(2):
        module()
    module.elbo.loss(module.model, module.guide)  # an evaluation is no step
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    resumed = build()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        assert resumed.elbo.beta() == module.elbo.beta() == 1.25
    weights = [resumed.elbo.beta() for _ in range(4)]
    assert weights == [1.25, 1.625, 2.0, 2.0]


def test_annealing_moves_with_svi():
    loss = Tempered(beta=Annealing(10))
    guide = Guide()
    svi = SVI(Model(), guide, pyro.optim.SGD({"lr": 0.0}), loss=loss)
    for _ in range(5):
        svi.step()
        svi.evaluate_loss()
    assert loss.beta.done == 5


def test_errors_at_the_door():
    for options in ({"beta": -1}, {"free_nats": -0.1}, {"beta": float("nan")}):
        with pytest.raises(ValueError, match=r"Tempered expected beta >= 0 and free_nats >= 0"):
            Tempered(**options)
    for options in ({"steps": 0}, {"steps": 3, "start": -1.0}, {"steps": 3, "stop": -1.0}):
        with pytest.raises(ValueError, match="Annealing expected steps >= 1 and weights >= 0"):
            Annealing(**options)
