"""Flows of images: layers against autograd and by hand, and the laws that all flows obey."""

import copy
import io
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.distributions import constraints

from pyrogen.distributions import Flow
from pyrogen.distributions.recipes.image import glow
from pyrogen.testing import DISTRIBUTION_CHECKS, MODULE_CHECKS, TRANSFORM_CHECKS
from pyrogen.transforms import RationalQuadratic
from pyrogen.transforms.image import Convolution1x1, ImageCoupling, Squeeze
from pyrogen.transforms.linear import ActNorm
from pyrogen.transforms.multiscale import MultiScale

SPLINE = RationalQuadratic(bins=4, bound=3.0)
CHANNELS, HEIGHT, WIDTH = 4, 2, 6
LAYERS = {  # on images of 4 channels
    "squeeze": lambda context=0: Squeeze(),
    "convolution": lambda context=0: Convolution1x1(4),
    "channels": lambda context=0: ActNorm(4, shared=2).eval(),
    "affine": lambda context=0: ImageCoupling(4, context, hidden=(8, 8)),
    "spline": lambda context=0: ImageCoupling(4, context, elementwise=SPLINE, hidden=(8,)),
    "flipped": lambda context=0: ImageCoupling(4, context, flip=True, hidden=(8,)),
}
SHAPES = {"square": (1, 4, 4), "wide": (2, 2, 6), "three scales": (1, 8, 8)}
LEVELS = {"square": 2, "wide": 1, "three scales": 3}
RECIPES = {
    "affine": lambda *a, **k: glow(*a, **{"steps": 2, "hidden": (8,), **k}),
    "spline": lambda *a, **k: glow(*a, **{"steps": 1, "hidden": (8,), "elementwise": SPLINE, **k}),
}


def awake(module):
    """Draw every parameter anew: layers start simple, where much would hold trivially."""
    for p in module.parameters():
        nn.init.normal_(p, std=0.2 if p.ndim < 3 else 0.7 * p[0].numel() ** -0.5)
    if isinstance(module, Flow):
        module.shift.uniform_(-1, 1)
        module.scale.uniform_(0.5, 2)
    return module.double()


@pytest.fixture(params=[0, 3], ids=["", "context"])
def context(request):
    return torch.randn(request.param).double() if request.param else None


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request, context):
    return awake(request.param(0 if context is None else 3))


@pytest.fixture(params=RECIPES.values(), ids=RECIPES)
def recipe(request):
    return request.param


@pytest.fixture(params=SHAPES)
def shape(request):
    return request.param


def slogdet(f, x):
    return torch.linalg.slogdet(jacobian(f, x).reshape(x.numel(), -1)).logabsdet.item()


# The layers


def test_layers_are_exact_both_ways(layer, context):
    f = layer(context)
    x = torch.randn(7, CHANNELS, HEIGHT, WIDTH).double()
    y, ladj = f.call_and_ladj(x)
    assert y.shape == f.forward_shape(x.shape)
    assert ladj.shape == (7,)
    back, inverse_ladj = f.inverse_and_ladj(y.clone())
    assert torch.allclose(back, x, atol=1e-11)
    assert torch.allclose(inverse_ladj, -ladj, atol=1e-10)
    assert f.inverse_shape(y.shape) == x.shape
    assert f.domain.event_dim == f.codomain.event_dim == 3
    assert ladj[0].item() == pytest.approx(slogdet(f, x[0]), abs=1e-9)
    assert inverse_ladj[0].item() == pytest.approx(slogdet(f.inv, y[0]), abs=1e-9)


def test_layers_have_both_derivatives(layer, context):
    f = layer(context)
    x = torch.randn(4, 2, 2).double().requires_grad_()
    for way, point in ((f.call_and_ladj, x), (f.inverse_and_ladj, f(x).detach())):

        def total(x, way=way):
            y, ladj = way(x)
            return (y.flatten(-3) * torch.arange(1.0, 17.0)).sum(-1) + 3 * ladj

        point = point.requires_grad_()
        assert torch.autograd.gradcheck(total, point, atol=1e-6)
        assert torch.autograd.gradgradcheck(total, point, atol=1e-6)


