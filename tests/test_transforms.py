"""Bijections: inverses, log-determinants and derivatives against autograd and other algorithms."""

import copy
import io

import pyro.distributions.transforms as pt
import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian
from torch.distributions import transforms as tt

from pyrogen.transforms import (
    ActNorm,
    Affine,
    Autoregressive,
    Bijection,
    Composed,
    Coupling,
    Elementwise,
    LULinear,
    Permutation,
    RationalQuadratic,
    Wrapped,
)

SPLINE = RationalQuadratic(bins=5, bound=3.0)
LAYERS = {
    "affine": lambda context: Elementwise(4, context),
    "spline": lambda context: Elementwise(4, context, elementwise=SPLINE),
    "affine coupling": lambda context: Coupling(4, context, hidden=(16,)),
    "spline coupling": lambda context: Coupling(4, context, elementwise=SPLINE, hidden=(16,)),
    "flipped coupling": lambda context: Coupling(4, context, flip=True, hidden=(16,)),
    "affine autoregressive": lambda context: Autoregressive(4, context, hidden=(16, 16)),
    "spline autoregressive": lambda context: Autoregressive(
        4, context, elementwise=SPLINE, order=(2, 0, 3, 1), hidden=(16, 16)
    ),
    "permutation": lambda context: Permutation((2, 0, 3, 1)),
    "linear": lambda context: LULinear(4),
    "actnorm": lambda context: ActNorm(4).eval(),
}


def awake(module):
    """Draw every parameter anew: layers start as the identity, where much would hold trivially."""
    for p in module.parameters():
        bound = p.shape[-1] ** -0.5 if p.ndim == 2 else 0.5
        nn.init.uniform_(p, -bound, bound)
    return module.double()


@pytest.fixture(params=[0, 3], ids=["", "context"])
def context(request):
    return torch.randn(request.param).double() if request.param else None


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request, context):
    return awake(request.param(0 if context is None else len(context)))


def test_inverse_returns_to_the_start(layer, context):
    f = layer(context)
    x = 2 * torch.randn(50, 4).double()
    y, ladj = f.call_and_ladj(x)
    back, inverse_ladj = f.inverse_and_ladj(y.clone())
    assert torch.allclose(back, x, atol=1e-12)
    assert torch.allclose(inverse_ladj, -ladj, atol=1e-11)
    assert torch.allclose(f(f.inv(x)), x, atol=1e-12)
    assert not torch.allclose(y, x)


def test_log_determinant_is_that_of_autograd(layer, context):
    f = layer(context)
    for x in 2 * torch.randn(5, 4).double():
        y, ladj = f.call_and_ladj(x)
        expected = torch.linalg.slogdet(jacobian(f, x)).logabsdet
        assert ladj.item() == pytest.approx(expected.item(), abs=1e-10)
        expected = torch.linalg.slogdet(jacobian(f.inv, y)).logabsdet
        assert f.inv.call_and_ladj(y)[1].item() == pytest.approx(expected.item(), abs=1e-10)
        assert f.log_abs_det_jacobian(x, y) == ladj


def test_derivatives_of_both_orders_match_finite_differences(layer, context):
    f = layer(context)
    x = torch.randn(2, 4).double().requires_grad_()
    weights = torch.arange(1.0, 5.0)
    for way in (f.call_and_ladj, f.inverse_and_ladj):

        def total(x, way=way):  # one output: gradcheck passes over those without gradient
            y, ladj = way(x)
            return (y * weights).sum(-1) + 3 * ladj

        assert torch.autograd.gradcheck(total, x, atol=1e-6)
        assert torch.autograd.gradgradcheck(total, x, atol=1e-6)


def test_parameters_have_the_gradient_of_finite_differences(layer, context):
    x = torch.randn(5, 4).double()
    weights = torch.arange(1.0, 5.0)
    for way in ("call_and_ladj", "inverse_and_ladj"):

        def total(way=way):
            y, ladj = getattr(layer(context), way)(x)
            return ((y * weights).sum(-1) + 3 * ladj).sum()

        for p in layer.parameters():
            (grad,) = torch.autograd.grad(total(), p)
            direction = torch.randn_like(p)
            with torch.no_grad():
                p.add_(1e-6 * direction)
                up = total()
                p.sub_(2e-6 * direction)
                slope = (up - total()) / 2e-6
            assert torch.allclose((grad * direction).sum(), slope, rtol=1e-6, atol=1e-5)


