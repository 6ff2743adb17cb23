"""A flow over all latents of a model, and the eight schools' exact answers."""

import io
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import (
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from pyro.infer.reparam import NeuTraReparam
from scipy import integrate, stats
from torch import nn

from pyrogen.distributions import maf, nsf, realnvp
from pyrogen.guides import Amortized, AutoFlow
from pyrogen.objectives import ELBO, DoublyReparameterized, ImportanceWeighted
from pyrogen.targets import EightSchools, LinearGaussian

small = partial(realnvp, layers=2, hidden=(8,))


def schools():
    return EightSchools().non_centred


def fit(model, guide, *args, steps=300, lr=0.02, particles=16):
    elbo = ELBO(
        particles,
        gradient=DoublyReparameterized(),
        vectorize_particles=True,
        max_plate_nesting=1,
    )
    loss = elbo(nn.Module(), guide).elbo
    optimizer = torch.optim.Adam(guide.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss.differentiable_loss(model, guide, *args).backward()
        optimizer.step()
        schedule.step()


def test_correlated_normal_is_matched_exactly():
    target = LinearGaussian(torch.tensor([[1.0, 0.9], [0.9, 1.0]]), noise=0.5)
    x = torch.tensor([1.0, -0.5])
    guide = AutoFlow(target, partial(nsf, layers=1, hidden=(8,))).setup(x)
    fit(target, guide, x, steps=150, lr=0.05)
    loss = Trace_ELBO(500, vectorize_particles=True, max_plate_nesting=0).loss(target, guide, x)
    assert loss == pytest.approx(-target.log_evidence(x).item(), abs=0.02)
    exact = target.posterior(x)
    assert torch.allclose(guide.median(x)["z"], exact.mean, atol=0.05)
    low, high = guide.quantiles([0.1587, 0.8413], x)["z"]
    assert torch.allclose((high - low) / 2, exact.stddev, rtol=0.08)


def test_density_counts_the_constraint():
    """The guide's log-density of a draw is the flow's, with the Jacobian of the constraint."""
    guide = AutoFlow(schools(), small).setup()
    trace = poutine.trace(guide).get_trace()
    trace.compute_log_prob()
    u = trace.nodes["_AutoFlow_latent"]["value"]
    tau = trace.nodes["tau"]["value"]
    expected = guide.flow().log_prob(u) - tau.log()  # d tau / d u = tau
    assert trace.log_prob_sum().item() == pytest.approx(expected.item(), abs=1e-5)


def test_starts_at_the_given_values():
    values = {"mu": torch.tensor(3.0), "tau": torch.tensor(2.0), "effect": torch.ones(8)}
    guide = AutoFlow(
        schools(), small, init_loc_fn=init_to_value(values=values), init_scale=1e-4
    ).setup()
    draw = guide()
    for name, value in values.items():
        assert torch.allclose(draw[name], value, atol=1e-2)


def test_standardize_starts_from_draws():
    guide = AutoFlow(schools(), small).setup()
    draws = {
        "mu": 4.0 + 3.0 * torch.randn(4000),
        "tau": (1.0 + 0.5 * torch.randn(4000)).exp(),
        "effect": torch.randn(4000, 1, 8) - 2.0,
        "theta": torch.zeros(4000),
    }
    assert guide.standardize(draws) is guide
    with torch.no_grad(), pyro.plate("draws", 4000, dim=-2):
        again = guide()
    assert again["mu"].mean() == pytest.approx(4.0, abs=0.3)
    assert again["mu"].std() == pytest.approx(3.0, rel=0.1)
    assert again["tau"].log().std() == pytest.approx(0.5, rel=0.1)
    assert again["effect"].mean() == pytest.approx(-2.0, abs=0.1)


@pytest.mark.parametrize("recipe", [nsf, maf])
def test_standardize_gives_the_noise_the_correlations_of_draws(recipe):
    """An untrained flow with a linear end is the normal of the draws' mean and covariance."""
    law = dist.MultivariateNormal(
        torch.tensor([1.0, -2.0, 3.0]),
        torch.tensor([[2.0, 1.5, 0.0], [1.5, 2.0, -0.5], [0.0, -0.5, 1.0]]),
    )
    x = law.sample((5000,))
    guide = AutoFlow(lambda: pyro.sample("z", law), lambda d: recipe(d, layers=2)).setup()
    guide.standardize({"z": x})
    fitted = dist.MultivariateNormal(x.mean(0), torch.cov(x.T))
    at = x[:20]
    assert torch.allclose(guide.get_posterior().log_prob(at), fitted.log_prob(at), atol=1e-3)


def test_standardize_refuses_what_does_not_fit():
    guide = AutoFlow(schools(), small)
    with pytest.raises(RuntimeError, match=r"guide.setup\(\*args\)"):
        guide.standardize({})
    guide.setup()
    draws = {"mu": torch.randn(9), "tau": torch.rand(9) + 0.1, "effect": torch.randn(9, 8)}
    with pytest.raises(ValueError, match="expected draws of 'tau', got mu"):
        guide.standardize({"mu": torch.randn(9)})
    with pytest.raises(ValueError, match="constant"):
        guide.standardize(draws | {"mu": torch.zeros(9)})
    with pytest.raises(ValueError, match="finite"):
        guide.standardize(draws | {"tau": torch.zeros(9)})


def correlated():
    covariance = torch.tensor([[4.0, 1.9, 0.5], [1.9, 1.0, 0.1], [0.5, 0.1, 0.3]])
    return dist.MultivariateNormal(torch.tensor([3.0, -1.0, 0.0]), covariance)


def correlated_model():
    pyro.sample("z", correlated())


def fitted(kind):
    """A simpler guide, at its optimum without training."""
    guide = kind(correlated_model)
    guide()
    with torch.no_grad():
        guide.loc.copy_(correlated().mean)
        if kind is AutoMultivariateNormal:
            guide.scale = correlated().scale_tril.diagonal()
            guide.scale_tril = correlated().scale_tril / guide.scale[:, None]
    return guide


@pytest.mark.parametrize("kind", [AutoMultivariateNormal, AutoLaplaceApproximation])
def test_warm_start_from_a_normal_guide_is_that_normal(kind):
    guide = AutoFlow(correlated_model, nsf)
    assert guide.warm_start(fitted(kind), draws=20_000) is guide
    with torch.no_grad():
        z = guide.get_posterior().sample((5000,))
        difference = guide.get_posterior().log_prob(z) - correlated().log_prob(z)
    assert difference.mean().abs() < 0.01  # nats
    assert torch.allclose(torch.cov(z.T), correlated().covariance_matrix, atol=0.25)
    x = guide.get_transform()(z.new_zeros(3))
    assert torch.allclose(x, correlated().mean, atol=0.1)
    assert torch.allclose(guide.median()["z"], correlated().mean, atol=0.1)


def test_warm_start_of_a_flow_without_a_linear_end_takes_the_scales():
    guide = AutoFlow(correlated_model, small).warm_start(fitted(AutoMultivariateNormal))
    assert torch.allclose(guide.flow.scale, correlated().stddev, rtol=0.05)
    z = guide.get_posterior().sample((5000,))
    assert torch.corrcoef(z.T)[0, 1].abs() < 0.05


def test_warm_start_knows_plates_and_constraints():
    simple = AutoNormal(schools())
    simple()
    fit(schools(), simple, steps=150, lr=0.05)
    guide = AutoFlow(schools(), nsf).warm_start(simple)
    losses = [
        ELBO(2000, vectorize_particles=True, max_plate_nesting=1).loss(schools(), g)
        for g in (simple, guide)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=0.1)


def test_warm_start_survives_the_state_dict():
    guide = AutoFlow(correlated_model, nsf).warm_start(fitted(AutoMultivariateNormal))
    fresh = AutoFlow(correlated_model, nsf)
    fresh.load_state_dict(guide.state_dict())
    z = torch.randn(4, 3)
    assert torch.equal(fresh.get_posterior().log_prob(z), guide.get_posterior().log_prob(z))


def test_warm_start_refuses_what_does_not_fit():
    guide = AutoFlow(correlated_model, nsf)
    with pytest.raises(ValueError, match="constant"):
        guide.warm_start(lambda: pyro.sample("z", dist.Delta(torch.zeros(3)).to_event(1)))
    with pytest.raises(ValueError, match="draws of 'z', got w"):
        guide.warm_start(lambda: pyro.sample("w", dist.Normal(0.0, 1.0)))
    with pytest.raises(ValueError, match=r"3 latents' correlations can be told, got 3"):
        guide.warm_start(fitted(AutoMultivariateNormal), draws=3)


@pytest.mark.parametrize("recipe", [small, partial(nsf, layers=2), maf], ids=["nvp", "nsf", "maf"])
def test_state_dict_restores_a_guide_that_has_not_run(recipe):
    guide = AutoFlow(schools(), recipe, init_scale=0.3).setup()
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.1 * torch.randn_like(p))
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    fresh = AutoFlow(schools(), recipe)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    draws = []
    for g in (guide, fresh):
        g.setup()
        pyro.set_rng_seed(5)
        draws.append(g()["theta" if "theta" in g() else "effect"])
    assert torch.equal(*draws)
    assert fresh.state_dict().keys() == guide.state_dict().keys()


def test_state_dict_of_another_model_is_refused():
    two = AutoFlow(lambda: pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1)), small)
    fresh = AutoFlow(schools(), small)
    fresh.load_state_dict(two.setup().state_dict())
    with pytest.raises(ValueError, match="flow of 2 latents, and its model has 10"):
        fresh()


