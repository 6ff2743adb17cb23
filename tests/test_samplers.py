import math

import pytest
import torch
from scipy.stats import kstest

from pyrogen.distributions import Ancestral, FrozenScore, Heun, Multistep
from pyrogen.paths import OU
from pyrogen.targets import GaussianMixture

LOW, HIGH = 2e-3, 80.0
SAMPLERS = {
    "Multistep": Multistep(),
    "Heun": Heun(),
    "Ancestral": Ancestral(),
    "FrozenScore": FrozenScore(),
}


@pytest.fixture(scope="module")
def ring():
    """Eight Gaussians, their noise, and where the probability-flow ODE takes it."""
    target = GaussianMixture.ring().to(torch.float64)
    noise = HIGH * torch.randn(400, 2, dtype=torch.float64, generator=torch.manual_seed(0))

    def slope(log_sigma, x):
        return x - target.denoise(x, log_sigma.exp())

    x, steps = noise, 500  # an independent solver: classical Runge-Kutta in log sigma
    h = torch.tensor(LOW / HIGH).double().log() / steps
    for i in range(steps):
        now = math.log(HIGH) + i * h
        k1 = slope(now, x)
        k2 = slope(now + h / 2, x + h / 2 * k1)
        k3 = slope(now + h / 2, x + h / 2 * k2)
        k4 = slope(now + h, x + h * k3)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return target, noise, x


def error(sampler, ring):
    target, noise, reference = ring
    return (sampler(target.denoise, noise, LOW, HIGH) - reference).norm(dim=-1).median().item()


@pytest.mark.parametrize(
    ("sampler", "order", "steps"),
    [
        (lambda n: Multistep(n, 1), 1, 100),
        (lambda n: Multistep(n, 2), 2, 100),
        (lambda n: Multistep(n, 3), 3, 100),
        (lambda n: Multistep(n, 4), 4, 40),
        (Heun, 2, 100),
        (lambda n: Ancestral(n, 0.0), 1, 100),
    ],
    ids=["1", "2", "3", "4", "Heun", "DDIM"],
)
def test_deterministic_samplers_converge_at_their_order(ring, sampler, order, steps):
    observed = math.log2(error(sampler(steps), ring) / error(sampler(2 * steps), ring))
    assert observed > order - 0.3


def test_twenty_evaluations_suffice(ring):
    """The published medians for this target are 1.9e-3, 2.5e-3 and 1.3e-1."""
    assert error(Multistep(20, order=3), ring) < 2.2e-3
    assert error(Multistep(20, order=2), ring) < 2.8e-3
    assert error(Multistep(20), ring) < error(Heun(10), ring) / 20


def test_flow_of_a_gaussian_is_the_closed_form():
    """Along each axis the ODE scales by the ratio of standard deviations."""
    covariance = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
    target = GaussianMixture(torch.tensor([[1.0, -2.0]]).double(), covariance[None])
    noise = torch.randn(50, 2, dtype=torch.float64) * HIGH
    values, axes = torch.linalg.eigh(covariance)
    shrink = ((values + LOW**2) / (values + HIGH**2)).sqrt()
    expected = target.means + ((noise - target.means) @ axes * shrink) @ axes.T
    for sampler in [Multistep(200), Heun(1000)]:
        assert torch.allclose(sampler(target.denoise, noise, LOW, HIGH), expected, atol=2e-4)


def law_of_draws(sampler, target, monkeypatch, low, high):
    """Exact mean and variance of a chain that is linear in its noise: one impulse per source."""
    impulses = torch.eye(sampler.steps + 2, dtype=torch.float64)  # the last row has no impulse
    start = target.means + (target.covariances[0] + high**2).sqrt() * impulses[:, :1]
    source = iter(impulses[:, 1:].T.unsqueeze(-1))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: next(source))
        x = sampler(target.denoise, start, low, high)
    mean = x[-1]
    return mean, (x[:-1] - mean).square().sum(0)


