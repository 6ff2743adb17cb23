"""Reflections and per-channel normalisation, against products of matrices and by hand."""

import copy
import math

import pytest
import torch
from torch.autograd.functional import jacobian
from torch.distributions import constraints

from pyrogen.testing import TRANSFORM_CHECKS
from pyrogen.transforms.linear import ActNorm, Householder, LULinear, Reflections


def product(vectors):
    """The product of the mirrors as matrices, the first one applied first."""
    whole = torch.eye(vectors.shape[-1]).to(vectors)
    for v in vectors:
        whole = (torch.eye(len(v)).to(v) - 2 * torch.outer(v, v) / (v @ v)) @ whole
    return whole


@pytest.mark.parametrize("check", TRANSFORM_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("reflections", [1, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_householder_is_a_transform(check, reflections, dtype):
    check(Householder(4, reflections).to(dtype), torch.randn(6, 4, dtype=dtype))


@pytest.mark.parametrize("reflections", [1, 2, 4, 9])
def test_reflections_are_the_product_of_mirrors(reflections):
    vectors = torch.randn(reflections, 4).double()
    f = Reflections(vectors)
    x = torch.randn(5, 4).double()
    matrix = product(vectors)
    assert torch.allclose(f(x), x @ matrix.T, atol=1e-14)
    assert torch.allclose(f.inv(x), x @ matrix, atol=1e-14)
    assert torch.linalg.det(jacobian(f, x[0])).item() == pytest.approx((-1) ** reflections)
    assert (f.call_and_ladj(x)[1] == 0).all()
    assert torch.allclose(f.columns(3), matrix.T[:3], atol=1e-14)


def test_one_mirror_by_hand():
    f = Reflections(torch.tensor([[3.0, 4.0]]))
    assert torch.allclose(f(torch.tensor([3.0, 4.0])), torch.tensor([-3.0, -4.0]))
    assert torch.allclose(f(torch.tensor([-4.0, 3.0])), torch.tensor([-4.0, 3.0]))


def test_lengths_of_the_normals_do_not_matter():
    vectors = torch.randn(3, 4).double()
    x = torch.randn(5, 4).double()
    for scale in (1e-6, 1e6):
        assert torch.allclose(Reflections(scale * vectors)(x), Reflections(vectors)(x), atol=1e-13)


def test_a_normal_of_zeros_reflects_nothing_and_has_a_gradient():
    vectors = torch.tensor([[0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    y = Reflections(vectors)(torch.tensor([1.0, 2.0]))
    assert y.tolist() == [-1.0, 2.0]
    y.square().sum().backward()
    assert vectors.grad.isfinite().all()


def test_each_datum_can_have_its_own_mirrors():
    vectors = torch.randn(5, 1, 2, 3).double()
    x = torch.randn(7, 3).double()
    y, ladj = Reflections(vectors).call_and_ladj(x)
    assert y.shape == (5, 7, 3)
    assert ladj.shape == (5, 7)
    assert torch.allclose(y[3], Reflections(vectors[3, 0])(x))
    assert torch.allclose(Reflections(vectors).inv(y), x.expand(5, 7, 3))
    assert Reflections(vectors).columns(2).shape == (5, 1, 2, 3)
    mapped = torch.vmap(lambda v, x: Reflections(v)(x))(vectors[:, 0], y[:, 0])
    assert torch.allclose(mapped, Reflections(vectors[:, 0])(y[:, 0]))


def test_as_many_mirrors_as_features_reach_any_rotation():
    """The QR algorithm does it in closed form; here by gradient, from a random start."""
    torch.manual_seed(1)
    target = product(torch.randn(4, 4)).double()
    layer = Householder(4).double()
    optimizer = torch.optim.Adam(layer.parameters(), 0.1)
    for _ in range(300):
        optimizer.zero_grad()
        loss = (Reflections(layer.vectors).columns(4).T - target).square().sum()
        loss.backward()
        optimizer.step()
    assert loss < 1e-6


def test_householder_keeps_lengths_in_single_precision():
    x = torch.randn(100, 64)
    y = Householder(64)()(x)
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-5)


def test_derivatives_of_both_orders_match_finite_differences():
    vectors = torch.randn(2, 3).double().requires_grad_()
    x = torch.randn(2, 3).double().requires_grad_()
    for way in ("call_and_ladj", "inverse_and_ladj"):

        def total(v, x, way=way):
            return getattr(Reflections(v), way)(x)[0] * torch.arange(1.0, 4.0)

        assert torch.autograd.gradcheck(total, (vectors, x))
        assert torch.autograd.gradgradcheck(total, (vectors, x))


def test_factors_are_those_of_the_map():
    layer = LULinear(3).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    lower, upper, ladj = layer.factors()
    matrix = jacobian(layer(), torch.zeros(3).double())
    assert torch.allclose(lower @ upper, matrix)
    assert ladj.item() == pytest.approx(torch.linalg.slogdet(matrix).logabsdet.item())


def test_few_rows_and_many_meet_the_same_map():
    """Two thin products for few rows, one of the factors for many."""
    layer = LULinear(5).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p)
    x = torch.randn(64, 5).double()
    lower, upper, _ = layer.factors()
    expected = x @ (lower @ upper).T + layer.bias
    assert torch.allclose(layer()(x), expected)
    assert torch.allclose(layer()(x[:3]), expected[:3])


# Activation normalisation of channels


def test_channels_leave_the_first_batch_in_standard_units():
    layer = ActNorm(3, shared=2)
    scale = torch.tensor([1.0, 5.0, 0.1])[:, None, None]
    images = 2 + scale * torch.randn(4, 2, 3, 8, 6)
    x = layer().inv(images)
    assert layer.ready
    rows = x.movedim(-3, -1).reshape(-1, 3)
    assert torch.allclose(rows.mean(0), torch.zeros(3), atol=1e-5)
    assert torch.allclose(rows.std(0), torch.ones(3), atol=1e-5)
    assert torch.allclose(layer()(x), images, atol=1e-5)


def test_log_determinant_counts_every_pixel():
    layer = ActNorm(2, shared=2).double().eval()
    torch.nn.init.normal_(layer.log_scale)
    torch.nn.init.normal_(layer.shift)
    f = layer()
    assert f.domain.event_dim == f.codomain.event_dim == 3
    x = torch.randn(5, 2, 3, 4).double()
    y, ladj = f.call_and_ladj(x)
    assert ladj.shape == (5,)
    matrix = jacobian(f, x[0]).reshape(24, 24)
    assert ladj[0].item() == pytest.approx(torch.linalg.slogdet(matrix).logabsdet.item())
    assert torch.allclose(f.inverse_and_ladj(y)[1], -ladj)
    assert torch.allclose(y[0, 1, 2, 3], x[0, 1, 2, 3] * layer.log_scale[1].exp() + layer.shift[1])


def test_vectors_and_images_of_one_pixel_agree():
    data = torch.randn(50, 3) * 4 + 1
    vectors, images = ActNorm(3), ActNorm(3, shared=2)
    x = vectors().inv(data)
    assert torch.allclose(images().inv(data[..., None, None])[..., 0, 0], x)
    assert vectors.state_dict().keys() == images.state_dict().keys()
    twin = copy.deepcopy(vectors)
    twin.load_state_dict(images.state_dict())
    assert torch.allclose(twin().inv(data), x)


def test_domain_of_vectors_is_unchanged():
    assert ActNorm(3)().domain is constraints.real_vector


ERRORS = [
    (lambda: Householder(0), r"at least 1 feature and 1 reflection, got 0 and 0\. For the ident"),
    (lambda: Householder(3, 0), r"got 3 and 0"),
    (
        lambda: ActNorm(2, shared=2)().inv(torch.ones(4, 3, 5, 5)),
        r"\(\*batch, 2, height, width\), got \(4, 3, 5, 5\)",
    ),
    (lambda: ActNorm(2, shared=2)().inv(torch.ones(4, 2, 5, 5)), r"got 2 constant"),
    (lambda: ActNorm(2, shared=2)().inv(torch.ones(2, 1, 1)), r"at least 2 data, got 1"),
    (
        lambda: ActNorm(2, shared=2)().inv(torch.full((4, 2, 5, 5), math.nan)),
        r"expected finite data, got 200 NaN",
    ),
]


@pytest.mark.parametrize(("call", "match"), ERRORS)
def test_refusals_say_what_to_do(call, match):
    with pytest.raises(ValueError, match=match):
        call()
