"""Noise-space inference against posteriors in closed form."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
from pyro.ops.stats import effective_sample_size
from scipy.stats import norm
from torch import nn

from pyrogen.distributions import (
    Ancestral,
    Diffusion,
    ExactDenoiser,
    Generator,
    LatentVariable,
    Marginal,
    Pushforward,
    nsf,
    realnvp,
)
from pyrogen.inference import AutoNoiseReparam, NoiseReparam, importance
from pyrogen.targets import LinearGaussian

W = torch.tensor([[1.0, 0.5], [0.0, 1.0], [0.3, -0.2]])
Y = torch.tensor([0.3, -1.2, 0.5])
TARGET = LinearGaussian(W, noise=0.7)
NOISE = dist.Normal(torch.zeros(2), 1.0).to_event(1)


def linear(z):
    return z @ W.T


def observed(prior, y=Y, noise=0.7):
    def model():
        x = pyro.sample("x", prior() if isinstance(prior, nn.Module) else prior)
        pyro.sample("y", dist.Normal(x, noise).to_event(1), obs=y)

    return model


def opened(model, *names):
    return poutine.reparam(model, {name: NoiseReparam() for name in names or ("x",)})


def guide(site, law):
    return lambda *_: pyro.sample(site, law)


def posterior_noise():
    p = TARGET.posterior(Y)
    return dist.MultivariateNormal(p.mean, p.covariance_matrix)


def has_mean_and_std(draws, mean, std):
    """Two-sided tests with the effective sample size; each fails once in 10^4."""
    draws = draws.reshape(-1, mean.numel())
    size = effective_sample_size(draws[:, None], sample_dim=0, chain_dim=1).clamp(max=len(draws))
    z = (draws.mean(0) - mean) / (std / size.sqrt())
    assert (2 * norm.sf(z.abs()) > 1e-4).all(), z
    z = (draws.std(0) / std - 1) * (2 * size).sqrt() / 1.5  # 1.5: squares mix more slowly
    assert (2 * norm.sf(z.abs()) > 1e-4).all(), z


def nuts(model, *, draws=250, warmup=80):
    mcmc = MCMC(NUTS(model), num_samples=draws, warmup_steps=warmup, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples()


def test_generator_evidence_is_exact():
    model = opened(observed(Pushforward(linear, NOISE, (3,))))
    posterior = importance(model, guide("x_noise", posterior_noise()), draws=100)
    assert set(posterior.samples) == {"x_noise", "x"}
    assert torch.allclose(posterior.samples["x"], linear(posterior.samples["x_noise"]), atol=1e-5)
    assert posterior.log_weights.std() < 1e-5
    assert posterior.log_evidence == pytest.approx(TARGET.log_evidence(Y).item(), abs=1e-4)


def test_nuts_on_a_generator_matches_the_closed_form():
    generator = Generator(nn.Linear(2, 3, bias=False), latents=2, event_shape=(3,))
    generator.net.weight.data.copy_(W)
    draws = nuts(opened(observed(generator)))
    assert set(draws) == {"x_noise"}
    x = Predictive(opened(observed(generator)), draws)()["x"].detach()
    assert x.shape == (250, 3)
    exact = TARGET.posterior(Y)
    covariance = W @ exact.covariance_matrix @ W.T
    has_mean_and_std(x, linear(exact.mean), covariance.diag().sqrt())


def test_nuts_on_a_marginal_matches_the_closed_form():
    """x = Wz + 0.5 e and y = x + 0.7 e': the posterior of x is normal."""
    prior = Marginal(NOISE, lambda z: dist.Normal(linear(z), 0.5).to_event(1))
    draws = nuts(opened(observed(prior)))
    assert set(draws) == {"x_latent", "x_noise"}
    x = Predictive(opened(observed(prior)), draws)()["x"].detach()
    k = W @ W.T + 0.25 * torch.eye(3)
    gain = k @ torch.linalg.inv(k + 0.49 * torch.eye(3))
    has_mean_and_std(x, gain @ Y, (k - gain @ k).diag().sqrt())


