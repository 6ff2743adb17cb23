"""Autoregressive layers against the definition: feature by feature."""

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian

from pyrogen.nets import MaskedMLP
from pyrogen.transforms import (
    Affine,
    Autoregressive,
    Inverted,
    PerFeature,
    RationalQuadratic,
    Shift,
    Stacked,
)

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
    before = torch.ones(3, 3).tril(-1).bool()
    net = MaskedMLP(before, 2, 2, hidden=(16, 16)).double()
    d = jacobian(net, torch.randn(5).double()).reshape(3, 2, 5)
    assert (d[..., 3:] != 0).all()
    see = (d[..., :3] != 0).all(1)
    assert torch.equal(see, torch.ones(3, 3).tril(-1).bool())


def sequential(f, x):
    """Draw feature by feature, the definition."""
    y = torch.zeros_like(x)
    for i in range(x.shape[-1]):
        moved = f._maps(y)(x)
        y = torch.where(torch.arange(x.shape[-1]) == i, moved, y)
    return y, f._maps(y).call_and_ladj(x)[1].sum(-1)


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


def test_cheap_maps_stop_as_soon_as_nothing_changes():
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
    layer().inv(torch.randn(3, 8))
    assert len(passes) == 1


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_both_ways_to_draw_agree(family):
    f = awake(Autoregressive(6, elementwise=family))()
    x = torch.randn(20, 6).double()
    with torch.no_grad():
        for a, b in zip(f._in_turn(x), f._repeat(x, x, x), strict=True):
            assert torch.allclose(a, b, atol=1e-13)


def test_network_tells_some_outputs_as_it_tells_all():
    net = MaskedMLP(torch.ones(4, 4).tril(-1).bool(), 3, 2)
    x = torch.randn(5, 6)
    some = net.outputs_for(torch.tensor([2, 0]), x)
    assert torch.allclose(some, net(x).unflatten(-1, (4, 3))[:, [2, 0]].flatten(1), atol=1e-6)


def test_context_of_a_larger_batch_widens_the_draw():
    layer = awake(Autoregressive(3, 2, elementwise=FAMILIES["spline"]))
    context, x = torch.randn(5, 1, 2).double(), torch.randn(4, 3).double()
    y, ladj = layer(context).call_and_ladj(x)
    assert (y.shape, ladj.shape) == ((5, 4, 3), (5, 4))
    assert torch.allclose(y[2], layer(context[2, 0])(x), atol=1e-13)


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


# Any graph

DIAMOND = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0]]).bool()
APART = torch.zeros(4, 4).bool()
FORK = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0]]).bool()


@pytest.mark.parametrize("graph", [DIAMOND, APART, FORK], ids=["diamond", "apart", "fork"])
@pytest.mark.parametrize("context", [0, 2])
def test_each_feature_sees_its_parents_and_no_others(graph, context):
    layer = awake(Autoregressive(4, context, adjacency=graph, hidden=(16, 16)))
    c = torch.randn(context).double() if context else None
    d = jacobian(layer(c).inv, torch.randn(4).double())  # one pass: entries are the edges
    assert torch.equal(d != 0, graph | torch.eye(4).bool())
    if context:
        seen = jacobian(lambda c: layer(c).inv(torch.ones(4).double()), c)
        assert (seen != 0).all()


@pytest.mark.parametrize(("graph", "passes"), [(DIAMOND, 3), (APART, 1), (FORK, 3)])
def test_a_draw_takes_as_many_passes_as_the_longest_chain(graph, passes):
    layer = awake(Autoregressive(4, adjacency=graph, elementwise=RationalQuadratic()))
    assert len(layer.sizes) == passes
    x = torch.randn(20, 4).double()
    y, ladj = layer().call_and_ladj(x)
    back, inverse_ladj = layer().inverse_and_ladj(y)
    assert torch.allclose(back, x, atol=1e-12)
    assert torch.allclose(ladj, -inverse_ladj, atol=1e-12)
    d = jacobian(layer(), x[0])
    assert torch.allclose(torch.linalg.slogdet(d).logabsdet, ladj[0], atol=1e-12)


def test_a_chain_by_order_and_by_adjacency_is_one_network():
    torch.manual_seed(0)
    first = Autoregressive(4, 2, order=[2, 0, 3, 1])
    torch.manual_seed(0)
    rank = torch.tensor([2, 0, 3, 1])
    second = Autoregressive(4, 2, adjacency=rank[:, None] > rank)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"adjacency": torch.ones(3, 3).bool()}, r"without cycles.*see earlier ones"),
        ({"adjacency": torch.eye(3).bool()}, r"without cycles"),
        (
            {"adjacency": torch.zeros(2, 3).bool()},
            r"got torch.bool of shape \(2, 3\)",
        ),
        ({"adjacency": torch.zeros(3, 3)}, r"boolean adjacency.*got torch.float32"),
        (
            {"adjacency": torch.zeros(3, 3).bool(), "order": [0, 1, 2]},
            r"got both",
        ),
        ({"order": [0, 1, 1]}, r"each of 0, ..., 2 once, got \[0, 1, 1\]"),
    ],
)
def test_graphs_that_are_none_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        Autoregressive(3, **options)


MIXED = PerFeature([Affine(), RationalQuadratic(), Shift()])


@pytest.mark.parametrize("family", [MIXED, Inverted(MIXED), Stacked(MIXED, Affine())])
def test_each_feature_may_have_a_family_of_its_own(family):
    f = awake(Autoregressive(3, elementwise=family, order=[1, 2, 0]))()
    x = torch.randn(20, 3).double()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y, ladj = f.call_and_ladj(x)
        back, inverse_ladj = f.inverse_and_ladj(y)
        assert torch.allclose(back, x, atol=1e-12)
        assert torch.allclose(ladj, -inverse_ladj, atol=1e-12)


def test_a_narrow_network_still_sees_all_that_it_may():
    chain = torch.ones(20, 20).tril(-1).triu(-1).bool()
    layer = awake(Autoregressive(20, adjacency=chain, hidden=(4, 4)))
    d = jacobian(layer().inv, torch.randn(20).double())
    assert torch.equal(d != 0, chain | torch.eye(20).bool())
