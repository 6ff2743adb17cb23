"""Importance sampling against closed forms, quadrature, and a loop over single traces."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, AutoNormalMessenger
from scipy.stats import norm

from pyrogen.evaluation.psis import psis
from pyrogen.inference import WeightedPosterior, importance
from pyrogen.targets import LinearGaussian

Y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SIGMA = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def eight_schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


@pytest.fixture
def problem():
    target = LinearGaussian(torch.tensor([[1.0, 0.5], [0.0, 1.0], [0.3, -0.2]]), noise=0.7)
    return target, torch.tensor([0.3, -1.2, 0.5])


def widened(posterior, factor=1.0, shift=0.0):
    def guide(*_):
        tril = factor * posterior.scale_tril
        pyro.sample("z", dist.MultivariateNormal(posterior.mean + shift, scale_tril=tril))

    return guide


def p_value(estimate, truth, error):
    return 2 * norm.sf(abs(float(estimate) - float(truth)) / float(error))


def test_exact_guide_gives_weights_without_variance(problem):
    target, x = problem
    posterior = importance(target, widened(target.posterior(x)), x, draws=500)
    assert posterior.log_weights.std() < 1e-5
    assert posterior.log_evidence == pytest.approx(target.log_evidence(x).item(), abs=1e-4)
    assert posterior.log_evidence_error < 1e-5
    assert posterior.ess == pytest.approx(500, rel=1e-3)
    assert posterior.reliable


def test_evidence_and_moments_match_the_closed_form(problem):
    target, x = problem
    exact = target.posterior(x)
    posterior = importance(target, widened(exact, 1.3, shift=0.2), x, draws=8000)
    assert p_value(
        posterior.log_evidence, target.log_evidence(x), posterior.log_evidence_error
    ) > (1e-4)
    error = exact.variance.sqrt() / math.sqrt(posterior.ess)
    for i in range(2):
        assert p_value(posterior.mean("z")[i], exact.mean[i], error[i]) > 1e-4
        assert posterior.std("z")[i] == pytest.approx(exact.variance[i].sqrt().item(), rel=0.08)
    assert posterior.reliable
    assert posterior.ess < 7900


def test_stated_error_of_the_evidence_is_its_spread(problem):
    target, x = problem
    guide = widened(target.posterior(x), 1.4)
    runs = [importance(target, guide, x, draws=300) for _ in range(200)]
    z = torch.tensor(
        [(r.log_evidence - target.log_evidence(x).item()) / r.log_evidence_error for r in runs]
    )
    assert p_value(z.mean(), 0, 1 / math.sqrt(200)) > 1e-4
    assert 0.8 < z.std() < 1.2  # +-5 % is one standard error: fails once in 10^4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_equal_those_of_single_traces(problem, dtype):
    target, x = problem
    target, x = LinearGaussian(target.weight.to(dtype), noise=0.7), x.to(dtype)
    guide = widened(target.posterior(x), 1.5)
    posterior = importance(target, guide, x, draws=7, chunk=3)
    assert posterior.log_weights.dtype == posterior.smoothed.dtype == dtype
    for i in range(7):
        z = {"z": posterior.samples["z"][i]}
        p = poutine.trace(poutine.condition(target, z)).get_trace(x).log_prob_sum()
        q = poutine.trace(poutine.condition(guide, z)).get_trace(x).log_prob_sum()
        assert posterior.log_weights[i].item() == pytest.approx((p - q).item(), abs=1e-4)


def test_plates_are_summed_for_each_draw():
    data = torch.randn(4, 3)

    def model(data):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 4, dim=-2):
            a = pyro.sample("a", dist.Normal(mu, 1.0))
            with pyro.plate("columns", 3, dim=-1), poutine.scale(scale=2.0):
                pyro.sample("x", dist.Normal(a, 1.0), obs=data)

    def guide(data):
        pyro.sample("mu", dist.Normal(0.2, 0.5))
        with pyro.plate("rows", 4, dim=-2):
            pyro.sample("a", dist.Normal(data.mean(1, keepdim=True), 0.5))

    posterior = importance(model, guide, data, draws=6)
    assert posterior.samples["a"].shape == (6, 4, 1)
    a, mu = posterior.samples["a"], posterior.samples["mu"]
    expected = (
        dist.Normal(0.0, 1.0).log_prob(mu)
        + dist.Normal(mu[:, None, None], 1.0).log_prob(a).sum((1, 2))
        + 2 * dist.Normal(a, 1.0).log_prob(data).sum((1, 2))
        - dist.Normal(0.2, 0.5).log_prob(mu)
        - dist.Normal(data.mean(1, keepdim=True), 0.5).log_prob(a).sum((1, 2))
    )
    assert torch.allclose(posterior.log_weights, expected, atol=1e-4)


def test_one_at_a_time_equals_all_at_once(problem):
    target, x = problem
    guide = widened(target.posterior(x), 1.5)
    loop = importance(target, guide, x, draws=5, chunk=1)
    assert loop.samples["z"].shape == (5, 2)
    scored = (
        target.posterior(x).log_prob(loop.samples["z"])
        + target.log_evidence(x)
        - dist.MultivariateNormal(
            target.posterior(x).mean, scale_tril=1.5 * target.posterior(x).scale_tril
        ).log_prob(loop.samples["z"])
    )
    assert torch.allclose(loop.log_weights, scored, atol=1e-4)


def test_averages_use_smoothed_weights_and_evidence_raw_ones(problem):
    target, x = problem
    posterior = importance(target, widened(target.posterior(x), 0.5), x, draws=200)
    smoothed, khat = psis(posterior.log_weights)
    weights = smoothed.softmax(0)
    raw = posterior.log_weights.softmax(0)
    z = posterior.samples["z"]
    assert not torch.allclose(weights, raw, atol=1e-3)
    assert posterior.khat == pytest.approx(float(khat))
    assert torch.allclose(posterior.mean("z"), weights @ z, atol=1e-5)
    assert posterior.ess == pytest.approx(1 / weights.square().sum().item(), rel=1e-3)
    assert posterior.log_evidence == pytest.approx(
        posterior.log_weights.double().exp().mean().log().item(), abs=1e-4
    )


def test_narrow_guide_is_called_unreliable(problem):
    target, x = problem
    posterior = importance(target, widened(target.posterior(x), 0.3, shift=1.0), x, draws=2000)
    assert posterior.khat > 0.7
    assert not posterior.reliable
    assert "Not reliable" in str(posterior)
    assert "NUTS" in str(posterior)


def test_few_draws_need_a_smaller_khat():
    def posterior(draws):
        w = torch.zeros(draws)
        return WeightedPosterior({"z": w}, w, w - math.log(draws), khat=0.6)

    assert posterior(4000).reliable
    assert not posterior(100).reliable  # 1 - 1/log10(100) = 0.5
    assert posterior(100).threshold == pytest.approx(0.5)
    assert not WeightedPosterior({}, torch.zeros(4000), torch.zeros(4000), math.nan).reliable


def eight_schools_guide(y, sigma):
    """Normal in unconstrained space, by hand."""
    pyro.sample("mu", dist.Normal(4.4, 3.5))
    pyro.sample("tau", dist.LogNormal(0.9, 1.2))
    with pyro.plate("school", 8):
        loc = torch.tensor([0.3, 0.1, -0.1, 0.05, -0.15, -0.05, 0.35, 0.1])
        pyro.sample("eta", dist.Normal(loc, 1.0))


def test_eight_schools_match_quadrature():
    posterior = importance(eight_schools, eight_schools_guide, Y, SIGMA, draws=40_000, chunk=8000)
    assert set(posterior.samples) == {"mu", "tau", "eta", "theta"}
    x = posterior.samples
    assert x["theta"].shape == (40_000, 8)
    assert torch.allclose(x["theta"], x["mu"][:, None] + x["tau"][:, None] * x["eta"])
    assert posterior.reliable
    assert posterior.log_evidence_error < 0.02
    assert p_value(posterior.log_evidence, -31.311347, posterior.log_evidence_error) > 1e-4
    for site, mean in {"mu": 4.39682, "tau": 3.59771}.items():
        error = posterior.std(site) / math.sqrt(posterior.ess)
        assert p_value(posterior.mean(site), mean, 2 * error) > 1e-4  # 2: ESS ignores f


@pytest.mark.parametrize("autoguide", [AutoNormal, AutoMultivariateNormal])
def test_autoguides_count_their_change_of_variables(autoguide):
    def model():
        tau = pyro.sample("tau", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Poisson(tau), obs=torch.tensor(2.0))

    guide = autoguide(model, init_scale=0.8)
    posterior = importance(model, guide, draws=5000)
    grid = torch.linspace(1e-3, 40, 40_000, dtype=torch.double)
    joint = (
        dist.LogNormal(0.0, 1.0).log_prob(grid)
        + dist.Poisson(grid).log_prob(torch.tensor(2.0, dtype=torch.double))
    ).exp()
    evidence = torch.trapezoid(joint, grid).log()
    assert set(posterior.samples) == {"tau"}
    assert p_value(posterior.log_evidence, evidence, posterior.log_evidence_error) > 1e-4


def test_messenger_guides_work():
    def model(x):
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = torch.tensor([0.3, -0.5, 1.0])
    guide = AutoNormalMessenger(model, init_scale=0.7)
    posterior = importance(model, guide, x, draws=4000)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum()
    assert posterior.samples["z"].shape == (4000, 3)
    assert p_value(posterior.log_evidence, exact, posterior.log_evidence_error) > 1e-4


def test_discrete_latents_work():
    def model():
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(k, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("k", dist.Bernoulli(0.5))

    posterior = importance(model, guide, draws=4000)
    joint = (
        torch.tensor([0.7, 0.3])
        * dist.Normal(torch.tensor([0.0, 1.0]), 1.0).log_prob(torch.tensor(1.0)).exp()
    )
    assert posterior.log_evidence == pytest.approx(joint.sum().log().item(), abs=0.02)
    assert posterior.mean("k").item() == pytest.approx((joint[1] / joint.sum()).item(), abs=0.04)


def test_resampling_is_systematic():
    log_weights = torch.tensor([0.1, 0.6, 0.3]).log()
    draws = torch.tensor([10.0, 20.0, 30.0])
    posterior = WeightedPosterior({"z": draws}, log_weights, log_weights, khat=0.0)
    counts = [int((posterior.resample(10)["z"] == value).sum()) for value in draws]
    assert counts == [1, 6, 3]
    for _ in range(20):
        many = posterior.resample(5)["z"]
        assert int((many == 20).sum()) == 3
        assert int((many == 10).sum()) in (0, 1)
        assert int((many == 30).sum()) in (1, 2)
    orders = {tuple(posterior.resample(6)["z"].tolist()) for _ in range(20)}
    assert len(orders) > 5
    assert len(posterior.resample()["z"]) == 3
    with pytest.raises(ValueError, match="n >= 1, got 0"):
        posterior.resample(0)


def test_impossible_draws_get_no_weight():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("positive", torch.where(z > 0, 0.0, -math.inf))

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    posterior = importance(model, guide, draws=4000)
    assert p_value(posterior.log_evidence, math.log(0.5), posterior.log_evidence_error) > 1e-4
    assert (posterior.resample(1000)["z"] > 0).all()
    assert posterior.mean("z").item() == pytest.approx((2 / math.pi) ** 0.5, abs=0.06)


def normal_model(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def normal_guide(x):
    pyro.sample("z", dist.Normal(0.0, 1.0))


ONE = torch.tensor(1.0)


def test_model_site_without_guide_site_is_refused():
    with pytest.raises(ValueError, match="model site 'z' without a guide site"):
        importance(normal_model, lambda x: None, ONE)


def test_guide_site_without_model_site_is_refused():
    def guide(x):
        normal_guide(x)
        pyro.sample("w", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="guide site 'w' without a model site"):
        importance(normal_model, guide, ONE)


def test_point_guide_is_refused():
    with pytest.raises(ValueError, match=r"is a point \(Delta\)"):
        importance(normal_model, AutoDelta(normal_model), ONE)


@pytest.mark.parametrize("options", [{"subsample_size": 2}, {"subsample": torch.tensor([0, 3])}])
def test_subsampled_plates_are_refused(options):
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 5, **options) as i:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    with pytest.raises(ValueError, match="plate 'n' shows 2 of 5"):
        importance(model, normal_guide, torch.zeros(5))


def test_nan_is_refused_by_site():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.where(z > 0, math.nan, 0.0))

    with (
        pyro.validation_enabled(False),
        pytest.raises(FloatingPointError, match="site 'f'"),
    ):
        importance(model, normal_guide, ONE)


def test_disjoint_support_is_refused():
    def model(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.tensor(-math.inf))

    with pytest.raises(ValueError, match="no draw with positive weight"):
        importance(model, normal_guide, ONE)


def test_model_that_mixes_draws_is_refused_and_runs_one_by_one():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.mean(), 1.0), obs=x)

    with pytest.raises(ValueError, match=r"model mixes draws.*chunk=1"):
        importance(model, normal_guide, ONE)
    assert importance(model, normal_guide, ONE, draws=10, chunk=1).log_weights.shape == (10,)


def test_guide_that_mixes_draws_is_refused():
    def model(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.Normal(0.0, 1.0))

    def guide(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.Normal(z.mean(), 1.0))

    with pytest.raises(ValueError, match="guide mixes draws"):
        importance(model, guide, ONE)


def test_density_that_is_an_estimate_is_not_mistaken_for_mixing():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("estimate", torch.randn_like(z))

    for _ in range(20):
        importance(model, normal_guide, ONE, draws=10)


def test_shapes_that_cannot_be_vectorized_carry_a_note():
    def model(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(torch.eye(2) @ z, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(RuntimeError) as caught:
        importance(model, guide, torch.zeros(2), draws=10)
    assert any("chunk=1" in note for note in caught.value.__notes__)
    one_by_one = importance(model, guide, torch.zeros(2), draws=10, chunk=1)
    assert one_by_one.samples["z"].shape == (10, 2)


def test_rounding_of_computed_sites_is_no_mixing():
    rotation = torch.linalg.qr(torch.randn(200, 200)).Q

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(200), 1.0).to_event(1))

    def guide():  # products of matrices round differently for one draw and for many
        noise = dist.Normal(torch.zeros(200), 1.0).to_event(1)
        a = pyro.sample("a", noise, infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(a @ rotation, event_dim=1))

    assert importance(model, guide, draws=53).log_weights.std() < 1e-3


def test_observed_point_mass_is_no_computed_site():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("constraint", dist.Delta(z).mask(torch.tensor(True)), obs=z)

    assert set(importance(model, normal_guide, ONE, draws=10).samples) == {"z"}


def test_undeclared_batch_dimensions_are_counted():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, torch.ones(5)), obs=x)  # no plate, no to_event

    x = torch.arange(5.0)
    with pyro.validation_enabled(False):
        posterior = importance(model, normal_guide, x, draws=5)
    z = posterior.samples["z"]
    expected = dist.Normal(z[:, None], 1.0).log_prob(x).sum(1)
    assert torch.allclose(posterior.log_weights, expected, atol=1e-4)


def test_unknown_site_is_refused():
    posterior = importance(normal_model, normal_guide, ONE, draws=100)
    with pytest.raises(ValueError, match=r"no site 'y'.*\['z'\]"):
        posterior.mean("y")


def test_too_few_draws_are_refused():
    with pytest.raises(ValueError, match="draws >= 2"):
        importance(normal_model, normal_guide, ONE, draws=1)


def test_summary_names_sites_and_verdict():
    text = str(importance(eight_schools, eight_schools_guide, Y, SIGMA, draws=1000))
    assert "theta[7]" in text
    wide = WeightedPosterior({"w": torch.zeros(2, 3, 4)}, torch.zeros(2), torch.zeros(2), khat=0.0)
    assert "w[2, 1]" in str(wide)
    assert "w has 2 more numbers" in str(wide)
    text = str(importance(normal_model, normal_guide, ONE, draws=1000))
    assert "z  " in text
    assert "log evidence -1." in text
    assert "Reliable: k̂" in text


def test_nothing_carries_gradient_and_the_store_stays_empty(problem):
    target, x = problem
    loc = torch.zeros(2, requires_grad=True)

    def guide(x):
        pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    posterior = importance(target, guide, x, draws=10)
    assert not posterior.log_weights.requires_grad
    assert not posterior.samples["z"].requires_grad
    assert not len(pyro.get_param_store())
