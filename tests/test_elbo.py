"""Sticking the landing: the gradient of the ELBO, without the score's noise."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import affine_autoregressive
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
    AutoNormalMessenger,
    AutoStructured,
)
from torch import nn

from pyrogen.objectives import ELBO, DoublyReparameterized
from pyrogen.targets import EightSchools, LinearGaussian


def sticking(*args, **kwargs):
    return ELBO(*args, gradient=DoublyReparameterized(), **kwargs)


@pytest.fixture
def problem():
    target = LinearGaussian(torch.tensor([[1.0, 0.5], [0.0, 1.0]]), noise=0.7)
    x = torch.tensor([0.3, -1.2])
    posterior = target.posterior(x)
    loc = posterior.mean.clone().requires_grad_()
    tril = posterior.scale_tril.clone().requires_grad_()

    def guide(x):
        pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))

    return target, guide, x, [loc, tril]


def mean_gradient(elbo, model, guide, parameters, *args):
    loss = elbo.differentiable_loss(model, guide, *args)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])


def assert_same_mean(model, guide, parameters, *args, particles=20_000, error=6.0):
    """Both estimators have one mean gradient: ``error`` standard errors, from 20 batches."""
    gradients = {}
    for elbo in (Trace_ELBO, sticking):
        pyro.set_rng_seed(1)
        one = elbo(particles // 20, vectorize_particles=True, max_plate_nesting=1)
        gradients[elbo] = torch.stack(
            [mean_gradient(one, model, guide, parameters, *args) for _ in range(20)]
        )
    plain, stl = gradients[Trace_ELBO], gradients[sticking]
    spread = ((plain.var(0) + stl.var(0)) / 20).sqrt() + 1e-6
    z = (plain.mean(0) - stl.mean(0)) / spread
    assert z.abs().max() < error, z  # t with 19+ degrees of freedom: fails once in 1e4
    return plain.var(0).sum(), stl.var(0).sum()


def test_bound_is_tight_at_the_posterior(problem):
    target, guide, x, _ = problem
    loss = sticking().loss(target, guide, x)
    assert loss == pytest.approx(-target.log_evidence(x).item(), abs=1e-5)


@pytest.mark.parametrize("vectorize", [False, True])
def test_gradient_vanishes_at_the_posterior(problem, vectorize):
    target, guide, x, phi = problem
    elbo = sticking(num_particles=4, vectorize_particles=vectorize, max_plate_nesting=0)
    assert mean_gradient(elbo, target, guide, phi, x).abs().max() < 1e-5
    assert mean_gradient(Trace_ELBO(), target, guide, phi, x).abs().max() > 1e-2


def test_gradient_has_no_spread_at_a_scalar_posterior():
    loc = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def model():
        z = pyro.sample("z", dist.Normal(loc.new_zeros(()), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=loc.new_ones(()))

    def guide():
        pyro.sample("z", dist.Normal(loc, 0.5**0.5))

    def spread(elbo):
        return torch.stack([mean_gradient(elbo, model, guide, [loc]) for _ in range(300)]).std()

    assert spread(sticking()) < 1e-12
    assert spread(Trace_ELBO()) == pytest.approx(1.4, abs=0.2)


@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_gradient_has_the_same_mean_elsewhere(problem, scale):
    target, _, x, _ = problem
    loc = torch.zeros(2, requires_grad=True)
    log_scale = torch.full((2,), scale).log().requires_grad_()

    def guide(x):
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    assert_same_mean(target, guide, [loc, log_scale], x)


def test_dependent_sites_are_held_one_by_one():
    """A guide z2 given z1: the posterior of a chain, where no site may keep its score."""
    theta = torch.tensor([0.4, 0.3, 0.5], dtype=torch.float64, requires_grad=True)
    target = LinearGaussian(torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64), noise=1.0)
    x = torch.tensor([1.0, -0.5], dtype=torch.float64)
    p = target.posterior(x)
    cov = p.covariance_matrix
    slope = cov[0, 1] / cov[0, 0]
    exact = torch.stack([p.mean[0], p.mean[1] - slope * p.mean[0], slope])
    scales = torch.stack([cov[0, 0], cov[1, 1] - slope * cov[0, 1]]).sqrt()

    def model():
        z1 = pyro.sample("z1", dist.Normal(theta.new_zeros(()), 1.0))
        z2 = pyro.sample("z2", dist.Normal(theta.new_zeros(()), 1.0))
        mean = torch.stack([z1, z2], -1) @ target.weight.T
        pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    def guide():
        z1 = pyro.sample("z1", dist.Normal(theta[0], scales[0]))
        pyro.sample("z2", dist.Normal(theta[1] + theta[2] * z1, scales[1]))

    assert_same_mean(model, guide, [theta])
    theta.data.copy_(exact)
    assert mean_gradient(sticking(), model, guide, [theta]).abs().max() < 1e-12


def schools_guide(make):
    guide = make(EightSchools().non_centred)
    guide()
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return guide


@pytest.mark.parametrize(
    "make",
    [
        AutoNormal,
        AutoMultivariateNormal,
        AutoStructured,
        lambda m: AutoNormalizingFlow(m, lambda d: affine_autoregressive(d, [16])),
    ],
    ids=["normal", "multivariate", "structured", "flow with cache"],
)
def test_autoguides_keep_their_mean_gradient(make):
    guide = schools_guide(make)
    assert_same_mean(EightSchools().non_centred, guide, list(guide.parameters()), error=7.0)


def test_variance_falls_near_the_posterior():
    torch.manual_seed(2)
    target = LinearGaussian(torch.randn(4, 3), noise=1.0)
    x = torch.randn(4)
    posterior = target.posterior(x)
    loc = (posterior.mean + 0.01).requires_grad_()
    tril = posterior.scale_tril.clone().requires_grad_()

    def guide(x):
        pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))

    plain, stl = assert_same_mean(target, guide, [loc, tril], x)
    assert stl < plain / 100


def test_parameters_of_the_store_are_held(problem):
    target, _, x, _ = problem

    def guide(x):
        loc = pyro.param("loc", target.posterior(x).mean)
        tril = pyro.param(
            "tril", target.posterior(x).scale_tril, constraint=dist.constraints.lower_cholesky
        )
        pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=tril))

    svi = SVI(target, guide, pyro.optim.SGD({"lr": 0.1}), loss=sticking())
    first = svi.step(x)
    for _ in range(5):
        svi.step(x)
    assert first == pytest.approx(-target.log_evidence(x).item(), abs=1e-5)
    assert torch.allclose(pyro.param("loc"), target.posterior(x).mean, atol=1e-4)


def test_parameters_of_modules_are_held_and_the_model_still_learns():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + self.shift, 1.0), obs=x)

    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(1, 1)  # the posterior is Normal(x / 2, 1 / 2)
            nn.init.constant_(self.encoder.weight, 0.5)
            nn.init.zeros_(self.encoder.bias)

        def forward(self, x):
            pyro.sample("z", dist.Normal(self.encoder(x[None])[0], 0.5**0.5))

    x, elbo = torch.tensor(1.3), sticking()(Model(), Guide())
    elbo(x).backward()
    assert elbo.guide.encoder.weight.grad.abs() < 1e-6
    mean = torch.stack(
        [torch.autograd.grad(elbo(x), elbo.model.shift)[0] for _ in range(1000)]
    ).mean()
    assert mean == pytest.approx(-1.3 / 2, abs=0.1)  # -d log p(x) / d shift; 4.5 standard errors


def test_subsampled_plate_is_replayed():
    loc = torch.zeros(10, requires_grad=True)
    data = torch.randn(10)

    def model(data):
        with pyro.plate("n", 10, subsample_size=3) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[i])

    def guide(data):
        with pyro.plate("n", 10, subsample_size=3) as i:
            pyro.sample("z", dist.Normal(loc[i], 0.5))

    gradient = mean_gradient(sticking(), model, guide, [loc], data)
    assert (gradient != 0).sum() == 3

    def posterior(data):
        with pyro.plate("n", 10, subsample_size=3) as i:
            pyro.sample("z", dist.Normal(data[i] / 2 + loc[i], 0.5**0.5))

    assert mean_gradient(sticking(), model, posterior, [loc], data).abs().max() < 1e-5


def test_masked_data_do_not_count():
    loc = torch.zeros(4, requires_grad=True)
    mask = torch.tensor([True, False, True, False])

    def model():
        with pyro.plate("n", 4), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(1.0, 1.0))

    def guide():
        with pyro.plate("n", 4), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(loc, 1.0))

    gradient = mean_gradient(sticking(), model, guide, [loc])
    assert torch.allclose(gradient, torch.tensor([-1.0, 0.0, -1.0, 0.0]))


def test_evaluation_runs_the_guide_once():
    runs = []

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        runs.append(0)
        model()

    SVI(model, guide, pyro.optim.SGD({"lr": 1.0}), sticking()).evaluate_loss()
    assert len(runs) == 1


def test_value_is_that_of_the_elbo(problem):
    target, guide, x, _ = problem
    losses = []
    for elbo in (Trace_ELBO(3), sticking(3)):
        pyro.set_rng_seed(0)
        losses.append(elbo.differentiable_loss(target, guide, x).item())
    assert losses[0] == losses[1]


def test_closed_form_agrees():
    """Mean gradient against the closed-form divergence of two normals; 5 standard errors."""
    loc = torch.tensor(0.7, requires_grad=True)

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        pyro.sample("z", dist.Normal(loc, 0.5))

    exact = mean_gradient(TraceMeanField_ELBO(), model, guide, [loc])
    elbo = sticking(10_000, vectorize_particles=True, max_plate_nesting=0)
    assert mean_gradient(elbo, model, guide, [loc]).item() == pytest.approx(exact.item(), abs=0.08)


def test_discrete_site_is_refused_by_name():
    def guide():
        pyro.sample("k", dist.Bernoulli(torch.tensor(0.5)))

    with pytest.raises(ValueError, match=r"'k' is Bernoulli.*Reparameterized"):
        sticking().differentiable_loss(guide, guide)

    def plated():
        with pyro.plate("n", 3):
            pyro.sample("k", dist.Bernoulli(torch.full((3, 2), 0.5)).to_event(1))

    with pytest.raises(ValueError, match="'k' is Bernoulli"):
        sticking().differentiable_loss(plated, plated)


def test_guide_that_cannot_be_repeated_is_refused():
    class Guide(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))

        def forward(self):
            pyro.sample("z", dist.Normal(self.net(torch.ones(1)), 1.0).to_event(1))

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))

    guide = Guide()
    with pytest.raises(ValueError, match=r"'net.1' is Dropout.*eval"):
        sticking().differentiable_loss(model, guide)
    sticking().differentiable_loss(model, guide.eval())

    with pytest.raises(NotImplementedError, match="AutoNormalMessenger runs only inside"):
        sticking().differentiable_loss(model, AutoNormalMessenger(model))