def test_marginal_evidence_matches_the_closed_form():
    prior = Marginal(NOISE, lambda z: dist.Normal(linear(z), 0.5).to_event(1))
    model = opened(observed(prior))

    def guide():
        pyro.sample("x_latent", dist.Normal(torch.tensor([0.0, -0.5]), 0.9).to_event(1))
        pyro.sample("x_noise", dist.Normal(torch.zeros(3), 0.9).to_event(1))

    posterior = importance(model, guide, draws=20_000, chunk=20_000)
    law = dist.MultivariateNormal(torch.zeros(3), W @ W.T + (0.49 + 0.25) * torch.eye(3))
    z = (posterior.log_evidence - law.log_prob(Y).item()) / posterior.log_evidence_error
    assert 2 * norm.sf(abs(z)) > 1e-4
    assert posterior.reliable


def test_observed_marginal_becomes_an_observed_site():
    model = LatentVariable(nn.Linear(2, 3, bias=False), 2, event_shape=(3,))
    model.decoder.weight.data.copy_(W)

    def program(y):
        with pyro.plate("data", len(y)):
            pyro.sample("x", model(), obs=y)

    y = torch.randn(6, 3)
    trace = poutine.trace(opened(program)).get_trace(y)
    assert trace.observation_nodes == ["x"]
    z = trace.nodes["x_latent"]["value"]
    expected = NOISE.log_prob(z).sum() + dist.Normal(linear(z), 0.5).log_prob(y).sum()
    assert trace.log_prob_sum().item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.equal(trace.nodes["x"]["value"], y)


def test_latent_marginal_of_counts_keeps_its_likelihood():
    prior = Marginal(dist.Normal(0.0, 1.0), lambda z: dist.Poisson(z.exp()))
    trace = poutine.trace(opened(lambda: pyro.sample("x", prior))).get_trace()
    assert trace.stochastic_nodes == ["x_latent", "x"]
    assert isinstance(trace.nodes["x"]["fn"], dist.Poisson)


def test_noise_is_opened_all_the_way_down():
    flow = realnvp(2, layers=2)
    prior = Marginal(flow(), lambda z: dist.Normal(linear(z), 0.5).to_event(1))
    trace = poutine.trace(opened(observed(prior))).get_trace()
    assert trace.stochastic_nodes == ["x_latent_noise", "x_noise"]
    z = flow().from_noise(trace.nodes["x_latent_noise"]["value"])
    assert torch.allclose(trace.nodes["x_latent"]["value"], z)

    deep = Pushforward(linear, flow(), (3,))
    trace = poutine.trace(opened(observed(deep))).get_trace()
    assert trace.stochastic_nodes == ["x_noise_noise"]
    z = flow().from_noise(trace.nodes["x_noise_noise"]["value"])
    assert torch.allclose(trace.nodes["x"]["value"], linear(z))


def test_flow_has_the_same_evidence_in_either_space():
    flow = nsf(2, layers=2)
    model = observed(flow, torch.tensor([0.4, -0.6]))
    wide = dist.Normal(torch.tensor([0.3, -0.4]), 0.8).to_event(1)
    noise = importance(opened(model), guide("x_noise", wide), draws=20_000, chunk=20_000)
    data = importance(model, guide("x", wide), draws=20_000, chunk=20_000)
    error = math.hypot(noise.log_evidence_error, data.log_evidence_error)
    assert 2 * norm.sf(abs(noise.log_evidence - data.log_evidence) / error) > 1e-4
    assert noise.reliable
    assert data.reliable


def test_scale_of_normal_noise_is_made_standard():
    latent = dist.Normal(torch.tensor([1.0, -1.0]), torch.tensor([80.0, 0.1])).to_event(1)
    model = opened(observed(Pushforward(linear, latent, (3,))))
    trace = poutine.trace(model).get_trace()
    e = trace.nodes["x_noise"]
    assert torch.equal(e["fn"].base_dist.scale, torch.ones(2))
    z = torch.tensor([1.0, -1.0]) + torch.tensor([80.0, 0.1]) * e["value"]
    assert torch.allclose(trace.nodes["x"]["value"], linear(z), atol=1e-4)


