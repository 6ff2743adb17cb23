"""Divergences of draws against closed forms, brute force and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.special import hyp1f1
from scipy.stats import wasserstein_distance

import pyrogen.divergences.ipm as ipm
import pyrogen.divergences.transport as transport
from pyrogen.divergences import (
    Distance,
    Gaussian,
    InverseMultiquadric,
    Laplace,
    Mixture,
    Polynomial,
    RationalQuadratic,
    energy_distance,
    mmd,
    mmd_v,
    sliced_wasserstein,
    wasserstein_1d,
)

KERNELS = {
    "gaussian": (Gaussian(0.7), lambda r, l1, dot: np.exp(-(r**2) / (2 * 0.7**2))),
    "laplace": (Laplace(0.7), lambda r, l1, dot: np.exp(-l1 / 0.7)),
    "quadratic": (
        RationalQuadratic(0.7, power=2.0),
        lambda r, l1, dot: (1 + r**2 / (2 * 2 * 0.7**2)) ** -2.0,
    ),
    "multiquadric": (InverseMultiquadric(0.7), lambda r, l1, dot: (1 + r**2 / 0.7**2) ** -0.5),
    "polynomial": (Polynomial(3), lambda r, l1, dot: (dot / 3 + 1) ** 3),
    "distance": (Distance(), lambda r, l1, dot: -r),
    "root distance": (Distance(0.5), lambda r, l1, dot: -(r**0.5)),
    "mixture": (
        Mixture(Gaussian(0.7), Distance()),
        lambda r, l1, dot: (np.exp(-(r**2) / (2 * 0.7**2)) - r) / 2,
    ),
}
METRICS = [n for n in KERNELS if n != "polynomial"]  # translation invariant


@pytest.fixture(params=KERNELS)
def kernel(request):
    return KERNELS[request.param][0]


def two(n=6, m=9, d=3, dtype=torch.float64):
    return torch.randn(n, d, dtype=dtype), torch.randn(m, d, dtype=dtype) + 0.3


@pytest.mark.parametrize("name", KERNELS)
def test_estimates_are_the_sums_of_their_definition(name):
    kernel, formula = KERNELS[name]
    x, y = two()

    def k(a, b):
        return formula(np.linalg.norm(a - b), np.abs(a - b).sum(), a @ b)

    def mean(a, b, distinct):
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not distinct or i != j]
        return np.mean([k(a[i], b[j]) for i, j in pairs])

    a, b = x.numpy(), y.numpy()
    for estimate, distinct in ((mmd, True), (mmd_v, False)):
        expected = mean(a, a, distinct) + mean(b, b, distinct) - 2 * mean(a, b, False)
        assert estimate(x, y, kernel).item() == pytest.approx(expected, rel=1e-9)


def test_energy_distance_is_its_formula():
    x, y = two()
    within = sum(torch.pdist(s).mean() for s in (x, y))
    expected = 2 * (x[:, None] - y).norm(dim=-1).mean() - within
    assert torch.allclose(energy_distance(x, y), expected)


def gaussian_pair(n, d=3):
    """Draws of N(0, I) and N(delta, 4 I)."""
    shift = torch.tensor([0.5, -1.0, 0.2], dtype=torch.float64)[:d]
    x = torch.randn(n, d, dtype=torch.float64)
    return x, shift + 2 * torch.randn(n, d, dtype=torch.float64), shift.square().sum().item()


def exact_gaussian(width, squared_shift, d=3):
    def mean(variance, shift):
        total = variance + width**2
        return (width**2 / total) ** (d / 2) * math.exp(-shift / (2 * total))

    return mean(2, 0) + mean(8, 0) - 2 * mean(5, squared_shift)


def exact_quadratic(width, power, squared_shift, d=3):
    def mean(variance, shift):
        s = variance / width**2

        def integrand(t):
            law = power**power * t ** (power - 1) * math.exp(-power * t) / math.gamma(power)
            spread = 1 + t * s
            return law * spread ** (-d / 2) * math.exp(-t * shift / width**2 / (2 * spread))

        return quad(integrand, 0, np.inf)[0]

    return mean(2, 0) + mean(8, 0) - 2 * mean(5, squared_shift)


def exact_cubic(shift, d=3):
    """(x.y/d + 1)^3 between N(a, s I) and N(b, t I)."""

    def mean(a, s, b, t):
        ab = a @ b
        second = np.trace((s * np.eye(d) + np.outer(a, a)) @ (t * np.eye(d) + np.outer(b, b)))
        third = ab**3 + 3 * ab * (t * a @ a + s * b @ b) + 3 * ab * s * t * d + 6 * s * t * ab
        return 1 + 3 * ab / d + 3 * second / d**2 + third / d**3

    zero = np.zeros(d)
    return mean(zero, 1, zero, 1) + mean(shift, 4, shift, 4) - 2 * mean(zero, 1, shift, 4)


def exact_energy(squared_shift, d=3):
    def mean(variance, shift):
        scale = math.sqrt(2 * variance) * math.gamma((d + 1) / 2) / math.gamma(d / 2)
        return scale * hyp1f1(-0.5, d / 2, -shift / (2 * variance))

    return 2 * mean(5, squared_shift) - mean(2, 0) - mean(8, 0)


EXACT = {
    "gaussian": (Gaussian(1.5), lambda shift: exact_gaussian(1.5, shift @ shift)),
    "quadratic": (
        RationalQuadratic(1.5, power=0.8),
        lambda shift: exact_quadratic(1.5, 0.8, shift @ shift),
    ),
    "cubic": (Polynomial(3), exact_cubic),
    "energy": (Distance(), lambda shift: exact_energy(shift @ shift)),
}


@pytest.mark.parametrize("name", EXACT)
def test_mmd_is_unbiased_for_the_closed_form(name):
    kernel, closed_form = EXACT[name]
    draws = torch.stack([mmd(*gaussian_pair(20)[:2], kernel) for _ in range(1000)])
    z = (draws.mean() - closed_form(np.array([0.5, -1.0, 0.2]))) / (draws.std() / 1000**0.5)
    assert abs(z) < 4  # fails once in 16 000 seeds


def test_v_statistic_has_the_stated_bias():
    kernel, n = Gaussian(1.5), 20
    draws = torch.stack([mmd_v(*gaussian_pair(n)[:2], kernel) for _ in range(1000)])
    excess = sum((1 - (1.5**2 / (v + 1.5**2)) ** 1.5) / n for v in (2, 8))
    expected = exact_gaussian(1.5, gaussian_pair(2)[2]) + excess
    assert abs(draws.mean() - expected) / (draws.std() / 1000**0.5) < 4  # one in 16 000


@pytest.mark.parametrize("estimate", [mmd, mmd_v])
def test_gradient_is_finite_where_draws_coincide(kernel, estimate):
    x = torch.randn(5, 3).repeat(2, 1).requires_grad_()
    estimate(x, x.detach(), kernel).backward()
    assert x.grad.isfinite().all()


def test_gradient_matches_finite_differences(kernel):
    x, y = two(4, 3)
    x.requires_grad_(), y.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: mmd(a, b, kernel), (x, y))
    assert torch.autograd.gradcheck(lambda a, b: mmd_v(a, b, kernel), (x, y))


@pytest.mark.parametrize("name", METRICS)
def test_mmd_ignores_order_shift_and_whose_turn_it_is(name):
    kernel = KERNELS[name][0]
    x, y = two()
    value = mmd(x, y, kernel)
    assert torch.allclose(value, mmd(y, x, kernel))
    assert torch.allclose(value, mmd(x.flip(0), y.roll(2, 0), kernel))
    assert torch.allclose(value, mmd(x + 5, y + 5, kernel))


@pytest.mark.parametrize("kernel", [Gaussian(1.0), RationalQuadratic(1.0), Distance()])
def test_radial_kernels_ignore_rotation(kernel):
    x, y = two()
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64)).Q
    assert torch.allclose(mmd(x, y, kernel), mmd(x @ rotation, y @ rotation, kernel))


def test_mmd_is_bounded_and_zero_on_equal_sets(kernel):
    x, y = two()
    assert mmd_v(x, x, kernel).abs() < 1e-12
    assert mmd_v(x, y, kernel) > 0
    assert mmd_v(torch.zeros(3, 3), torch.full((3, 3), 1e3), Gaussian(1.0)) <= 2


def test_quadratic_tends_to_gaussian():
    x, y = two()
    assert torch.allclose(RationalQuadratic(1.3, power=1e7)(x, y), Gaussian(1.3)(x, y), atol=1e-6)


def test_blocks_do_not_change_the_value(kernel, monkeypatch):
    x, y = two(40, 50)
    value, biased = mmd(x, y, kernel), mmd_v(x, y, kernel)
    torch.manual_seed(1)
    sliced = sliced_wasserstein(x, y)
    monkeypatch.setattr(ipm, "BLOCK", 130)
    monkeypatch.setattr(transport, "BLOCK", 1000)
    torch.manual_seed(1)
    assert torch.allclose(sliced_wasserstein(x, y), sliced)
    assert torch.allclose(mmd(x, y, kernel), value)
    assert torch.allclose(mmd_v(x, y, kernel), biased)


def test_float32_far_from_the_origin_keeps_its_digits():
    x, y = two(200, 200)
    far = (x + 1000).float(), (y + 1000).float()
    exact = mmd(far[0].double(), far[1].double(), Gaussian(1.0)).float()
    assert mmd(*far, Gaussian(1.0)).dtype == torch.float32
    assert (mmd(*far, Gaussian(1.0)) - exact).abs() < 1e-6


def test_width_can_be_learned():
    width = torch.tensor(1.0, requires_grad=True)
    mmd(*two(), Gaussian(width)).backward()
    assert width.grad.abs() > 0


@pytest.mark.parametrize("n", [1, 7, 12])
def test_line_cost_is_scipys(n):
    x, y = torch.randn(n, dtype=torch.float64), torch.randn(7, dtype=torch.float64) * 2 + 1
    assert wasserstein_1d(x, y).item() == pytest.approx(wasserstein_distance(x, y), rel=1e-12)


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0])
def test_line_cost_of_unequal_sizes_is_that_of_repeats(order):
    x, y = torch.randn(4, 6).double(), torch.randn(4, 8).double()
    expected = wasserstein_1d(x.repeat(1, 4), y.repeat(1, 3), order=order)
    assert torch.allclose(wasserstein_1d(x, y, order=order), expected)
    assert expected.shape == (4,)


def test_sliced_wasserstein_of_gaussians():
    """|shift|^2 / d + (s - t)^2; 0.08 is four standard errors of directions and draws."""
    x, y, squared_shift = gaussian_pair(4000)
    value = sliced_wasserstein(x, y, projections=800)
    assert abs(value - (squared_shift / 3 + 1)) < 0.08


def test_sliced_wasserstein_of_a_shift_is_exact_on_average():
    x = torch.randn(30, 4, dtype=torch.float64)
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    values = torch.stack([sliced_wasserstein(x, x + shift, projections=1) for _ in range(4000)])
    z = (values.mean() - shift.square().sum() / 4) / (values.std() / 4000**0.5)
    assert abs(z) < 4  # fails once in 16 000 seeds


def test_one_feature_needs_no_directions():
    x, y = torch.randn(9), torch.randn(4)
    before = torch.get_rng_state()
    assert sliced_wasserstein(x, y) == wasserstein_1d(x, y, order=2.0)
    assert torch.equal(before, torch.get_rng_state())


def test_orders_are_ranked_and_scale():
    x, y = torch.randn(50), torch.randn(50) + 1
    first, second = wasserstein_1d(x, y), wasserstein_1d(x, y, order=2.0)
    assert first <= second.sqrt()
    assert torch.allclose(wasserstein_1d(3 * x, 3 * y, order=2.0), 9 * second)


@pytest.mark.parametrize("order", [1.0, 2.0])
def test_transport_gradients(order):
    x, y = torch.randn(4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: wasserstein_1d(a, y, order=order), x)
    z = torch.randn(5, 3, requires_grad=True)
    sliced_wasserstein(z, z.detach(), order=order).backward()
    assert z.grad.isfinite().all()


def test_events_are_flattened():
    x, y = torch.randn(5, 2, 3), torch.randn(4, 2, 3)
    kernel = Gaussian(2.0)
    assert torch.allclose(mmd(x, y, kernel), mmd(x.flatten(1), y.flatten(1), kernel))
    assert energy_distance(x, y) == energy_distance(x.flatten(1), y.flatten(1))


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.ones(5, 2), torch.ones(5, 3), ValueError, r"shape \(\*batch, 2\), got \(5, 3\)"),
        (torch.ones(5, 2), torch.ones(2, 5, 2), ValueError, "Flatten its batch dimensions"),
        (torch.ones(5, 2), torch.ones(5, 2).double(), ValueError, "one dtype and device"),
        (torch.ones(5, 2).long(), torch.ones(5, 2), TypeError, "floating-point data"),
        (torch.full((5, 2), torch.nan), torch.ones(5, 2), ValueError, "10 NaN"),
        (torch.ones(5, 2), torch.full((5, 2), torch.inf), ValueError, "10 NaN or infinite"),
        (torch.ones(0, 2), torch.ones(5, 2), ValueError, "at least .* data, got 0"),
        (torch.ones(5, 0), torch.ones(5, 0), ValueError, "at least one feature"),
        ([1.0], torch.ones(5, 2), TypeError, "expected a tensor, got list"),
        (torch.ones(5, 2), None, TypeError, "expected a tensor, got NoneType"),
        (torch.tensor(1.0), torch.tensor(1.0), ValueError, "expected a batch"),
    ],
)
@pytest.mark.parametrize("door", ["mmd", "mmd_v", "energy_distance", "sliced_wasserstein"])
def test_bad_sets_are_refused(door, x, y, error, message):
    call = {
        "mmd": lambda: mmd(x, y, Gaussian(1.0)),
        "mmd_v": lambda: mmd_v(x, y, Gaussian(1.0)),
        "energy_distance": lambda: energy_distance(x, y),
        "sliced_wasserstein": lambda: sliced_wasserstein(x, y),
    }[door]
    with pytest.raises(error, match=message) as refusal:
        call()
    assert door in str(refusal.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mmd(torch.ones(1, 2), torch.ones(5, 2), Gaussian(1.0)), "mmd needs at least 2"),
        (lambda: energy_distance(torch.ones(5, 2), torch.ones(1, 2)), "needs at least 2"),
        (lambda: Gaussian(0.0), "Gaussian expected width > 0, got 0.0"),
        (lambda: Laplace(-1.0), "Laplace expected width > 0"),
        (lambda: InverseMultiquadric(torch.nan), "expected width > 0, got nan"),
        (lambda: RationalQuadratic(1.0, power=0.0), "expected power > 0"),
        (lambda: Polynomial(0), "expected degree > 0"),
        (lambda: Distance(2.0), "expected 0 < power < 2"),
        (lambda: Mixture(), "at least one kernel, got none"),
        (lambda: wasserstein_1d(torch.ones(2), torch.ones(2), order=0.5), "expected order >= 1"),
        (lambda: wasserstein_1d(torch.ones(2), torch.ones(2).double()), "holds torch.float32"),
        (lambda: wasserstein_1d(torch.ones(0), torch.ones(2)), "at least 1 data, got 0"),
        (
            lambda: sliced_wasserstein(torch.ones(2, 2), torch.ones(2, 2), projections=0),
            "expected projections >= 1",
        ),
    ],
)
def test_bad_choices_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
