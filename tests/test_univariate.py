"""Increasing maps of one variable: precision, smoothness, and the formula of the paper."""

import pytest
import torch

from pyrogen.transforms import Affine, RationalQuadratic

SPLINE = RationalQuadratic(bins=5, bound=3.0)
FAMILIES = {"affine": Affine(), "spline": SPLINE}


@pytest.mark.parametrize(
    ("dtype", "places", "nats"), [(torch.float32, 3e-5, 1e-4), (torch.float64, 1e-12, 1e-12)]
)
def test_spline_keeps_its_precision(dtype, places, nats):
    family = RationalQuadratic()
    spline = family(torch.randn(200_000, family.parameters, dtype=dtype))
    x = 3 * torch.randn(200_000, dtype=dtype)
    y, ladj = spline.call_and_ladj(x)
    back, inverse_ladj = spline.inverse_and_ladj(y)
    assert (back - x).abs().max() <= places
    assert (ladj + inverse_ladj).abs().max() <= nats


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_spline_has_no_nan_at_any_scale(scale):
    family = RationalQuadratic()
    params = scale * torch.randn(20_000, family.parameters)
    x = torch.cat([3 * torch.randn(19_995), torch.tensor([-5.0, 5.0, 0.0, -1e30, 1e30])])
    params.requires_grad_()
    x.requires_grad_()
    spline = family(params)
    y, ladj = spline.call_and_ladj(x)
    back, inverse_ladj = spline.inverse_and_ladj(x)
    for out in (y, ladj, back, inverse_ladj):
        assert out.isfinite().all()
        for grad in torch.autograd.grad(out.sum(), (params, x), retain_graph=True):
            assert grad.isfinite().all()
    assert (spline(back) - x)[x.abs() < 6].abs().max() < 1e-3


def test_spline_is_the_rational_quadratic_of_the_paper():
    """Against equations 4 and 5 of Durkan et al., written out bin by bin."""
    params = torch.randn(SPLINE.parameters).double()
    spline = SPLINE(params)
    knots_x, knots_y, slopes = spline.x, spline.y, spline.slopes
    assert (knots_x.diff() > 0).all()
    assert (knots_y.diff() > 0).all()
    assert (knots_x[0], knots_x[-1], knots_y[0], knots_y[-1]) == (-3, 3, -3, 3)
    assert (slopes[0], slopes[-1]) == (1, 1)
    for k in range(SPLINE.bins):
        x = torch.linspace(knots_x[k], knots_x[k + 1], 7).double()[1:-1]
        xi = (x - knots_x[k]) / (knots_x[k + 1] - knots_x[k])
        rise = knots_y[k + 1] - knots_y[k]
        s = rise / (knots_x[k + 1] - knots_x[k])
        d0, d1 = slopes[k], slopes[k + 1]
        below = s + (d1 + d0 - 2 * s) * xi * (1 - xi)
        expected = knots_y[k] + rise * (s * xi**2 + d0 * xi * (1 - xi)) / below
        slope = s**2 * (d1 * xi**2 + 2 * s * xi * (1 - xi) + d0 * (1 - xi) ** 2) / below**2
        y, ladj = spline.call_and_ladj(x)
        assert torch.allclose(y, expected, atol=1e-12)
        assert torch.allclose(ladj, slope.log(), atol=1e-12)


def test_spline_is_smooth_at_its_knots_and_the_identity_beyond():
    spline = SPLINE(torch.randn(SPLINE.parameters).double())
    near = 1e-9
    value, left = spline.call_and_ladj(spline.x - near)
    other, right = spline.call_and_ladj(spline.x + near)
    assert torch.allclose(left, right, atol=1e-6)
    assert torch.allclose(value, other, atol=1e-7)
    assert torch.allclose(right.exp()[:-1], spline.slopes[:-1], atol=1e-6)
    out = torch.tensor([-100.0, -3.01, 3.01, 100.0]).double()
    for way in (spline.call_and_ladj, spline.inverse_and_ladj):
        y, ladj = way(out)
        assert torch.equal(y, out)
        assert torch.equal(ladj, torch.zeros(4).double())


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_family_broadcasts_its_parameters(family):
    params = torch.randn(3, family.parameters)
    x = torch.randn(5, 3)
    y = family(params)(x)
    for i in range(3):
        assert torch.allclose(y[:, i], family(params[i])(x[:, i]), atol=1e-6)


def test_affine_is_scale_and_shift():
    y, ladj = Affine(bound=100.0)(torch.tensor([0.01, 3.0]).double()).call_and_ladj(
        torch.tensor(2.0).double()
    )
    assert y.item() == pytest.approx(2 * torch.tensor(0.01).exp().item() + 3, abs=1e-6)
    assert ladj.item() == pytest.approx(0.01, abs=1e-6)
    assert Affine(bound=2.0)(torch.tensor([1e6, 0.0])).log_scale.item() == pytest.approx(2.0)