def test_store_stays_empty_and_two_guides_do_not_meet():
    model, guides = schools(), [AutoFlow(schools(), small).setup() for _ in range(2)]
    before = [{k: v.clone() for k, v in g.state_dict().items()} for g in guides]
    svi = SVI(model, guides[1], pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(5):
        svi.step()
    changed = [
        any(not torch.equal(v, old[k]) for k, v in g.state_dict().items())
        for g, old in zip(guides, before, strict=True)
    ]
    assert changed == [False, True]
    assert len(pyro.get_param_store()) == 0


def test_module_local_parameters_work():
    with pyro.settings.context(module_local_params=True):
        guide = AutoFlow(schools(), small)
        SVI(schools(), guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step()
        fit(schools(), guide, steps=2)


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("elbo", [ELBO, ImportanceWeighted, Trace_ELBO])
def test_gradient_reaches_every_parameter(elbo, vectorize):
    guide = AutoFlow(schools(), small).setup()
    loss = elbo(num_particles=3, vectorize_particles=vectorize, max_plate_nesting=1)
    loss.differentiable_loss(schools(), guide).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in guide.parameters())


def test_double_precision_follows_the_model():
    schools = EightSchools(dtype=torch.float64)
    guide = AutoFlow(schools.centred, small).setup()
    assert all(p.dtype == torch.float64 for p in guide.parameters())
    assert guide()["theta"].dtype == torch.float64
    assert ELBO().loss(schools.centred, guide) > 0


def test_event_shapes_and_supports():
    def model():
        pyro.sample("w", dist.Dirichlet(torch.ones(4)))
        pyro.sample("l", dist.LKJCholesky(3, 1.0))
        with pyro.plate("a", 2, dim=-2), pyro.plate("b", 3, dim=-1):
            pyro.sample("r", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoFlow(model, small).setup()
    assert guide.latent_dim == 3 + 3 + 12
    shapes = {name: tuple(value.shape) for name, value in guide().items()}
    assert shapes == {"w": (4,), "l": (3, 3), "r": (2, 3, 2)}
    assert guide.median()["w"].sum() == pytest.approx(1.0)
    quantiles = guide.quantiles([0.1, 0.5, 0.9])["r"]
    assert quantiles.shape == (3, 2, 3, 2)
    assert (quantiles.diff(dim=0) > 0).all()
    assert ELBO(2, vectorize_particles=True).loss(model, guide) > 0


def test_predictive_draws_from_it():
    guide = AutoFlow(schools(), small).setup()
    draws = Predictive(schools(), guide=guide, num_samples=20, parallel=True)()
    assert draws["effect"].shape[-1] == 8
    assert draws["tau"].shape[0] == 20


def transported(guide, target):
    neutra = NeuTraReparam(guide.requires_grad_(False))
    return neutra, poutine.reparam(target, config=lambda _: neutra)


def test_transport_map_changes_the_variables_of_a_model():
    """Log-density in the noise is that of the model at the draw, plus the log-determinant."""
    target, x = EightSchools().non_centred, torch.randn(10)
    guide = AutoFlow(target, small, init_scale=0.4).setup()
    guide()
    _, model = transported(guide, target)
    shared = "mu_shared_latent"
    run = poutine.trace(poutine.condition(model, {shared: x})).get_trace()
    u, ladj = guide.get_transform().call_and_ladj(x)
    values = {"mu": u[0], "tau": u[1].exp(), "effect": u[2:]}
    expected = poutine.trace(poutine.condition(target, values)).get_trace().log_prob_sum()
    assert run.log_prob_sum().item() == pytest.approx((expected + ladj + u[1]).item(), rel=1e-5)


@pytest.mark.slow
def test_transport_map_serves_hamiltonian_monte_carlo():
    target = LinearGaussian(torch.tensor([[1.0, 0.9], [0.9, 1.0]]), noise=0.5)
    x = torch.tensor([1.0, -0.5])
    guide = AutoFlow(target, small).setup(x)
    fit(target, guide, x, steps=100)
    guide(x)
    neutra, model = transported(guide, target)
    mcmc = MCMC(NUTS(model), num_samples=300, warmup_steps=100, disable_progbar=True)
    mcmc.run(x)
    z = neutra.transform_sample(mcmc.get_samples()["z_shared_latent"])["z"]
    exact = target.posterior(x)
    assert torch.allclose(z.mean(0), exact.mean, atol=0.25)
    assert torch.allclose(z.std(0), exact.stddev, rtol=0.25)


def hierarchical(x, size=3):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", 6, subsample_size=size) as rows:
        z = pyro.sample("z", dist.Normal(m, s))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows, 0])