def test_diffusion_posterior_matches_the_closed_form():
    """The exact denoiser of N(0, I) carries standard noise to itself."""
    diffusion = Diffusion(ExactDenoiser(lambda x, s, _: x / (1 + s[:, None] ** 2)), (2,))
    y = torch.tensor([0.5, -1.0])
    variance = 0.49 / 1.49
    law = dist.Normal(y / 1.49, variance**0.5).to_event(1)
    model = opened(observed(diffusion, y))
    posterior = importance(model, guide("x_noise", law), draws=100)
    exact = dist.Normal(0.0, 1.49**0.5).log_prob(y).sum().item()
    assert posterior.log_evidence == pytest.approx(exact, abs=1e-2)
    assert torch.allclose(posterior.samples["x"], posterior.samples["x_noise"], atol=1e-2)


def test_random_sampler_is_refused_in_its_own_words():
    denoiser = ExactDenoiser(lambda x, s, _: x / (1 + s[:, None] ** 2))
    diffusion = Diffusion(denoiser, (2,), sampler=Ancestral(4))
    with pytest.raises(NotImplementedError, match="draws fresh noise"):
        opened(observed(diffusion, torch.zeros(2)))()


def test_normal_sites_are_non_centred():
    def model():
        mu = pyro.sample("mu", dist.Normal(1.0, 2.0))
        with pyro.plate("n", 4):
            pyro.sample("x", dist.Normal(mu, 3.0))

    trace = poutine.trace(opened(model, "mu", "x")).get_trace()
    assert trace.stochastic_nodes == ["mu_noise", "n", "x_noise"]
    mu = 1 + 2 * trace.nodes["mu_noise"]["value"]
    assert torch.allclose(trace.nodes["x"]["value"], mu + 3 * trace.nodes["x_noise"]["value"])
    assert trace.nodes["x"]["value"].shape == (4,)


