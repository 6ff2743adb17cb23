"""What ArviZ receives: shapes, names, likelihoods and predictions."""

import sys
import types
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive
from pyro.infer.autoguide import AutoMultivariateNormal
from scipy.stats import norm

from pyrogen.distributions import Marginal
from pyrogen.export import groups, to_arviz
from pyrogen.inference import NoiseReparam, WeightedPosterior, importance

Y = torch.tensor([[1.0, 0.5, -0.2], [0.3, 2.0, 1.0], [-1.0, 0.0, 0.4], [0.8, 0.1, 0.2]])
DRAWS = {"mu": torch.randn(50), "z": torch.randn(50, 4, 1)}


def model(y):
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    with pyro.plate("school", 4, dim=-2):
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.deterministic("twice", 2 * z)
        with pyro.plate("pupil", 3, dim=-1):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)
    pyro.factor("penalty", -mu.abs())


def guide(y):
    pyro.sample("mu", dist.Normal(0.3, 0.6))
    with pyro.plate("school", 4, dim=-2):
        pyro.sample("z", dist.Normal(0.8 * y.mean(1, keepdim=True), 0.6))


@pytest.fixture(scope="module")
def az():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ announces its next version when imported
        import arviz

        return arviz


def test_draws_keep_their_chains_and_order():
    plain = groups({"z": torch.arange(12.0).reshape(6, 2)}, chains=2)
    assert plain.data["posterior"]["z"].shape == (2, 3, 2)
    assert plain.data["posterior"]["z"][1, 0].tolist() == [6, 7]
    assert set(plain.data) == {"posterior"}


def test_log_likelihood_matches_each_draw():
    plain = groups(DRAWS, model, Y, chains=5)
    log_likelihood = plain.data["log_likelihood"]["y"]
    assert log_likelihood.shape == (5, 10, 4, 3)
    expected = norm.logpdf(Y.numpy() - DRAWS["z"].numpy()).reshape(5, 10, 4, 3)
    assert np.allclose(log_likelihood, expected, atol=1e-5)
    assert np.array_equal(plain.data["observed_data"]["y"], Y.numpy())
    assert set(plain.data["posterior"]) == {"mu", "z", "twice"}
    assert np.allclose(plain.data["posterior"]["twice"], 2 * plain.data["posterior"]["z"])


def test_predictions_have_the_law_of_the_model():
    z = torch.tensor([3.0, -1.0, 0.0, 10.0])[:, None].expand(4000, 4, 1)
    plain = groups({"mu": torch.zeros(4000), "z": z}, model, Y)
    new = plain.data["posterior_predictive"]["y"][0]
    assert new.shape == (4000, 4, 3)
    statistic = (new.mean((0, 2)) - z[0, :, 0].numpy()) * np.sqrt(12_000)
    assert (2 * norm.sf(abs(statistic)) > 1e-4).all()
    assert new.std(0) == pytest.approx(np.ones((4, 3)), abs=0.06)  # five standard errors
    assert not np.allclose(new[0], new[1])


def test_dimensions_are_named_after_plates():
    plain = groups(DRAWS, model, Y)
    assert plain.dims == {
        "z": ["school", None],
        "twice": ["school", None],
        "y": ["school", "pupil"],
    }


def test_events_follow_the_plates():
    def model():
        with pyro.plate("draw", 5):  # a name that ArviZ uses itself
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.deterministic("total", torch.zeros(7))

    plain = groups({"z": torch.zeros(10, 5, 2)}, model)
    assert plain.dims == {"z": ["draw_plate", None]}
    assert plain.data["posterior"]["total"].shape == (1, 10, 7)


def test_data_that_a_plate_repeats_are_repeated():
    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("a", 2, dim=-2), pyro.plate("b", 3, dim=-1):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = torch.tensor([1.0, 2.0, 3.0])
    plain = groups({"z": torch.randn(5)}, model, y)
    assert plain.dims["y"] == ["a", "b"]
    assert plain.data["observed_data"]["y"].tolist() == [[1, 2, 3], [1, 2, 3]]
    assert plain.data["log_likelihood"]["y"].shape == (1, 5, 2, 3)
    assert plain.data["posterior_predictive"]["y"].shape == (1, 5, 2, 3)