def test_subsampled_plate_is_refused_and_has_a_place_beside():
    x = torch.randn(6, 1)
    with pytest.raises(
        NotImplementedError, match=r"'z' lies in plate 'data'.*3 of 6.*Use Amortized"
    ):
        AutoFlow(hierarchical, small)(x)
    assert AutoFlow(hierarchical, small)(x, 6)["z"].shape == (6,)

    guide = AutoGuideList(hierarchical)
    guide.append(AutoFlow(poutine.block(hierarchical, hide=["z"]), small))
    guide.append(Amortized(poutine.block(hierarchical, hide=["m", "s"]), nn.Linear(1, 2)))
    assert set(guide(x)) == {"m", "s", "z"}
    assert ELBO(2).loss(hierarchical, guide, x) > 0


def test_unfit_models_and_recipes_are_refused():
    def discrete():
        pyro.sample("k", dist.Bernoulli(0.5))

    def observed():
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.zeros(()))

    with pytest.raises(ValueError, match="discrete sample site 'k'"):
        AutoFlow(discrete, small)()
    with pytest.raises(RuntimeError, match="AutoFlow found no latent variables"):
        AutoFlow(observed, small)()
    with pytest.raises(TypeError, match=r"expected a recipe.*got Flow.*functools.partial"):
        AutoFlow(schools(), nsf(3))
    with pytest.raises(ValueError, match="Flow of 10 features"):
        AutoFlow(schools(), lambda features: nsf(3))()
    with pytest.raises(ValueError, match="positive init_scale"):
        AutoFlow(schools(), nsf, init_scale=-1.0)


