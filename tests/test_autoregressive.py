"""Autoregressive layers against the definition: feature by feature."""

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian

from pyrogen.nets import masked_mlp
from pyrogen.transforms import Affine, Autoregressive, RationalQuadratic

FAMILIES = {"affine": Affine(), "spline": RationalQuadratic(bins=5, bound=3.0)}


def awake(module):
    """Draw every parameter anew: layers start as the identity, where much would hold trivially."""
    for p in module.parameters():
        bound = p.shape[-1] ** -0.5 if p.ndim == 2 else 0.5
        nn.init.uniform_(p, -bound, bound)
    return module.double()


@pytest.mark.parametrize("order", [None, (2, 0, 3, 1)])
def test_autoregressive_jacobian_is_full_triangular_in_its_order(order):
    f = awake(Autoregressive(4, order=order))()
    by_rank = torch.tensor(order or range(4)).argsort()
    d = jacobian(f, torch.randn(4).double())[by_rank][:, by_rank]
    assert torch.equal(d, d.tril())
    assert (d[torch.ones(4, 4).tril().bool()] != 0).all()


def test_every_masked_output_sees_the_context():
    net = masked_mlp(3, 2, 2, hidden=(16, 16)).double()
    d = jacobian(net, torch.randn(5).double()).reshape(3, 2, 5)
    assert (d[..., 3:] != 0).all()
    see = (d[..., :3] != 0).all(1)
    assert torch.equal(see, torch.ones(3, 3).tril(-1).bool())


def sequential(f, x):
    """Draw feature by feature, the definition."""
    y = torch.zeros_like(x)
    for i in range(x.shape[-1]):
        moved = f.conditioner(y)(x)
        y = torch.where(torch.arange(x.shape[-1]) == i, moved, y)
    return y, f.conditioner(y).call_and_ladj(x)[1].sum(-1)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_draw_equals_the_sequential_one(family):
    layer = awake(Autoregressive(6, elementwise=family))
    x = torch.randn(20, 6).double()
    expected = sequential(layer(), x)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for a, b in zip(layer().call_and_ladj(x), expected, strict=True):
                assert torch.allclose(a, b, atol=1e-13)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_draw_has_the_derivatives_of_the_sequential_one(family):
    layer = awake(Autoregressive(4, 2, elementwise=family, hidden=(8,)))
    x, context = torch.randn(4).double(), torch.randn(2).double()
    weights = tuple(layer.parameters())

    def one(x, context):
        y, ladj = layer(context).call_and_ladj(x)
        return (y * torch.arange(4)).sum() + ladj

    def other(x, context):
        y, ladj = sequential(layer(context), x)
        return (y * torch.arange(4)).sum() + ladj

    for a, b in zip(
        torch.autograd.grad(one(x, context), weights),
        torch.autograd.grad(other(x, context), weights),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-12)
    ours, theirs = hessian(one, (x, context)), hessian(other, (x, context))
    for i in range(2):
        for j in range(2):
            assert torch.allclose(ours[i][j], theirs[i][j], atol=1e-11)
    assert ours[0][1].abs().max() > 1e-3


def test_draw_stops_as_soon_as_nothing_changes():
    layer = Autoregressive(8, hidden=(8,))
    passes = []
    layer.net.register_forward_hook(lambda *_: passes.append(1))
    with torch.no_grad():
        layer()(torch.randn(3, 8))
        assert len(passes) == 2  # the identity: one pass, and one to see that it stays
        passes.clear()
        nn.init.normal_(layer.net[-1].weight)
        layer()(torch.randn(3, 8))
        assert 2 < len(passes) <= 8
    passes.clear()
    layer()(torch.randn(3, 8))
    assert len(passes) == 8
    passes.clear()
    layer().inv(torch.randn(3, 8))
    assert len(passes) == 1


@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")  # of torch.func itself
def test_forward_derivatives_outlive_values_that_have_settled():
    layer = awake(Autoregressive(4, hidden=()))
    nn.init.zeros_(layer.net[0].bias)
    x = torch.zeros(4).double()  # is drawn as 0, whatever the weights
    tangent = torch.randn(4).double()
    expected = jacobian(layer(), x) @ tangent
    with torch.no_grad():
        value, ours = torch.func.jvp(layer(), (x,), (tangent,))
    assert (value == 0).all()
    assert torch.allclose(ours, expected, atol=1e-12)
    assert not torch.allclose(ours, tangent, atol=1e-2)
