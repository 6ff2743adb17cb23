"""Maps that are good, and pass; maps that hide mass, and do not; and the pilot that tells."""

import math
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from neutra_cases import (
    SCHOOLS,
    BluntFunnelMap,
    Crooked,
    FunnelMap,
    Map,
    fitted,
    funnel,
    mapped,
    small,
    standard,
)
from scipy import stats

from pyrogen.distributions import Flow, maf, nsf, realnvp
from pyrogen.evaluation import khat_threshold
from pyrogen.guides import AutoFlow
from pyrogen.guides.log_joint import LogJoint
from pyrogen.inference.fidelity import Limits, fidelity, transported
from pyrogen.inference.pilot import pilot, rhat, stuck
from pyrogen.objectives import DoublyReparameterized


def test_exact_map_of_the_funnel_is_faithful():
    verdict = fidelity(funnel, mapped(funnel, FunnelMap()), chains=64)
    assert verdict.faithful
    assert verdict.log_weights.std() < 1e-4
    assert verdict.ess == pytest.approx(2000, rel=1e-3)
    assert verdict.rhat < 1.08
    assert verdict.stuck == 0
    assert verdict.step == (0.25, 0.25)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("recipe", "steps"),
    [
        (small, 300),
        (partial(nsf, layers=3, hidden=(32, 32)), 600),  # with 300, two chains may be stuck
        (partial(maf, hidden=(32, 32)), 300),
    ],
    ids=["realnvp", "nsf", "maf"],
)
def test_fitted_flows_on_the_schools_are_faithful(recipe, steps, seed):
    guide = fitted(SCHOOLS, recipe, steps=steps, seed=seed, gradient=DoublyReparameterized())
    verdict = fidelity(SCHOOLS, guide)
    assert verdict.faithful, str(verdict)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("recipe", [maf, nsf, realnvp])
def test_short_fits_of_the_funnel_are_refused(recipe, seed):
    """R̂ was 1.39 and 1.41 for realnvp, with 17 and 15 stuck chains, on two seeds.

    Chains half as many and half as long gave 1.48 to 1.69 for realnvp, on six others, and 1.25
    to 1.40 for maf, on five; all were refused, as were five fits by nsf. Good fits of the schools
    gave 1.02 to 1.04.
    """
    guide = fitted(funnel, recipe, steps=350, seed=seed)
    verdict = fidelity(funnel, guide)
    assert not verdict.faithful, str(verdict)


@pytest.mark.parametrize("seed", range(5))
def test_a_small_neck_is_refused_though_the_weights_are_good(seed):
    """Half of the chains from elsewhere start in the most hidden 2 %: some in the neck."""
    pyro.set_rng_seed(seed)
    verdict = fidelity(funnel, mapped(funnel, BluntFunnelMap()), chains=64, transitions=20)
    assert verdict.ess > 0.95 * 2000
    assert verdict.khat < khat_threshold(2000)
    assert verdict.stuck >= 3
    assert not verdict.faithful, str(verdict)


def test_a_map_without_a_root_is_refused():
    class Rootless(Crooked):
        def inverse_and_ladj(self, y):
            raise FloatingPointError("no root")

    verdict = fidelity(standard, mapped(standard, Rootless()), chains=8, transitions=8)
    assert verdict.round_trip == math.inf
    assert not verdict.faithful


def test_verdict_prints():
    good = fidelity(standard, mapped(standard, Crooked()), chains=32)
    assert "AutoFlow as a map of 3 latents" in str(good)
    assert "R̂ of 32 short chains" in str(good)
    assert "Faithful: chains through this map forget" in str(good)
    bad = fidelity(standard, mapped(standard, Crooked(shift=0.5)), chains=8, transitions=8)
    assert "Not faithful: noise comes back" in str(bad)


def test_pilot_samples_the_posterior():
    """The last draws of its chains, of v by a KS test; one seed in 10,000 fails."""
    guide = mapped(funnel, FunnelMap())
    values, _ = pilot(transported(guide), LogJoint(funnel, guide), 128, 10)
    assert values.shape == (10, 128, 11)
    assert stats.kstest(values[-1, :, 0].numpy() / 3, "norm").pvalue > 1e-4


def test_rhat_is_the_rank_normalised_one():
    x = torch.randn(40, 12, 3, dtype=torch.float64) + torch.randn(12, 3) * torch.tensor(
        [0, 0.3, 2]
    )
    x = x.exp()  # ranks do not care
    with warnings.catch_warnings(action="ignore"):
        import arviz
    expected = [
        float(arviz.rhat(x[..., j].T.numpy(), method="z_scale")) for j in range(x.shape[-1])
    ]
    assert rhat(x) == pytest.approx(max(expected), rel=1e-3)


def test_stuck_chains_are_counted():
    x = torch.randn(40, 50, 2)
    assert stuck(x) == 0
    x[:, 3, 1] += 8.0
    x[:, 7, 0] -= 8.0
    assert stuck(x) == 2


@pytest.mark.parametrize("few", [{"draws": 5}, {"chains": 4}, {"transitions": 2}])
def test_a_pilot_of_nothing_is_refused(few):
    with pytest.raises(ValueError, match="fidelity expected draws >= 25"):
        fidelity(standard, mapped(standard, Crooked()), **few)


@pytest.mark.parametrize("value", [-1.0, math.nan])
def test_limits_are_numbers(value):
    with pytest.raises(ValueError, match="Limits expected rhat >= 0"):
        Limits(rhat=value)


def test_a_prior_without_draws_leaves_other_starts():
    def improper():
        law = dist.ImproperUniform(dist.constraints.real, (), (3,))
        z = pyro.sample("z", law)
        pyro.factor("f", -z.square().sum(-1) / 2)

    guide = AutoFlow(
        improper,
        lambda features: Flow(features, [Map(Crooked())]),
        init_loc_fn=lambda site: torch.zeros(3),
    ).setup()
    assert fidelity(improper, guide, chains=32).faithful
