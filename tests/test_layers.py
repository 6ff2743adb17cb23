"""What every layer asks of sizes, and what copies of its bijection hold."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyrogen import distributions as pd
from pyrogen.autodiff import can_steer
from pyrogen.inputs import check_positive
from pyrogen.nets import MaskedMLP, TimeMLP, mlp
from pyrogen.transforms import (
    ActNorm,
    Autoregressive,
    Continuous,
    Convolution1x1,
    Coupling,
    Elementwise,
    Euler,
    Householder,
    ImageCoupling,
    LULinear,
    Permutation,
    Planar,
    Radial,
    Reflections,
    Sylvester,
)

VECTORS = {  # of three features
    "Elementwise": lambda c: Elementwise(3, c),
    "Coupling": lambda c: Coupling(3, c),
    "flipped Coupling": lambda c: Coupling(3, c, flip=True),
    "Autoregressive": lambda c: Autoregressive(3, c),
    "Planar": lambda c: Planar(3, c),
    "Radial": lambda c: Radial(3, c),
    "Sylvester": lambda c: Sylvester(3, c),
    "Permutation": lambda c: Permutation.reverse(3),
    "Householder": lambda c: Householder(3),
    "LULinear": lambda c: LULinear(3),
    "ActNorm": lambda c: ActNorm(3),
    "Continuous": lambda c: Continuous(TimeMLP(3, c), 3, c, solver=Euler(2)),
}
IMAGES = {  # of three channels
    "ImageCoupling": lambda c: ImageCoupling(3, c),
    "Convolution1x1": lambda c: Convolution1x1(3),
    "ActNorm": lambda c: ActNorm(3, shared=2),
}


def context(features):
    return torch.zeros(features) if features else None


@pytest.mark.parametrize("way", ["call_and_ladj", "inverse_and_ladj", "_call", "_inverse"])
@pytest.mark.parametrize("features", [1, 2, 4])
@pytest.mark.parametrize("width", [0, 2], ids=["", "context"])
@pytest.mark.parametrize("name", VECTORS)
def test_wrong_number_of_features_is_refused(name, width, features, way):
    f = VECTORS[name](width)(context(width))
    message = rf"expected shape \(\*batch, 3\), got \(5, {features}\)\. Reshape"
    with pytest.raises(ValueError, match=message):
        getattr(f, way)(torch.randn(5, features))


@pytest.mark.parametrize("way", ["call_and_ladj", "inverse_and_ladj"])
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("width", [0, 2], ids=["", "context"])
@pytest.mark.parametrize("name", IMAGES)
def test_wrong_number_of_channels_is_refused(name, width, channels, way):
    f = IMAGES[name](width)(context(width))
    message = rf"{name} expected shape \(\*batch, 3, height, width\), got \(5, {channels}, 2, 2\)"
    with pytest.raises(ValueError, match=message):
        getattr(f, way)(torch.randn(5, channels, 2, 2))


@pytest.mark.parametrize("name", VECTORS)
def test_scalars_and_shapes_of_other_features_are_refused(name):
    f = VECTORS[name](0)()
    with pytest.raises(ValueError, match=r"\(\*batch, 3\), got \(\)"):
        f(torch.zeros(()))
    with pytest.raises(ValueError, match=r"\(\*batch, 3\), got \(5, 4\)"):
        f.forward_shape((5, 4))
    assert f.forward_shape((5, 3)) == (5, 3)


@pytest.mark.parametrize("name", VECTORS)
def test_features_are_counted_within_vmap_too(name):
    f = VECTORS[name](0).eval()()
    assert torch.vmap(f.call_and_ladj)(torch.randn(5, 3))[0].shape == (5, 3)
    with pytest.raises(ValueError, match=r"\(\*batch, 3\), got \(4,\)"):
        torch.vmap(f.call_and_ladj)(torch.randn(5, 4))


def test_one_feature_is_no_batch_of_reflections():
    with pytest.raises(
        ValueError, match=r"Reflections expected shape \(\*batch, 3\), got \(5, 1\)"
    ):
        Reflections(torch.randn(5, 2, 3))(torch.randn(5, 1))


SIZES = [
    (lambda: Elementwise(0), "Elementwise expected at least 1 feature, got 0. Pass a positive"),
    (lambda: ActNorm(0), "ActNorm expected at least 1 feature, got 0"),
    (lambda: LULinear(0), "LULinear expected at least 1 feature, got 0"),
    (lambda: Autoregressive(0), "Autoregressive expected at least 1 feature, got 0"),
    (lambda: Sylvester(0), "Sylvester expected at least 1 feature, got 0"),
    (lambda: mlp(2, 2, (8, 0)), "mlp expected at least 1 hidden unit, got 0"),
    (lambda: mlp(2, 2, (-1,)), "mlp expected at least 1 hidden unit, got -1"),
    (lambda: MaskedMLP(torch.ones(2, 2).tril(-1).bool(), 2, hidden=(0,)), "MaskedMLP .*1 hidden"),
    (lambda: Coupling(2, hidden=(0,)), "at least 1 hidden unit, got 0"),
    (lambda: Autoregressive(2, hidden=(-3,)), "at least 1 hidden unit, got -3"),
    (lambda: Planar(2, 1, hidden=(0,)), "at least 1 hidden unit, got 0"),
    (lambda: ImageCoupling(2, hidden=(8, 0)), "ImageCoupling .* 1 hidden channel, got 0"),
    (lambda: check_positive("Flow", layer=1, feature=-1), "at least 1 feature, got -1"),
]


@pytest.mark.parametrize(("call", "match"), SIZES)
def test_sizes_below_one_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


RECIPES = {
    name: getattr(pd, name)
    for name in (
        *("bernstein", "gaussianization", "iaf", "maf", "naf", "ncsf", "nice", "nsf", "planar"),
        *("radial", "realnvp", "sospf", "sylvester", "umnn"),
    )
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_want_features_and_layers(name):
    for layers in (0, -1):
        with pytest.raises(ValueError, match=rf"at least 1 layer, got {layers}\. Pass"):
            RECIPES[name](2, layers=layers)
    with pytest.raises(ValueError, match=r"at least \d feature"):
        RECIPES[name](0)


@pytest.mark.parametrize("order", [(0.0, 2.0, 1.0), (True, False), ((0, 1),), 3])
def test_orders_are_whole_numbers(order):
    with pytest.raises(ValueError, match="Permutation expected each of 0"):
        Permutation(torch.tensor(order))
    features = torch.tensor(order).numel()
    with pytest.raises(ValueError, match=r"expected order to hold each of 0"):
        Autoregressive(features, order=order)


def test_orders_of_other_integers_are_orders():
    order = torch.tensor([2, 0, 1], dtype=torch.int32)
    assert torch.equal(Permutation(order)()(torch.arange(3.0)), torch.tensor([2.0, 0.0, 1.0]))
    assert Autoregressive(3, order=order)()(torch.zeros(3)).shape == (3,)


class Doubled(nn.Module):
    """An embedding with a buffer of indices before its weights."""

    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.tensor([1, 0]))
        self.net = nn.Linear(2, 5)

    def forward(self, a):
        return self.net(a[..., self.order])


def test_embedding_is_asked_in_its_own_precision():
    layer = Coupling(4, embedding=Doubled().double(), hidden=(8,))
    assert layer.net[0].in_features == 5
    x = torch.randn(3, 4).double()
    assert layer.double()()(x).shape == (3, 4)


def test_embedding_is_asked_where_it_lives():
    with torch.device("meta"):
        embedding = Doubled()
    assert Coupling(4, embedding=embedding, hidden=(8,)).net[0].in_features == 5


COPIED = {
    "realnvp": lambda: pd.realnvp(3, layers=2, hidden=(8,)),
    "nsf": lambda: pd.nsf(3, layers=2, hidden=(8,)),
    "nice": lambda: pd.nice(3, layers=2, hidden=(8,)),
    "maf": lambda: pd.maf(3, layers=2, hidden=(8,)),
    "iaf": lambda: pd.iaf(3, layers=2, hidden=(8,)),
    "gaussianization": lambda: pd.gaussianization(3, layers=2),
    "glow": lambda: pd.glow((1, 4, 4), levels=1, steps=2, hidden=(8,)),
    "ncsf": lambda: pd.ncsf(3, layers=2, hidden=(8,)),
}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda law: pickle.loads(pickle.dumps(law))])
@pytest.mark.parametrize("name", COPIED)
def test_copy_of_a_law_stands_alone(name, copied):
    flow = COPIED[name]()
    law = flow()
    x = law.sample((5,))
    other = copied(law)
    before = law.log_prob(x)
    assert torch.equal(other.log_prob(x), before)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    assert torch.equal(other.log_prob(x), before)
    assert not torch.allclose(law.log_prob(x), before)


def test_copy_of_a_conditional_law_stands_alone():
    flow = pd.realnvp(3, 2, layers=2, hidden=(8,))
    c = torch.randn(5, 2)
    law, x = flow(c), torch.randn(5, 3)
    other, before = copy.deepcopy(law), law.log_prob(x)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.3 * torch.randn_like(p))
    c.zero_()
    assert torch.equal(other.log_prob(x), before)


@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")  # of torch.func itself
def test_values_steer_but_within_vmap():
    seen = []

    def look(x):
        seen.append(can_steer(x))
        return x.square().sum()

    x = torch.ones(2, 3)
    look(x)
    torch.func.grad(look)(x)
    torch.func.jacfwd(look)(x)
    assert seen == [True] * 3
    torch.vmap(look)(x)
    torch.vmap(torch.func.grad(look))(x)
    torch.func.grad(lambda x: torch.vmap(look)(x).sum())(x)
    assert seen[3:] == [False] * 3


def test_errors_of_the_loop_are_not_swallowed(monkeypatch):
    """Only vmap may keep values from ending it: any other error is one."""

    def broken(*_):
        raise RuntimeError("out of memory")

    layer = Autoregressive(3, hidden=(8,))
    monkeypatch.setattr(torch, "equal", broken)
    with torch.no_grad(), pytest.raises(RuntimeError, match="out of memory"):
        layer()(torch.randn(3))


class NoTransfer(TorchDispatchMode):
    """Refuses to fill a tensor on another device than the meta device, or to move one there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                raise AssertionError(f"{func} makes a tensor on {x.device}.")
        return out