PRIORS = {
    "generator": lambda: Pushforward(linear, NOISE, (3,)),
    "flow": lambda: realnvp(3, layers=2)(),
    "marginal": lambda: Marginal(NOISE, lambda z: dist.Normal(linear(z), 0.5).to_event(1)),
    "conditional": lambda: Generator(nn.Linear(4, 3), 2, (3,), context=2)(torch.zeros(5, 2)),
}
WRAPPERS = {
    "plain": lambda d: d.expand((4, 5)),
    "event": lambda d: d.expand((4, 5)).to_event(1),
    "mask": lambda d: d.expand((4, 5)).mask(torch.arange(5) < 2),
    "masked event": lambda d: d.expand((4, 5)).mask(torch.arange(5) < 2).to_event(1),
    "expanded": lambda d: dist.ExpandedDistribution(d.expand((5,)), (4, 5)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("prior", PRIORS)
def test_wrappers_keep_shapes_and_densities(prior, wrapper):
    d = WRAPPERS[wrapper](PRIORS[prior]())
    kept = 2 if "mask" in wrapper else 5

    def model():
        with pyro.plate("outer", 4, dim=-len(d.batch_shape)):
            return pyro.sample("x", d)

    trace = poutine.trace(opened(model)).get_trace()
    assert trace.nodes["_RETURN"]["value"].shape == (4, 5, 3)
    assert trace.nodes["x"]["fn"].batch_shape == d.batch_shape
    assert trace.nodes["x"]["fn"].event_shape == d.event_shape
    trace.compute_log_prob()
    for name in ("x_noise", "x_latent"):
        if name in trace.stochastic_nodes:
            site = trace.nodes[name]
            assert site["log_prob"].shape == d.batch_shape
            expected = dist.Normal(0.0, 1.0).log_prob(site["value"][:, :kept]).sum()
            assert site["log_prob_sum"].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("prior", PRIORS)
def test_expansion_without_a_plate_draws_each_element(prior):
    d = dist.ExpandedDistribution(PRIORS[prior]().expand((5,)), (4, 5))
    x = opened(lambda: pyro.sample("x", d))()
    assert x.shape == (4, 5, 3)
    assert (x[0] != x[1]).all()


def test_plates_scale_the_noise_with_the_data():
    def model():
        with pyro.plate("n", 10, subsample_size=2):
            pyro.sample("x", Pushforward(linear, NOISE, (3,)))

    trace = poutine.trace(opened(model)).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["x_noise"]
    expected = 5 * NOISE.log_prob(site["value"]).sum()
    assert site["log_prob_sum"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert trace.nodes["x"]["log_prob_sum"] == 0


@pytest.mark.parametrize("prior", ["generator", "flow", "marginal"])
@pytest.mark.parametrize("autoguide", [AutoNormal, AutoMultivariateNormal])
def test_autoguides_run_without_a_warning(prior, autoguide):
    model = opened(observed(PRIORS[prior]()))
    guide = autoguide(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(svi.step())
    assert svi.step() != svi.step()
    x = Predictive(model, guide=guide, num_samples=7)()["x"]
    assert x.shape == (7, 3)


def test_initial_values_belong_to_the_noise():
    model = opened(observed(PRIORS["generator"]()))
    start = torch.tensor([0.5, 2.0])
    guide = AutoNormal(model, init_loc_fn=init_to_value(values={"x_noise": start}))
    guide()
    assert torch.allclose(guide.median()["x_noise"], start)


def test_variational_posterior_matches_the_closed_form():
    w = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # the posterior has independent parts
    target = LinearGaussian(w, noise=0.7)
    y = torch.tensor([0.5, -1.0])
    model = opened(observed(Pushforward(lambda z: z @ w.T, NOISE, (2,)), y))
    guide = AutoNormal(model, init_scale=0.5)
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), elbo)
    for _ in range(150):
        svi.step()
    posterior = importance(model, guide, draws=2000)
    assert posterior.reliable
    assert posterior.ess > 1500
    assert posterior.log_evidence == pytest.approx(target.log_evidence(y).item(), abs=0.03)


def test_strategy_opens_what_needs_it_and_nothing_else():
    @AutoNoiseReparam()
    def model():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", Pushforward(linear, NOISE, (3,)))
        pyro.sample("c", realnvp(2, layers=1)().to_event(0))
        pyro.sample("d", PRIORS["marginal"](), obs=torch.zeros(3))
        pyro.sample("e", realnvp(2, layers=1)(), obs=torch.zeros(2))

    trace = poutine.trace(model).get_trace()
    assert trace.stochastic_nodes == ["a", "b_noise", "c_noise", "d_latent"]
    assert {"d", "e"} <= set(trace.observation_nodes)
    assert trace.log_prob_sum().isfinite()


def test_observed_density_is_left_alone():
    flow = realnvp(2, layers=1)
    x = torch.zeros(2)
    trace = poutine.trace(opened(lambda: pyro.sample("x", flow(), obs=x))).get_trace()
    assert trace.stochastic_nodes == []
    assert trace.log_prob_sum() == flow().log_prob(x)


def test_condition_first_and_open_the_outcome():
    prior = PRIORS["marginal"]()
    model = poutine.condition(lambda: pyro.sample("x", prior), data={"x": Y})
    trace = poutine.trace(opened(model)).get_trace()
    assert trace.stochastic_nodes == ["x_latent"]
    assert torch.equal(trace.nodes["x"]["value"], Y)


def test_observed_generator_is_refused():
    prior = PRIORS["generator"]()
    with pytest.raises(NotImplementedError, match=r"'x' is observed, but Pushforward.*noisy copy"):
        opened(lambda: pyro.sample("x", prior, obs=Y))()


def test_strategy_refuses_an_observed_generator_at_once():
    prior = PRIORS["generator"]()
    with pytest.raises(NotImplementedError, match="noisy copy"):
        AutoNoiseReparam()(lambda: pyro.sample("x", prior, obs=Y))()


def test_site_without_noise_is_refused():
    with pytest.raises(TypeError, match="'x' is Gamma, which is no function of noise"):
        opened(lambda: pyro.sample("x", dist.Gamma(1.0, 1.0)))()


def test_without_it_the_generator_cannot_be_scored():
    with warnings.catch_warnings(), pytest.raises(NotImplementedError, match="no density"):
        poutine.trace(observed(PRIORS["generator"]())).get_trace().log_prob_sum()


def test_works_in_float64():
    w = W.double()
    noise = dist.Normal(w.new_zeros(2), 1.0).to_event(1)
    model = opened(observed(Pushforward(lambda z: z @ w.T, noise, (3,)), Y.double()))
    trace = poutine.trace(model).get_trace()
    assert trace.nodes["x_noise"]["value"].dtype == torch.float64
    assert trace.log_prob_sum().dtype == torch.float64
