"""Straight-through draws: hard values, soft gradients, and a bias that is what it should be."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormalMessenger
from scipy import stats
from torch.nn import functional as F

from pyrogen.objectives import (
    ELBO,
    ChiSquared,
    ImportanceWeighted,
    Renyi,
    Reparameterized,
    StraightThrough,
    Tempered,
    Thermodynamic,
)
from pyrogen.objectives.elbo.relaxed import Draws, continued, relaxation_of

MIDPOINTS = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
LOGISTIC = MIDPOINTS.logit()  # quantiles: a mean over them is an integral over the noise


def gradients(bound, model, guide, logits, *args):
    """One independent gradient a row of ``logits``, whose rows are cells of a plate."""
    loss = bound.differentiable_loss(model, guide, *args)
    return torch.autograd.grad(loss, logits)[0]


def costs(cost, law):
    """A model whose log-density is minus a cost, and a guide of many copies of one law."""

    def model(logits):
        with pyro.plate("copies", len(logits)):
            b = pyro.sample("b", law(logits.detach()))
            pyro.factor("cost", -cost(b))

    def guide(logits):
        with pyro.plate("copies", len(logits)):
            pyro.sample("b", law(logits))

    return model, guide


def bernoulli(logits):
    return dist.Bernoulli(logits=logits)


def one_hot(logits):
    return dist.OneHotCategorical(logits=logits)


def standard_errors(draws, exact):
    return (draws.mean(0) - exact) / (draws.std(0) / len(draws) ** 0.5)


def mean_by_quadrature(cost, logit, temperature):
    """The mean straight-through gradient of a cost, by autograd along logistic noise."""
    logit = torch.tensor(logit, dtype=torch.float64, requires_grad=True)
    z = logit + LOGISTIC
    soft = (z / temperature).sigmoid()
    b = (z > 0).double() + soft - soft.detach()
    return torch.autograd.grad(cost(b).mean(), logit)[0].item()


LAWS = {
    "Bernoulli": lambda: dist.Bernoulli(torch.tensor([0.1, 0.5, 0.97])),
    "in a larger batch": lambda: dist.Bernoulli(torch.tensor(0.3)).expand([3]),
    "independent": lambda: dist.Bernoulli(logits=torch.tensor([-1.0, 0.0, 4.0])).to_event(1),
    "masked": lambda: dist.Bernoulli(torch.full((3,), 0.2)).mask(
        torch.tensor([True, False, True])
    ),
    "one-hot": lambda: dist.OneHotCategorical(torch.tensor([0.1, 0.6, 0.3])),
    "one-hots": lambda: dist.OneHotCategorical(
        logits=torch.tensor([[0.0, 1.0, -2.0], [3.0, 0.0, 0.0]])
    ).to_event(1),
    "impossible outcome": lambda: dist.OneHotCategorical(
        logits=torch.tensor([0.0, -math.inf, 1.0])
    ),
}


@pytest.mark.parametrize("name", LAWS)
def test_values_are_hard_and_have_the_law_of_the_site(name):
    law, count = LAWS[name](), 20_000
    with Draws(0.3), pyro.plate("copies", count, dim=-2):
        b = pyro.sample("b", law)
    assert set(b.unique().tolist()) == {0.0, 1.0}
    drawn, expected = b.sum(0).flatten(), bare_mean(law).flatten()
    for k, p in zip(drawn, expected.expand(drawn.shape), strict=True):
        assert stats.binomtest(int(k), count, p.item()).pvalue > 1e-5  # fails once in 5000


def bare_mean(law):
    while isinstance(law, (dist.MaskedDistribution, dist.Independent)):
        law = law.base_dist
    return law.mean


@pytest.mark.parametrize("name", LAWS)
def test_continued_density_is_the_law_s_at_its_values_and_straight_between(name):
    law = LAWS[name]()
    same = continued(law)
    assert (same.batch_shape, same.event_shape) == (law.batch_shape, law.event_shape)
    a, b = law.sample(), law.sample()
    assert torch.allclose(same.log_prob(a), law.log_prob(a), atol=1e-6)
    middle = same.log_prob(0.3 * a + 0.7 * b)
    assert torch.allclose(middle, 0.3 * law.log_prob(a) + 0.7 * law.log_prob(b), atol=1e-5)


@pytest.mark.parametrize("name", LAWS)
def test_noise_given_the_draw_is_the_same_number(name):
    relaxation = relaxation_of(LAWS[name]().expand([1000, *LAWS[name]().batch_shape]))
    z = relaxation.noisy()
    again = relaxation.given_hard(z)
    assert torch.allclose(again, z, rtol=1e-4, atol=1e-5)


def test_noise_given_the_sign_moves_at_a_fixed_quantile():
    logits = torch.linspace(-3, 3, 999, dtype=torch.float64).requires_grad_()
    relaxation = relaxation_of(bernoulli(logits))
    z = relaxation.noisy().detach()
    (slope,) = torch.autograd.grad(relaxation.given_hard(z).sum(), logits)
    z.requires_grad_()
    below = torch.sigmoid(-logits)
    inside = torch.sigmoid(z - logits)
    quantile = torch.where(z > 0, (inside - below) / (1 - below), inside / below)
    by_logits, by_z = torch.autograd.grad(quantile.sum(), (logits, z))
    assert torch.allclose(slope, -by_logits / by_z, rtol=1e-8)


def test_noise_given_the_largest_moves_at_a_fixed_quantile():
    logits = torch.randn(999, 4, dtype=torch.float64).log_softmax(-1).requires_grad_()
    relaxation = relaxation_of(one_hot(logits))
    z = relaxation.noisy().detach()
    loss = relaxation.given_hard(z).sum()
    (slope,) = torch.autograd.grad(loss, relaxation.logits)
    top, place = z.max(-1, keepdim=True)
    z, free = z.clone().requires_grad_(), logits.detach().requires_grad_()
    quantile = torch.exp((free - top).exp() - (free - z).exp())  # Gumbel below the largest
    by_logits, by_z = torch.autograd.grad(quantile.log().sum(), (free, z))
    expected = (-by_logits / by_z).scatter(-1, place, 0.0)  # the largest: log-sum-exp, which is 0
    assert torch.allclose(slope, expected, rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.2, 0.5, 1.0, 3.0])
@pytest.mark.parametrize("logit", [0.0, 1.5])
def test_linear_cost_has_the_mean_gradient_of_the_relaxation(temperature, logit):
    logits = torch.full((50_000,), logit, requires_grad=True)
    model, guide = costs(lambda b: 3 * b, bernoulli)
    got = gradients(ELBO(gradient=StraightThrough(temperature)), model, guide, logits, logits)
    theta = torch.tensor(logit, dtype=torch.float64, requires_grad=True)
    mean_soft = ((theta + LOGISTIC) / temperature).sigmoid().mean()
    exact = 3 * torch.autograd.grad(mean_soft, theta)[0].item()
    assert abs(standard_errors(got, exact)) < 5  # fails once in 1.7e6


def test_slope_shrinks_to_two_thirds_at_temperature_one():
    exact = 0.5 * (1 - 0.5)
    assert mean_by_quadrature(lambda b: b, 0.0, 1.0) == pytest.approx(2 / 3 * exact, rel=1e-6)
    assert mean_by_quadrature(lambda b: b, 0.0, 0.01) == pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("logit", [0.0, 2.0, -2.0])
def test_curvature_pulls_inwards(logit):
    """The cost (b - t)^2 of the draws is nearly flat; its slope at them points to the middle."""
    t, temperature = 0.499, 0.5
    logits = torch.full((50_000,), logit, requires_grad=True)
    model, guide = costs(lambda b: (b - t).square(), bernoulli)
    got = gradients(ELBO(gradient=StraightThrough(temperature)), model, guide, logits, logits)
    expected = mean_by_quadrature(lambda b: (b - t).square(), logit, temperature)
    assert abs(standard_errors(got, expected)) < 5
    p = 1 / (1 + math.exp(-logit))
    bias = expected - (1 - 2 * t) * p * (1 - p)
    if logit:
        assert bias * logit > 0  # descent brings the logit back to even odds
        assert abs(bias) > 100 * (1 - 2 * t) * p * (1 - p)
    else:
        assert abs(bias) < (1 - 2 * t) * p * (1 - p)


def test_two_categories_are_a_bernoulli():
    temperature, gap = 0.7, 0.8
    logits = torch.tensor([[gap, 0.0]]).repeat(50_000, 1).requires_grad_()
    model, guide = costs(lambda b: b[..., 0].square(), one_hot)
    got = gradients(ELBO(gradient=StraightThrough(temperature)), model, guide, logits, logits)
    expected = mean_by_quadrature(lambda b: b.square(), gap, temperature)
    assert abs(standard_errors(got[:, 0], expected)) < 5
    assert abs(standard_errors(got[:, 1], -expected)) < 5


def test_categories_lose_their_bias_with_the_temperature_under_a_linear_cost():
    cost = torch.tensor([1.0, -2.0, 0.5])
    one = torch.tensor([0.3, -0.4, 0.0])
    logits = one.repeat(100_000, 1).requires_grad_()
    model, guide = costs(lambda b: b @ cost, one_hot)
    got = gradients(ELBO(gradient=StraightThrough(0.02)), model, guide, logits, logits)
    p = one.softmax(-1)
    assert standard_errors(got, p * (cost - p @ cost)).abs().max() < 5


def test_importance_weighted_bound_is_differentiated_as_a_whole():
    """Two particles, by quadrature over the noise of both."""
    temperature, prior, x = 0.5, -0.8, 1.0

    def model(logits):
        with pyro.plate("copies", len(logits)):
            b = pyro.sample("b", dist.Bernoulli(logits=torch.tensor(prior)))
            pyro.sample("x", dist.Normal(b, 1.0), obs=torch.full((len(logits),), x))

    def guide(logits):
        with pyro.plate("copies", len(logits)):
            pyro.sample("b", dist.Bernoulli(logits=logits))

    logits = torch.full((40_000,), 0.4, requires_grad=True)
    bound = ImportanceWeighted(2, gradient=StraightThrough(temperature), vectorize_particles=True)
    got = gradients(bound, model, guide, logits, logits)

    theta = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    z = theta + ((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000).logit()
    soft = (z / temperature).sigmoid()
    b = (z > 0).double() + soft - soft.detach()
    log_w = b * prior - math.log1p(math.exp(prior)) + dist.Normal(b, 1.0).log_prob(torch.tensor(x))
    log_w = log_w - (b * theta - F.softplus(theta))
    value = torch.logaddexp(log_w[:, None], log_w).mean()
    exact = -torch.autograd.grad(value, theta)[0].item()
    assert abs(standard_errors(got, exact)) < 5


def six(dtype=torch.float32):
    torch.manual_seed(0)
    w, x = torch.randn(6, 4).to(dtype), 2 * torch.randn(4).to(dtype)
    logits = torch.zeros(6, dtype=dtype, requires_grad=True)

    def model():
        prior = torch.full((6,), 0.3, dtype=dtype)
        z = pyro.sample("z", dist.Bernoulli(prior).to_event(1))
        pyro.sample("x", dist.Normal(z @ w, 1.0).to_event(1), obs=x)

    def guide():
        pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    return model, guide, logits


BOUNDS = {
    "ELBO": ELBO,
    "Tempered": lambda *a, **k: Tempered(*a, beta=0.5, **k),
    "ImportanceWeighted": ImportanceWeighted,
    "Renyi": lambda *a, **k: Renyi(*a, alpha=0.5, **k),
    "ChiSquared": ChiSquared,
    "Thermodynamic": Thermodynamic,
}


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BOUNDS)
def test_every_bound_takes_it(name, dtype, vectorize):
    model, guide, logits = six(dtype)
    bound = BOUNDS[name](3, gradient=StraightThrough(), vectorize_particles=vectorize)
    gradient = gradients(bound, model, guide, logits)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()
    assert (gradient != 0).all()


def test_one_particle_of_any_bound_is_the_elbo():
    model, guide, logits = six()
    both = []
    for bound in (ELBO, ImportanceWeighted):
        pyro.set_rng_seed(3)
        both.append(gradients(bound(1, gradient=StraightThrough()), model, guide, logits))
    assert torch.allclose(*both, atol=1e-5)


def test_continuous_sites_go_along_their_path():
    loc = torch.zeros(3, requires_grad=True)

    def model():
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(3))

    def guide():
        with pyro.plate("n", 3):
            pyro.sample("z", dist.Normal(loc, 0.5))

    both = []
    for gradient in (Reparameterized(), StraightThrough()):
        pyro.set_rng_seed(3)
        both.append(gradients(ELBO(2, gradient=gradient), model, guide, loc))
    assert torch.equal(*both)


def test_draws_may_decide_later_ones_and_plates_may_be_subsampled():
    logits = torch.zeros(10, requires_grad=True)
    slope = torch.tensor(0.5, requires_grad=True)

    def model():
        with pyro.plate("n", 10, subsample_size=4) as i, poutine.mask(mask=i < 9):
            b = pyro.sample("b", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(b, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(len(i)))

    def guide():
        with pyro.plate("n", 10, subsample_size=4) as i, poutine.mask(mask=i < 9):
            b = pyro.sample("b", dist.Bernoulli(logits=logits[i]))
            pyro.sample("z", dist.Normal(slope * b, 1.0))

    bound = ELBO(3, gradient=StraightThrough(), vectorize_particles=True)
    loss = bound.differentiable_loss(model, guide)
    a, b = torch.autograd.grad(loss, (logits, slope))
    assert 3 <= (a != 0).sum() <= 4
    assert b.isfinite()


def test_it_learns_a_factor_model():
    model, guide, _ = six()

    def stored():
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("logits", torch.zeros(6))).to_event(1))

    bound = ELBO(8, gradient=StraightThrough(0.3), vectorize_particles=True)
    before = ELBO(1000, vectorize_particles=True).loss(model, guide)
    svi = SVI(model, stored, pyro.optim.Adam({"lr": 0.1}), loss=bound)
    for _ in range(150):
        svi.step()
    assert ELBO(1000, vectorize_particles=True).loss(model, stored) < before - 3


def fixed(*laws):
    """A program that draws from these laws."""

    def program():
        for i, law in enumerate(laws):
            pyro.sample(f"k{i}", law)

    return program


def test_what_cannot_be_relaxed_is_refused():
    bound = ELBO(gradient=StraightThrough())
    k = fixed(dist.Categorical(torch.ones(3)))
    with pytest.raises(NotImplementedError, match=r"'k0' is Categorical.*OneHotCategorical"):
        bound.loss(k, k)
    k = fixed(dist.Poisson(1.0))
    with pytest.raises(NotImplementedError, match=r"'k0' is Poisson.*Reparameterized"):
        bound.loss(k, k)
    with pytest.raises(NotImplementedError, match=r"Model site 'k0' is Binomial.*Bernoulli or"):
        bound.loss(fixed(dist.Binomial(1, torch.tensor(0.5))), fixed(dist.Bernoulli(0.5)))
    normal = fixed(dist.Normal(0.0, 1.0))
    with pytest.raises(NotImplementedError, match="AutoNormalMessenger runs only inside"):
        bound.loss(normal, AutoNormalMessenger(normal))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_is_positive(temperature):
    with pytest.raises(ValueError, match="StraightThrough expected a positive temperature"):
        StraightThrough(temperature)
