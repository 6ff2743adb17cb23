"""Rational-quadratic splines: precision, smoothness, and the formula of the paper."""

import math

import pytest
import torch

from pyrogen.transforms.spline import BoundedSpline, CircularSpline, RationalQuadratic

SPLINES = {
    "line": RationalQuadratic(bins=5, bound=3.0),
    "interval": BoundedSpline(bins=5, bound=3.0),
    "circle": CircularSpline(bins=5),
}


@pytest.fixture(params=SPLINES.values(), ids=SPLINES)
def family(request):
    return request.param


def squashed(x, limit):
    x = 0.6 * x
    return (x / (1 + ((1 + x**2).sqrt() - 1) / limit)).exp()


def knots(family, params):
    """Places, heights and slopes at the knots, computed anew from what the docstring says."""
    bins = family.bins
    bound = math.pi if isinstance(family, CircularSpline) else family.bound
    limit = math.log(100)
    sizes = squashed(params[: 2 * bins], limit / 2)
    ends = [
        bound * (2 * torch.cat([torch.zeros(1).to(s), s.cumsum(0) / s.sum()]) - 1)
        for s in sizes.split(bins)
    ]
    slopes = squashed(params[2 * bins :], limit)
    one = torch.ones(1).to(slopes)
    if isinstance(family, RationalQuadratic):
        slopes = torch.cat([one, slopes, one])
    if isinstance(family, CircularSpline):
        slopes = torch.cat([slopes[:bins], slopes[:1]])
    return *ends, slopes


@pytest.mark.parametrize(
    ("dtype", "places", "nats"), [(torch.float32, 3e-5, 1e-4), (torch.float64, 1e-12, 1e-12)]
)
def test_spline_keeps_its_precision(dtype, places, nats):
    family = RationalQuadratic()
    spline = family(torch.randn(200_000, family.parameters, dtype=dtype))
    x = 3 * torch.randn(200_000, dtype=dtype)
    for there, back in (
        (spline.call_and_ladj, spline.inverse_and_ladj),
        (spline.inverse_and_ladj, spline.call_and_ladj),
    ):
        y, ladj = there(x)
        again, other = back(y)
        assert (again - x).abs().max() <= places
        assert (ladj + other).abs().max() <= nats


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_spline_has_no_nan_at_any_scale(family, scale):
    params = scale * torch.randn(20_000, family.parameters)
    x = torch.cat([3 * torch.randn(19_993), torch.tensor([-5.0, 5.0, -3.0, 3.0, 0.0, -1e6, 1e6])])
    params.requires_grad_()
    x.requires_grad_()
    spline = family(params)
    y, ladj = spline.call_and_ladj(x)
    back, inverse_ladj = spline.inverse_and_ladj(x)
    for out in (y, ladj, back, inverse_ladj):
        assert out.isfinite().all()
        for grad in torch.autograd.grad(out.sum(), (params, x), retain_graph=True):
            assert grad.isfinite().all()


def test_spline_inverts_at_any_scale():
    family = RationalQuadratic()
    spline = family(100 * torch.randn(20_000, family.parameters))
    x = 3 * torch.randn(20_000)
    assert (spline.inv(spline(x)) - x)[x.abs() < 6].abs().max() < 1e-3


def test_spline_is_the_rational_quadratic_of_the_paper(family):
    """Against equations 4 and 5 of Durkan et al., written out bin by bin."""
    params = torch.randn(family.parameters).double()
    if isinstance(family, CircularSpline):
        params[-1] = 0
    spline = family(params)
    knots_x, knots_y, slopes = knots(family, params)
    for k in range(family.bins):
        x = torch.linspace(knots_x[k], knots_x[k + 1], 7).double()[1:-1]
        xi = (x - knots_x[k]) / (knots_x[k + 1] - knots_x[k])
        rise = knots_y[k + 1] - knots_y[k]
        s = rise / (knots_x[k + 1] - knots_x[k])
        d0, d1 = slopes[k], slopes[k + 1]
        below = s + (d1 + d0 - 2 * s) * xi * (1 - xi)
        expected = knots_y[k] + rise * (s * xi**2 + d0 * xi * (1 - xi)) / below
        slope = s**2 * (d1 * xi**2 + 2 * s * xi * (1 - xi) + d0 * (1 - xi) ** 2) / below**2
        y, ladj = spline.inverse_and_ladj(x)
        assert torch.allclose(y, expected, atol=1e-12)
        assert torch.allclose(ladj, slope.log(), atol=1e-12)


def test_spline_is_smooth_at_its_knots(family):
    params = torch.randn(family.parameters).double()
    if isinstance(family, CircularSpline):
        params[-1] = 0
    spline = family(params)
    knots_x, knots_y, slopes = knots(family, params)
    inner = slice(None) if isinstance(family, RationalQuadratic) else slice(1, -1)
    x, near = knots_x[inner], 1e-9
    value, left = spline.inverse_and_ladj(x - near)
    other, right = spline.inverse_and_ladj(x + near)
    assert torch.allclose(left, right, atol=1e-6)
    assert torch.allclose(value, other, atol=1e-7)
    assert torch.allclose(value, knots_y[inner], atol=1e-7)
    assert torch.allclose(right.exp(), slopes[inner], atol=1e-6)


