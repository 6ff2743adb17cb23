"""Flows as distributions: exact densities, Pyro sites, supports, and floors they cannot pass."""

import copy
import io
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from flow_cases import MONOTONE, RECIPES, SUPPORTS, awake, networks
from torch import nn
from torch.distributions import constraints
from torch.distributions import transforms as tt

from pyrogen.distributions import CircularNoise, Flow, StudentTNoise, Transformed, circular, nsf
from pyrogen.nets import MaskedLinear
from pyrogen.targets import checkerboard, eight_gaussians
from pyrogen.transforms import Elementwise, LULinear

EVERY = RECIPES | MONOTONE


@pytest.fixture(params=EVERY.values(), ids=EVERY)
def recipe(request):
    return request.param


@pytest.fixture(params=SUPPORTS.values(), ids=SUPPORTS)
def support(request):
    return request.param


# The density


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_untrained_flow_is_its_noise(recipe):
    x = torch.randn(7, 3)
    expected = dist.Normal(torch.zeros(3), 1.0).to_event(1).log_prob(x)
    assert torch.allclose(recipe(3)().log_prob(x), expected, atol=1e-5)


def test_affine_flow_has_the_density_in_closed_form():
    flow = Flow(2, [Elementwise(2)], support=constraints.positive).double()
    nn.init.constant_(flow.layers[0].params, 0.5)
    flow.shift.fill_(0.3)
    flow.scale.fill_(2.0)
    scale = math.exp(3 * math.tanh(0.5 / 3))
    expected = dist.LogNormal(torch.full((2,), 0.3 + 2 * 0.5).double(), 2 * scale).to_event(1)
    x = expected.sample((10,))
    assert torch.allclose(flow().log_prob(x), expected.log_prob(x), atol=1e-12)


def test_density_integrates_to_one(recipe):
    flow = awake(recipe(2).double())
    draws = flow().sample((1000,))
    scale = draws.std(0)
    grid = torch.linspace(-12, 12, 401).double()
    x = draws.mean(0) + scale * torch.cartesian_prod(grid, grid)
    with torch.no_grad():
        mass = flow().log_prob(x).exp().sum() * scale.prod() * (grid[1] - grid[0]) ** 2
    assert mass.item() == pytest.approx(1.0, abs=1e-3)


def test_density_integrates_to_one_on_a_square(recipe):
    flow = awake(recipe(2, support=constraints.unit_interval).double())
    flow.shift.zero_()
    flow.scale.fill_(0.5)  # away from the borders, where a grid is too coarse
    grid = (torch.arange(400).double() + 0.5) / 400
    with torch.no_grad():
        mass = flow().log_prob(torch.cartesian_prod(grid, grid)).exp().mean()
    assert mass.item() == pytest.approx(1.0, abs=1e-3)


def test_draws_follow_the_density(recipe):
    """E[q/p] = 1 under p for any law q: a wrong density or a wrong draw shows."""
    flow = awake(recipe(2).double())
    with torch.no_grad():
        x = flow().sample((5_000,))
        q = dist.Normal(x.mean(0), 0.5 * x.std(0)).to_event(1)
        ratio = (q.log_prob(x) - flow().log_prob(x)).exp()
    error = ratio.std() / len(x) ** 0.5
    assert abs(ratio.mean() - 1) < 4.5 * error  # fails once in 1e5
    assert error < 0.2


