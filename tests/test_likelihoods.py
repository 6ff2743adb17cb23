"""Likelihoods against closed forms and SciPy: densities, units, tails, gradients, draws."""

import math
from itertools import pairwise

import pytest
import torch
from pyro.infer import Trace_ELBO
from scipy import stats
from torch import nn

from pyrogen.distributions import (
    BernoulliLogits,
    CategoricalLevels,
    CorrelatedGaussian,
    DiscretizedLogistic,
    HeteroscedasticGaussian,
    HomoscedasticGaussian,
    LatentVariable,
    Likelihood,
    LogisticLevels,
)
from pyrogen.guides import Amortized
from pyrogen.nets import mlp
from pyrogen.testing import DISTRIBUTION_CHECKS, MODULE_CHECKS

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
LIKELIHOODS = {
    "bernoulli": lambda: BernoulliLogits((3,)),
    "picture of bits": lambda: BernoulliLogits((1, 2, 3)),
    "homoscedastic": lambda: HomoscedasticGaussian((3,)),
    "heteroscedastic": lambda: HeteroscedasticGaussian((1, 2, 3)),
    "full covariance": lambda: CorrelatedGaussian((3,)),
    "low rank": lambda: CorrelatedGaussian((3,), rank=2),
    "logistic": lambda: LogisticLevels((3,), 5),
    "mixture": lambda: LogisticLevels((2, 3), 5, components=3),
    "categorical": lambda: CategoricalLevels((2, 3), 5),
}


def decoded(likelihood):
    """A model whose decoder feeds the likelihood."""
    net = nn.Sequential(nn.Linear(2, likelihood.outputs.numel()))
    net.append(nn.Unflatten(-1, tuple(likelihood.outputs)))
    return LatentVariable(net, 2, event_shape=likelihood.event_shape, likelihood=likelihood)


