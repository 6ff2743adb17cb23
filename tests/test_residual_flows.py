"""Planar, radial and Sylvester layers: exact both ways, with a context, as flows and guides."""

import copy
import io
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.distributions import constraints

from pyrogen.distributions.recipes.residual import planar, radial, sylvester
from pyrogen.guides import AutoFlow
from pyrogen.testing import DISTRIBUTION_CHECKS, MODULE_CHECKS, TRANSFORM_CHECKS
from pyrogen.transforms import residual
from pyrogen.transforms.residual import Planar, Radial, Sylvester

LAYERS = {
    "planar": lambda context=0: Planar(4, context, hidden=(8,)),
    "radial": lambda context=0: Radial(4, context, hidden=(8,)),
    "sylvester": lambda context=0: Sylvester(4, context, hidden=(8,)),
    "narrow sylvester": lambda context=0: Sylvester(4, context, units=2, hidden=(8,)),
}
RECIPES = {"planar": planar, "radial": radial, "sylvester": sylvester}


def awake(module, scale=1.0):
    """Draw every parameter anew: layers start as the identity, where much would hold trivially."""
    for p in module.parameters():
        nn.init.normal_(p, std=scale if p.ndim == 1 else scale * p.shape[-1] ** -0.5)
    return module.double()


@pytest.fixture(params=[0, 3], ids=["", "context"])
def context(request):
    return torch.randn(request.param).double() if request.param else None


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request, context):
    return awake(request.param(0 if context is None else len(context)))


@pytest.fixture(params=RECIPES.values(), ids=RECIPES)
def recipe(request):
    return request.param


# The layers