def test_inverse_is_a_bijection_with_the_two_swapped(layer, context):
    f = layer(context)
    assert isinstance(f.inv, Bijection)
    assert f.inv.inv is f
    x = torch.randn(3, 4).double()
    for a, b in zip(f.inverse_and_ladj(x), f.inv.call_and_ladj(x), strict=True):
        assert torch.equal(a, b)


def test_leading_shape_does_not_matter(layer, context):
    x = torch.randn(6, 4).double()
    f = layer(context)
    assert torch.allclose(f(x.reshape(2, 3, 4)).reshape(6, 4), f(x), atol=1e-12)
    assert torch.allclose(f(x[0]), f(x)[0], atol=1e-12)
    if context is not None:
        wide = layer(context.expand(6, 1, -1))
        assert wide.forward_shape((4,)) == (6, 1, 4) or isinstance(
            layer, Permutation | LULinear | ActNorm
        )
        assert torch.allclose(wide(x.reshape(6, 1, 4)).reshape(6, 4), f(x), atol=1e-12)
        assert wide(x).shape in {(6, 6, 4), (6, 4)}


@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")  # of torch.func itself
def test_vmap_agrees_with_the_batch(layer, context):
    f = layer(context)
    x = torch.randn(5, 4).double()
    for way in (f.call_and_ladj, f.inverse_and_ladj):
        for a, b in zip(torch.func.vmap(way)(x), way(x), strict=True):
            assert torch.allclose(a, b, atol=1e-12)
    with torch.no_grad():  # the early stop of a draw must not cut derivatives off
        forward = torch.func.vmap(torch.func.jacfwd(f))(x)
    reverse = torch.func.vmap(torch.func.jacrev(f))(x)
    assert torch.allclose(forward, reverse, atol=1e-12)


def test_layers_start_as_the_identity():
    x = torch.randn(5, 4)
    for name in set(LAYERS) - {"permutation"}:
        y, ladj = LAYERS[name](0)().call_and_ladj(x)
        assert torch.allclose(y, x, atol=1e-6)
        assert torch.allclose(ladj, torch.zeros(5), atol=1e-6)


def test_state_survives_a_file_and_a_copy(layer, context):
    expected = layer(context)(torch.ones(4).double())
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin = awake(copy.deepcopy(layer))
    if list(layer.parameters()):
        assert not torch.equal(twin(context)(torch.ones(4).double()), expected)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(context)(torch.ones(4).double()), expected)


# Coupling


def test_coupling_moves_one_half_and_reads_the_other():
    for flip in (False, True):
        f = awake(Coupling(5, flip=flip))()
        moved = torch.arange(5) < 3 if flip else torch.arange(5) >= 2
        d = jacobian(f, torch.randn(5).double())
        assert torch.equal(d[~moved], torch.eye(5).double()[~moved])
        assert torch.equal(d[moved][:, moved].count_nonzero(1), torch.ones(3).long())
        assert (d[moved][:, ~moved] != 0).all()


# Linear


def test_linear_is_its_matrix():
    layer = awake(LULinear(4))
    matrix = jacobian(layer(), torch.zeros(4).double())
    lower, upper = layer.entries.tril(-1) + torch.eye(4), layer.entries.triu(1)
    expected = lower @ (upper + layer.log_diagonal.exp().diag())
    assert torch.allclose(matrix, expected, atol=1e-12)
    assert torch.allclose(layer()(torch.zeros(4).double()), layer.bias)


def test_permutations():
    x = torch.arange(5.0)
    assert torch.equal(Permutation((3, 0, 1, 4, 2))()(x), torch.tensor([3.0, 0, 1, 4, 2]))
    assert torch.equal(Permutation.reverse(5)()(x), x.flip(0))
    layer = Permutation.random(50)
    assert torch.equal(layer()(torch.arange(50.0)).sort().values, torch.arange(50.0))
    assert set(layer.state_dict()) == {"order", "undo"}


def test_actnorm_starts_from_the_first_training_batch_only():
    layer = ActNorm(2)
    data = 3 + 5 * torch.randn(2, 100, 2)
    layer.eval()().inv(data)
    layer.train()()(data)  # from noise to data says nothing about the data
    assert not layer.ready
    x = layer().inv(data).flatten(0, 1)
    assert layer.ready
    assert torch.allclose(x.mean(0), torch.zeros(2), atol=1e-5)
    assert torch.allclose(x.std(0), torch.ones(2), atol=1e-5)

    before = copy.deepcopy(layer.state_dict())
    layer().inv(100 * data)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    twin = ActNorm(2)
    twin.load_state_dict(before)
    assert torch.equal(twin().inv(data), layer().inv(data))