def test_leading_shape_does_not_matter(layer, context):
    f = layer(context)
    x = torch.randn(6, CHANNELS, HEIGHT, WIDTH).double()
    y, ladj = f.call_and_ladj(x)
    folded, folded_ladj = f.call_and_ladj(x.unflatten(0, (2, 3)))
    assert torch.allclose(folded.flatten(0, 1), y)
    assert torch.allclose(folded_ladj.flatten(), ladj)
    assert torch.allclose(f(x[0]), y[0])
    mapped = torch.vmap(f.call_and_ladj)(x)
    assert torch.allclose(mapped[0], y)
    assert torch.allclose(torch.vmap(f.inverse_and_ladj)(y)[0], x)
    if context is not None:
        wide = layer(context.expand(5, 1, -1))
        assert torch.allclose(wide(x) + 0 * y.new_zeros(5, 1, 1, 1, 1), y.expand(5, *y.shape))


@pytest.mark.parametrize("check", TRANSFORM_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", ["affine", "spline", "convolution", "squeeze"])
def test_layers_pass_the_checks(name, check, dtype):
    for c in (None, torch.randn(6, 3, dtype=dtype)):
        x = torch.randn(6, CHANNELS, HEIGHT, 2, dtype=dtype)
        f = awake(LAYERS[name](0 if c is None else 3)).to(dtype)
        if check.__name__ == "log_determinant_matches_autograd":
            f64, x64 = f.double(), x.double()
            c64 = None if c is None else c[0].double()
            ladj = f64(c64).call_and_ladj(x64[0])[1].item()
            assert ladj == pytest.approx(slogdet(f64(c64), x64[0]), abs=1e-6)
        elif name != "squeeze" or check.__name__ != "transform_keeps_the_batch":  # not the shape
            check(f, x, c)


def test_couplings_start_as_the_identity_and_learn_at_once():
    for name in ("affine", "spline"):
        layer = LAYERS[name]()
        x = torch.randn(5, CHANNELS, HEIGHT, WIDTH)
        y, ladj = layer().call_and_ladj(x)
        assert torch.allclose(y, x, atol=1e-6)
        assert torch.allclose(ladj, torch.zeros(5), atol=1e-5)
        (y**4).sum().backward()
        assert any((p.grad != 0).any() for p in layer.parameters())


def test_coupling_moves_one_half_and_reads_neighbours_of_the_other():
    for flip in (False, True):
        f = awake(ImageCoupling(4, flip=flip, hidden=(8,)))()
        matrix = jacobian(f, torch.randn(4, 5, 5).double())
        kept = slice(2, 4) if flip else slice(0, 2)
        moved = slice(0, 2) if flip else slice(2, 4)
        eye = torch.eye(50).double()
        assert torch.equal(matrix[kept, :, :, kept].reshape(50, 50), eye)
        assert (matrix[kept, :, :, moved] == 0).all()
        own = matrix[moved, :, :, moved].reshape(50, 50)
        assert torch.equal(own != 0, eye == 1)
        read = (matrix[moved, :, :, kept] != 0).all(0).all(2)  # height, width, height, width
        assert read[2, 2, 1:4, 1:4].all()


def test_odd_channels_are_split_unevenly():
    for flip in (False, True):
        f = awake(ImageCoupling(3, flip=flip, hidden=(8,)))()
        x = torch.randn(3, 2, 2).double()
        y, ladj = f.call_and_ladj(x)
        assert (y == x).all(-1).all(-1).sum() == 1
        assert torch.allclose(f.inv(y), x)
        assert ladj.item() == pytest.approx(slogdet(f, x))


def test_squeeze_by_hand_and_as_a_checkerboard():
    f = Squeeze()()
    image = torch.arange(24.0).reshape(1, 4, 6)
    small = f.inv(image)
    assert small.shape == (4, 2, 3)
    assert small[:, 0, 0].tolist() == [0, 7, 1, 6]
    assert small[:, 1, 2].tolist() == [16, 23, 17, 22]
    assert torch.equal(f(small), image)
    colours = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(2, 3)[None]
    assert torch.equal(f.inv(colours)[:2], torch.zeros(2, 2, 3))
    assert torch.equal(f.inv(colours)[2:], torch.ones(2, 2, 3))
    channels = torch.randn(3, 4, 4)
    assert f.inv(channels).shape == (12, 2, 2)
    assert torch.equal(f(f.inv(channels)), channels)


def test_convolution_is_torch_s_own():
    layer = awake(Convolution1x1(3))
    lower, upper, _ = layer.linear.factors()
    kernel = (layer.rotation() @ lower @ upper)[..., None, None]
    x = torch.randn(5, 3, 4, 2).double()
    expected = nn.functional.conv2d(x, kernel, layer.linear.bias)
    assert torch.allclose(layer()(x), expected)
    fresh = Convolution1x1(3)
    for dtype in (torch.float32, torch.float64):  # orthogonal in the precision it is used in
        q = fresh.to(dtype).rotation()
        assert torch.allclose(q @ q.T, torch.eye(3, dtype=dtype), atol=8 * torch.finfo(dtype).eps)
    assert torch.equal(fresh().call_and_ladj(x)[1], torch.zeros(5).double())


# Several scales


def test_noise_enters_scale_by_scale():
    layer = MultiScale((1, 4, 4), [[Squeeze()], [Squeeze()]])
    f = layer()
    assert (f.domain.event_dim, f.codomain.event_dim) == (1, 3)
    assert f.forward_shape((7, 16)) == (7, 1, 4, 4)
    assert f.inverse_shape((7, 1, 4, 4)) == (7, 16)
    assert f.inv.forward_shape((7, 1, 4, 4)) == (7, 16)
    z = torch.arange(16.0)
    x, ladj = f.call_and_ladj(z)
    assert ladj == 0
    diagonal = Squeeze()().inv(x)[:2]  # channels of the finest scale that come from coarser ones
    coarse = Squeeze()().inv(diagonal)
    assert torch.equal(coarse.flatten(), z[:8])
    assert torch.equal(Squeeze()().inv(x)[2:].flatten(), z[8:])
    assert torch.equal(f.inv(x), z)


def test_fresh_noise_has_a_learned_law_given_the_rest():
    """The coupling that opens a scale is enough: another one would move the same half again."""
    flow = awake(glow((1, 4, 4), levels=2, steps=1, hidden=(8,)))
    scale = flow.layers[0].scales[1]
    assert [type(layer) for layer in scale] == [ImageCoupling, Convolution1x1, Squeeze]
    opening = scale[0]
    image = torch.randn(4, 2, 2).double()
    moved = opening()(image)
    assert torch.equal(moved[:2], image[:2])
    assert (moved[2:] != image[2:]).all()


def test_flow_of_images_is_exact_both_ways(recipe, shape):
    for context in (None, torch.randn(3).double()):
        flow = awake(recipe(SHAPES[shape], 0 if context is None else 3, levels=LEVELS[shape]))
        f = flow(context).bijection
        assert (f.domain.event_dim, f.codomain.event_dim) == (1, 3)
        z = torch.randn(math.prod(SHAPES[shape])).double()
        x, ladj = f.call_and_ladj(z)
        assert x.shape == SHAPES[shape]
        assert ladj.item() == pytest.approx(slogdet(f, z), abs=1e-7)
        back, inverse_ladj = f.inverse_and_ladj(x.clone())
        assert torch.allclose(back, z, atol=1e-10)
        assert torch.allclose(inverse_ladj, -ladj, atol=1e-9)
        assert (jacobian(f, z).reshape(len(z), -1) != 0).double().mean() > 0.2


# The law


@pytest.mark.parametrize("check", DISTRIBUTION_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_flow_is_a_distribution(recipe, check, dtype):
    check(awake(recipe((1, 4, 4), 2)).to(dtype)(torch.randn(4, 2, dtype=dtype)))


@pytest.mark.parametrize("check", MODULE_CHECKS, ids=lambda f: f.__name__)
def test_flow_is_a_module(recipe, check):
    check(awake(recipe((1, 4, 4), 2)).float(), torch.randn(4, 2))


def test_untrained_flow_is_its_noise(recipe):
    x = torch.randn(7, 1, 8, 8)
    expected = dist.Normal(torch.zeros(1, 8, 8), 1.0).to_event(3).log_prob(x)
    for mode in (True, False):  # nothing depends on a first batch
        assert torch.allclose(recipe((1, 8, 8)).train(mode)().log_prob(x), expected, atol=1e-4)


def test_density_integrates_to_one(recipe):
    """In four dimensions, by importance sampling from a wider normal law."""
    flow = awake(recipe((1, 2, 2), levels=1))
    with torch.no_grad():
        x = flow().sample((20_000,))
        wide = dist.MultivariateNormal(x.flatten(1).mean(0), 2 * torch.cov(x.flatten(1).T))
        y = wide.sample((100_000,))
        weight = (flow().log_prob(y.reshape(-1, 1, 2, 2)) - wide.log_prob(y)).exp()
    error = weight.std() / len(y) ** 0.5
    assert abs(weight.mean() - 1) < 4.5 * error  # fails once in 1e5
    assert error < 0.02


@pytest.mark.parametrize(("dtype", "nats"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_draw_and_score_agree(recipe, dtype, nats):
    for flow in (recipe((1, 8, 8)).to(dtype), awake(recipe((1, 4, 4))).to(dtype)):
        x, log_prob = flow().rsample_and_log_prob((100,))
        assert x.dtype == log_prob.dtype == dtype
        assert (flow().log_prob(x) - log_prob).abs().max() <= nats


def test_hessian_matches_finite_differences(recipe):
    p = awake(recipe((1, 2, 2), 2, levels=1))(torch.ones(2).double())
    x = torch.randn(1, 2, 2).double()
    step = 1e-5 * torch.eye(4).double().reshape(4, 1, 2, 2)
    slopes = [(jacobian(p.log_prob, x + h) - jacobian(p.log_prob, x - h)) / 2e-5 for h in step]
    found = hessian(p.log_prob, x).reshape(4, 4)
    assert torch.allclose(found, torch.stack(slopes).reshape(4, 4), atol=1e-6, rtol=1e-6)
    assert torch.allclose(found, found.T, atol=1e-9)


def test_context_sets_the_batch_shape(recipe):
    flow = awake(recipe((1, 4, 4), 3))
    context = torch.randn(4, 1, 3).double()
    p = flow(context)
    assert (p.batch_shape, p.event_shape) == ((4, 1), (1, 4, 4))
    assert p.sample((5,)).shape == (5, 4, 1, 1, 4, 4)
    assert p.expand((2, 4, 3)).sample().shape == (2, 4, 3, 1, 4, 4)
    x = torch.randn(4, 7, 1, 4, 4).double()
    assert p.log_prob(x).shape == (4, 7)
    assert torch.allclose(p.log_prob(x)[2, 3], flow(context[2, 0]).log_prob(x[2, 3]))
    assert not torch.allclose(p.log_prob(x)[0], p.log_prob(x[:1])[1], atol=1e-3)
    assert torch.allclose(p.log_prob(x[0, 0]), p.log_prob(x[0, 0].expand(4, 1, 1, 4, 4)))
    mapped = torch.vmap(lambda x, c: flow(c).log_prob(x))
    with pyro.validation_enabled(False):
        assert torch.allclose(mapped(x[:, 0], context[:, 0]), p.log_prob(x)[:, 0])


def test_every_parameter_gets_a_gradient(recipe):
    for context in (0, 3):
        flow = awake(recipe((1, 4, 4), context))
        c = torch.randn(8, 3).double() if context else None
        flow(c).log_prob(torch.randn(8, 1, 4, 4).double()).sum().backward()
        flow(c).rsample().sum().backward()
        for name, w in flow.named_parameters():
            assert w.grad is not None, name
            assert w.grad.abs().sum() > 0, name


def test_images_stand_in_a_pyro_model(recipe):
    flow = recipe((1, 4, 4), 3, support=constraints.unit_interval)
    images = torch.rand(7, 1, 4, 4)

    def model():
        with pyro.plate("data", 7):
            c = pyro.sample("c", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            return pyro.sample("x", flow(c), obs=images)

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["x"]["log_prob"].shape == (7,)
    assert flow(torch.zeros(3)).support.check(images).all()
    with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 7):
        assert pyro.sample("x", flow(torch.randn(7, 3))).shape == (4, 7, 1, 4, 4)


def test_standardize_pulls_images_back_to_unit_scale(recipe):
    flow = recipe((2, 4, 4), support=constraints.unit_interval)
    images = torch.rand(50, 2, 4, 4)
    assert flow.standardize(images) is flow
    assert flow.shift.shape == (2, 4, 4)
    pixels = images.logit()
    assert torch.allclose(flow.shift, pixels.mean(0), atol=1e-5)
    assert torch.allclose(flow.scale, pixels.std(0), atol=1e-5)
    with pytest.raises(ValueError, match=r"\(\*batch, 2, 4, 4\), got \(50, 4, 4\)"):
        flow.standardize(images[:, 0])


def test_state_survives_a_file_and_a_copy(recipe):
    flow = awake(recipe((1, 4, 4)))
    x = flow().sample((5,))
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    other = recipe((1, 4, 4)).double()
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (other, copy.deepcopy(flow)):
        assert torch.equal(twin().log_prob(x), flow().log_prob(x))


class Uniform(nn.Module):
    """Noise on the unit cube, shifted to have mean 0."""

    def __init__(self, features):
        super().__init__()
        self.register_buffer("edge", torch.ones(features))

    def forward(self):
        return dist.Uniform(-self.edge, self.edge, validate_args=False).to_event(1)


def test_noise_is_the_callers_choice(recipe):
    flow = recipe((1, 4, 4), noise=Uniform(16))
    noise, _ = flow().bijection.inverse_and_ladj(flow().sample((50,)))
    assert noise.shape == (50, 16)
    assert noise.abs().max() < 1.001


def test_law_of_images_is_learned():
    """Correlated Gaussian pixels: the loss comes down to the entropy, and never below."""
    torch.manual_seed(0)
    factor = torch.eye(16) + 0.8 * torch.rand(16, 16).tril(-1)
    truth = dist.MultivariateNormal(torch.zeros(16), scale_tril=factor)
    flow = glow((1, 4, 4), levels=1, steps=3, hidden=(16,))
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        loss = -flow().log_prob(truth.sample((128,)).reshape(-1, 1, 4, 4)).mean()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x = truth.sample((4000,))
        gap = (truth.log_prob(x) - flow().log_prob(x.reshape(-1, 1, 4, 4))).mean()
    assert 0 < gap < 1.5
    independent = (truth.covariance_matrix.diagonal().log().sum() - 2 * factor.logdet()) / 2
    assert gap < 0.2 * independent  # what pixels by themselves would lose


# Refusals

ERRORS = [
    (lambda: Squeeze()()(torch.ones(3, 4, 4)), r"multiples of 4 .*got 3\. Give the data twice"),
    (lambda: Squeeze()().inv(torch.ones(1, 3, 4)), r"halves height and width, got 3 by 4\. Pad"),
    (lambda: ImageCoupling(1), r"at least 2 channels, got 1\. Put a Squeeze"),
    (lambda: ImageCoupling(4, hidden=()), r"at least one hidden layer, got none\. Pass hidden"),
    (lambda: ImageCoupling(4, 3)(), r"ImageCoupling was built with context=3, got 0"),
    (lambda: Convolution1x1(0), r"at least 1 channel, got 0"),
    (
        lambda: MultiScale((4, 4), [[Squeeze()]]),
        r"\(channels, height, width\) .*got \(4, 4\) and 1",
    ),
    (lambda: MultiScale((1, 4, 4), []), r"at least one scale, got \(1, 4, 4\) and 0"),
    (lambda: MultiScale((1, 4, 4), [[], []])(), r"halves the channels between scales, got 1 of"),
    (lambda: MultiScale((1, 6, 6), [[Squeeze()], [Squeeze()]])(), r"got 3 by 3"),
    (lambda: MultiScale((1, 4, 4), [[Squeeze()]])()(torch.ones(5, 15)), r"16 numbers, got 15"),
    (lambda: MultiScale((1, 4, 4), [[Squeeze()]])().inv(torch.ones(5, 16)), r"got \(5, 16\)"),
    (lambda: glow((1, 6, 6), levels=2), r"2 levels, .* and 6 by 6.*multiples of 4"),
    (lambda: glow((1, 4, 4), levels=0), r"at least 1 .*got 0 levels"),
    (lambda: glow((16,)), r"image_shape \(channels, height, width\), got \(16,\)"),
    (lambda: glow((1, 4, 4))(torch.ones(3)), r"context=0, got 3"),
    (lambda: glow((1, 4, 4))().log_prob(torch.ones(5, 16)), r"event|shape"),
    (lambda: glow((1, 4, 4))().log_prob(torch.full((1, 4, 4), math.nan)), r"within the support"),
]


@pytest.mark.parametrize(("call", "match"), ERRORS)
def test_refusals_say_what_to_do(call, match):
    with pytest.raises(ValueError, match=match):
        call()