def test_slopes_are_right_where_the_discriminant_turns():
    """Untrained, in the middle of a bin, the two forms of the root meet."""
    family = RationalQuadratic(bins=4, bound=4.0)
    y = torch.tensor([-3.0, -1.0, 1.0, 3.0]).double().requires_grad_()
    x, ladj = family(torch.zeros(11).double()).call_and_ladj(y)
    (slope,) = torch.autograd.grad(x.sum(), y, retain_graph=True)
    assert torch.allclose(slope, torch.ones(4).double(), atol=1e-14)
    (slope,) = torch.autograd.grad(ladj.sum(), y)
    assert torch.allclose(slope, torch.zeros(4).double(), atol=1e-14)


def test_beyond_its_bound_the_spline_is_the_identity():
    spline = SPLINES["line"](torch.randn(14).double())
    out = torch.tensor([-100.0, -3.01, -3.0, 3.0, 3.01, 100.0]).double()
    for way in (spline.call_and_ladj, spline.inverse_and_ladj):
        y, ladj = way(out)
        assert torch.equal(y, out)
        assert torch.equal(ladj, torch.zeros(6).double())


def test_interval_is_mapped_onto_itself_with_free_ends():
    family = BoundedSpline(bins=5, bound=3.0)
    params = torch.randn(100, family.parameters).double()
    spline = family(params)
    ends = torch.tensor([[-3.0], [3.0]]).double()
    assert torch.equal(spline(ends), ends.expand(2, 100))
    assert torch.equal(spline.inv(ends), ends.expand(2, 100))
    limit = math.log(100)
    for way, sign in ((spline.call_and_ladj, -1), (spline.inverse_and_ladj, 1)):
        ladj = sign * way(ends)[1]
        for end, raw in zip(ladj, (params[:, 10], params[:, 15]), strict=True):
            assert torch.allclose(end, squashed(raw, limit).log(), atol=1e-12)
    x = 6 * torch.rand(100).double() - 3
    assert spline.domain.check(x).all()
    assert spline.codomain.check(spline(x)).all()
    assert not spline.domain.check(torch.tensor(3.1))


def test_beyond_an_interval_the_slope_of_its_end_goes_on():
    family = BoundedSpline(bins=5, bound=3.0)
    spline = family(torch.randn(family.parameters).double())
    x = torch.tensor([-3.0, -3.1, 3.0, 3.1]).double()
    for way in (spline.call_and_ladj, spline.inverse_and_ladj):
        y, ladj = way(x)
        assert torch.equal(ladj[::2], ladj[1::2])
        assert torch.allclose((y[1::2] - y[::2]) / (x[1::2] - x[::2]), ladj[::2].exp())


def test_bounded_spline_pushes_uniform_noise_to_a_density_of_mass_one():
    family = BoundedSpline(bins=4, bound=1.0)
    spline = family(torch.randn(family.parameters).double())
    x = (torch.arange(20_000).double() + 0.5) / 10_000 - 1
    mass = spline.inverse_and_ladj(x)[1].exp().mean()
    assert mass.item() == pytest.approx(1, abs=1e-6)
    assert spline.inverse_and_ladj(x)[1][[0, -1]].exp().min() > 0


def test_circle_has_no_seam():
    family = CircularSpline(bins=5)
    spline = family(torch.randn(50, family.parameters).double())
    near = torch.tensor([[-math.pi + 1e-9], [math.pi - 1e-9]]).double()
    for way in (spline.call_and_ladj, spline.inverse_and_ladj):
        y, ladj = way(near)
        gap = torch.remainder(y[0] - y[1] + 1, 2 * math.pi) - 1
        assert gap.abs().max() < 1e-5
        assert torch.allclose(ladj[0], ladj[1], atol=1e-5)
        around = way(near + 6 * math.pi)
        assert torch.allclose(torch.cos(around[0] - y), torch.ones(2, 50).double())
        assert torch.allclose(around[1], ladj, atol=1e-6)
        assert spline.codomain.check(y).all()


def test_circle_can_turn_all_the_way():
    family = CircularSpline(bins=3)
    x = torch.linspace(-3, 3, 20).double()
    for turn in (0.5, 3.0, -100.0):
        params = torch.zeros(family.parameters).double()
        params[-1] = turn
        y, ladj = family(params).call_and_ladj(x)
        assert torch.allclose(torch.cos(y - x - turn), torch.ones(20).double())
        assert torch.allclose(ladj, torch.zeros(20).double(), atol=1e-12)


def test_density_on_the_circle_has_mass_one():
    family = CircularSpline(bins=4)
    spline = family(torch.randn(family.parameters).double())
    x = 2 * math.pi * ((torch.arange(20_000).double() + 0.5) / 20_000) - math.pi
    assert spline.inverse_and_ladj(x)[1].exp().mean().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_spline_is_one_graph(family, monkeypatch):
    kind = torch.distributions.Distribution  # tracing switches validation off for good
    monkeypatch.setattr(kind, "_validate_args", kind._validate_args)
    params, x = torch.randn(50, family.parameters), torch.randn(50)

    def both(p, x):
        return *family(p).call_and_ladj(x), *family(p).inverse_and_ladj(x)

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    for a, b in zip(compiled(params, x), both(params, x), strict=True):
        assert torch.allclose(a, b)


ERRORS = [
    (lambda: RationalQuadratic(bins=1), r"RationalQuadratic expected 2 to 256 bins, got 1"),
    (lambda: CircularSpline(bins=1000), r"CircularSpline expected 2 to 256 bins, got 1000"),
    (lambda: BoundedSpline(bound=0), r"BoundedSpline expected a positive bound, got 0\. Try"),
    (lambda: RationalQuadratic(bound=math.inf), r"positive bound, got inf"),
]


@pytest.mark.parametrize(("call", "match"), ERRORS)
def test_refusals_say_what_to_do(call, match):
    with pytest.raises(ValueError, match=match):
        call()
