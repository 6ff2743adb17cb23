"""Flow matching against the fields of Gaussian paths, which are known, and the laws they carry."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

from pyrogen.distributions import Flow, nsf
from pyrogen.distributions.recipes.continuous import cnf
from pyrogen.nets import TimeMLP
from pyrogen.objectives.continuous import RegularizedLikelihood
from pyrogen.objectives.matching import (
    Bridge,
    FlowMatching,
    IndependentCoupling,
    OptimalTransport,
    SchroedingerBridge,
    Stochastic,
    Straight,
    Trigonometric,
)
from pyrogen.testing import OBJECTIVE_CHECKS
from pyrogen.transforms import LULinear
from pyrogen.transforms.continuous import Continuous

MEAN, SPREAD = 1.5, 0.4  # of the data; the noise is standard normal


def straight(t, low=0.0):
    return (1 - t) * MEAN, ((1 - t) ** 2 * SPREAD**2 + (low + (1 - low) * t) ** 2).sqrt()


def turn(t, blur=0.0):
    c, s = (torch.pi / 2 * t).cos(), (torch.pi / 2 * t).sin()
    gamma = blur * (torch.pi * t).sin() ** 2
    return c * MEAN, (c**2 * SPREAD**2 + s**2 + gamma**2).sqrt()


def bridge(t, sigma):
    mean, spread = straight(t)
    return mean, (spread**2 + sigma**2 * t * (1 - t)).sqrt()


PATHS = {  # an interpolant, and mean and standard deviation of x_t
    "straight": (Straight(), straight),
    "straight, smoothed": (Straight(0.2), lambda t: straight(t, 0.2)),
    "trigonometric": (Trigonometric(), turn),
    "bridge": (Bridge(0.7), lambda t: bridge(t, 0.7)),
    "stochastic": (Stochastic(gamma=0.6), lambda t: turn(t, 0.6)),
    "stochastic, straight": (
        Stochastic(Straight(), gamma=0.0),
        straight,
    ),
}


@pytest.fixture(params=PATHS.values(), ids=PATHS)
def path(request):
    return request.param


def exact_field(moments, t, x):
    """On the line one field alone carries N(mean, spread^2)."""
    with torch.enable_grad():
        t = t.detach().requires_grad_()
        mean, spread = moments(t)
        (drift,) = torch.autograd.grad(mean.sum(), t, retain_graph=True)
        (growth,) = torch.autograd.grad(spread.log().sum(), t)
    return drift + growth * (x - mean.detach())


class Exact(nn.Module):
    def __init__(self, moments):
        super().__init__()
        self.moments = moments
        self.gain, self.bias = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, x, t, context):
        return self.gain * exact_field(self.moments, t.unsqueeze(-1), x) + self.bias


def data(n):
    return MEAN + SPREAD * torch.randn(n, 1).double()


def flow_of(moments):
    return Flow(1, [Continuous(Exact(moments), 1)]).double()


@pytest.mark.parametrize("t", [0.03, 0.3, 0.5, 0.8])
def test_point_and_velocity_are_those_of_the_path(path, t):
    """Regress the velocity on the point: the exact field, whatever the formula."""
    interpolant, moments = path
    n = 100_000
    t = torch.full((n, 1), t).double()
    x_t, velocity = interpolant(data(n), torch.randn(n, 1).double(), t)
    mean, spread = moments(t[:1])
    assert abs(x_t.mean() - mean) < 4.5 * spread / math.sqrt(n)
    assert (x_t.std() / spread - 1).abs() < 4.5 / math.sqrt(2 * n)
    rest = velocity - exact_field(moments, t, x_t)
    for regressor in (torch.ones_like(x_t), (x_t - mean) / spread):  # fails once in 1e5 each
        product = rest * regressor
        assert product.mean().abs() < 4.5 * product.std() / math.sqrt(n)


def test_ends_are_datum_and_noise(path):
    interpolant, _ = path
    x, z = data(5), torch.randn(5, 1).double()
    for end, expected in ((1e-9, x), (1 - 1e-9, z)):
        x_t, _ = interpolant(x, z, torch.full((5, 1), end).double())
        low = interpolant.sigma_min if isinstance(interpolant, Straight) and end < 0.5 else 0.0
        assert torch.allclose(x_t, expected + low * z, atol=1e-3)


def vanishes(objective, n, repeats):
    """No gradient at the exact field, in expectation, and one away from it."""
    field = objective.flow.layers[0].field
    both = [field.gain, field.bias]
    draws = [torch.stack(torch.autograd.grad(objective(data(n)), both)) for _ in range(repeats)]
    gradients = torch.stack(draws)
    error = gradients.std(0) / math.sqrt(repeats)
    assert (gradients.mean(0).abs() < 4.5 * error + 0.002).all()  # fails once in 1e5
    with torch.no_grad():
        field.gain.fill_(1.2)
    assert torch.autograd.grad(objective(data(50 * n)), field.gain)[0] > 10 * error[0]


def test_gradient_vanishes_at_the_exact_field(path):
    interpolant, moments = path
    vanishes(FlowMatching(flow_of(moments), interpolant=interpolant), 640, 150)


def test_gradient_vanishes_at_the_field_of_the_schroedinger_bridge():
    def moments(t):
        """Entropic pairs of Gaussians have covariance c: c^2 + eps c / 2 = spread^2."""
        epsilon = 2 * 0.7**2
        c = -epsilon / 4 + math.sqrt(epsilon**2 / 16 + SPREAD**2)
        ends = ((1 - t) * SPREAD) ** 2 + t**2 + 2 * t * (1 - t) * c
        return (1 - t) * MEAN, (ends + 0.7**2 * t * (1 - t)).sqrt()

    objective = FlowMatching(
        flow_of(moments), coupling=SchroedingerBridge(0.7, block=100), interpolant=Bridge(0.7)
    )
    vanishes(objective, 400, 60)


def monotone(t):
    """Optimal pairs on the line: z = (x - mean) / spread."""
    return (1 - t) * MEAN, (1 - t) * SPREAD + t


def test_optimal_pairs_make_straight_flows():
    """Their velocity is a function of the point: a loss of zero, up to the block's finite size."""
    objective = FlowMatching(flow_of(monotone), coupling=OptimalTransport(block=500))
    crossing = FlowMatching(flow_of(straight))
    assert objective(data(500)) < 0.03
    assert crossing(data(500)) > 0.2


