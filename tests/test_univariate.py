"""Increasing maps of one variable: the laws of every family, and families made of families."""

import math

import pytest
import torch
from torch.distributions import constraints
from univariate_cases import FAMILIES, LINE

from pyrogen.transforms import Affine, Autoregressive, Coupling, RationalQuadratic, ShiftScale
from pyrogen.transforms.monotone import LogisticMixture
from pyrogen.transforms.spline import CircularSpline
from pyrogen.transforms.tails import HeavyTails
from pyrogen.transforms.univariate import Inverted, PerFeature, Stacked


@pytest.fixture(params=FAMILIES.values(), ids=FAMILIES)
def family(request):
    return request.param


def points(n, dtype=torch.float32):
    return (3 * torch.randn(n, dtype=dtype)).clamp(-3.1, 3.1)  # within every domain


def apart(a, b, family):
    """Distance, on the circle where that is the domain."""
    gap = (a - b).abs()
    return torch.minimum(gap, 2 * math.pi - gap) if isinstance(family, CircularSpline) else gap


@pytest.mark.parametrize(
    ("dtype", "places", "nats"), [(torch.float32, 3e-5, 1e-4), (torch.float64, 1e-12, 1e-12)]
)
def test_both_ways_undo_each_other(family, dtype, places, nats):
    x = points(10_000, dtype)
    scale = 0.7 if isinstance(family, Stacked) else 1.0  # errors of three layers add up
    bijection = family(scale * torch.randn(len(x), family.parameters, dtype=dtype))
    for there, back in (
        (bijection.call_and_ladj, bijection.inverse_and_ladj),
        (bijection.inverse_and_ladj, bijection.call_and_ladj),
    ):
        y, ladj = there(x)
        again, other = back(y)
        assert y.dtype == ladj.dtype == dtype
        assert apart(again, x, family).max() <= places
        assert (ladj + other).abs().max() <= nats


@pytest.mark.parametrize("scale", [100.0, 1e4])
def test_nothing_breaks_at_any_scale(family, scale):
    x = points(2_000).requires_grad_()
    params = (scale * torch.randn(len(x), family.parameters)).requires_grad_()
    bijection = family(params)
    for out in (*bijection.call_and_ladj(x), *bijection.inverse_and_ladj(x)):
        assert out.isfinite().all()
        for grad in slopes(out, params, x):
            assert grad.isfinite().all()


def slopes(out, *inputs):
    zero = sum(0 * v.sum() for v in inputs)  # where a slope is constant
    return torch.autograd.grad(out.sum() + zero, inputs, retain_graph=True)


