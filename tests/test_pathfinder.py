"""Quasi-Newton paths to normal approximations: exact where the target is normal."""

import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide import init_to_value

from pyrogen.distributions import nsf
from pyrogen.guides import AutoFlow, Pathfinder
from pyrogen.guides.pathfinder import _InverseHessian
from pyrogen.inference import importance
from pyrogen.objectives import ELBO
from pyrogen.targets import EightSchools, LinearGaussian


@pytest.fixture
def linear():
    weight = torch.tensor([[1.0, 0.5, 0.0], [0.0, 2.0, 1.0], [0.3, 0.0, 0.2]])
    return LinearGaussian(weight, noise=0.5), torch.tensor([1.0, -0.5, 2.0])


def test_normal_posterior_is_found_exactly(linear):
    target, x = linear
    guide = Pathfinder(target, paths=3, steps=30, particles=1000).fit(x)
    exact = target.posterior(x)
    covariance = guide.scale_tril @ guide.scale_tril.mT
    assert torch.allclose(guide.loc, exact.mean.expand(3, -1), atol=0.01)
    assert torch.allclose(covariance, exact.covariance_matrix.expand(3, 3, 3), atol=0.05)
    assert torch.allclose(guide.elbo, target.log_evidence(x), atol=0.03)


def test_curvature_of_a_quadratic_is_told_by_as_many_steps_as_dimensions():
    a = torch.randn(5, 5, dtype=torch.float64)
    hessian = a @ a.T + torch.eye(5)
    estimate = _InverseHessian(5, history=5)
    done: list[torch.Tensor] = []
    for axis in torch.eye(5, dtype=torch.float64):
        step = axis  # made conjugate to all before, as exact line searches would
        for other in done:
            step = step - (axis @ hessian @ other) / (other @ hessian @ other) * other
        done.append(step)
        estimate.update(step, hessian @ step)
    assert torch.allclose(estimate.dense(), hessian.inverse(), atol=1e-10)


def test_inverse_hessian_keeps_the_secant_equation():
    estimate = _InverseHessian(4, history=3)
    for _ in range(6):
        step = torch.randn(4, dtype=torch.float64)
        change = step * torch.tensor([1.0, 2.0, 3.0, 40.0]) + 0.1 * step.roll(1)
        estimate.update(step, change)
        assert torch.allclose(estimate.dense() @ change, step)
        assert (torch.linalg.eigvalsh(estimate.dense()) > 0).all()
    before = estimate.dense()
    estimate.update(step, -change)  # curved the wrong way: not believed
    assert torch.equal(estimate.dense(), before)


def test_diagonal_is_that_of_the_scaled_matrix_update():
    """Of the BFGS update of the Hessian, once it is scaled to the newest step."""
    estimate = _InverseHessian(3, history=1)
    for _ in range(4):
        step = torch.randn(3, dtype=torch.float64)
        change = step * torch.tensor([1.0, 5.0, 2.0]) + 0.1 * step.roll(1)
        old = estimate.diagonal
        hessian = (change @ (old * change)) / (step @ change) * (1 / old).diag()
        along = hessian @ step
        hessian = hessian - torch.outer(along, along) / (step @ along)
        hessian = hessian + torch.outer(change, change) / (step @ change)
        estimate.update(step, change)
        assert torch.allclose(1 / estimate.diagonal, hessian.diagonal())


def test_logistic_regression_agrees_with_quadrature():
    x = torch.randn(60, 2)
    y = (torch.rand(60) < (x @ torch.tensor([1.5, -1.0])).sigmoid()).float()

    def model():
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        with pyro.plate("data", 60):
            pyro.sample("y", dist.Bernoulli(logits=(x * w).sum(-1)), obs=y)

    guide = Pathfinder(model).fit()
    axis = torch.linspace(-2, 5, 300)
    grid = torch.cartesian_prod(axis, axis - 4)
    log_joint = dist.Normal(0.0, 2.0).log_prob(grid).sum(-1)
    log_joint = log_joint + dist.Bernoulli(logits=grid @ x.T).log_prob(y).sum(-1)
    weight = log_joint.softmax(0)
    mean = weight @ grid
    std = (weight @ (grid - mean).square()).sqrt()
    evidence = log_joint.logsumexp(0) + 2 * (axis[1] - axis[0]).log()
    law = guide.get_posterior()
    assert torch.allclose(law.mean, mean, atol=0.25 * std.min().item())
    assert torch.allclose(law.stddev, std, rtol=0.2)
    posterior = importance(model, guide, draws=4000)
    assert posterior.reliable
    assert posterior.log_evidence == pytest.approx(evidence.item(), abs=0.03)
    assert torch.allclose(posterior.mean("w"), mean, atol=0.02)


def test_density_counts_constraints_plates_and_factors():
    model = EightSchools().non_centred
    guide = Pathfinder(model, paths=1, steps=1).fit()
    for u in torch.randn(3, 10):
        values = {"mu": u[0], "tau": u[1].exp(), "effect": u[2:]}
        exact = poutine.trace(poutine.condition(model, values)).get_trace().log_prob_sum() + u[1]
        assert guide._log_joint(u[None]).item() == pytest.approx(exact.item(), rel=1e-6)