@pytest.mark.parametrize("moments", [straight, turn, lambda t: bridge(t, 0.7), monotone])
def test_flow_of_the_exact_field_has_the_density_of_the_data(moments):
    x = data(20)
    expected = dist.Normal(MEAN, SPREAD).log_prob(x).squeeze(-1)
    assert torch.allclose(flow_of(moments)().log_prob(x), expected, atol=1e-7)


def test_loss_before_training_is_the_mean_square_of_the_velocity():
    x = torch.randn(50_000, 2)
    loss = FlowMatching(cnf(2))(x).item()
    assert loss == pytest.approx(2.0, abs=0.05)


def test_units_and_support_of_the_data_do_not_matter():
    losses = []
    x = data(1000).float()
    for transform, support in [
        (lambda x: x, constraints.real),
        (lambda x: 100 + 0.01 * x, constraints.real),
        (torch.exp, constraints.positive),
        (torch.sigmoid, constraints.unit_interval),
    ]:
        torch.manual_seed(0)
        flow = cnf(1, support=support)
        nn.init.normal_(flow.layers[0].field.net[-1].weight)
        flow.standardize(transform(x))
        losses.append(FlowMatching(flow)(transform(x)).item())
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-3)


def test_time_is_stratified_and_in_no_order():
    seen = []

    class Record(nn.Module):
        def forward(self, x, t, context):
            seen.append(t)
            return x

    FlowMatching(Flow(2, [Continuous(Record(), 2)]))(torch.randn(8, 8, 2))
    assert torch.equal((64 * seen[0]).long().sort().values, torch.arange(64))
    assert not torch.equal((64 * seen[0]).long(), torch.arange(64))


def test_bridge_has_a_loss_of_finite_variance():
    """Without its weight the mean square of the velocity grows with every draw."""
    interpolant = Bridge(1.0)
    t = torch.logspace(-9, -0.31, 200).double().unsqueeze(-1)
    x, z = torch.zeros(200, 1).double(), torch.zeros(200, 1).double()
    squares = sum(interpolant(x, z, t)[1].square() for _ in range(2000)) / 2000
    assert squares[0] > 1e6
    assert (interpolant.weight(t) * squares).max() < 1.5
    assert (interpolant.weight(t) > 0).all()
    assert torch.allclose(interpolant.weight(torch.tensor(0.5)), torch.ones(()))


def test_noise_of_yours_is_the_one_that_is_used():
    flow = cnf(2)
    x = torch.randn(500, 2)
    assert FlowMatching(flow)(x, noise=x) == 0  # nothing moves, as the untrained field says
    shifted = FlowMatching(flow)(x, noise=x + torch.tensor([3.0, 0.0]))
    assert shifted.item() == pytest.approx(9 / 2, rel=1e-5)


def test_noise_of_the_flow_is_the_one_that_is_used():
    class Narrow(nn.Module):
        def forward(self):
            return dist.Normal(torch.full((2,), 5.0), 1e-3).to_event(1)

    loss = FlowMatching(cnf(2, noise=Narrow()))(torch.zeros(100, 2))
    assert loss.item() == pytest.approx(25.0, rel=1e-2)