@pytest.mark.parametrize("way", ["call_and_ladj", "inverse_and_ladj"])
@pytest.mark.parametrize("name", ["Householder", "Sylvester", "Permutation", "Autoregressive"])
def test_layers_make_their_tensors_where_they_live(name, way):
    layer = VECTORS[name](0).to("meta")
    x = torch.zeros(5, 3, device="meta")
    if (name, way) == ("Sylvester", "inverse_and_ladj"):
        pytest.skip("its loop asks for values, which a meta tensor lacks")
    with NoTransfer():
        getattr(layer(), way)(x)


def test_periodic_networks_keep_their_indices_where_they_live():
    flow = pd.ncsf(3, layers=2, hidden=(8,)).to("meta")
    indices = [b for name, b in flow.named_buffers() if "embedding" in name]
    assert {b.device.type for b in indices} == {"meta"}
    assert not any("embedding" in name for name in flow.state_dict())


@pytest.mark.parametrize("recipe", [pd.planar, pd.radial, pd.sylvester])
def test_residual_flows_take_other_noise(recipe):
    noise = pd.StudentTNoise(3)
    flow = recipe(3, layers=2, noise=noise)
    assert flow.noise is noise
    x = torch.randn(5, 3)
    law = flow()
    z, ladj = law.bijection.inverse_and_ladj(x)
    assert torch.allclose(law.log_prob(x), noise().log_prob(z) + ladj)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.parametrize("name", VECTORS)
def test_both_directions_are_one_graph(name, monkeypatch):
    kind = torch.distributions.Distribution  # tracing switches validation off for good
    monkeypatch.setattr(kind, "_validate_args", kind._validate_args)
    torch.compiler.reset()
    layer = VECTORS[name](0).eval()

    def both(x):
        return *layer().call_and_ladj(x), *layer().inverse_and_ladj(x)

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    x = torch.randn(5, 3)
    for a, b in zip(compiled(x), both(x), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