def test_poor_paths_have_no_weight():
    """Of two modes, one holds almost all mass."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 10.0))
        both = torch.stack([(z - 3) ** 2 * -2, (z + 3) ** 2 * -2 - 8.0]).logsumexp(0)
        pyro.factor("modes", both)

    guide = Pathfinder(model, paths=12).fit()
    assert (guide.loc > 2.5).any()
    assert (guide.loc < -2.5).any()
    assert guide.get_posterior().sample((2000,)).gt(0).float().mean() > 0.95


@pytest.mark.slow
def test_eight_schools():
    """The mode lies far from the mass: a start only, and importance sampling says so."""
    target = EightSchools()
    guide = Pathfinder(target.non_centred, paths=20).fit()
    posterior = importance(target.non_centred, guide, draws=20_000)
    assert posterior.log_evidence == pytest.approx(target.log_evidence(), abs=0.6)
    assert posterior.mean("tau").item() == pytest.approx(3.598, abs=0.8)
    assert not posterior.reliable
    centred = Pathfinder(target.centred, steps=60).fit()  # its density has no upper bound
    assert centred.elbo.max() > -42


def test_flow_starts_from_it(linear):
    target, x = linear
    simple = Pathfinder(target).fit(x)
    guide = AutoFlow(target, nsf).warm_start(simple, x)
    loss = ELBO(500, vectorize_particles=True).loss(target, guide, x)
    assert loss == pytest.approx(-target.log_evidence(x).item(), abs=0.1)


def test_stands_wherever_a_guide_stands(linear):
    target, x = linear
    guide = Pathfinder(target).fit(x)
    draws = Predictive(target, guide=guide, num_samples=2000, parallel=True)(x)
    exact = target.posterior(x)
    assert torch.allclose(draws["z"].mean(0), exact.mean, atol=0.1)
    median = guide.median(x)["z"]
    assert torch.allclose(median, exact.mean, atol=0.05)
    low, high = guide.quantiles([0.1587, 0.8413], x)["z"]
    assert torch.allclose((high - low) / 2, exact.stddev, rtol=0.1)
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    fresh = Pathfinder(target)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.allclose(fresh.median(x)["z"], median, atol=0.05)
    assert not list(guide.parameters())


def test_starts_without_density_are_passed_over():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.log(), 0.1), obs=torch.tensor(0.0))

    for seed in range(4):
        pyro.set_rng_seed(seed)
        guide = Pathfinder(model, paths=10).fit()
        assert 1 <= len(guide.loc) < 10
        assert torch.allclose(guide.get_posterior().mean, torch.ones(1), atol=0.1)


def test_data_outside_the_support_are_refused():
    def model():
        rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        pyro.sample("x", dist.Poisson(rate), obs=torch.tensor(2.5))

    with pytest.raises(ValueError, match=r"(?s)site 'x'.*within the support"):
        Pathfinder(model).fit()


def test_second_fit_may_have_other_data():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = Pathfinder(model, paths=2)
    for x in (torch.zeros(5), torch.tensor([2.0, -4.0])):
        assert torch.allclose(guide.fit(x).get_posterior().mean, x / 2, atol=0.05)


def test_double_precision():
    guide = Pathfinder(EightSchools(dtype=torch.float64).non_centred, paths=1, steps=5).fit()
    assert guide.loc.dtype == torch.float64
    assert guide()["tau"].dtype == torch.float64


def test_refusals_say_what_to_do(linear):
    target, x = linear
    with pytest.raises(ValueError, match="paths >= 1, got 0"):
        Pathfinder(target, paths=0)
    with pytest.raises(RuntimeError, match=r"guide.fit\(\*args\)"):
        Pathfinder(target)(x)
    with pytest.raises(FloatingPointError, match="no finite density on 4 paths"):
        Pathfinder(target).fit(x * torch.nan)

    def local(x):
        with pyro.plate("data", 3, subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    with pytest.raises(NotImplementedError, match="Pathfinder would give all minibatches"):
        Pathfinder(local).fit(x)

    def minibatch(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 3, subsample_size=2) as rows:
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    with pytest.raises(NotImplementedError, match=r"'data' holds a subsample of 2 of 3.*changes"):
        Pathfinder(minibatch).fit(x)

    def flat():
        improper = dist.ImproperUniform(dist.constraints.real, (), ())
        pyro.sample("z", improper)

    start = init_to_value(values={"z": torch.tensor(0.0)})
    with pytest.raises(ValueError, match="depends on the latents, got a constant"):
        Pathfinder(flat, init_loc_fn=start).fit()
    with pytest.raises(ValueError, match="discrete sample site 'k'"):
        Pathfinder(lambda: pyro.sample("k", dist.Bernoulli(0.5))).fit()
