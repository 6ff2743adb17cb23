"""Tails that are learned: laws in closed form, limits, and Student's law far out."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import distributions as td

from pyrogen.distributions import Flow
from pyrogen.transforms import Elementwise, RationalQuadratic
from pyrogen.transforms.tails import HeavyTails, SinhArcsinh
from pyrogen.transforms.univariate import Stacked


def indices(family, left, right):
    """Parameters at which a family of tails has these indices."""
    odds = [v / (family.limit - v) for v in (family.start, left, right)]
    raw = torch.tensor(odds[1:], dtype=torch.float64).log() - math.log(odds[0])
    return torch.cat([raw, torch.zeros(2).double()])  # at 0, of slope 1


def log_prob(bijection, x):
    z, ladj = bijection.inverse_and_ladj(x)
    return td.Normal(0.0, 1.0).log_prob(z) + ladj


def test_each_side_is_a_generalized_pareto_law():
    family = HeavyTails()
    tails = family(indices(family, 0.3, 0.8))
    x = torch.linspace(0.01, 1e4, 300).double()
    scale = math.sqrt(math.pi / 2)
    for side, index in ((1, 0.8), (-1, 0.3)):
        expected = stats.genpareto(index, scale=scale).logpdf(x.numpy()) - math.log(2)
        assert np.allclose(log_prob(tails, side * x), expected, atol=1e-10)


def test_shift_and_scale_are_those_of_the_data():
    params = torch.randn(4).double()
    z = torch.randn(20).double()
    scale = torch.exp(params[3] / (1 + (params[3] / 5) ** 2).sqrt())
    plain = torch.cat([params[:2], torch.zeros(2).double()])
    x, ladj = HeavyTails()(params).call_and_ladj(z)
    y, plain_ladj = HeavyTails()(plain).call_and_ladj(z)
    assert torch.allclose(x, params[2] + scale * y)
    assert torch.allclose(ladj, plain_ladj + scale.log())


def test_draws_follow_the_pareto_law():
    family = HeavyTails()
    x = family(indices(family, 0.3, 0.8))(torch.randn(20_000).double())
    law = stats.genpareto(0.8, scale=math.sqrt(math.pi / 2))
    assert stats.kstest(x[x > 0].numpy(), law.cdf).pvalue > 1e-4


def test_index_of_zero_is_laplace():
    """The limit is reached without a jump, in value and in derivatives."""
    scale = math.sqrt(math.pi / 2)
    x = torch.tensor([-30.0, -1.0, 0.5, 8.0]).double()
    for raw in (-25.0, -700.0, -1e6):
        params = torch.tensor([raw, raw, 0.0, 0.0]).double().requires_grad_()
        p = log_prob(HeavyTails()(params), x)
        assert torch.allclose(p, td.Laplace(0.0, scale).log_prob(x), atol=1e-6)
        assert torch.autograd.grad(p.sum(), params)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_series_meet_the_formulas(dtype):
    """Around the place where one takes over from the other."""
    family = HeavyTails()
    x = torch.linspace(0.5, 2.0, 500, dtype=dtype)
    params = indices(family, 1e-3, 1e-3)
    exact = log_prob(family(params), x.double())
    assert (log_prob(family(params.to(dtype)), x) - exact).abs().max() < 30 * torch.finfo(
        dtype
    ).eps
    index = 1e-3
    z, _ = family(params).inverse_and_ladj(x.double())
    size = -torch.special.erfc(z / math.sqrt(2)).log()
    expected = math.sqrt(math.pi / 2) * torch.expm1(index * size) / index
    assert torch.allclose(expected, x.double(), rtol=1e-13)


def test_slope_at_the_origin_is_one_from_both_sides():
    tails = HeavyTails()(torch.tensor([0.4, -1.0, 0.0, 0.0]).double())
    for zero in (0.0, -0.0, 1e-300, -1e-300):
        x = torch.tensor(zero, dtype=torch.float64, requires_grad=True)
        for way in (tails.call_and_ladj, tails.inverse_and_ladj):
            y, ladj = way(x)
            assert ladj.item() == pytest.approx(0, abs=1e-15)
            (slope,) = torch.autograd.grad(y, x, create_graph=True)
            assert slope.item() == pytest.approx(1)
            (curve,) = torch.autograd.grad(ladj, x)
            assert curve.isfinite()


def test_far_noise_and_far_data_are_finite_in_single_precision():
    family = HeavyTails()
    tails = family(indices(family, 0.5, 1.0).float())
    z = torch.tensor([-13.0, -5.0, 5.0, 13.0])
    x = tails(z)
    assert torch.allclose(tails.inv(x), z, rtol=1e-5)
    far = torch.tensor([-1e30, 1e30]).requires_grad_()
    p = log_prob(tails, far)
    assert p.isfinite().all()
    assert torch.autograd.grad(p.sum(), far)[0].isfinite().all()


def fit(family, data, *, steps):
    """Maximum likelihood, on all data at once: batches would blur what is far out."""
    flow = Flow(1, [Elementwise(1, elementwise=family)])
    optimizer = torch.optim.LBFGS(flow.parameters(), max_iter=steps, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = -flow().log_prob(data).mean()
        value.backward()
        return value

    optimizer.step(loss)
    return flow


@pytest.mark.slow
def test_students_tails_are_learned_and_a_splines_are_not():
    """Student's law of 2 degrees of freedom, of index 1/2, from 20,000 draws.

    Its tail is Pareto's in the limit only, hence the width of the interval.
    """
    student = td.StudentT(2.0)
    data = student.sample((20_000, 1))
    x = torch.tensor([-1e4, -1e3, -100.0, 100.0, 1e3, 1e4]).unsqueeze(-1)
    heavy = fit(Stacked(RationalQuadratic(bound=2.0), HeavyTails()), data, steps=40)
    tails = HeavyTails()(heavy.layers[0].params[:, -4:])
    for index in (tails.left, tails.right):
        assert index.item() == pytest.approx(0.5, abs=0.15)
    spline = fit(RationalQuadratic(), data, steps=40)
    with torch.no_grad():
        errors = [flow().log_prob(x) - student.log_prob(x).squeeze(-1) for flow in (heavy, spline)]
    assert errors[0].abs().max() < 4
    assert errors[1].abs().min() > 1e3


def test_index_is_recovered_by_maximum_likelihood():
    """From 20,000 draws a side, whose information gives errors of 0.009 and 0.013."""
    family = HeavyTails()
    data = family(indices(family, 0.3, 0.8))(torch.randn(40_000).double()).unsqueeze(-1)
    flow = fit(family, data.float(), steps=20)
    tails = family(flow.layers[0].params)
    assert tails.left.item() == pytest.approx(0.3, abs=0.04)  # fails once in 1e5
    assert tails.right.item() == pytest.approx(0.8, abs=0.06)


def test_sinh_arcsinh_is_the_density_of_the_paper():
    """Jones and Pewsey, equation 2."""
    params = torch.tensor([0.7, -0.4]).double()
    bijection = SinhArcsinh()(params)
    skewness = 0.7 / math.sqrt(1 + 0.7**2 / 25)
    weight = math.exp(-0.4 / math.sqrt(1 + 0.4**2))
    x = torch.linspace(-10, 10, 41).double()
    inner = weight * x.asinh() - skewness
    expected = (
        math.log(weight)
        + inner.cosh().log()
        - 0.5 * inner.sinh() ** 2
        - 0.5 * torch.log(2 * math.pi * (1 + x**2))
    )
    assert torch.allclose(log_prob(bijection, x), expected, atol=1e-12)


def test_sinh_arcsinh_makes_tails_heavier_or_lighter():
    z = torch.tensor([3.0])
    assert SinhArcsinh()(torch.tensor([0.0, -1.0]))(z) > 5
    assert SinhArcsinh()(torch.tensor([0.0, 1.0]))(z) < 2


ERRORS = [
    (lambda: HeavyTails(start=0.0), r"0 < start < limit <= 4, got start=0\.0 and limit=1\.5"),
    (lambda: HeavyTails(start=2.0), r"Try 0\.1 and 1\.5"),
    (lambda: SinhArcsinh(bound=0.0), r"SinhArcsinh expected a bound within \(0, 3\], got 0"),
]


@pytest.mark.parametrize(("call", "match"), ERRORS)
def test_refusals_say_what_to_do(call, match):
    with pytest.raises(ValueError, match=match):
        call()