def test_actnorm_sends_gradients_through_the_first_batch():
    layer = ActNorm(2)
    layer().inverse_and_ladj(torch.randn(8, 2))[1].sum().backward()
    assert torch.allclose(layer.log_scale.grad, torch.full((2,), -8.0))


# Composition and other people's transforms


def test_composition_adds_log_determinants_over_event_dimensions():
    parts = [awake(LULinear(3))(), tt.StickBreakingTransform(), tt.ExpTransform()]
    f = Composed(parts)
    assert (f.domain.event_dim, f.codomain.event_dim) == (1, 1)
    assert f.forward_shape((7, 3)) == (7, 4)
    assert f.inverse_shape((7, 4)) == (7, 3)
    assert f.inv.forward_shape((7, 4)) == (7, 3)
    x = torch.randn(5, 3).double()
    y, ladj = f.call_and_ladj(x)
    assert torch.allclose(y, parts[2](parts[1](parts[0](x))))
    back, inverse_ladj = f.inverse_and_ladj(y)
    assert torch.allclose(back, x, atol=1e-8)
    assert torch.allclose(inverse_ladj, -ladj, atol=1e-8)
    assert torch.allclose(ladj, tt.ComposeTransform(parts).log_abs_det_jacobian(x, y), atol=1e-8)
    assert Composed([tt.ExpTransform()]).call_and_ladj(x)[1].shape == (5, 3)


@pytest.mark.parametrize("way", ["call_and_ladj", "inverse_and_ladj"])
def test_wrapped_pyro_transform_is_never_stale(way):
    theirs = pt.spline_coupling(4)
    x = torch.randn(3, 4)
    ask = getattr(Wrapped(theirs), way)
    before, _ = ask(x)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3)
    after, ladj = ask(x)
    fresh, fresh_ladj = getattr(Wrapped(theirs), way)(x.clone())
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.equal(after, fresh)
    assert torch.equal(ladj, fresh_ladj)


def test_bijections_fit_torch_composition():
    layer = awake(Coupling(4))
    chain = tt.ComposeTransform([layer(), tt.ExpTransform(), layer()], cache_size=1)
    x = torch.randn(3, 4).double()
    expected = torch.linalg.slogdet(jacobian(chain, x[0])).logabsdet
    assert torch.allclose(chain.log_abs_det_jacobian(x, chain(x))[0], expected)
    assert torch.allclose(chain.inv(chain(x).clone()), x)


ERRORS = [
    (lambda: Coupling(1), ValueError, r"at least 2 features, got 1\. For one feature use"),
    (lambda: Coupling(2, 3)(), ValueError, r"context=3, got 0 context features"),
    (lambda: Elementwise(2)(torch.ones(3)), ValueError, r"context=0, got 3 context features"),
    (lambda: Autoregressive(2, 1)(), ValueError, r"Autoregressive was built with context=1"),
    (lambda: Autoregressive(3, order=(0, 1, 1)), ValueError, r"each of 0, ..., 2 once.*randperm"),
    (lambda: Autoregressive(3, order=(0, 1)), ValueError, r"each of 0, ..., 2 once.*\[0, 1\]"),
    (lambda: Permutation((1, 1, 0)), ValueError, r"once, got \[1, 1, 0\]. Use Permutation"),
    (lambda: Permutation((0.0, 1.0)), ValueError, r"Permutation expected each of 0"),
    (lambda: Affine(bound=0.0), ValueError, r"positive bound, got 0.0. Try 3"),
    (lambda: RationalQuadratic(bins=1), ValueError, r"2 to 256 bins, got 1"),
    (lambda: RationalQuadratic(bound=-1.0), ValueError, r"positive bound, got -1.0. Try 5"),
    (lambda: ActNorm(2)().inv(torch.ones(1, 2)), ValueError, r"at least 2 data, got 1"),
    (lambda: ActNorm(2)().inv(torch.ones(3, 2)), ValueError, r"got 2 constant"),
    (lambda: ActNorm(2)().inv(torch.ones(2)), ValueError, r"batch of shape \(\*batch, 2\)"),
    (lambda: Wrapped(tt.AbsTransform()), ValueError, r"bijective transform, got AbsTransform"),
    (lambda: Composed([]), ValueError, r"at least one transform, got none"),
]


@pytest.mark.parametrize(("call", "error", "match"), ERRORS)
def test_refusals_say_what_to_do(call, error, match):
    with pytest.raises(error, match=match):
        call()
