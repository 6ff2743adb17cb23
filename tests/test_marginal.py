"""Latent-variable models: draws, units, shapes and refusals."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from scipy.stats import chi2, kstest, norm
from torch import nn
from torch.distributions import constraints

from pyrogen.distributions import (
    HeteroscedasticGaussian,
    HomoscedasticGaussian,
    LatentVariable,
    Marginal,
    realnvp,
)
from pyrogen.testing import DISTRIBUTION_CHECKS, MODULE_CHECKS


def linear(weight, noise):
    prior = dist.Normal(weight.new_zeros(weight.shape[1]), 1.0).to_event(1)
    return Marginal(prior, lambda z: dist.Normal(z @ weight.T, noise).to_event(1))


W = torch.tensor([[1.0, 0.5], [0.0, 2.0], [-1.0, 1.0]])


def vae(**options):
    options = {"event_shape": (3,)} | options
    width = 2 + options.get("context", 0)
    return LatentVariable(nn.Linear(width, 3), 2, **options)


LAWS = {
    "linear": lambda: linear(W, 0.5),
    "poisson": lambda: Marginal(dist.Normal(torch.zeros(4), 1.0), lambda z: dist.Poisson(z.exp())),
    "module": lambda: vae()(),
    "context": lambda: vae(context=2)(torch.randn(4, 2)),
    "heteroscedastic": lambda: LatentVariable(
        nn.Linear(2, 6), 2, event_shape=(3,), likelihood=HeteroscedasticGaussian((3,))
    )(),
    "flow prior": lambda: vae(prior=realnvp(2, layers=2))(),
    "image": lambda: LatentVariable(
        nn.Sequential(nn.Linear(2, 12), nn.Unflatten(-1, (1, 3, 4))), 2, event_shape=(1, 3, 4)
    )(),
}


@pytest.mark.parametrize("check", DISTRIBUTION_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("law", LAWS)
def test_keeps_the_contract(law, check):
    check(LAWS[law]())


@pytest.mark.parametrize("check", MODULE_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("context", [0, 2])
def test_module_keeps_the_contract(context, check):
    check(vae(context=context), *([torch.randn(4, 2)] if context else []))


@pytest.mark.parametrize("draw", ["sample", "rsample", "__call__"])
def test_draws_have_the_law_of_the_integral(draw):
    x = getattr(linear(W, 0.5), draw)((20_000,)).detach()
    covariance = W @ W.T + 0.25 * torch.eye(3)
    statistic = (x @ torch.linalg.inv(covariance) * x).sum(-1)
    assert kstest(statistic, chi2(3).cdf).pvalue > 1e-4
    for i in range(3):
        assert kstest(x[:, i] / covariance[i, i].sqrt(), norm.cdf).pvalue > 1e-4


def test_gradient_flows_only_where_both_parts_carry_it():
    loc = torch.tensor(0.3, requires_grad=True)
    smooth = Marginal(dist.Normal(loc, 1.0), lambda z: dist.Normal(z, 1.0))
    (gradient,) = torch.autograd.grad(smooth.rsample((100,)).sum(), loc)
    assert gradient == 100
    assert smooth().requires_grad
    assert not smooth.sample().requires_grad

    counts = Marginal(dist.Normal(loc, 1.0), lambda z: dist.Poisson(z.exp()))
    mixture = Marginal(dist.Categorical(torch.ones(3)), lambda k: dist.Normal(k + loc, 1.0))
    assert smooth.has_rsample
    assert not counts.has_rsample
    assert not mixture.has_rsample
    assert not counts().requires_grad
    assert counts.support is constraints.nonnegative_integer
    with pytest.raises(NotImplementedError, match=r"needs .* rsample, got Normal and Poisson"):
        counts.rsample()


def test_looking_at_the_shape_moves_no_random_stream():
    torch.manual_seed(1)
    expected = torch.randn(())
    torch.manual_seed(1)
    p = linear(W, 0.5)
    assert p.support.event_dim == 1
    assert p.has_rsample
    assert torch.randn(()) == expected


def test_batch_of_the_likelihood_gets_latents_of_its_own():
    context = torch.zeros(5, 1)
    p = Marginal(
        dist.Normal(torch.zeros(2), 1.0).to_event(1),
        lambda z: dist.Normal(z + context, 1e-6).to_event(1),
    )
    assert p.batch_shape == (5,)
    assert p.sample()[:, 0].std() > 0.1


def test_density_is_refused_with_both_ways_out():
    with pytest.raises(NotImplementedError, match=r"log_evidence.*NoiseReparam"):
        linear(W, 0.5).log_prob(torch.zeros(3))


def test_noise_is_the_prior():
    p = linear(W, 0.5)
    assert p.noise is p.prior


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_standardize_gives_data_units(dtype):
    x = torch.tensor([10.0, -5.0, 0.0], dtype=dtype) + torch.randn(1000, 3, dtype=dtype) * (
        torch.tensor([3.0, 0.1, 1.0], dtype=dtype)
    )
    module = vae().to(dtype)
    assert module.standardize(x.reshape(10, 100, 3)) is module
    z = torch.randn(7, 2, dtype=dtype)
    p = module.decode(z)
    assert torch.allclose(p.mean, x.mean(0) + x.std(0) * module.decoder(z))
    assert torch.allclose(p.stddev, 0.5 * x.std(0).expand(7, 3), rtol=1e-4)
    assert p.mean.dtype == dtype


def test_scalar_data_have_units_too():
    module = LatentVariable(
        nn.Sequential(nn.Linear(2, 1), nn.Flatten(0)), 2, event_shape=()
    ).standardize(torch.tensor([1.0, 3.0]))
    assert module.likelihood.shift == 2
    assert module().sample((5,)).shape == (5,)


def test_heteroscedastic_noise_comes_from_the_decoder():
    likelihood = HeteroscedasticGaussian((1, 2), floor=0.1)
    output = torch.tensor([[[1.0, 2.0], [0.0, -100.0]]])
    p = likelihood(output)
    assert p.event_shape == (1, 2)
    assert torch.allclose(p.mean, torch.tensor([[[1.0, 2.0]]]))
    assert torch.allclose(p.stddev, torch.tensor([[[0.1 + math.log(2), 0.1]]]))


def test_model_is_the_joint_density():
    module = vae(context=1)
    x, context = torch.randn(6, 3), torch.randn(6, 1)
    trace = poutine.trace(module.model).get_trace(x, context)
    z = trace.nodes["z"]["value"]
    assert z.shape == (6, 2)
    mean = module.decoder(torch.cat([z, context], -1))
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum() + dist.Normal(mean, 0.5).log_prob(x).sum()
    assert trace.log_prob_sum().item() == pytest.approx(expected.item(), rel=1e-5)


def test_objective_finds_the_parameters_and_the_store_stays_empty():
    module = vae()
    encoder = nn.Linear(3, 2)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 0.5).to_event(1))

    guide.__dict__["encoder"] = encoder
    objective = Trace_ELBO()(module.model, guide)
    assert {id(p) for p in module.parameters()} <= {id(p) for p in objective.parameters()}
    objective(torch.randn(4, 3)).backward()
    assert all(p.grad is not None for p in module.parameters())
    assert not len(pyro.get_param_store())
    assert not any("latent_variable" in name for name in module.state_dict())


def test_bound_is_exact_with_the_posterior_of_a_linear_decoder():
    module = vae().standardize(linear(W, 0.5).sample((100,)) + 3)
    nn.init.normal_(module.likelihood.raw)
    x = linear(W, 0.5).sample((50,)) + 3
    a, b = module.likelihood.shift, module.likelihood.scale
    w, s = b[:, None] * module.decoder.weight, module.decode(torch.zeros(2)).stddev
    mean = a + b * module.decoder.bias

    def guide(x):
        scaled = w / s.square()[:, None]
        precision = torch.eye(2) + w.T @ scaled
        loc = torch.linalg.solve(precision, ((x - mean) @ scaled).T).T
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, precision_matrix=precision))

    loss = Trace_ELBO()(module.model, guide)(x)
    marginal = dist.MultivariateNormal(mean, w @ w.T + s.square().diag())
    assert loss.item() == pytest.approx(-marginal.log_prob(x).sum().item(), rel=1e-4)


def test_context_reaches_the_decoder():
    module = vae(context=2)
    with pytest.raises(ValueError, match="context=2, got 0"):
        module()
    with pytest.raises(ValueError, match="context=2, got 0"):
        module.decode(torch.zeros(5, 2))
    with pytest.raises(ValueError, match="context=0, got 1"):
        vae()(torch.zeros(5, 1))
    p = module(torch.randn(5, 2)).expand((4, 5))
    assert p.sample((3,)).shape == (3, 4, 5, 3)


def test_misfit_is_refused():
    for width in (1, 4):  # one would broadcast
        with pytest.raises(ValueError, match=rf"\(\*batch, 3\), got \({width},\)"):
            LatentVariable(nn.Linear(2, width), 2, event_shape=(3,))().sample()
    with pytest.raises(ValueError, match=r"event shape \(3,\), got \(\)"):
        vae(likelihood=lambda x: dist.Bernoulli(logits=x))().sample()
    bernoulli = vae(likelihood=lambda x: dist.Bernoulli(logits=x).to_event(1))
    assert not bernoulli().has_rsample
    with pytest.raises(TypeError, match=r"expected a Likelihood such as Homo.*got function"):
        bernoulli.standardize(torch.randn(5, 3))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(1, 3), "at least 2 data"),
        (torch.randn(5, 4), r"shape \(\*batch, 3\)"),
        (torch.full((5, 3), torch.nan), "finite"),
        (torch.ones(5, 3), "features that vary"),
        (torch.randn(5, 3).double(), "float32"),
    ],
)
def test_bad_data_are_refused(x, message):
    with pytest.raises(ValueError, match=message):
        vae().standardize(x)


def test_model_refuses_bad_data():
    with pytest.raises(ValueError, match="finite"):
        vae().model(torch.full((5, 3), torch.nan))
    with pytest.raises(TypeError, match="floating-point"):
        vae().model(torch.zeros(5, 3, dtype=torch.long))


def test_bad_noise_is_refused():
    with pytest.raises(ValueError, match="floor > 0, got 0"):
        HomoscedasticGaussian((2,), floor=0)
    with pytest.raises(ValueError, match="noise > floor"):
        HomoscedasticGaussian((2,), noise=1e-4)
    with pytest.raises(ValueError, match="at least one dimension"):
        HeteroscedasticGaussian(())


def test_every_context_has_a_latent_of_its_own():
    class Deaf(nn.Module):
        def forward(self, context):
            return dist.Normal(torch.zeros(2), 1.0).to_event(1)

    model = LatentVariable(
        nn.Linear(3, 2, bias=False), 2, event_shape=(2,), context=1, prior=Deaf()
    )
    law = model(torch.zeros(5, 1))
    assert law.batch_shape == (5,)
    z = law.prior.sample()
    assert z.shape == (5, 2)
    assert len(z.unique(dim=0)) == 5
    assert law.sample((7,)).shape == (7, 5, 2)


def test_large_noise_stays_finite():
    likelihood = HomoscedasticGaussian((2,), noise=200.0)
    assert torch.allclose(likelihood(torch.zeros(2)).stddev, torch.tensor(200.0))
