"""Every bound by every gradient: expected value and expected gradient, exactly.

The draws of two particles take every outcome, each in a cell of a plate of its own and scaled by
its probability, so that one evaluation of the loss is the whole expectation.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from elbo_cases import BOUNDS, chosen, hermite, log_bernoulli, log_normal, outcomes
from pyro import poutine

from pyrogen.objectives import (
    DoublyReparameterized,
    NoBaseline,
    Reparameterized,
    ScoreFunction,
)

F64 = torch.float64
VECTORIZED = pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorized"])
GRADIENTS = {
    "path and score": Reparameterized,
    "no baseline": lambda: Reparameterized(NoBaseline()),
    "score": ScoreFunction,
    "score, no baseline": lambda: ScoreFunction(NoBaseline()),
}
PLATES = ["whole", "mask", "observations masked", "scale"]


def leaves(*values):
    return [torch.tensor(v, dtype=F64, requires_grad=True) for v in values]


def exact_match(loss, expected, parameters, tolerance):
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    actual = torch.autograd.grad(loss, parameters, allow_unused=True)
    exact = torch.autograd.grad(expected, parameters)
    for a, e in zip(actual, exact, strict=True):
        assert torch.allclose(a, e, atol=tolerance), (a, e)


class Mixed:
    """A discrete draw, then one with a path, for two of four data."""

    def __init__(self, plates, nodes=16):
        self.plates = plates
        self.x = torch.tensor([1.0, 0.5, -1.0, 0.2], dtype=F64)
        self.logit, self.loc, self.log_scale, self.theta = self.parameters = leaves(
            [0.2, -0.4, 0.1, 0.5], [0.3, 0.0, -0.2, 0.1], [-0.1, -0.15, -0.05, -0.1], 0.3
        )
        self.i = torch.tensor([1, 3]) if plates == "subsample" else torch.arange(4)
        self.mask = torch.tensor([True, False, True, True])[self.i]
        noise, weight = hermite(nodes)
        k, at = outcomes(2, torch.arange(2, dtype=F64), torch.arange(nodes, dtype=F64))
        self.k = k[..., None].expand(-1, -1, len(self.i))
        self.noise = noise[at.long()][..., None].expand_as(self.k)
        self.weight = weight[at.long()].prod(0)[:, None]

    def expectation(self, bound):
        i, k = self.i, self.k
        mean, scale = (self.loc[i] + 0.5 * k), self.log_scale[i].exp()
        z = mean + scale * self.noise
        one = torch.ones((), dtype=F64)
        log_q = log_bernoulli(self.logit[i], k) + log_normal(mean, scale, z)
        log_x = log_normal(z, 1.5 * one, self.x[i])
        if self.plates == "observations masked":
            log_x = log_x * self.mask
        log_p = log_bernoulli(self.theta, k) + log_normal(k + self.theta, one, z) + log_x
        weight = self.weight * log_bernoulli(self.logit[i], k).sum(0).exp()
        if self.plates == "mask":
            weight = weight * self.mask
        outside = {"subsample": 2.0, "scale": 0.1}.get(self.plates, 1.0)
        return outside * (weight * bound(log_p - log_q)).sum()

    def _program(self, body):
        i = self.i
        probability = log_bernoulli(self.logit.detach()[i], self.k).sum(0).exp() * self.weight
        scale = 0.1 * probability if self.plates == "scale" else probability
        mask = self.mask if self.plates == "mask" else None
        outer = pyro.plate("outcomes", len(scale), dim=-2)
        with outer, pyro.plate("data", 4, subsample=i, dim=-1) as i, poutine.scale(scale=scale):
            if mask is None:
                body(i)
            else:
                with poutine.mask(mask=mask):
                    body(i)

    def programs(self):
        coin, normal = chosen(dist.Bernoulli, self.k), chosen(dist.Normal, self.noise)

        def model(i):
            k = pyro.sample("k", dist.Bernoulli(logits=self.theta))
            z = pyro.sample("z", dist.Normal(k + self.theta, 1.0))
            law = dist.Normal(z, 1.5)
            if self.plates == "observations masked":
                law = law.mask(self.mask)
            pyro.sample("x", law, obs=self.x[i])

        def guide(i):
            k = pyro.sample("k", coin(logits=self.logit[i]))
            pyro.sample("z", normal(self.loc[i] + 0.5 * k, self.log_scale[i].exp()))

        return lambda: self._program(model), lambda: self._program(guide)


@VECTORIZED
@pytest.mark.parametrize(
    ("gradient", "plates"),
    [(name, "subsample") for name in GRADIENTS] + [("path and score", p) for p in PLATES],
)
@pytest.mark.parametrize("bound", BOUNDS)
def test_mean_is_exact_with_discrete_and_continuous_draws(bound, gradient, plates, vectorize):
    make, value, sign = BOUNDS[bound]
    problem = Mixed(plates)
    loss = make(
        2, gradient=GRADIENTS[gradient](), vectorize_particles=vectorize, max_plate_nesting=2
    )
    expected = sign * problem.expectation(value)
    actual = loss.differentiable_loss(*problem.programs())
    exact_match(actual, expected, problem.parameters, 1e-5)


class Chain:
    """Two draws with a path, one given the other, in two data with an observation a time."""

    def __init__(self, plates, nodes=10):
        self.plates = plates
        self.x = torch.tensor([[0.5, 1.0], [-0.3, 0.8]], dtype=F64)
        self.first, self.second, self.slope, self.theta, self.shift = self.parameters = leaves(
            [0.3, -0.1], [0.2, 0.1], [0.4, 0.6], 0.3, 0.2
        )
        self.i = torch.tensor([1]) if plates == "subsample" else torch.arange(2)
        noise, weight = hermite(nodes)
        at = outcomes(2, *2 * [torch.arange(nodes)])
        e = noise[at][..., None, None].expand(-1, -1, -1, len(self.i), 1)
        self.noise_1, self.noise_2 = e
        self.weight = weight[at].prod(0).prod(0)[:, None, None]

    def expectation(self, bound):
        i, one = self.i[:, None], torch.ones((), dtype=F64)
        z1 = self.first[i] + 0.8 * self.noise_1
        mean = self.second[i] + self.slope[i] * z1
        z2 = mean + 0.9 * self.noise_2
        # what a guide moves after its draws, its density with it; and a factor of its own
        stretch = 1 + 0.2 * self.shift
        log_q = log_normal(self.first[i], 0.8 * one, z1) + log_normal(mean, 0.9 * one, z2)
        if self.plates != "nested":
            z1 = stretch * z1
            log_q = log_q - stretch.log() + 0.1 * self.shift * z2.sin()
        log_p = log_normal(self.theta, one, z1) + log_normal(z1, one, z2)
        log_x = log_normal(z2, 1.5 * one, self.x[self.i]).sum(-1, keepdim=True)
        outside = 2.0 if self.plates == "subsample" else 1.0
        return outside * (self.weight * bound(log_p + log_x - log_q)).sum()

    def programs(self):
        first, second = chosen(dist.Normal, self.noise_1), chosen(dist.Normal, self.noise_2)
        outer = pyro.plate("outcomes", len(self.weight), dim=-3)
        rows = pyro.plate("rows", 2, subsample=self.i, dim=-2)

        def model():
            with outer, rows, poutine.scale(scale=self.weight):
                z1 = pyro.sample("z1", dist.Normal(self.theta, 1.0))
                z2 = pyro.sample("z2", dist.Normal(z1, 1.0))
                with pyro.plate("times", 2, dim=-1):
                    pyro.sample("x", dist.Normal(z2, 1.5), obs=self.x[self.i])

        def guide():
            i = self.i[:, None]
            with outer, rows, poutine.scale(scale=self.weight):
                if self.plates == "nested":
                    e1 = pyro.sample("z1", first(self.first[i], 0.8))
                else:
                    e1 = pyro.sample("e1", first(self.first[i], 0.8), infer={"is_auxiliary": True})
                    stretch = 1 + 0.2 * self.shift
                    pyro.sample("z1", dist.Delta(stretch * e1, -stretch.log()))
                z2 = pyro.sample("z2", second(self.second[i] + self.slope[i] * e1, 0.9))
                if self.plates != "nested":
                    pyro.factor("own", 0.1 * self.shift * z2.sin(), has_rsample=True)

        return model, guide


@VECTORIZED
@pytest.mark.parametrize(
    ("gradient", "plates"),
    [
        (Reparameterized, "transformed"),
        (ScoreFunction, "transformed"),
        (DoublyReparameterized, "transformed"),
        (DoublyReparameterized, "nested"),
        (DoublyReparameterized, "subsample"),
    ],
)
@pytest.mark.parametrize("bound", BOUNDS)
def test_mean_is_exact_along_the_path(bound, gradient, plates, vectorize):
    make, value, sign = BOUNDS[bound]
    problem = Chain(plates)
    loss = make(2, gradient=gradient(), vectorize_particles=vectorize, max_plate_nesting=3)
    parameters = problem.parameters[: 4 if plates == "nested" else 5]
    expected = sign * problem.expectation(value)
    exact_match(loss.differentiable_loss(*problem.programs()), expected, parameters, 1e-3)