@pytest.mark.parametrize(
    "sampler",
    [
        lambda n: Ancestral(n),
        lambda n: Ancestral(n, 0.5),
        lambda n: FrozenScore(n),
        lambda n: FrozenScore(n, OU(horizon=4.0, start=0.5, stop=3.5)),
    ],
    ids=["Ancestral", "half", "FrozenScore", "varying rate"],
)
def test_stochastic_samplers_converge_at_order_one(sampler, monkeypatch):
    mean, variance, low, high = 0.7, 0.3, 0.01, 20.0
    target = GaussianMixture(
        torch.tensor([[mean]]).double(), torch.tensor([[[variance]]]).double()
    )
    errors = []
    for steps in (200, 400):
        m, v = law_of_draws(sampler(steps), target, monkeypatch, low, high)
        errors.append(((m - mean).abs() + (v - variance - low**2).abs()).item())
    assert errors[1] < 0.02
    assert math.log2(errors[0] / errors[1]) > 0.7


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ancestral_step_is_the_posterior_of_the_chain(eta, monkeypatch):
    """From sigma_t to sigma_s, given clean data 0 and x_t = 3: Bayes' rule for eta = 1."""
    high, low, x_t = 4.0, 2.5, torch.tensor([3.0], dtype=torch.float64)

    def step(z):
        monkeypatch.setattr(torch, "randn_like", lambda x: torch.full_like(x, z))
        return Ancestral(1, eta)(lambda x, sigma: 0 * x, x_t, low, high).item()

    scale = eta * low * math.sqrt(1 - low**2 / high**2)
    assert step(1.0) - step(0.0) == pytest.approx(scale)
    assert step(0.0) == pytest.approx(3 * math.sqrt(low**2 - scale**2) / high)


@pytest.mark.parametrize(
    ("sampler", "steps"), [(Ancestral, 200), (FrozenScore, 300), (Multistep, 20)]
)
def test_draws_have_the_law_of_the_data(sampler, steps):
    """A projection of the ring: Kolmogorov-Smirnov, false alarms once in ten thousand."""
    target = GaussianMixture.ring().to(torch.float64)
    noise = HIGH * torch.randn(2000, 2, dtype=torch.float64)
    x = sampler(steps)(target.denoise, noise, LOW, HIGH)[:, 0].numpy()
    normal = torch.distributions.Normal(target.means[:, 0], 0.1)

    def cdf(values):
        return normal.cdf(torch.as_tensor(values)[:, None]).mean(-1).numpy()

    assert kstest(x, cdf).pvalue > 1e-4


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shape_and_dtype_are_kept(sampler, dtype):
    target = GaussianMixture.ring().to(dtype)
    noise = torch.randn(2, 3, 2, dtype=dtype) * 10
    x = sampler(target.denoise, noise, LOW, 10.0)
    assert (x.shape, x.dtype) == (noise.shape, dtype)


@pytest.mark.parametrize("sampler", [Multistep(), Heun()])
def test_a_draw_does_not_depend_on_its_batch_mates(sampler, ring):
    target, noise, _ = ring
    together = sampler(target.denoise, noise, LOW, HIGH)
    alone = sampler(target.denoise, noise[7:8], LOW, HIGH)
    assert torch.allclose(together[7], alone[0], atol=1e-10)


def test_evaluations_are_as_many_as_stated():
    levels = []

    def denoise(x, sigma):
        levels.append(sigma.item())
        return torch.zeros_like(x)

    for sampler, calls in [
        (Multistep(7), 7),
        (Heun(7), 14),
        (Ancestral(7), 7),
        (FrozenScore(7), 7),
    ]:
        levels.clear()
        sampler(denoise, torch.ones(1, 1, dtype=torch.float64), LOW, HIGH)
        assert len(levels) == calls
        assert max(levels) == pytest.approx(HIGH)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: Multistep(0), r"Multistep expected steps >= 1, got 0"),
        (lambda: Multistep(order=5), r"order from 1 to 4, got 5"),
        (lambda: Multistep(order=0), r"order from 1 to 4, got 0"),
        (lambda: Heun(rho=-1.0), r"Heun expected rho > 0, got -1\.0"),
        (lambda: Ancestral(eta=1.5), r"eta from 0 to 1, got 1\.5"),
        (lambda: Heun().grid(2.0, 1.0), r"0 < low < high, got low=2\.0 and high=1\.0"),
        (
            lambda: FrozenScore(path=OU(horizon=1.0))(None, torch.zeros(1), LOW, HIGH),
            r"starts at noise level 80.*ends at 2\.52.*Lengthen",
        ),
    ],
)
def test_impossible_requests_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act()