def moved(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return module


@pytest.mark.parametrize("check", DISTRIBUTION_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", LIKELIHOODS)
@DTYPES
def test_keeps_the_contract(name, check, dtype):
    likelihood = LIKELIHOODS[name]().to(dtype)
    output = torch.randn(4, *likelihood.outputs, dtype=dtype)
    check(likelihood(output))
    check(decoded(likelihood).to(dtype)())


@pytest.mark.parametrize("check", MODULE_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_model_with_it_keeps_the_contract(name, check):
    check(moved(decoded(LIKELIHOODS[name]())))


@pytest.mark.parametrize("name", LIKELIHOODS)
@DTYPES
def test_every_parameter_and_output_gets_a_finite_gradient(name, dtype):
    likelihood = moved(LIKELIHOODS[name]()).to(dtype)
    output = torch.randn(4, *likelihood.outputs, dtype=dtype, requires_grad=True)
    p = likelihood(output)
    log_prob = p.log_prob(p.sample())
    assert log_prob.dtype == dtype
    log_prob.sum().backward()
    assert output.grad.isfinite().all()
    assert (output.grad != 0).any()
    assert all(q.grad.isfinite().all() and (q.grad != 0).any() for q in likelihood.parameters())


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_wrong_outputs_are_refused(name):
    likelihood = LIKELIHOODS[name]()
    shape = ", ".join(map(str, likelihood.outputs))
    for bad in (torch.zeros(4, *likelihood.outputs, 1), torch.zeros(likelihood.outputs[-1] + 1)):
        with pytest.raises(ValueError, match=rf"outputs of shape \(\*batch, {shape}\), got"):
            likelihood(bad)


# ------------------------------------------------------------------ discretised logistic


def levels(n, dtype=torch.float64):
    return torch.arange(n, dtype=dtype)


@pytest.mark.parametrize("loc", [-3.0, 0.0, 2.3, 4.5, 9.0])
@pytest.mark.parametrize("scale", [0.05, 0.7, 30.0])
def test_probabilities_are_differences_of_scipys_cdf(loc, scale):
    p = DiscretizedLogistic(torch.tensor(loc).double(), torch.tensor(scale).double(), 6)
    law = stats.logistic(loc, scale)
    edges = [-math.inf, 0.5, 1.5, 2.5, 3.5, 4.5, math.inf]
    probability = torch.tensor([law.cdf(b) - law.cdf(a) for a, b in pairwise(edges)])
    assert torch.allclose(p.log_prob(levels(6)).exp(), probability, atol=1e-14)
    assert torch.allclose(p.cdf(levels(6)), probability.cumsum(0), atol=1e-14)
    assert p.cdf(torch.tensor(-0.5)) == 0
    assert p.cdf(torch.tensor(2.7)) == p.cdf(torch.tensor(2.0))
    mean = (levels(6) * probability).sum()
    assert torch.allclose(p.mean, mean)
    variance = ((levels(6) - mean) ** 2 * probability).sum()
    assert torch.allclose(p.variance, variance, atol=1e-12)


@pytest.mark.parametrize("n", [2, 17, 256])
@DTYPES
def test_probabilities_sum_to_one(n, dtype):
    loc = torch.tensor([-1e4, -3.0, 0.0, n / 2, n + 2.0, 1e4], dtype=dtype)
    scale = torch.tensor([1e-3, 0.3, 5.0, 1e4], dtype=dtype)
    p = DiscretizedLogistic(loc[:, None], scale, n)
    total = p.log_prob(p.enumerate_support()).exp().sum(0)
    assert torch.allclose(total, torch.ones_like(total), atol=n * 8 * torch.finfo(dtype).eps)


@DTYPES
def test_tails_are_exact_where_differences_of_sigmoids_vanish(dtype):
    """Far below mu, log P(x) = (x + 1/2 - mu) / s + log(1 - exp(-1/s)), nearly."""
    loc, scale = torch.tensor(1e4, dtype=dtype), torch.tensor(0.5, dtype=dtype)
    log_prob = DiscretizedLogistic(loc, scale, 256).log_prob(levels(256, dtype))
    x = levels(256)
    expected = (x + 0.5 - 1e4) / 0.5 + math.log1p(-math.exp(-2.0))
    expected[0] -= math.log1p(-math.exp(-2.0))  # the lowest level has all below it
    expected[255] = 0
    assert torch.allclose(log_prob.double(), expected, rtol=1e-6)
    mirrored = DiscretizedLogistic(255 - loc, scale, 256).log_prob(255 - levels(256, dtype))
    assert torch.allclose(mirrored, log_prob, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-3, 0.5, 1e4])
@DTYPES
def test_gradients_are_finite_at_the_edges_and_right(scale, dtype):
    loc = torch.tensor([-50.0, 0.0, 2.0, 4.0, 50.0], dtype=dtype)[:, None].requires_grad_()
    width = torch.tensor(scale, dtype=dtype, requires_grad=True)
    log_prob = DiscretizedLogistic(loc, width, 5).log_prob(levels(5, dtype))
    gradients = torch.autograd.grad(log_prob.sum(), (loc, width))
    assert all(g.isfinite().all() for g in gradients)
    if dtype == torch.float64 and scale == 0.5:
        mu, s = loc.detach().clamp(-3, 7).requires_grad_(), width.detach().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda mu, s: DiscretizedLogistic(mu, s, 5).log_prob(levels(5)), (mu, s)
        )


@pytest.mark.parametrize("loc", [-1.0, 3.2, 8.0])
def test_draws_follow_the_probabilities(loc):
    p = DiscretizedLogistic(torch.tensor(loc), torch.tensor(1.3), 8)
    x = p.sample((20_000,))
    counts = torch.stack([(x == level).sum() for level in range(8)])
    assert counts.sum() == 20_000
    expected = 20_000 * p.log_prob(levels(8, torch.float32)).exp().double()
    expected *= 20_000 / expected.sum()
    assert stats.chisquare(counts, expected).pvalue > 1e-4


def test_support_enumeration_and_refusals():
    p = DiscretizedLogistic(torch.zeros(3), torch.ones(2, 1), 4)
    assert p.enumerate_support().shape == (4, 2, 3)
    assert p.enumerate_support(expand=False).shape == (4, 1, 1)
    assert p.support.is_discrete
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(torch.tensor(4.0))
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(torch.tensor(0.5))
    with pytest.raises(ValueError, match="within the support"):
        p.expand((4, 2, 3)).log_prob(torch.tensor(4.0))
    with pytest.raises(ValueError, match="scale"):
        DiscretizedLogistic(torch.zeros(()), torch.zeros(()), 4)
    with pytest.raises(ValueError, match="at least 2 levels, got 1"):
        DiscretizedLogistic(torch.zeros(()), torch.ones(()), 1)
    trusted = DiscretizedLogistic(torch.zeros(3), torch.ones(3), 4, validate_args=False)
    assert trusted.expand((2, 3)).log_prob(torch.full((3,), 9.0)).shape == (2, 3)


# ------------------------------------------------------------------ grey levels


def test_logistic_levels_are_logistics_in_the_units_of_the_data():
    x = torch.randint(0, 17, (200, 2, 3)).float()
    likelihood = LogisticLevels((2, 3), 17, floor=0.1).standardize(x)
    output = torch.randn(5, 4, 3)
    p = likelihood(output)
    mean, raw = output[:, :2], output[:, 2:]
    a, b = x.mean(0), x.std(0, correction=0)
    expected = DiscretizedLogistic(a + b * mean, b * (0.1 + nn.functional.softplus(raw)), 17)
    value = p.sample()
    assert torch.allclose(p.log_prob(value), expected.log_prob(value).sum((-1, -2)), atol=1e-4)
    assert torch.allclose(p.mean, expected.mean, atol=1e-4)


def test_a_mixture_of_logistics_is_the_sum_of_its_components():
    likelihood = LogisticLevels((2,), 5, components=2, floor=0.1)
    output = torch.randn(3, 12)
    p = likelihood(output)
    assert likelihood.outputs == (12,)
    numbers = output.reshape(3, 6, 2)
    weight = numbers[:, 4:].softmax(1)
    shift, scale = 2.0, 5 / 4
    total = torch.zeros(3, 2)
    x = torch.tensor([0.0, 3.0])
    for k, start in enumerate((-2.0, 2.0)):
        loc = shift + scale * (numbers[:, k] + start)
        width = scale * (0.1 + nn.functional.softplus(numbers[:, 2 + k]))
        total += weight[:, k] * DiscretizedLogistic(loc, width, 5).log_prob(x).exp()
    assert torch.allclose(p.log_prob(x), total.log().sum(-1), atol=1e-5)


def test_categorical_levels_start_at_the_frequencies():
    x = torch.tensor([[0.0, 2.0], [0.0, 1.0], [1.0, 2.0]])
    likelihood = CategoricalLevels((2,), 3).standardize(x)
    p = likelihood(torch.zeros(6)).base_dist.probs
    assert torch.allclose(p, torch.tensor([[3 / 6, 2 / 6, 1 / 6], [1 / 6, 2 / 6, 3 / 6]]))
    raised = likelihood(torch.tensor([0.0, 0.0, 0.0, 1.0, 0.0, 0.0])).base_dist.probs
    assert torch.equal(raised[0], p[0])  # the fourth output is of level 1, feature 1
    assert torch.allclose((raised[1] / p[1]).log().diff(), torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_mean_and_variance_are_those_of_the_draws(name):
    """Within 5 standard errors, for at most 12 numbers: fails once in 10^5 by chance."""
    likelihood = moved(LIKELIHOODS[name]())
    p = likelihood(torch.randn(likelihood.outputs))
    x = p.sample((10_000,))
    assert ((x.mean(0) - p.mean).abs() < 5 * x.std(0) / 100 + 1e-6).all()
    kurtosis = (x - p.mean).pow(4).mean(0) - p.variance.square()
    assert ((x.var(0) - p.variance).abs() < 5 * kurtosis.clamp(min=0).sqrt() / 100 + 1e-4).all()


def test_constant_pixels_are_learned_too():
    x = torch.zeros(50, 2)
    x[:, 1] = torch.randint(0, 17, (50,)).float()
    likelihood = LogisticLevels((2,), 17).standardize(x)
    assert likelihood.scale[0] == 0.5
    certain = likelihood(torch.tensor([-50.0, 0.0, -50.0, 0.0])).base_dist.log_prob(x[0])
    assert certain[0] > -1e-6


@pytest.mark.parametrize("make", [LogisticLevels, CategoricalLevels])
def test_bad_levels_are_refused(make):
    with pytest.raises(ValueError, match="at least one dimension"):
        make((), 5)
    with pytest.raises(ValueError, match="at least 2 levels, got 1"):
        make((3,), 1)
    for bad in (torch.full((4, 3), 0.5), torch.full((4, 3), 5.0), torch.full((4, 3), -1.0)):
        with pytest.raises(ValueError, match="whole numbers from 0 to 4, got"):
            make((3,), 5).standardize(bad)
    with pytest.raises(ValueError, match="finite"):
        make((3,), 5).standardize(torch.full((4, 3), torch.nan))
    with pytest.raises(TypeError, match="floating-point"):
        make((3,), 5).standardize(torch.zeros(4, 3).long())


def test_bad_mixtures_are_refused():
    with pytest.raises(ValueError, match="components >= 1 and floor > 0, got 0"):
        LogisticLevels((3,), 5, components=0)
    with pytest.raises(ValueError, match="components >= 1 and floor > 0, got 1 and 0"):
        LogisticLevels((3,), 5, floor=0)


# ------------------------------------------------------------------ Bernoulli and Gaussians


def test_bernoulli_starts_at_the_means():
    x = torch.rand(1000, 2) * torch.tensor([0.5, 0.0])
    likelihood = BernoulliLogits((2,)).standardize(x)
    p = likelihood(torch.zeros(3, 2))
    assert torch.allclose(p.mean, torch.tensor([x[:, 0].mean(), 1e-3]).expand(3, 2))
    output = torch.randn(3, 2)
    value = torch.tensor([1.0, 0.0])
    chance = torch.sigmoid(output + likelihood.shift)
    expected = chance[:, 0].log() + (1 - chance[:, 1]).log()
    assert torch.allclose(likelihood(output).log_prob(value), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"data in \[0, 1\], got 0 to 2"):
        likelihood.standardize(torch.tensor([[0.0, 2.0]]))


@pytest.mark.parametrize("rank", [None, 1, 2])
@DTYPES
def test_correlated_gaussian_is_scipys(rank, dtype):
    x = (torch.randn(500, 3) @ torch.randn(3, 3) * torch.tensor([1.0, 5.0, 0.1]) + 2).to(dtype)
    likelihood = moved(CorrelatedGaussian((3,), rank=rank)).to(dtype).standardize(x)
    output = torch.randn(4, 3, dtype=dtype)
    p = likelihood(output)
    b = x.std(0)
    s = 1e-3 + nn.functional.softplus(likelihood.raw)
    if rank is None:
        root = likelihood.factor.tril(-1) + s.diag()
        sigma = root @ root.T
    else:
        sigma = likelihood.factor @ likelihood.factor.T + s.square().diag()
    sigma = (b[:, None] * sigma * b).detach().double()
    mean = (x.mean(0) + b * output).detach().double()
    value = p.sample()
    expected = [
        stats.multivariate_normal(m, sigma).logpdf(v) for m, v in zip(mean, value, strict=True)
    ]
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9
    assert torch.allclose(p.log_prob(value).double(), torch.tensor(expected), atol=tolerance)
    assert (sigma[0, 1] / (sigma[0, 0] * sigma[1, 1]).sqrt()).abs() > 0.01
    draws = p.sample((4000,))[:, 0].double() - mean[0]
    statistic = (draws @ torch.linalg.inv(sigma) * draws).sum(-1)
    assert stats.kstest(statistic, stats.chi2(3).cdf).pvalue > 1e-4


def test_correlated_gaussian_starts_uncorrelated():
    full = CorrelatedGaussian((3,), noise=0.4)(torch.zeros(3)).covariance_matrix
    assert torch.allclose(full, 0.16 * torch.eye(3))
    low = CorrelatedGaussian((3,), rank=2, noise=0.4)(torch.zeros(3)).covariance_matrix
    assert torch.allclose(low, 0.16 * torch.eye(3), atol=1e-3)


@pytest.mark.parametrize("rank", [None, 1])
def test_learned_covariance_finds_the_noises(rank):
    """A decoder that says nothing leaves the data's covariance to the likelihood."""
    root = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]])
    x = torch.randn(5000, 3) @ root.T * torch.tensor([1.0, 10.0, 0.1])
    likelihood = CorrelatedGaussian((3,), rank=rank).standardize(x)
    optimizer = torch.optim.LBFGS(
        likelihood.parameters(), max_iter=200, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = -likelihood(torch.zeros(3)).log_prob(x).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = likelihood(torch.zeros(3)).covariance_matrix.detach()
    scale = x.std(0)
    assert torch.allclose(found / scale / scale[:, None], x.T.corrcoef(), atol=0.03)


def test_bad_covariances_are_refused():
    with pytest.raises(ValueError, match=r"event_shape=\(features,\), got \(1, 3\)"):
        CorrelatedGaussian((1, 3))
    with pytest.raises(ValueError, match="rank >= 1, got 0"):
        CorrelatedGaussian((3,), rank=0)
    with pytest.raises(ValueError, match="CorrelatedGaussian expected noise > floor"):
        CorrelatedGaussian((3,), noise=1e-4)


# ------------------------------------------------------------------ in a model


@pytest.mark.parametrize(
    "name", ["bernoulli", "full covariance", "low rank", "mixture", "categorical"]
)
def test_a_model_with_it_learns(name):
    likelihood = LIKELIHOODS[name]()
    source = decoded(moved(LIKELIHOODS[name]()))
    with torch.no_grad():
        source.decoder[0].weight.mul_(3)
    x = source().sample((300,))
    model = decoded(likelihood).standardize(x)
    flat = nn.Sequential(nn.Flatten(), mlp(x[0].numel(), 4, (16,)))
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    objective = elbo(model.model, Amortized(model.model, flat))
    before = objective(x).item()
    optimizer = torch.optim.Adam(objective.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = objective(x)
        loss.backward()
        optimizer.step()
    assert loss.item() < before - 5
    assert isinstance(likelihood, Likelihood)


@pytest.mark.parametrize(("loc", "scale"), [(254.0, 0.05), (200.6, 0.05), (128.0, 3.0)])
def test_variance_does_not_cancel(loc, scale):
    single, double = (
        DiscretizedLogistic(torch.tensor(loc, dtype=t), torch.tensor(scale, dtype=t), 256)
        for t in (torch.float32, torch.float64)
    )
    assert single.variance.item() == pytest.approx(double.variance.item(), rel=1e-3)
    x = torch.arange(256).double()
    p = double.log_prob(x).exp()
    second = (p * (x - (p * x).sum()).square()).sum()
    assert double.variance.item() == pytest.approx(second.item(), rel=1e-6)


def test_supports_are_enumerated_in_the_precision_of_draws():
    law = CategoricalLevels((2,), levels=4)(torch.zeros(8))
    assert law.base_dist.enumerate_support().dtype == law.sample().dtype
