"""Flows as priors and guides: under NUTS, autoguides and Predictive, on every support."""

import logging

import pyro
import pyro.distributions as dist
import pytest
import torch
from flow_cases import RECIPES, SUPPORTS, awake
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

from pyrogen.distributions import maf, realnvp
from pyrogen.targets import LinearGaussian


@pytest.fixture(params=RECIPES.values(), ids=RECIPES)
def recipe(request):
    return request.param


@pytest.fixture(params=SUPPORTS.values(), ids=SUPPORTS)
def support(request):
    return request.param


@pytest.fixture
def prior_model(recipe, support):
    flow = awake(recipe(2, support=support)).requires_grad_(False)

    def model():
        z = pyro.sample("z", flow())
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    return model, flow().support


def test_flow_is_a_prior_everywhere(prior_model, caplog):
    caplog.set_level(logging.ERROR)
    model, support = prior_model
    guide = AutoNormal(model)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=0)
    SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo).step()
    for parallel in (True, False):
        draws = Predictive(model, guide=guide, num_samples=4, parallel=parallel)()
        assert draws["z"].shape[0] == 4
        draws = Predictive(model, num_samples=4, parallel=parallel)()
        assert support.check(draws["z"]).all()
    kernel = NUTS(model, max_tree_depth=2, jit_compile=False)
    mcmc = MCMC(kernel, num_samples=2, warmup_steps=2, disable_progbar=True)
    mcmc.run()
    assert support.check(mcmc.get_samples()["z"]).all()


def test_nuts_samples_an_affine_flow_prior(caplog):
    """z1 ~ N(3, 2^2) through a flow, y = 5 seen with noise 1: posterior N(4.6, 0.8)."""
    caplog.set_level(logging.ERROR)
    flow = maf(1, layers=2)
    flow.shift.fill_(3.0)
    flow.scale.fill_(2.0)
    flow.requires_grad_(False)

    def model():
        z = pyro.sample("z", flow())
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.tensor([5.0]))

    mcmc = MCMC(NUTS(model), num_samples=200, warmup_steps=50, disable_progbar=True)
    mcmc.run()
    z = mcmc.get_samples()["z"]
    assert z.mean().item() == pytest.approx(4.6, abs=0.36)  # 4 standard errors at ESS 100
    assert z.var().item() == pytest.approx(0.8, abs=0.45)


def test_flow_guide_reaches_the_evidence():
    target = LinearGaussian(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), noise=0.5)
    x = torch.tensor([1.0, -0.5])
    flow = realnvp(2, layers=2, hidden=(16,))

    def guide(x):
        pyro.module("flow", flow)
        pyro.sample("z", flow())

    elbo = Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(target, guide, pyro.optim.Adam({"lr": 0.02}), elbo)
    for _ in range(400):
        svi.step(x)
    bound = sum(-svi.evaluate_loss(x) for _ in range(20)) / 20
    assert bound == pytest.approx(target.log_evidence(x).item(), abs=0.05)


def test_flow_is_a_likelihood(recipe, caplog):
    caplog.set_level(logging.ERROR)
    flow = awake(recipe(2, 3)).requires_grad_(False)
    data = torch.randn(10, 2)

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 10):
            pyro.sample("x", flow(z), obs=data)

    trace = pyro.poutine.trace(model).get_trace()
    z = trace.nodes["z"]["value"]
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum() + flow(z).log_prob(data).sum()
    assert torch.allclose(trace.log_prob_sum(), expected, atol=1e-4)
    mcmc = MCMC(NUTS(model, max_tree_depth=2), num_samples=2, warmup_steps=2, disable_progbar=True)
    mcmc.run()
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=False)
    SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), elbo).step()