@pytest.mark.parametrize(("dtype", "nats"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_draw_and_score_agree(recipe, dtype, nats):
    for flow in (recipe(6).to(dtype), awake(recipe(6)).to(dtype)):
        x, log_prob = flow().rsample_and_log_prob((100,))
        assert x.dtype == log_prob.dtype == dtype
        assert (flow().log_prob(x) - log_prob).abs().max() <= nats


def test_draw_and_score_agree_at_ten_times_the_outputs(recipe):
    """Maps this steep lose eight digits whatever the algorithm, so double precision it is."""
    flow = awake(recipe(6)).double()
    with torch.no_grad():
        for net in networks(flow):
            net[-1].weight.mul_(10)
    x, log_prob = flow().rsample_and_log_prob((100,))
    assert (flow().log_prob(x) - log_prob).abs().max() <= 1e-6


def test_every_support_has_its_jacobian(recipe, support):
    """Against torch's own transformed distribution, which takes two passes."""
    flow = awake(recipe(3, support=support).double())
    p = flow()
    x, log_prob = p.rsample_and_log_prob((50,))
    reference = dist.TransformedDistribution(p.noise, p.transforms)
    assert torch.allclose(log_prob, reference.log_prob(x), atol=1e-6)
    assert torch.allclose(p.log_prob(x), log_prob, atol=1e-6)
    assert p.support.event_dim == 1
    assert p.support.check(x).all()


def test_hessian_matches_finite_differences(recipe):
    p = awake(recipe(3, 2).double())(torch.ones(2).double())

    def slope(x):
        return torch.autograd.functional.jacobian(p.log_prob, x)

    x = torch.tensor([0.3, -0.4, 0.7]).double()
    hessian = torch.autograd.functional.hessian(p.log_prob, x)
    step = 1e-5 * torch.eye(3).double()
    expected = torch.stack([(slope(x + h) - slope(x - h)) / 2e-5 for h in step])
    assert torch.allclose(hessian, expected, atol=1e-6)
    assert torch.allclose(hessian, hessian.T, atol=1e-10)


def test_one_way_is_one_pass(recipe):
    flow = recipe(4, 1, layers=3)
    count = []
    for net in networks(flow):
        net[0].register_forward_hook(lambda *_: count.append(1))
    p = flow(torch.ones(1))
    x, _ = p.rsample_and_log_prob((5,))
    drawn = len(count)
    p.log_prob(x)
    assert min(drawn, len(count) - drawn) == len(networks(flow))  # one way at least


def test_nothing_is_stale_after_a_step(recipe):
    flow = awake(recipe(2))
    p = flow()
    x = p.sample()
    before = p.log_prob(x)
    with torch.no_grad():
        for w in flow.parameters():
            w.add_(0.1)
    assert not torch.equal(p.log_prob(x), before)
    assert torch.equal(p.log_prob(x), flow().log_prob(x.clone()))


def test_every_parameter_gets_a_gradient(recipe):
    for context in (0, 3):
        flow = awake(recipe(4, context))
        c = torch.randn(8, 3) if context else None
        flow(c).log_prob(torch.randn(8, 4)).sum().backward()
        flow(c).rsample().sum().backward()
        for name, w in flow.named_parameters():
            assert w.grad is not None, name
            assert w.grad.abs().sum() > 0, name


def test_untrained_flow_learns_at_once(recipe):
    flow = recipe(4, 1)
    flow(torch.ones(1)).log_prob(torch.randn(8, 4) ** 3).sum().backward()
    assert all(w.grad is not None for w in flow.parameters())
    last = networks(flow)[0][-1]
    assert isinstance(last, nn.Linear | MaskedLinear)
    assert last.weight.grad.abs().sum() > 0


def test_every_feature_moves_every_other(recipe):
    if recipe is MONOTONE["triangular"]:
        pytest.skip("a triangular map is triangular")
    flow = awake(recipe(5, layers=6).double())
    dense = torch.autograd.functional.jacobian(flow().bijection, torch.randn(5).double())
    assert (dense != 0).all()


def test_every_feature_is_moved_by_a_network(recipe):
    flow = recipe(5).double()
    for name, p in flow.named_parameters():
        if ".net." in name:
            nn.init.normal_(p)
    moved = torch.autograd.functional.jacobian(flow().bijection, torch.randn(5).double())
    assert (moved != torch.eye(5).double()).any(1).all()


# A distribution of Pyro


def test_context_sets_the_batch_shape(recipe):
    flow = awake(recipe(2, 3))
    context = torch.randn(4, 1, 3)
    p = flow(context)
    assert (p.batch_shape, p.event_shape) == ((4, 1), (2,))
    assert p.sample((5,)).shape == (5, 4, 1, 2)
    x = torch.randn(4, 7, 2)
    assert torch.allclose(p.log_prob(x)[2, 3], flow(context[2, 0]).log_prob(x[2, 3]), atol=1e-5)
    assert not torch.allclose(p.log_prob(x)[0], p.log_prob(x[:1])[1], atol=1e-3)


def test_context_sets_the_batch_shape_even_where_no_layer_reads_it():
    p = Flow(2, [LULinear(2)], 3)(torch.zeros(4, 3))
    assert p.batch_shape == p.noise.batch_shape == (4,)
    assert p.sample().unique(dim=0).shape == (4, 2)


def test_expand_keeps_the_law(recipe):
    for context in (None, torch.randn(1, 3)):
        p = awake(recipe(2, 0 if context is None else 3))(context)
        wide = p.expand((6, 5))
        assert isinstance(wide, Transformed)
        assert wide.sample((2,)).shape == (2, 6, 5, 2)
        assert wide.noise.batch_shape == (6, 5)
        x = wide.sample()
        assert torch.allclose(wide.log_prob(x), p.log_prob(x), atol=1e-5)
        assert (x.flatten(0, 1)[1:] != x.flatten(0, 1)[:-1]).all()
        assert wide.rsample_and_log_prob()[1].shape == (6, 5)


def test_shapes_inside_plates(recipe):
    flow = recipe(2, 3)
    with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 7):
        assert pyro.sample("x", flow(torch.randn(7, 3))).shape == (4, 7, 2)
        masked = flow(torch.randn(7, 3)).mask(torch.arange(7) < 3)
        assert pyro.sample("y", masked).shape == (4, 7, 2)
    assert (masked.log_prob(torch.randn(7, 2)) == 0).tolist() == [False] * 3 + [True] * 4
    p = flow(torch.randn(7, 3)).to_event(1)
    assert (p.batch_shape, p.event_shape) == ((), (7, 2))
    assert p.log_prob(p.sample()).shape == ()


def test_noise_and_draw_are_one_to_one(recipe, support):
    p = awake(recipe(3, support=support).double())()
    z = p.noise.sample((10,)).requires_grad_()
    x = p.from_noise(z)
    assert torch.equal(x, p.from_noise(z))
    expected = p.noise.log_prob(z) - p.bijection.call_and_ladj(z)[1]
    assert torch.allclose(p.log_prob(x), expected, atol=1e-6)
    assert torch.autograd.grad(x.square().sum(), z)[0].abs().sum() > 0


def test_same_seed_same_draw(recipe):
    draws = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        draws.append(awake(recipe(4))().sample((5,)))
    assert torch.equal(*draws)


def test_state_survives_a_file_and_a_copy(recipe):
    flow = awake(recipe(4, support=constraints.positive))
    x = flow().sample((5,))
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    other = recipe(4, support=constraints.positive)
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (other, copy.deepcopy(flow)):
        assert torch.equal(twin().log_prob(x), flow().log_prob(x))
    assert torch.equal(copy.deepcopy(flow()).log_prob(x), flow().log_prob(x))


# Standardizing


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_standardize_pulls_data_back_to_unit_scale(recipe, support):
    flow = recipe(3, support=support)
    data = awake(recipe(3, support=support))().sample((50, 4))
    assert flow.standardize(data) is flow
    u = flow.constrain.inv(data).flatten(0, 1)
    assert torch.allclose(flow.shift, u.mean(0))
    assert torch.allclose(flow.scale, u.std(0))
    noise, _ = flow().bijection.inverse_and_ladj(data)
    assert torch.allclose(noise.mean((0, 1)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(noise.flatten(0, 1).std(0), torch.ones(3), atol=1e-4)


# Refusals

RING = CircularNoise([True, True])
UNIT = constraints.unit_interval
TWO = torch.tensor([[0.5, 0.2], [0.1, 0.4]])


def with_nan():
    return nsf(2).standardize(torch.tensor([[0.0, math.nan], [1.0, 2.0]]))


ERRORS = [
    (lambda: nsf(2, support=circular, noise=RING), ValueError, r"on the circle.*ncsf"),
    (lambda: nsf(2, support=circular), ValueError, r"on the circle.*ncsf"),
    (lambda: nsf(2, noise=StudentTNoise(3))(), ValueError, r"event shape \(2,\), got \(3,\)"),
    (lambda: nsf(2, 3)(), ValueError, r"context=3, got 0 .*rebuild the flow"),
    (lambda: nsf(2)(torch.ones(4, 3)), ValueError, r"context=0, got 3"),
    (lambda: nsf(2, 3)(torch.ones(4, 2)), ValueError, r"context=3, got 2"),
    (lambda: nsf(1), ValueError, r"at least 2 features.*use\s+Elementwise or Autoregressive"),
    (lambda: Flow(0, []), ValueError, r"at least 1 feature, got 0"),
    (lambda: Flow(2, [], support=constraints.boolean), ValueError, r"reals map onto, got Boolean"),
    (lambda: Flow(2, [], support=constraints.dependent), ValueError, r"reals map onto"),
    (lambda: Flow(2, [], support="positive"), TypeError, r"expected a constraint.*'positive'"),
    (with_nan, ValueError, r"finite data, got 1 NaN"),
    (lambda: nsf(2).standardize(torch.ones(5, 3)), ValueError, r"\(\*batch, 2\), got \(5, 3\)"),
    (lambda: nsf(2).standardize(torch.ones(5, 2).int()), TypeError, r"floating-point"),
    (lambda: nsf(2).standardize(torch.ones(5, 2).double()), ValueError, r"holds torch.float32"),
    (lambda: nsf(2).standardize(torch.ones(1, 2)), ValueError, r"at least 2 data, got 1"),
    (lambda: nsf(2).standardize(torch.ones(0, 2)), ValueError, r"at least 2 data, got 0"),
    (lambda: nsf(2).standardize(torch.ones(5, 2)), ValueError, r"got 2 constant"),
    (lambda: nsf(2, support=UNIT).standardize(TWO + 1), ValueError, r"got 2 outside or on"),
    (lambda: nsf(2, support=UNIT).standardize(TWO.round()), ValueError, r"on its border"),
    (lambda: nsf(2, support=UNIT).standardize(TWO + 0.5), ValueError, r"got 1 outside or on"),
    (lambda: nsf(2, support=constraints.positive).standardize(-TWO), ValueError, r"outside or on"),
    (lambda: nsf(2)().log_prob(torch.ones(2).int()), TypeError, r"floating-point.*x.float"),
    (lambda: nsf(2)().log_prob(torch.tensor([0.0, math.nan])), ValueError, r"within the support"),
    (lambda: nsf(2, support=UNIT)().log_prob(TWO + 1), ValueError, r"within the support"),
    (lambda: nsf(2)().log_prob(torch.ones(5, 3)), ValueError, r"rightmost|shape"),
    (lambda: Transformed(dist.Normal(0.0, 1.0), []), ValueError, r"at least one transform"),
]


@pytest.mark.parametrize(("call", "error", "match"), ERRORS)
def test_refusals_say_what_to_do(call, error, match):
    with pytest.raises(error, match=match):
        call()


# Without validation a value outside the support costs nothing to score, and is not checked


def test_validation_is_the_callers_choice():
    noise = dist.Normal(torch.zeros(2), 1.0, validate_args=False).to_event(1)
    p = Transformed(noise, [tt.ExpTransform()], validate_args=False)
    assert p.log_prob(-torch.ones(2)).isnan()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.parametrize("recipe", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("context", [0, 3])
def test_log_prob_is_one_graph(recipe, context, monkeypatch):
    validation = torch.distributions.Distribution._validate_args
    monkeypatch.setattr(  # tracing switches it off for good
        torch.distributions.Distribution, "_validate_args", validation
    )
    torch.compiler.reset()  # one cache for all recipes would overflow
    flow = awake(recipe(4, context))
    c = torch.randn(8, 3) if context else None
    compiled = torch.compile(lambda x: flow(c).log_prob(x), fullgraph=True, backend="eager")
    x = torch.randn(8, 4)
    assert torch.allclose(compiled(x), flow(c).log_prob(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "floor", "above"),
    [(eight_gaussians, 2.833, 0.15), (checkerboard, math.log(32), 0.35)],
    ids=["eight gaussians", "checkerboard"],
)
def test_loss_approaches_the_entropy_and_never_passes_it(target, floor, above):
    flow = nsf(2).standardize(target(10_000))
    optimizer = torch.optim.Adam(flow.parameters(), 5e-3)
    steps = 600
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -flow().log_prob(target(256)).mean()
        loss.backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        nll = -flow().log_prob(target(50_000))
    error = (nll.std() / len(nll) ** 0.5).item()
    assert nll.mean().item() > floor - 4.5 * error
    assert nll.mean().item() < floor + above


@pytest.mark.parametrize(
    "support", [constraints.half_open_interval(0, 1), constraints.independent(UNIT, 1)], ids=str
)
def test_border_is_refused_whatever_the_kind_of_interval(support):
    x = torch.rand(50, 2)
    x[3] = 0
    with pytest.raises(ValueError, match=r"got 1 outside or on its border"):
        nsf(2, support=support).standardize(x)


def test_context_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match=r"The context of Flow expected finite data"):
        nsf(2, 3)(torch.full((4, 3), torch.nan))
    with pytest.raises(ValueError, match=r"The context of Flow holds torch.float32"):
        nsf(2, 3)(torch.zeros(4, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"context=0, got 3 .*Pass no context"):
        nsf(2)(torch.zeros(4, 3))


def test_contexts_can_be_mapped_over():
    flow = awake(nsf(2, 3, hidden=(16,)))
    x, c = torch.randn(5, 2), torch.randn(5, 3)
    mapped = torch.vmap(lambda x, c: flow(c).log_prob(x))
    with pyro.validation_enabled(False):
        assert torch.allclose(mapped(x, c), flow(c).log_prob(x), atol=1e-5)
