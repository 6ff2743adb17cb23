"""NUTS through good maps knows the posterior; maps that hide mass are refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from neutra_cases import (
    SCHOOLS,
    Crooked,
    FunnelMap,
    correlated,
    correlated_law,
    fitted,
    funnel,
    mapped,
    small,
    standard,
    two_modes,
)
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoLaplaceApproximation,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalizingFlow,
)
from scipy import stats

from pyrogen.evaluation import khat_threshold
from pyrogen.guides import AutoFlow
from pyrogen.inference.fidelity import Limits, fidelity
from pyrogen.inference.neutra import NeuTra
from pyrogen.objectives import DoublyReparameterized
from pyrogen.targets import EightSchools


def nuts(neutra, draws=150, warmup=60):
    kernel = NUTS(neutra.model, max_tree_depth=5)
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=warmup, disable_progbar=True)
    mcmc.run()
    return neutra.transform_sample(mcmc.get_samples()[neutra.site])


def p_value(x, mean):
    """Of the mean of one chain's draws, by their effective number."""
    size = pyro.ops.stats.effective_sample_size(x[None], 0, 1).clamp(max=len(x))
    return 2 * stats.norm.sf((x.mean(0) - mean).abs() / x.std(0) * size.sqrt())


def test_nuts_through_an_exact_map_knows_the_funnel():
    """Mean of v and of v^2 are 0 and 9; one seed in 5000 fails."""
    v = nuts(NeuTra(funnel, mapped(funnel, FunnelMap()), chains=32))["v"]
    assert p_value(v, 0.0) > 1e-4
    assert p_value(v.square(), 9.0) > 1e-4


def test_nuts_through_a_fitted_normal_knows_its_moments():
    """The means and the squares of three latents; one seed in 1600 fails."""
    guide = AutoMultivariateNormal(correlated)
    guide()
    with torch.no_grad():  # its optimum, but for a scale that is a half too wide
        guide.loc.copy_(correlated_law().mean)
        guide.scale = 1.5 * correlated_law().scale_tril.diagonal()
        tril = correlated_law().scale_tril
        guide.scale_tril = tril / tril.diagonal()[:, None]
    z = nuts(NeuTra(correlated, guide, chains=32))["z"]
    assert (p_value(z, correlated_law().mean) > 1e-4).all()
    centred = (z - correlated_law().mean).square()
    assert (p_value(centred, correlated_law().variance) > 1e-4).all()


@pytest.mark.slow
def test_nuts_through_a_fitted_flow_knows_the_schools():
    """Ten means by quadrature; one seed in 1000 fails."""
    guide = fitted(SCHOOLS, small, steps=300, gradient=DoublyReparameterized())
    draws = nuts(NeuTra(SCHOOLS, guide), draws=300, warmup=150)
    problem = EightSchools()
    exact = problem.posterior_mean()
    for name in ("mu", "tau"):
        assert p_value(draws[name], exact[name]) > 1e-4
    log_joint, mu, tau = problem._integrate()
    y, noise, spread = problem.y.double(), problem.s.double().square(), tau.square()[:, None]
    theta = log_joint.softmax(0) @ ((y * spread + mu[:, None] * noise) / (spread + noise))
    own = draws["mu"][:, None] + draws["tau"][:, None] * draws["effect"]
    assert (p_value(own.double(), theta) > 1e-4).all()


def test_a_short_fit_of_the_funnel_is_refused():
    guide = fitted(funnel, small, steps=200, particles=1)
    with pytest.raises(ValueError, match=r"NeuTra refuses AutoFlow.*R̂ = .*wrong in silence"):
        NeuTra(funnel, guide, chains=64, transitions=30)


def test_a_missed_mode_is_refused_though_the_weights_are_perfect():
    one = torch.stack([4.0 + 0.69 * torch.randn(4000), 5.0 * torch.randn(4000)], -1)
    guide = AutoFlow(two_modes, small).setup().standardize({"x": one})
    verdict = fidelity(two_modes, guide, chains=64, transitions=20)
    assert verdict.ess > 0.95 * 2000
    assert verdict.khat < khat_threshold(2000)
    assert verdict.rhat > 1.2
    with pytest.raises(ValueError, match="do not forget where they start"):
        NeuTra(two_modes, guide, chains=32, transitions=20)