def test_weighted_posterior_is_resampled_and_keeps_its_verdict():
    posterior = importance(model, guide, Y, draws=2000)
    plain = groups(posterior, model)  # the arguments are known
    assert plain.data["posterior"]["z"].shape == (1, 2000, 4, 1)
    assert plain.attrs["khat"] == posterior.khat
    assert plain.attrs["ess"] == posterior.ess
    assert plain.attrs["log_evidence"] == posterior.log_evidence
    mean = plain.data["posterior"]["z"][0].mean(0)
    # Resampling adds less than multinomial noise: five of its standard errors.
    assert np.allclose(mean, posterior.mean("z"), atol=5 * 0.6 / 2000**0.5)
    assert not np.allclose(mean, posterior.samples["z"].mean(0), atol=5 * 0.6 / 2000**0.5)


def test_weights_decide_what_is_kept():
    log_weights = torch.tensor([0.0, -torch.inf, 0.0, -torch.inf])
    samples = {"z": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    posterior = WeightedPosterior(samples, log_weights, log_weights.log_softmax(0), khat=0.0)
    assert sorted(groups(posterior).data["posterior"]["z"][0]) == [1, 1, 3, 3]


def test_draws_of_a_guide_lose_its_auxiliary_sites():
    auto = AutoMultivariateNormal(model)
    draws = Predictive(auto, num_samples=30)(Y)
    assert "_AutoMultivariateNormal_latent" in draws
    plain = groups(draws, model, Y)
    assert set(plain.data["posterior"]) == {"mu", "z", "twice"}
    assert plain.data["posterior"]["mu"].shape == (1, 30)
    assert plain.data["posterior"]["z"].shape == (1, 30, 4, 1)


def test_many_draws_run_in_chunks():
    draws = {"mu": torch.randn(2500), "z": torch.randn(2500, 4, 1)}
    plain = groups(draws, model, Y)
    expected = norm.logpdf(Y.numpy() - draws["z"].numpy())
    assert np.allclose(plain.data["log_likelihood"]["y"][0], expected, atol=1e-5)


def test_noise_space_draws_come_with_their_values():
    prior = Marginal(dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 0.5))

    def program(y):
        with pyro.plate("n", 3):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    opened = poutine.reparam(program, {"x": NoiseReparam()})
    draws = {"x_latent": torch.randn(20, 3), "x_noise": torch.randn(20, 3)}
    plain = groups(draws, opened, torch.zeros(3))
    x = draws["x_latent"] + 0.5 * draws["x_noise"]
    assert np.allclose(plain.data["posterior"]["x"][0], x, atol=1e-6)
    assert plain.dims["x"] == ["n"]
    assert np.allclose(plain.data["log_likelihood"]["y"][0], norm.logpdf(x), atol=1e-5)


def test_mcmc_brings_its_chains_and_divergences(az):
    mcmc = MCMC(NUTS(model), num_samples=20, warmup_steps=10, disable_progbar=True)
    mcmc.run(Y)
    plain = groups(mcmc, model, Y)
    assert plain.data["posterior"]["mu"].shape == (1, 20)
    assert np.array_equal(plain.data["posterior"]["mu"][0], mcmc.get_samples()["mu"].numpy())
    assert plain.data["sample_stats"]["diverging"].shape == (1, 20)
    count = sum(len(indices) for indices in mcmc.diagnostics()["divergences"].values())
    assert plain.data["sample_stats"]["diverging"].sum() == count
    assert to_arviz(mcmc, model, Y).posterior["z"].dims[:3] == ("chain", "draw", "school")