@pytest.mark.parametrize("check", TRANSFORM_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_layer_is_a_transform(name, check, dtype):
    for c in (None, torch.randn(6, 3, dtype=dtype)):
        layer = awake(LAYERS[name](0 if c is None else 3), 0.7).to(dtype)
        check(layer, torch.randn(6, 4, dtype=dtype), c)


def test_layers_start_as_the_identity(context):
    x = torch.randn(5, 4)
    for make in LAYERS.values():
        c = None if context is None else context.float()
        y, ladj = make(0 if c is None else 3)(c).call_and_ladj(x)
        assert torch.allclose(y, x, atol=1e-6)
        assert torch.allclose(ladj, torch.zeros(5), atol=1e-6)


def test_inverse_returns_to_the_start(layer, context):
    f = layer(context)
    x = 3 * torch.randn(200, 4).double()
    y, ladj = f.call_and_ladj(x)
    back, inverse_ladj = f.inverse_and_ladj(y.clone())
    assert torch.allclose(back, x, atol=1e-11)
    assert torch.allclose(inverse_ladj, -ladj, atol=1e-10)
    assert torch.allclose(f(f.inv(x)), x, atol=1e-11)
    assert not torch.allclose(y, x, atol=0.1)


def test_log_determinant_is_that_of_autograd(layer, context):
    f = layer(context)
    for x in 2 * torch.randn(5, 4).double():
        y, ladj = f.call_and_ladj(x)
        expected = torch.linalg.slogdet(jacobian(f, x))
        assert expected.sign == 1
        assert ladj.item() == pytest.approx(expected.logabsdet.item(), abs=1e-10)
        expected = torch.linalg.slogdet(jacobian(f.inv, y)).logabsdet
        assert f.inv.call_and_ladj(y)[1].item() == pytest.approx(expected.item(), abs=1e-9)


def test_derivatives_of_both_orders_match_finite_differences(layer, context):
    f = layer(context)
    x = torch.randn(2, 4).double().requires_grad_()
    for way in (f.call_and_ladj, f.inverse_and_ladj):

        def total(x, way=way):
            y, ladj = way(x)
            return (y * torch.arange(1.0, 5.0)).sum(-1) + 3 * ladj

        assert torch.autograd.gradcheck(total, x, atol=1e-6)
        assert torch.autograd.gradgradcheck(total, x, atol=1e-6)


def test_parameters_have_the_gradient_of_finite_differences(layer, context):
    x = torch.randn(5, 4).double()
    for way in ("call_and_ladj", "inverse_and_ladj"):

        def total(way=way):
            y, ladj = getattr(layer(context), way)(x)
            return ((y * torch.arange(1.0, 5.0)).sum(-1) + 3 * ladj).sum()

        for p in layer.parameters():
            (grad,) = torch.autograd.grad(total(), p)
            direction = torch.randn_like(p)
            with torch.no_grad():
                p.add_(1e-6 * direction)
                up = total()
                p.sub_(2e-6 * direction)
                slope = (up - total()) / 2e-6
            assert torch.allclose((grad * direction).sum(), slope, rtol=1e-6, atol=1e-5)


def test_leading_shape_does_not_matter(layer, context):
    f = layer(context)
    x = torch.randn(6, 4).double()
    assert torch.allclose(f(x.reshape(2, 3, 4)).reshape(6, 4), f(x))
    assert torch.allclose(f.inv(x.reshape(2, 3, 4)).reshape(6, 4), f.inv(x))
    assert torch.allclose(f(x[0]), f(x)[0])
    if context is not None:
        wide = layer(context.expand(6, 1, -1))
        assert wide.batch_shape == (6, 1)
        assert torch.allclose(wide(x)[2], f(x))
        assert torch.allclose(wide.inv(x)[2], f.inv(x))
        assert wide.call_and_ladj(x)[1].shape == wide.inverse_and_ladj(x)[1].shape == (6, 6)


@pytest.mark.filterwarnings("ignore:.*jit.script:DeprecationWarning")  # of torch.func itself
def test_vmap_agrees_with_the_batch(layer, context):
    f = layer(context)
    x = torch.randn(5, 4).double()
    for way in (f.call_and_ladj, f.inverse_and_ladj):
        for a, b in zip(torch.func.vmap(way)(x), way(x), strict=True):
            assert torch.allclose(a, b, atol=1e-12)
    with torch.no_grad():
        forward = torch.func.vmap(torch.func.jacfwd(f.inv))(x)
    assert torch.allclose(forward, torch.func.vmap(torch.func.jacrev(f.inv))(x), atol=1e-12)
    assert torch.allclose(forward[0], jacobian(f.inv, x[0]), atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_parameters_of_a_hundred_are_survived(name, dtype):
    layer = awake(LAYERS[name](), 100.0).to(dtype)
    x = (10 * torch.randn(500, 4, dtype=dtype)).requires_grad_()
    for way in (layer().call_and_ladj, layer().inverse_and_ladj):
        y, ladj = way(x)
        assert y.isfinite().all()
        assert ladj.isfinite().all()
        (y.sum() + ladj.sum()).backward()
        assert x.grad.isfinite().all()
        assert all(p.grad.isfinite().all() for p in layer.parameters())
    if dtype == torch.float64:
        y = layer()(x)
        assert torch.allclose(layer()(layer().inv(y)), y, rtol=1e-6, atol=1e-6)


# Tiny cases in closed form


def test_planar_by_hand():
    layer = Planar(2).double()
    w, u = torch.tensor([2.0, 0.0]).double(), torch.tensor([0.5, 3.0]).double()
    layer.parameters_of.values.data = torch.cat([u, w, torch.tensor([0.3]).double()])
    x = torch.tensor([0.1, -0.2]).double()
    t = math.tanh(2 * 0.1 + 0.3)
    c = 0.99 * (math.log1p(math.exp(1.0) * (math.e - 1)) - 1)  # of w . u = 1
    y, ladj = layer().call_and_ladj(x)
    assert y.tolist() == pytest.approx([0.1 + c / 2 * t, -0.2 + 3 * t])
    assert ladj.item() == pytest.approx(math.log1p(c * (1 - t**2)))


def test_radial_by_hand():
    layer = Radial(3).double()
    centre = torch.tensor([1.0, 0.0, 0.0]).double()
    layer.parameters_of.values.data = torch.cat([centre, torch.tensor([0.0, 2.0]).double()])
    beta = 0.99 * (math.log1p(math.exp(2.0) * (math.e - 1)) - 1)
    y, ladj = layer().call_and_ladj(torch.tensor([1.0, 3.0, 0.0]).double())
    push = beta / (1 + 3)
    assert y.tolist() == pytest.approx([1.0, 3 * (1 + push), 0.0])
    assert ladj.item() == pytest.approx(2 * math.log1p(push) + math.log1p(beta / 16))


def test_radial_at_its_centre():
    for dtype in (torch.float32, torch.float64):
        layer = Radial(3).to(dtype)
        layer.parameters_of.values.data[3:] = 1.0
        f = layer()
        centre = layer.parameters_of.values.data[:3].clone().requires_grad_()
        for way in (f.call_and_ladj, f.inverse_and_ladj):
            y, ladj = way(centre)
            assert torch.equal(y, centre)
            (slope,) = torch.autograd.grad(ladj + y.sum(), centre)
            assert slope.isfinite().all()
        assert f(centre).isfinite().all()
        assert hessian(lambda x, f=f: f.inverse_and_ladj(x)[0].sum(), centre).isfinite().all()


def test_sylvester_of_one_feature_is_planar():
    wide, narrow = Sylvester(1).double(), Planar(1).double()
    for c, scale, bias in [(0.7, 0.4, 0.2), (-2.0, -0.5, 1.0)]:
        wide.parameters_of.values.data = torch.tensor([1.0, c, scale, bias]).double()
        w = -math.exp(scale / math.sqrt(1 + (scale / 3) ** 2))  # one mirror turns the sign
        narrow.parameters_of.values.data = torch.tensor([c / w, w, bias]).double()
        x = torch.randn(50, 1).double()
        for a, b in zip(wide().call_and_ladj(x), narrow().call_and_ladj(x), strict=True):
            assert torch.allclose(a, b, atol=1e-12)


def test_sylvester_is_its_matrices():
    layer = awake(Sylvester(4, units=3))
    f = layer()
    vectors, entries, log_diagonal, bias = layer.parameters_of.values.split([12, 9, 3, 3])
    mirrors = torch.eye(4).double()
    for v in vectors.reshape(3, 4):
        mirrors = (torch.eye(4) - 2 * torch.outer(v, v) / (v @ v)) @ mirrors
    q, entries = mirrors[:, :3], entries.reshape(3, 3)
    diagonal = (log_diagonal / (1 + (log_diagonal / 3) ** 2).sqrt()).exp()
    inner = entries.T.triu(1) + diagonal.diag()
    outer = entries.triu(1) + (residual._above_minus_one(entries.diag()) / diagonal).diag()
    x = torch.randn(4).double()
    expected = x + q @ outer @ (inner @ q.T @ x + bias).tanh()
    assert torch.allclose(f(x), expected, atol=1e-12)
    (slope,) = torch.autograd.grad(f(x).square().sum(), layer.parameters_of.values)
    assert (slope != 0).all()  # each number counts


def test_scalar_equation_has_the_root_of_bisection():
    """Over slopes at zero from 0.01 to a million, and targets from tiny to far out."""
    c = torch.tensor([-0.99, -0.9, -0.3, 0.0, 1e-3, 1.0, 30.0, 1e3, 1e6]).double()[:, None]
    y = torch.logspace(-9, 7, 65).double()
    y = torch.cat([-y, torch.zeros(1).double(), y])
    y = torch.cat([y.expand(len(c), -1), c * (1 - torch.logspace(-9, -1, 9).double())], dim=-1)
    low, high = y - c.abs() - 1, y + c.abs() + 1
    for _ in range(200):
        middle = (low + high) / 2
        above = middle + c * middle.tanh() > y
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    root = residual._solve(y, c)
    assert torch.allclose(root, (low + high) / 2, rtol=1e-9, atol=1e-12)
    single = residual._solve(y.float(), c.float()).double()
    residue = single + c * single.tanh() - y
    assert (residue.abs() <= 1e-6 * (y.abs() + c.abs() + single.abs())).all()


def test_newton_needs_few_repeats(monkeypatch):
    calls = []
    newton = residual._newton
    monkeypatch.setattr(residual, "_newton", lambda *a: (calls.append(1), newton(*a))[1])
    c = torch.linspace(-0.98, 20, 100)
    residual._solve(5 * torch.randn(100, 100), c)
    assert len(calls) <= 16


# The flows


def awake_flow(recipe, features, context=0, scale=0.7, **options):
    flow = awake(recipe(features, context, layers=3, hidden=(8,), **options), scale)
    flow.shift.uniform_(-1, 1)
    flow.scale.uniform_(0.5, 2)
    return flow


@pytest.mark.parametrize("check", DISTRIBUTION_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_flow_is_a_distribution(recipe, check, dtype):
    check(awake_flow(recipe, 3, 2).to(dtype)(torch.randn(4, 2, dtype=dtype)))


@pytest.mark.parametrize("check", MODULE_CHECKS, ids=lambda f: f.__name__)
def test_flow_is_a_module(recipe, check):
    check(awake_flow(recipe, 3, 2).float(), torch.randn(4, 2))


def test_untrained_flow_is_its_noise(recipe):
    x = torch.randn(7, 3)
    expected = dist.Normal(torch.zeros(3), 1.0).to_event(1).log_prob(x)
    assert torch.allclose(recipe(3)().log_prob(x), expected, atol=1e-5)
    assert torch.allclose(recipe(3, 2)(torch.randn(7, 2)).log_prob(x), expected, atol=1e-5)


def test_density_integrates_to_one(recipe):
    flow = awake_flow(recipe, 2)
    grid = torch.linspace(-16, 16, 401).double()
    with torch.no_grad():
        mass = flow().log_prob(torch.cartesian_prod(grid, grid)).exp().sum()
    assert mass.item() * (grid[1] - grid[0]).item() ** 2 == pytest.approx(1.0, abs=1e-3)


def test_draws_follow_the_density(recipe):
    """E[q/p] = 1 under p for any law q: a wrong density or a wrong draw shows."""
    flow = awake_flow(recipe, 2)
    with torch.no_grad():
        x = flow().sample((5_000,))
        q = dist.Normal(x.mean(0), 0.5 * x.std(0)).to_event(1)
        ratio = (q.log_prob(x) - flow().log_prob(x)).exp()
    error = ratio.std() / len(x) ** 0.5
    assert abs(ratio.mean() - 1) < 4.5 * error  # fails once in 1e5
    assert error < 0.2


@pytest.mark.parametrize(("dtype", "nats"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_draw_and_score_agree(recipe, dtype, nats):
    for flow in (recipe(6).to(dtype), awake_flow(recipe, 6, scale=0.5).to(dtype)):
        x, log_prob = flow().rsample_and_log_prob((100,))
        assert x.dtype == log_prob.dtype == dtype
        assert (flow().log_prob(x) - log_prob).abs().max() <= nats


def test_hessian_matches_finite_differences(recipe):
    p = awake_flow(recipe, 3, 2)(torch.ones(2).double())
    x = torch.tensor([0.3, -0.4, 0.7]).double()
    step = 1e-5 * torch.eye(3).double()
    slopes = [(jacobian(p.log_prob, x + h) - jacobian(p.log_prob, x - h)) / 2e-5 for h in step]
    found = hessian(p.log_prob, x)
    assert torch.allclose(found, torch.stack(slopes), atol=1e-6, rtol=1e-6)
    assert torch.allclose(found, found.T, atol=1e-9)


def test_context_sets_the_batch_shape(recipe):
    flow = awake_flow(recipe, 2, 3)
    context = torch.randn(4, 1, 3).double()
    p = flow(context)
    assert (p.batch_shape, p.event_shape) == ((4, 1), (2,))
    assert p.sample((5,)).shape == (5, 4, 1, 2)
    x = torch.randn(4, 7, 2).double()
    assert torch.allclose(p.log_prob(x)[2, 3], flow(context[2, 0]).log_prob(x[2, 3]), atol=1e-9)
    assert not torch.allclose(p.log_prob(x)[0], p.log_prob(x[:1])[1], atol=1e-3)
    mapped = torch.vmap(lambda x, c: flow(c).log_prob(x))
    with pyro.validation_enabled(False):
        assert torch.allclose(mapped(x[:, 0], context[:, 0]), p.log_prob(x)[:, 0], atol=1e-9)


def test_every_parameter_gets_a_gradient(recipe):
    for context in (0, 3):
        flow = awake_flow(recipe, 4, context)
        c = torch.randn(8, 3).double() if context else None
        flow(c).log_prob(torch.randn(8, 4).double()).sum().backward()
        flow(c).rsample().sum().backward()
        for name, w in flow.named_parameters():
            assert w.grad is not None, name
            assert w.grad.abs().sum() > 0, name


def test_untrained_flow_learns_at_once(recipe):
    for context in (0, 3):
        flow = recipe(4, context)
        c = torch.randn(8, 3) if context else None
        flow(c).log_prob(torch.randn(8, 4) ** 3).sum().backward()
        assert all(any((p.grad != 0).any() for p in f.parameters()) for f in flow.layers)


def test_state_survives_a_file_and_a_copy(recipe):
    flow = awake_flow(recipe, 4, support=constraints.positive)
    x = flow().sample((5,))
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    other = recipe(4, layers=3, support=constraints.positive).double()
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (other, copy.deepcopy(flow)):
        assert torch.equal(twin().log_prob(x), flow().log_prob(x))


def test_supports_and_plates(recipe):
    p = awake_flow(recipe, 3, support=constraints.simplex)()
    x, log_prob = p.rsample_and_log_prob((50,))
    assert x.shape == (50, 4)
    assert p.support.check(x).all()
    assert torch.allclose(p.log_prob(x), log_prob, atol=1e-6)
    flow = recipe(2, 3)
    with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 7):
        assert pyro.sample("x", flow(torch.randn(7, 3))).shape == (4, 7, 2)


# As guides


LOST = {"planar": 0.7, "radial": 0.95, "sylvester": 0.7}  # of what the best normal law loses


@pytest.mark.parametrize("name", RECIPES)
def test_guide_finds_a_posterior_that_no_normal_law_fits(name):
    """A banana: the evidence lower bound comes nearer to the log evidence, which is 0."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a.square() - 1, 0.7))

    pyro.set_rng_seed(0)
    guide = AutoFlow(model, partial(RECIPES[name], layers=6), init_scale=0.5).setup()
    loss_of = Trace_ELBO(128, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 3e-2}), loss_of)
    for _ in range(150):
        svi.step()
    loss = Trace_ELBO(5_000, vectorize_particles=True, max_plate_nesting=0).loss(model, guide)
    u = (math.sqrt(1 + 16 / 0.49) - 1) * 0.49 / 8  # best variance of a, in closed form
    normal = -0.5 - 0.5 * math.log(u) + u / 2 + u**2 / 0.49
    assert -0.05 < loss < LOST[name] * normal


@pytest.mark.slow
def test_amortized_posterior_follows_its_context():
    """z | x of a nonlinear model, one flow for every x, against quadrature."""
    pyro.set_rng_seed(1)

    def log_joint(z, x):
        prior = dist.Normal(0.0, 1.0).log_prob(z)
        return (prior + dist.Normal(z.exp(), 0.5).log_prob(x)).squeeze(-1)

    flow = sylvester(1, 1, layers=4, hidden=(16,))
    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(300):
        x = 3 * torch.rand(128, 1)
        z, log_prob = flow(x).rsample_and_log_prob()
        loss = (log_prob - log_joint(z, x)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    grid = torch.linspace(-6, 6, 2001)[:, None]
    for value in (0.1, 1.0, 2.5):
        x = torch.full((1,), value)
        exact = log_joint(grid, x).softmax(0) / 0.006
        with torch.no_grad():
            density = flow(x).log_prob(grid).exp()
        assert density.sum().item() * 0.006 == pytest.approx(1, abs=1e-3)
        overlap = torch.minimum(exact, density).sum().item() * 0.006
        assert overlap > 0.9


# Refusals

ERRORS = [
    (lambda: Planar(0), r"Planar expected at least 1 feature, got 0"),
    (lambda: Radial(0), r"Radial expected at least 1 feature, got 0"),
    (lambda: Sylvester(3, units=4), r"1 to features=3 units, got 4\. Stack several"),
    (lambda: Sylvester(3, units=0), r"units, got 0"),
    (lambda: Planar(2, 3)(), r"Planar was built with context=3, got 0"),
    (lambda: Radial(2)(torch.ones(3)), r"Radial was built with context=0, got 3"),
    (lambda: Sylvester(2, 1)(torch.full((4, 1), math.nan)), r"context of Sylvester .*finite"),
    (lambda: planar(0), r"at least 1 feature"),
]


@pytest.mark.parametrize(("call", "match"), ERRORS)
def test_refusals_say_what_to_do(call, match):
    with pytest.raises(ValueError, match=match):
        call()