@pytest.mark.parametrize(
    ("bijection", "message"),
    [
        (Crooked(shift=0.01), "noise comes back from the latents with an error of"),
        (Crooked(ladj=0.05), "another density when they are scored, by 0.05 nats"),
    ],
    ids=["inverse", "log-determinant"],
)
def test_a_map_that_contradicts_itself_is_refused(bijection, message):
    with pytest.raises(ValueError, match=message):
        NeuTra(standard, mapped(standard, bijection), chains=8, transitions=8)


def test_one_goes_on_deliberately():
    guide = mapped(standard, Crooked(ladj=0.05))
    neutra = NeuTra(standard, guide, chains=32, limits=Limits(density=0.1))
    assert neutra.verdict.faithful
    wide = mapped(wider, Crooked())
    with pytest.raises(ValueError, match=r"k̂ = .* \(limit 0.00\)"):
        NeuTra(wider, wide, chains=8, transitions=8, limits=Limits(khat=0.0))


def wider():
    pyro.sample("z", dist.Normal(torch.zeros(3), 1.5).to_event(1))


def test_density_in_the_noise_is_the_models_with_the_log_determinant():
    guide = AutoFlow(SCHOOLS, small, init_scale=0.4).setup()
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.05 * torch.randn_like(p))
    neutra = NeuTra(SCHOOLS, guide, chains=8, transitions=8, limits=Limits(rhat=9.0, stuck=8))
    noise = torch.randn(10)
    trace = poutine.trace(poutine.condition(neutra.model, {neutra.site: noise})).get_trace()
    u, ladj = guide.get_transform().call_and_ladj(noise)
    values = {"mu": u[0], "tau": u[1].exp(), "effect": u[2:]}
    alone = poutine.trace(poutine.condition(SCHOOLS, values)).get_trace().log_prob_sum()
    expected = alone + ladj + u[1]
    assert trace.log_prob_sum().item() == pytest.approx(expected.item(), rel=1e-5)
    for name, value in neutra.transform_sample(noise.expand(2, 3, 10)).items():
        assert torch.allclose(value, values[name].expand(2, 3, *values[name].shape), atol=1e-5)


def test_works_in_double_precision_and_in_predictive():
    model = EightSchools(dtype=torch.float64).non_centred
    guide = AutoDiagonalNormal(model)
    guide()
    neutra = NeuTra(model, guide, chains=8, transitions=8, limits=Limits(rhat=9.0, stuck=8))
    draws = {neutra.site: torch.randn(4, 10, dtype=torch.float64)}
    found = Predictive(neutra.model, draws)()
    assert found["theta"].dtype == torch.float64
    assert torch.equal(found["mu"].flatten(), neutra.transform_sample(draws[neutra.site])["mu"])


def test_guides_without_a_map_are_refused():
    normal, laplace = AutoNormal(standard), AutoLaplaceApproximation(standard)
    normal(), laplace()
    with pytest.raises(TypeError, match="maps noise to all latents, got AutoNormal"):
        NeuTra(standard, normal)
    with pytest.raises(NotImplementedError, match="AutoLaplaceApproximation has no transform"):
        NeuTra(standard, laplace)
    with pytest.raises(RuntimeError, match="AutoFlow has not seen its model run"):
        NeuTra(standard, AutoFlow(standard, small))
    one_way = AutoNormalizingFlow(standard, dist.transforms.planar)
    one_way()
    with pytest.raises(NotImplementedError, match="no inverse"):
        NeuTra(standard, one_way)


def test_models_that_do_not_fit_are_refused():
    def mixing():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("f", -(z - z.mean()).square().sum(-1))

    def broken():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("f", (z[..., 0] - 10).log())

    def impossible():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("f", torch.full_like(z[..., 0], -torch.inf))

    def steep():
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("f", -(z[..., 0] * 0).sqrt())

    guide = mapped(standard, Crooked())
    with pytest.raises(FloatingPointError, match="finite gradient"):
        NeuTra(steep, guide, chains=8, transitions=8)
    with pytest.raises(ValueError, match="model mixes draws"):
        NeuTra(mixing, guide, chains=8, transitions=8)
    with pytest.raises(FloatingPointError, match="NaN or infinity"):
        NeuTra(broken, guide, chains=8, transitions=8)
    with pytest.raises(ValueError, match="no draw of the guide that the model thinks possible"):
        NeuTra(impossible, guide, chains=8, transitions=8)