def test_log_determinant_is_that_of_autograd(family):
    x = points(50, torch.float64).requires_grad_()
    bijection = family(torch.randn(len(x), family.parameters, dtype=torch.float64))
    for way in (bijection.call_and_ladj, bijection.inverse_and_ladj):
        y, ladj = way(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        assert torch.allclose(ladj, slope.log(), atol=1e-7)


def test_second_derivatives_are_exact_both_ways(family):
    """In the point and in the parameters, against central differences of the first."""
    torch.manual_seed(1)
    start = torch.cat([torch.randn(family.parameters), torch.tensor([0.7])]).double()

    for way in ("call_and_ladj", "inverse_and_ladj"):

        def total(v, way=way):
            y, ladj = getattr(family(v[:-1]), way)(v[-1])
            return y.sin() + ladj

        hessian = torch.autograd.functional.hessian(total, start)

        def slope(v, total=total):
            return torch.autograd.functional.jacobian(total, v)

        step = 1e-5 * torch.eye(len(start)).double()
        expected = torch.stack([(slope(start + h) - slope(start - h)) / 2e-5 for h in step])
        assert torch.allclose(hessian, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("layer", [Autoregressive, Coupling], ids=lambda c: c.__name__)
def test_hessian_through_a_layer_is_exact_both_ways(family, layer):
    module = layer(3, elementwise=family, hidden=(8,)).double()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.5)
    x = torch.tensor([0.3, -0.4, 0.7]).double()
    for way in ("call_and_ladj", "inverse_and_ladj"):

        def total(v, way=way):
            y, ladj = getattr(module(), way)(v)
            return ladj - 0.5 * y.square().sum()

        def slope(v, total=total):
            return torch.autograd.functional.jacobian(total, v)

        hessian = torch.autograd.functional.hessian(total, x)
        step = 1e-5 * torch.eye(3).double()
        expected = torch.stack([(slope(x + h) - slope(x - h)) / 2e-5 for h in step])
        assert torch.allclose(hessian, expected, atol=1e-6, rtol=1e-6)
        assert torch.allclose(hessian, hessian.T, atol=1e-8)


def test_parameters_of_zero_give_the_identity(family):
    if isinstance(family, HeavyTails):
        pytest.skip("power-law tails are never Gaussian")
    x = points(200, torch.float64)
    y, ladj = family(torch.zeros(family.parameters).double()).inverse_and_ladj(x)
    mixed = any(isinstance(f, LogisticMixture) for f in parts(family))
    assert (y - x).abs().max() <= (0.17 if mixed else 1e-12)
    assert ladj.abs().max() <= (0.13 if mixed else 1e-12)


def parts(family):
    if isinstance(family, Stacked):
        return [p for f in family.families for p in parts(f)]
    return parts(family.family) if isinstance(family, Inverted) else [family]


def test_every_parameter_moves_from_zero(family):
    params = torch.zeros(family.parameters).double().requires_grad_()
    x = torch.linspace(-4.9, 4.9, 60).double() ** 3 / 25 + 0.05
    optimizer = torch.optim.Adam([params], 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        y, ladj = family(params).inverse_and_ladj(x)
        (0.5 * y.square() - ladj).mean().backward()
        optimizer.step()
    assert params.grad.count_nonzero() == len(params)
    twins = len(params) - len(params.grad.unique())
    assert twins == 0  # of parameters that would stay equal for ever


def test_family_broadcasts_its_parameters(family):
    params = torch.randn(3, family.parameters)
    x = points((5, 3))
    bijection = family(params)
    for way in ("call_and_ladj", "inverse_and_ladj"):
        y, ladj = getattr(bijection, way)(x)
        assert y.shape == ladj.shape == (5, 3)
        one, _ = getattr(bijection, way)(x[0, 0])
        assert one.shape == (3,)
        for i in range(3):
            assert torch.allclose(y[:, i], getattr(family(params[i]), way)(x[:, i])[0], atol=2e-5)


def test_family_can_be_mapped_over(family):
    params = torch.randn(4, family.parameters).double()
    x = points(4, torch.float64)
    for way in ("call_and_ladj", "inverse_and_ladj"):
        mapped = torch.vmap(lambda p, x, way=way: getattr(family(p), way)(x))(params, x)
        for a, b in zip(mapped, getattr(family(params), way)(x), strict=True):
            assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("family", LINE.values(), ids=LINE)
def test_tails_go_on_to_the_ends_of_the_world(family):
    x = torch.tensor([-1e3, 1e3]).requires_grad_()
    params = torch.randn(family.parameters)
    y, ladj = family(params).inverse_and_ladj(x)
    assert y.isfinite().all()
    assert ladj.isfinite().all()
    assert slopes(ladj, x)[0].isfinite().all()
    assert torch.allclose(family(params)(y.detach()), x, rtol=1e-4)


def test_affine_is_scale_and_shift():
    y, ladj = Affine(bound=100.0)(torch.tensor([0.01, 3.0]).double()).call_and_ladj(
        torch.tensor(2.0).double()
    )
    assert y.item() == pytest.approx(2 * torch.tensor(0.01).exp().item() + 3, abs=1e-6)
    assert ladj.item() == pytest.approx(0.01, abs=1e-6)
    affine = Affine(bound=2.0)(torch.tensor([1e6, 0.0]))
    assert isinstance(affine, ShiftScale)
    assert affine.log_scale.item() == pytest.approx(2.0)


# Families made of families


def test_inverted_swaps_the_ways():
    family = RationalQuadratic()
    params, x = torch.randn(5, family.parameters), torch.randn(5)
    turned = Inverted(family)(params)
    for a, b in zip(turned.call_and_ladj(x), family(params).inverse_and_ladj(x), strict=True):
        assert torch.equal(a, b)


def test_stacked_applies_its_first_family_first():
    family = Stacked(Affine(), RationalQuadratic())
    params, x = torch.randn(5, family.parameters), torch.randn(5)
    assert family.parameters == 2 + 23
    middle, first = Affine()(params[:, :2]).call_and_ladj(x)
    expected, second = RationalQuadratic()(params[:, 2:]).call_and_ladj(middle)
    y, ladj = family(params).call_and_ladj(x)
    assert torch.equal(y, expected)
    assert torch.equal(ladj, first + second)


def test_each_feature_gets_its_own_family():
    families = [CircularSpline(), Affine(), RationalQuadratic(), CircularSpline(), Affine()]
    family = PerFeature(families)
    assert family.parameters == 25
    params, x = torch.randn(7, 5, 25), points((7, 5))
    for way in ("call_and_ladj", "inverse_and_ladj"):
        y, ladj = getattr(family(params), way)(x)
        for i, own in enumerate(families):
            alone = own(params[:, i, : own.parameters])
            for a, b in zip((y, ladj), getattr(alone, way)(x[:, i]), strict=True):
                assert torch.equal(a[:, i], b)


def test_each_feature_keeps_its_domain():
    bijection = PerFeature([CircularSpline(), Affine()])(torch.randn(2, 25))
    x = torch.tensor([[3.0, 100.0], [4.0, 100.0]])
    assert bijection.domain.check(x).tolist() == [[True, True], [False, True]]
    assert bijection.codomain.check(bijection(x[:1])).all()


def test_circular_beside_straight_in_one_coupling():
    layer = Coupling(4, elementwise=PerFeature([CircularSpline(), RationalQuadratic()]))
    torch.nn.init.normal_(layer.net[-1].weight)
    x = points((6, 4)).double()
    bijection = layer.double()()
    y, ladj = bijection.call_and_ladj(x)
    assert (y != x).any(0).tolist() == [False, False, True, True]
    back, other = bijection.inverse_and_ladj(y)
    assert torch.allclose(back, x)
    assert torch.allclose(ladj, -other)
    around = x.clone()
    around[:, 2] += 2 * math.pi
    assert torch.allclose(bijection(around), y)


ERRORS = [
    (lambda: Affine(bound=-1.0), ValueError, r"positive bound, got -1.*Try"),
    (lambda: Stacked(), ValueError, r"Stacked expected at least one family, got none"),
    (lambda: PerFeature([Affine]), TypeError, r"families such as Affine\(\), got ABCMeta"),
    (
        lambda: PerFeature([Affine()] * 3)(torch.zeros(2, 2)),
        ValueError,
        r"holds 3 families, got parameters of 2 features\. Give a family",
    ),
]


@pytest.mark.parametrize(("call", "error", "match"), ERRORS)
def test_refusals_say_what_to_do(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_families_of_the_line_say_so():
    for family in LINE.values():
        assert family(torch.zeros(family.parameters)).domain is constraints.real


def test_bounded_stays_at_its_bound():
    from pyrogen.transforms.univariate import bounded

    x = torch.tensor([-1e30, 1e19, 1e20, 1e38])
    assert torch.allclose(bounded(x, 3.0), torch.tensor([-3.0, 3.0, 3.0, 3.0]))
