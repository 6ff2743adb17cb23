"""Reweighted wake-sleep: exact gradients, minibatches, dreams, and a posterior learned."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from elbo_cases import chosen, hermite, log_bernoulli
from pyro import poutine
from torch import nn

from pyrogen.objectives import ImportanceWeighted, ReweightedWakeSleep

F64 = torch.float64
VECTORIZED = pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorized"])
X = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=F64)


class Bits:
    """One bit a datum."""

    def __init__(self):
        self.theta = torch.tensor([0.3, 0.9], dtype=F64, requires_grad=True)
        self.phi = torch.tensor([0.2, 0.5], dtype=F64, requires_grad=True)

    def model(self, x, i, coin=dist.Bernoulli, normal=dist.Normal, scale=1.0):
        with pyro.plate("data", 4, subsample=i), poutine.scale(scale=scale):
            z = pyro.sample("z", coin(logits=self.theta[0]))
            pyro.sample("x", normal(self.theta[1] * z, 1.0), obs=x)

    def guide(self, x, i, coin=dist.Bernoulli, scale=1.0):
        with pyro.plate("data", 4, subsample=i), poutine.scale(scale=scale):
            pyro.sample("z", coin(logits=self.phi[0] + self.phi[1] * x))


@VECTORIZED
@pytest.mark.parametrize("i", [[2], [0, 3]])
def test_wake_gradients_are_exact(i, vectorize):
    """All outcomes of K = 2: weights are each datum's own, the subsample's scale is outside."""
    bits, i = Bits(), torch.tensor(i)
    x = X[i]
    loss = ReweightedWakeSleep(2, vectorize_particles=vectorize, max_plate_nesting=1)
    mean, exact = [0.0, 0.0], [0.0, 0.0]
    for outcome in itertools.product(torch.tensor([0.0, 1.0], dtype=F64), repeat=2 * len(i)):
        z = torch.stack(outcome).reshape(2, len(i))
        coin = chosen(dist.Bernoulli, z)
        estimate = loss.differentiable_loss(bits.model, lambda *a, c=coin: bits.guide(*a, c), x, i)
        log_p = log_bernoulli(bits.theta[0], z)
        log_p = log_p + dist.Normal(bits.theta[1] * z, 1.0).log_prob(x)
        log_q = log_bernoulli(bits.phi[0] + bits.phi[1] * x, z)
        log_w = (log_p - log_q).detach()
        weight = log_w.exp() / log_w.exp().sum(0)
        scale, probability = 4 / len(i), log_q.sum().exp().item()
        assert estimate.item() == pytest.approx(
            -scale * log_w.exp().mean(0).log().sum().item(), rel=1e-12
        )
        actual = torch.autograd.grad(estimate, [bits.theta, bits.phi])
        parts = [
            torch.autograd.grad(-scale * (weight * log).sum(), parameter)[0]
            for log, parameter in ((log_p, bits.theta), (log_q, bits.phi))
        ]
        for k in range(2):
            mean[k] = mean[k] + probability * actual[k]
            exact[k] = exact[k] + probability * parts[k]
    assert all(torch.allclose(a, e, atol=1e-12) for a, e in zip(mean, exact, strict=True))


def mean_gradient(loss, bits, i, parameter):
    """Of all outcomes of one datum."""
    mean = 0.0
    for outcome in itertools.product(torch.tensor([0.0, 1.0], dtype=F64), repeat=3):
        z = torch.stack(outcome).reshape(3, 1)
        coin = chosen(dist.Bernoulli, z)
        x, i_ = X[i : i + 1], torch.tensor([i])
        value = loss.differentiable_loss(bits.model, lambda *a, c=coin: bits.guide(*a, c), x, i_)
        probability = log_bernoulli(bits.phi[0] + bits.phi[1] * x, z).sum().exp().item()
        mean = mean + probability * torch.autograd.grad(value, parameter)[0]
    return mean


def test_the_model_climbs_the_importance_weighted_bound():
    bits = Bits()
    for i in range(4):
        expected = mean_gradient(ImportanceWeighted(3), bits, i, bits.theta)
        assert torch.allclose(mean_gradient(ReweightedWakeSleep(3), bits, i, bits.theta), expected)


def asleep(dream, x, i):
    return dream["x"], i


def test_sleep_gradient_is_exact():
    """Every dream of one bit and its observation, by quadrature, scaled by its probability."""
    bits = Bits()
    nodes, weight = hermite(40)
    z = torch.cat([torch.zeros(40, dtype=F64), torch.ones(40, dtype=F64)])
    noise, weight = nodes.repeat(2), weight.repeat(2)
    probability = weight * log_bernoulli(bits.theta[0], z).exp().detach()

    def plated(program, **kinds):
        def run(x, i=None):
            with pyro.plate("dreams", 80), poutine.scale(scale=probability):
                program(x, **kinds)

        return run

    def model(x, coin, normal):
        z = pyro.sample("z", coin(logits=bits.theta[0]))
        pyro.sample("x", normal(bits.theta[1] * z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Bernoulli(logits=bits.phi[0] + bits.phi[1] * x))

    coin, normal = chosen(dist.Bernoulli, z[None]), chosen(dist.Normal, noise[None])
    loss = ReweightedWakeSleep(2, sleep=lambda dream, x: (dream["x"],), insomnia=0.0)
    value = loss.differentiable_loss(
        plated(model, coin=coin, normal=normal), plated(guide), torch.zeros(80, dtype=F64)
    )
    (actual,) = torch.autograd.grad(value, bits.phi)
    x = bits.theta[1].detach() * z + noise
    exact = -(probability * log_bernoulli(bits.phi[0] + bits.phi[1] * x, z)).sum()
    assert torch.allclose(actual, torch.autograd.grad(exact, bits.phi)[0], atol=1e-12)


def test_wake_and_sleep_are_mixed_by_insomnia():
    bits, gradients, losses = Bits(), [], []
    for insomnia in (0.0, 1.0, 0.25):
        pyro.set_rng_seed(0)
        loss = ReweightedWakeSleep(3, sleep=asleep, insomnia=insomnia)
        value = loss.differentiable_loss(bits.model, bits.guide, X, torch.arange(4))
        losses.append(value.item())
        gradients.append(torch.autograd.grad(value, [bits.phi, bits.theta]))
    slept, woke, mixed = (phi for phi, _ in gradients)
    assert torch.allclose(mixed, 0.25 * woke + 0.75 * slept, atol=1e-12)
    assert torch.equal(gradients[0][1], gradients[1][1])  # the model does not learn from dreams
    assert losses[0] == losses[1] == losses[2]
    pyro.set_rng_seed(0)
    half = ReweightedWakeSleep(3, sleep=asleep).differentiable_loss(
        bits.model, bits.guide, X, torch.arange(4)
    )
    expected = 0.5 * (woke + slept)
    assert torch.allclose(torch.autograd.grad(half, bits.phi)[0], expected, atol=1e-12)


class Table(nn.Module):
    """Four causes, three effects, and a guide for every effect."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.register_buffer("likelihood", torch.randn(4, 3).softmax(-1))
        self.prior = torch.tensor([0.1, 0.2, 0.3, 0.4])
        self.logits = nn.Parameter(torch.zeros(3, 4))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(self.prior))
            pyro.sample("x", dist.Categorical(self.likelihood[z]), obs=x)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Categorical(logits=self.logits[x]))


