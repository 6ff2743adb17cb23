"""Bounds on the density of data against densities in closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from scipy.stats import norm
from torch import nn

from pyrogen.distributions import LatentVariable, Marginal
from pyrogen.evaluation import (
    Evidence,
    Kind,
    bits_per_dim,
    log_evidence,
    monte_carlo_evidence,
)
from pyrogen.guides import Amortized
from pyrogen.targets import LinearGaussian

TARGET = LinearGaussian(torch.tensor([[1.0, 0.5], [0.0, 1.0], [0.3, -0.2]]), noise=0.7)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        mean = z @ TARGET.weight.T.to(x)
        pyro.sample("x", dist.Normal(mean, 0.7).to_event(1), obs=x)


def guide(x, factor=1.5):
    q = TARGET.posterior(torch.zeros(3))
    precision = q.precision_matrix.to(x)
    loc = torch.linalg.solve(precision, (x @ TARGET.weight.to(x) / 0.7**2).T).T
    with pyro.plate("data", len(x)):
        tril = factor * torch.linalg.cholesky(torch.linalg.inv(precision))
        pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))


def exact(x):
    return LinearGaussian(TARGET.weight.to(x), 0.7).log_evidence(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_exact_guide_gives_the_density_of_each_datum(dtype, batch_size):
    x = torch.randn(20, 3, dtype=dtype)
    bound = log_evidence(model, lambda x: guide(x, 1.0), x, particles=3, batch_size=batch_size)
    assert bound.log_prob.dtype == dtype
    assert torch.allclose(bound.log_prob, exact(x), atol=1e-4)
    assert bound.kind is Kind.LOWER_BOUND
    assert bound.value == pytest.approx(exact(x).mean().item(), abs=1e-4)
    assert bound.error == pytest.approx(exact(x).std().item() / math.sqrt(20), abs=1e-4)


def test_bound_grows_with_particles_and_stays_below():
    x = torch.randn(500, 3)
    truth = exact(x)
    gaps = []
    for particles in (1, 4, 16, 256):
        gap = truth - log_evidence(model, guide, x, particles=particles).log_prob
        gaps.append(gap.mean().item())
        z = gap.mean() / (gap.std() / math.sqrt(500))
        assert norm.sf(-z.item()) > 1e-4  # below on average
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3]
    assert gaps[3] < 0.01


def test_gap_of_one_particle_is_the_divergence():
    x = torch.randn(2000, 3)
    gap = exact(x) - log_evidence(model, guide, x, particles=1).log_prob
    posterior = TARGET.posterior(x[0])
    wide = dist.MultivariateNormal(posterior.mean, scale_tril=1.5 * posterior.scale_tril)
    expected = torch.distributions.kl_divergence(wide, posterior)
    z = (gap.mean() - expected) / (gap.std() / math.sqrt(2000))
    assert 2 * norm.sf(abs(z.item())) > 1e-4


def test_average_of_weights_is_unbiased_for_each_datum():
    x = torch.tensor([[0.5, -1.0, 0.2], [2.0, 1.0, 0.0]])
    bound = log_evidence(model, guide, x.repeat(2000, 1), particles=5, batch_size=4000)
    weights = bound.log_prob.exp().reshape(2000, 2)
    z = (weights.mean(0) - exact(x).exp()) / (weights.std(0) / math.sqrt(2000))
    assert (2 * norm.sf(z.abs()) > 1e-4).all()


def test_other_plates_are_summed_within_a_datum():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("features", 4, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2):
            mean = x.sum(-1, keepdim=True) / 5
            pyro.sample("z", dist.Normal(mean, (1 / 5) ** 0.5))

    x = torch.randn(6, 4)
    truth = dist.MultivariateNormal(torch.zeros(4), torch.eye(4) + 1).log_prob(x)
    bound = log_evidence(model, guide, x, particles=2, batch_size=4)
    assert torch.allclose(bound.log_prob, truth, atol=1e-4)


def test_context_is_cut_with_the_data():
    module = LatentVariable(nn.Linear(3, 2), 2, event_shape=(2,), context=1)
    x, context = torch.randn(10, 2), torch.randn(10, 1)

    def guide(x, context):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    w, b = module.decoder.weight, module.decoder.bias
    mean = context @ w[:, 2:].T + b
    law = dist.MultivariateNormal(mean, w[:, :2] @ w[:, :2].T + 0.25 * torch.eye(2))
    bound = log_evidence(module.model, guide, x, context, particles=4000, batch_size=3)
    assert not bound.log_prob.requires_grad
    assert torch.allclose(bound.log_prob, law.log_prob(x), atol=0.2)


def test_monte_carlo_matches_the_closed_form_and_is_looser():
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    p = Marginal(prior, lambda z: dist.Normal(z @ TARGET.weight.T, 0.7).to_event(1))
    x = torch.randn(50, 3)
    naive = monte_carlo_evidence(p, x, particles=20_000, batch_size=20)
    assert naive.kind is Kind.LOWER_BOUND
    assert torch.allclose(naive.log_prob, exact(x), atol=0.2)
    few = monte_carlo_evidence(p, x, particles=10)
    assert few.value < log_evidence(model, guide, x, particles=10).value


def test_counts_are_data_too():
    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(2.0 + x, 2.0))

    x = torch.tensor([0, 1, 5])
    truth = dist.GammaPoisson(2.0, 1.0).log_prob(x)
    assert torch.allclose(log_evidence(model, guide, x, particles=2).log_prob, truth, atol=1e-4)


def test_result_reads_as_what_it_is():
    log_prob = torch.tensor([-1.0, -2.0, -3.0])
    assert str(Evidence(log_prob, Kind.EXACT)).startswith("log p(x) = -2.000 ± 0.577 nats")
    assert ">= -2.000" in str(Evidence(log_prob, Kind.LOWER_BOUND))
    assert "~ -2.000" in str(Evidence(log_prob, Kind.ODE))
    assert math.isnan(Evidence(log_prob[:1], Kind.EXACT).error)
    with pytest.raises(ValueError, match=r"shape \(data,\), got \(\)"):
        Evidence(log_prob.sum(), Kind.EXACT)


def test_bits_do_not_depend_on_the_units():
    x = dist.Beta(2.0, 3.0).sample((1000, 12))
    unit = dist.Beta(2.0, 3.0).log_prob(x).sum(-1).mean().item()
    levels = unit - 12 * math.log(256)  # the same density for pixels in 0..255
    symmetric = unit - 12 * math.log(2)  # and in -1..1
    bits = bits_per_dim(unit, 12, cell=1 / 256)
    assert bits == pytest.approx(bits_per_dim(levels, 12))
    assert bits == pytest.approx(bits_per_dim(symmetric, 12, cell=2 / 256))
    for dims, cell in [(0, 1.0), (3, 0.0)]:
        with pytest.raises(ValueError, match="dims >= 1 and cell > 0"):
            bits_per_dim(0.0, dims, cell=cell)


@pytest.mark.slow
def test_autoencoder_reaches_the_density_of_linear_data():
    law = dist.MultivariateNormal(
        torch.zeros(3), TARGET.weight @ TARGET.weight.T + 0.49 * torch.eye(3)
    )
    x, held_out = law.sample((4000,)), law.sample((1000,))
    vae = LatentVariable(nn.Linear(2, 3), 2, event_shape=(3,)).standardize(x)
    guide = Amortized(vae.model, nn.Linear(3, 4)).setup(x)
    objective = Trace_ELBO()(vae.model, guide)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    for _ in range(600):
        optimizer.zero_grad()
        (objective(x[torch.randint(4000, (256,))]) / 256).backward()
        optimizer.step()
    truth = law.log_prob(held_out)
    gap = truth - log_evidence(vae.model, guide, held_out, particles=64).log_prob
    assert gap.mean() > -4 * gap.std() / math.sqrt(1000)
    assert gap.mean() < 0.05
    naive = monte_carlo_evidence(vae(), held_out, particles=5000)
    assert abs(naive.value - truth.mean()) < 0.1


def test_site_outside_the_plate_is_refused():
    def shared(x):
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, s).expand((3,)).to_event(1), obs=x)

    def shared_guide(x):
        pyro.sample("s", dist.LogNormal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"site 's' outside a plate over the 5 data"):
        log_evidence(shared, shared_guide, torch.randn(5, 3))


def test_guide_in_another_plate_is_refused():
    def other(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match="outside a plate"):
        log_evidence(model, other, torch.randn(5, 3))


def test_subsampling_is_refused():
    def part(x):
        with pyro.plate("data", len(x), subsample_size=2) as i:
            pyro.sample("x", dist.Normal(0.0, 1.0).expand((3,)).to_event(1), obs=x[i])

    with pytest.raises(ValueError, match="plate 'data' shows 2 of 5"):
        log_evidence(part, lambda x: None, torch.randn(5, 3))


def test_unmatched_sites_are_refused():
    with pytest.raises(ValueError, match="model site 'z' without a guide site"):
        log_evidence(model, lambda x: None, torch.randn(5, 3))


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="got none"):
        log_evidence(model, guide)
    with pytest.raises(ValueError, match="5 data each"):
        log_evidence(model, guide, torch.randn(5, 3), torch.randn(4, 1))
    with pytest.raises(ValueError, match="at least 1 data"):
        log_evidence(model, guide, torch.randn(0, 3))
    with pytest.raises(ValueError, match="finite"):
        log_evidence(model, guide, torch.full((5, 3), math.nan))
    with pytest.raises(ValueError, match="particles >= 1"):
        log_evidence(model, guide, torch.randn(5, 3), particles=0)
    with pytest.raises(ValueError, match="no sites"):
        log_evidence(lambda x: None, lambda x: None, torch.randn(5, 3))
    p = Marginal(dist.Normal(torch.zeros(2), 1.0), lambda z: dist.Normal(z, 1.0))
    with pytest.raises(ValueError, match=r"one distribution, got a batch \(2,\)"):
        monte_carlo_evidence(p, torch.zeros(5))


def test_datum_without_a_bound_is_refused():
    def impossible(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("f", torch.where(x > 0, -math.inf, 0.0) + 0 * z)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(FloatingPointError, match="no finite bound for 2 of 3 data"):
        log_evidence(impossible, guide, torch.tensor([-1.0, 1.0, 2.0]))


def test_two_plates_of_one_size_are_refused():
    def model(x):
        with pyro.plate("features", 4, dim=-2), pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("features", 4, dim=-2), pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.T / 2, 0.5**0.5))

    x = torch.randn(8, 4)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum(1)
    assert torch.allclose(log_evidence(model, guide, x, particles=2).log_prob, exact, atol=1e-4)
    with pytest.raises(ValueError, match=r"two plates of 4 .*another batch_size"):
        log_evidence(model, guide, x, particles=2, batch_size=4)