def test_arviz_summarizes_and_cross_validates(az):
    posterior = importance(model, guide, Y, draws=2000)
    data = to_arviz(posterior, model, coords={"school": ["A", "B", "C", "D"]})
    assert set(data.groups()) == {
        "posterior",
        "log_likelihood",
        "posterior_predictive",
        "observed_data",
    }
    assert data.posterior["z"].dims[:3] == ("chain", "draw", "school")
    assert data.log_likelihood["y"].dims == ("chain", "draw", "school", "pupil")
    assert data.observed_data["y"].dims == ("school", "pupil")
    assert data.posterior.attrs["khat"] == posterior.khat
    summary = az.summary(data, var_names=["mu", "z"], kind="stats")
    assert list(summary.index) == ["mu", *(f"z[{s}, 0]" for s in "ABCD")]
    loo = az.loo(data)
    assert loo.n_data_points == 12
    assert -30 < loo.elpd_loo < -10


def test_dimensions_can_be_given(az):
    data = to_arviz({"z": torch.zeros(8, 3)}, chains=2, dims={"z": ["axis"]})
    assert data.posterior["z"].dims == ("chain", "draw", "axis")


def test_next_arviz_gets_one_nested_dict(monkeypatch):
    stub = types.ModuleType("arviz")
    stub.__version__ = "1.2.0"
    stub.from_dict = lambda data, *, attrs, dims, coords: (data, attrs, dims, coords)
    monkeypatch.setitem(sys.modules, "arviz", stub)
    posterior = importance(model, guide, Y, draws=50)
    data, attrs, dims, coords = to_arviz(posterior, model, coords={"school": [1, 2, 3, 4]})
    assert data["posterior"]["z"].shape == (1, 50, 4, 1)
    assert attrs["posterior"]["khat"] == posterior.khat
    assert dims["y"] == ["school", "pupil"]
    assert coords == {"school": [1, 2, 3, 4]}


def test_without_arviz_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    with pytest.raises(ImportError, match="pip install arviz"):
        to_arviz(DRAWS)


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match=r"got Tensor.*importance"):
        groups(torch.zeros(3))
    with pytest.raises(ValueError, match="same number of draws"):
        groups({"a": torch.zeros(3), "b": torch.zeros(4)})
    with pytest.raises(ValueError, match="same number of draws"):
        groups({})
    with pytest.raises(ValueError, match="chains=4"):
        groups({"a": torch.zeros(10)}, chains=4)
    with pytest.raises(ValueError, match="no draws of the model's site 'z'"):
        groups({"mu": torch.zeros(10)}, model, Y)
    with pytest.raises(ValueError, match=r"Site 'z' has shape \(10, 5\)"):
        groups({"mu": torch.zeros(10), "z": torch.zeros(10, 5)}, model, Y)


def test_subsampled_plates_are_refused():
    def part(y):
        with pyro.plate("n", 4, subsample_size=2) as i:
            pyro.sample("y", dist.Normal(0.0, 1.0).expand((3,)).to_event(1), obs=y[i])

    with pytest.raises(ValueError, match="plate 'n' shows 2 of 4"):
        groups({"mu": torch.zeros(5)}, part, Y)


def test_plain_groups_need_no_arviz(monkeypatch):
    monkeypatch.setitem(sys.modules, "arviz", None)
    assert groups(DRAWS, model, Y).data["posterior"]["mu"].shape == (1, 50)


@pytest.mark.parametrize(
    "handler", [poutine.scale(scale=2.0), poutine.mask(mask=torch.ones(4) < 0)]
)
def test_data_that_do_not_count_once_are_refused(handler):
    def weighted():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with handler, pyro.plate("data", 4):
            pyro.sample("y", dist.Normal(z, 1.0), obs=torch.zeros(4))

    with pytest.raises(ValueError, match="site 'y' is masked or scaled"):
        groups({"z": torch.randn(10)}, weighted)


def test_predictions_pass_through_deterministic_sites():
    def nested():
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("school", 3):
            effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
            theta = pyro.deterministic("theta", mu + effect)
            pyro.sample("y", dist.Normal(theta, 1e-3), obs=torch.zeros(3))

    draws = {"mu": torch.randn(20), "effect": torch.randn(20, 3)}
    plain = groups(draws, nested)
    predicted = plain.data["posterior_predictive"]["y"]
    assert predicted.shape == (1, 20, 3)
    assert np.allclose(predicted, plain.data["posterior"]["theta"], atol=0.01)