@pytest.mark.parametrize("sleep", [None, lambda dream, x: (dream["x"],)])
def test_a_discrete_guide_learns_the_posterior(sleep):
    table, x = Table(), torch.arange(3).repeat(40)
    loss = ReweightedWakeSleep(
        20, sleep=sleep, insomnia=None if sleep is None else 0.0, vectorize_particles=True
    )
    optimizer = torch.optim.Adam(table.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for _ in range(400):
        optimizer.zero_grad()
        loss.loss_and_grads(table.model, table, x)
        optimizer.step()
        schedule.step()
    joint = table.prior[:, None] * table.likelihood
    posterior = (joint / joint.sum(0)).T
    assert (table.logits.softmax(-1) - posterior).abs().max() < 0.03


def test_evaluation_does_not_dream():
    bits, dreams = Bits(), []

    def sleep(dream, x, i):
        dreams.append(dream)
        return asleep(dream, x, i)

    loss = ReweightedWakeSleep(sleep=sleep)
    loss.loss(bits.model, bits.guide, X, torch.arange(4))
    assert not dreams
    loss.differentiable_loss(bits.model, bits.guide, X, torch.arange(4))
    assert {"z", "x"} <= set(dreams[0])


def test_errors_at_the_door():
    for options in ({"insomnia": 0.5}, {"insomnia": 2.0, "sleep": asleep}, {"insomnia": -1.0}):
        with pytest.raises(ValueError, match=r"insomnia in \[0, 1\], and 1 without sleep"):
            ReweightedWakeSleep(**options)
