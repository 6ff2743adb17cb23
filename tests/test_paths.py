import pytest
import torch
from torch.func import grad, vmap

from pyrogen.paths import EDM, OU, VE, VP, Cosine, Linear, SubVP

PATHS = {
    "OU": OU(horizon=3.0),
    "OU with a varying rate": OU(horizon=1.5, start=0.5, stop=3.5),
    "VP": VP(),
    "SubVP": SubVP(),
    "VE": VE(),
    "EDM": EDM(sigma_max=3.0),
    "Cosine": Cosine(),
    "Linear": Linear(),
}
t = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)


@pytest.fixture(params=PATHS.values(), ids=PATHS)
def path(request):
    return request.param


def close(a, b, tolerance):
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def test_drift_is_the_rate_of_log_alpha(path):
    rate = vmap(grad(lambda t: path(t)[0].log()))(t)
    assert close(path.drift(t), rate, 1e-9)


def test_diffusion_is_what_the_variance_lacks(path):
    growth = vmap(grad(lambda t: path(t)[1].square()))(t)
    expected = growth - 2 * path.drift(t) * path(t)[1].square()
    assert close(path.diffusion(t), expected, 1e-9)


def test_noise_increases(path):
    assert (path.ratio(t).diff() > 0).all()


def test_paths_start_at_the_data(path):
    alpha, sigma = path(torch.zeros((), dtype=torch.float64))
    assert (alpha.item(), sigma.item()) == (1.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_inverts_the_ratio(path, dtype):
    s = t.to(dtype)
    assert path(s)[1].dtype == path.time(s).dtype == dtype
    assert close(path.time(path.ratio(s)), s, 20 * torch.finfo(dtype).eps)


def test_single_precision_holds_near_the_ends(path):
    ends = torch.tensor([2**-20, 0.5, 1 - 2**-20], dtype=torch.float64)  # exact in both
    for exact, single in zip(path(ends), path(ends.float()), strict=True):
        assert torch.allclose(single.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("path", [p for name, p in PATHS.items() if name != "VE"])
def test_the_equation_has_the_stated_marginal(path):
    """Euler-Maruyama with 20 000 walkers: mean and scale within five standard errors."""
    n, stop, steps = 20_000, 0.7, 500
    x, dt = torch.full((n,), 1.5, dtype=torch.float64), torch.tensor(stop / steps).double()
    for i in range(steps):
        now = (i + 0.5) * dt
        x = x * (1 + path.drift(now) * dt) + (path.diffusion(now) * dt).sqrt() * torch.randn_like(
            x
        )
    alpha, sigma = path(torch.tensor(stop).double())
    assert (x.mean() - 1.5 * alpha).abs() < 5 * sigma / n**0.5 + 2e-3
    assert (x.std() / sigma - 1).abs() < 5 / (2 * n) ** 0.5 + 5e-3


def test_variance_of_a_varying_ornstein_uhlenbeck():
    _, sigma = OU(horizon=1.5, start=0.5, stop=3.5)(torch.ones((), dtype=torch.float64))
    assert sigma.square().item() == pytest.approx(1.2624, abs=5e-5)


def test_variance_of_a_constant_ornstein_uhlenbeck():
    path = OU(horizon=3.0, start=0.6, stop=0.6)
    assert close(path(t)[1].square(), 0.6 * (1 - torch.exp(-6 * t)) / 2, 1e-12)


def test_normal_law_is_stationary_at_the_default_rate():
    alpha, sigma = OU()(t)
    assert close(alpha.square() + sigma.square(), torch.ones_like(t), 1e-12)


@pytest.mark.parametrize("path", [OU(horizon=3.0), OU(horizon=1.5, start=0.5, stop=3.5)])
def test_frozen_step_integrates_the_rate(path):
    """Against the midpoint rule; for the default also the closed form in e^h."""
    late, early = torch.tensor([0.9, 0.35], dtype=torch.float64)
    growth, gain, scale = path.frozen_step(late, early)
    u = early + (late - early) * (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    back = torch.exp(path.horizon * (u - early))
    rate = path.diffusion(u) * (late - early)
    assert growth.item() == pytest.approx(torch.exp(path.horizon * (late - early)).item())
    assert gain.item() == pytest.approx((back * rate).mean().item(), rel=1e-7)
    assert scale.item() ** 2 == pytest.approx((back.square() * rate).mean().item(), rel=1e-7)
    if path.start == path.stop == 2:
        assert gain.item() == pytest.approx(2 * (growth.item() - 1))
        assert scale.item() == pytest.approx((growth.item() ** 2 - 1) ** 0.5)


def test_paths_are_values():
    assert VP() == VP(start=0.1, stop=20.0)
    assert repr(EDM()) == "EDM(sigma_max=80.0)"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OU(horizon=0.0), r"OU expected horizon > 0 and finite, got 0\.0"),
        (lambda: OU(start=-1.0), r"OU expected start > 0"),
        (lambda: VP(stop=float("nan")), r"VP expected stop > 0 and finite, got nan"),
        (lambda: SubVP(start=0.0), r"SubVP expected start > 0"),
        (lambda: EDM(sigma_max=-1.0), r"EDM expected sigma_max > 0"),
        (lambda: VE(sigma_min=2.0, sigma_max=1.0), r"VE expected sigma_min < sigma_max.*Swap"),
    ],
)
def test_impossible_paths_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