def test_contexts_stay_with_their_data():
    """The field sees the context of the datum, not of the draw of noise."""
    seen = []

    class Record(nn.Module):
        def forward(self, x, t, context):
            seen.append((x, t, context))
            return x

    flow = Flow(1, [Continuous(Record(), 1, 1)], 1)
    c = torch.randn(40, 1)
    coupling = OptimalTransport(context_weight=0.0)
    FlowMatching(flow, coupling=coupling)(10 * c, c, noise=torch.zeros(40, 1))
    x_t, t, context = seen[0]
    assert torch.allclose(x_t, (1 - t.unsqueeze(-1)) * 10 * context, atol=1e-5)


@pytest.mark.parametrize("check", OBJECTIVE_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("context", [0, 2])
def test_objective_keeps_every_law(check, context):
    objective = FlowMatching(cnf(3, context), coupling=OptimalTransport(), interpolant=Bridge(0.3))
    check(objective, torch.randn(8, 3), *([torch.randn(8, 2)] if context else []))


def test_precision_is_that_of_the_flow():
    for coupling in (IndependentCoupling(), OptimalTransport(), SchroedingerBridge()):
        objective = FlowMatching(cnf(2).double(), coupling=coupling)
        assert objective(torch.randn(20, 2).double()).dtype == torch.float64


@pytest.mark.slow
@pytest.mark.parametrize(
    ("coupling", "interpolant"),
    [
        (IndependentCoupling(), Straight()),
        (OptimalTransport(), Straight()),
        (OptimalTransport(), Bridge(0.1)),
        (IndependentCoupling(), Stochastic(gamma=0.2)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_conditional_density_is_learned(coupling, interpolant):
    """x = c + N(0, 0.5^2), two-sided: the mean log-density comes near minus the entropy."""

    def draw(n):
        c = torch.randn(n, 1)
        side = 2 * torch.randint(2, (n, 1)) - 1
        return c + side + 0.5 * torch.randn(n, 1), c

    x, c = draw(20_000)
    flow = cnf(1, 1, hidden=(64, 64)).standardize(x)
    objective = FlowMatching(flow, coupling=coupling, interpolant=interpolant)
    optimizer = torch.optim.Adam(flow.parameters(), 4e-3)
    steps = 1500
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(len(x), (256,))
        optimizer.zero_grad()
        objective(x[rows], c[rows]).backward()
        optimizer.step()
        decay.step()
    x, c = draw(2000)
    side = dist.Normal(torch.tensor([1.0, -1.0]), 0.5)
    exact = side.log_prob(x - c).logsumexp(-1) - math.log(2)
    with torch.no_grad():
        gap = (exact - flow(c).log_prob(x)).mean().item()
    assert -0.02 < gap < 0.1


ERRORS = [
    (lambda: FlowMatching(nsf(2)), ValueError, r"one Continuous layer, got \[Coupling, LULinear"),
    (
        lambda: FlowMatching(Flow(2, [Continuous(TimeMLP(2), 2), LULinear(2)])),
        ValueError,
        r"got \[Continuous, LULinear\]. Build it by cnf",
    ),
    (lambda: FlowMatching(cnf(2, 1))(torch.zeros(4, 2)), ValueError, r"context=1, got 0"),
    (
        lambda: FlowMatching(cnf(2, 1))(torch.zeros(4, 2), torch.zeros(3, 1)),
        ValueError,
        r"one context for each datum",
    ),
    (
        lambda: FlowMatching(cnf(2))(torch.zeros(4, 2), noise=torch.zeros(3, 2)),
        ValueError,
        r"one draw of noise per datum, got \(3, 2\).*as many draws as data",
    ),
    (
        lambda: FlowMatching(cnf(2))(torch.zeros(4, 2), noise=torch.zeros(4, 3)),
        ValueError,
        r"The noise of FlowMatching expected a batch of shape \(\*batch, 2\)",
    ),
    (
        lambda: FlowMatching(cnf(2))(torch.zeros(4, 2), noise=torch.zeros(4, 2).double()),
        ValueError,
        r"The noise of FlowMatching holds torch.float32",
    ),
    (
        lambda: FlowMatching(cnf(2, support=constraints.positive))(-torch.ones(4, 2)),
        ValueError,
        r"within the support",
    ),
    (lambda: Straight(-0.1), ValueError, r"Straight expected sigma_min >= 0, got -0.1"),
    (lambda: Bridge(math.nan), ValueError, r"Bridge expected sigma >= 0, got nan"),
    (lambda: Stochastic(gamma=-1.0), ValueError, r"Stochastic expected gamma >= 0, got -1"),
]


@pytest.mark.parametrize(("call", "error", "match"), ERRORS)
def test_refusals_say_what_to_do(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.parametrize("objective", [FlowMatching, RegularizedLikelihood])
def test_data_outside_the_support_are_refused(objective):
    flow = cnf(2, hidden=(8,), support=constraints.unit_interval)
    with pytest.raises(ValueError, match="within the support"):
        objective(flow)(1 + torch.rand(8, 2))


def test_one_context_serves_the_whole_batch():
    flow = cnf(2, 3, hidden=(8,))
    assert FlowMatching(flow)(torch.randn(8, 2), torch.zeros(3)).isfinite()