def test_single_latent_takes_an_autoregressive_flow():
    def model():
        pyro.sample("z", dist.Gamma(3.0, 1.0))

    guide = AutoFlow(model, partial(maf, layers=1, hidden=(8,))).setup()
    fit(model, guide, steps=200, lr=0.05)
    loss = Trace_ELBO(1000, vectorize_particles=True, max_plate_nesting=0).loss(model, guide)
    assert 0 <= loss + 1e-3 < 0.05  # the best log-normal is .028 nats from Gamma(3, 1)


def test_eight_schools_evidence_and_means_agree_with_adaptive_quadrature():
    """Here mu is integrated by the trapezoidal rule and tau adaptively, over the half line."""
    target = EightSchools()
    y, s = target.y.double().numpy(), target.s.double().numpy()
    mu = np.linspace(-60, 60, 2001)
    prior = stats.norm.pdf(mu, 0, 5) * (mu[1] - mu[0]) * 1e14

    def integral(power_mu=0, power_tau=0):
        def over_mu(tau):
            likelihood = stats.norm.pdf(y[:, None], mu, np.hypot(s, tau)[:, None]).prod(0)
            value = (mu**power_mu * prior * likelihood).sum()
            return tau**power_tau * stats.halfcauchy.pdf(tau, 0, 5) * value

        return integrate.quad(over_mu, 0, np.inf, epsrel=1e-9, limit=200)[0]

    evidence = integral()
    assert np.log(evidence / 1e14) == pytest.approx(-31.311347, abs=1e-6)
    assert target.log_evidence() == pytest.approx(np.log(evidence / 1e14), abs=1e-8)
    mean = target.posterior_mean()
    assert mean["mu"] == pytest.approx(integral(power_mu=1) / evidence, rel=1e-7)
    assert mean["tau"] == pytest.approx(integral(power_tau=1) / evidence, rel=1e-7)
    assert mean["mu"] == pytest.approx(4.39682, abs=5e-6)
    assert mean["tau"] == pytest.approx(3.59771, abs=6e-6)


def test_both_schools_models_are_one_law():
    target = EightSchools()
    trace = poutine.trace(target.non_centred).get_trace()
    values = {name: trace.nodes[name]["value"] for name in ("mu", "tau", "theta", "effect")}
    log_p = [
        poutine.trace(poutine.condition(model, values)).get_trace().log_prob_sum().item()
        for model in (target.centred, target.non_centred)
    ]
    jacobian = 8 * values["tau"].log().item()
    assert log_p[0] + jacobian == pytest.approx(log_p[1], rel=1e-5)


def test_flow_finds_the_evidence_of_eight_schools():
    model = EightSchools().non_centred
    guide = AutoFlow(model, small).setup()
    fit(model, guide, steps=200)
    bound = ImportanceWeighted(20_000, vectorize_particles=True, max_plate_nesting=1)
    assert -bound.loss(model, guide) == pytest.approx(-31.31, abs=0.1)
