"""Whole numbers by flows: exact draws, and bounds below the probability that quadrature gives."""

import copy
import math

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from flow_cases import awake
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from scipy import stats
from torch import nn
from torch.distributions import constraints

from pyrogen.distributions import Flow, nsf, realnvp
from pyrogen.distributions.dequantized import (
    Dequantized,
    Quantized,
    UniformDequantizer,
    VariationalDequantizer,
)
from pyrogen.evaluation import bits_per_dim
from pyrogen.objectives.dequantization import Dequantization
from pyrogen.testing import DISTRIBUTION_CHECKS, OBJECTIVE_CHECKS
from pyrogen.training import Trainer
from pyrogen.transforms import Elementwise

UNIT = constraints.unit_interval


def quadrature(p, k, nodes=40):
    """Exact log-probability of the cell of ``k``, by Gauss-Legendre."""
    at, weight = torch.as_tensor(numpy.stack(numpy.polynomial.legendre.leggauss(nodes)))
    at, weight = (at + 1) / 2, weight / 2
    features = k.shape[-1]
    u = torch.cartesian_prod(*[at] * features).reshape(-1, features)
    w = torch.cartesian_prod(*[weight] * features).reshape(-1, features).prod(-1)
    return (p.log_prob(k + u[:, None]) + w.log()[:, None]).logsumexp(0)


def sharp(features=2, context=0):
    """A flow that varies within a cell, so that a bound of one draw is loose."""
    flow = realnvp(features, context, layers=2, hidden=(8,)).double()
    awake(flow)
    flow.shift.fill_(0.6)
    flow.scale.fill_(0.4)
    return flow


def learned(features=2, context=0):
    return VariationalDequantizer(
        realnvp(features, features + context, layers=3, hidden=(16,), support=UNIT)
    ).double()


CELLS = torch.cartesian_prod(*[torch.arange(-1.0, 3.0).double()] * 2)


def test_draws_are_the_floor_of_the_flow():
    flow = Flow(1, []).double()
    flow.shift.fill_(0.4)
    flow.scale.fill_(1.3)
    k = Dequantized(flow)().sample((5000,))[:, 0]
    cells = torch.arange(-3.0, 4.0).double()
    cdf = dist.Normal(0.4, 1.3).cdf
    expected = cdf(cells + 1) - cdf(cells)
    seen = torch.stack([(k == c).sum() for c in cells])
    rest = 1 - expected.sum()
    counts = [*seen.tolist(), 5000 - seen.sum().item()]
    assert stats.chisquare(counts, [*(5000 * expected).tolist(), 5000 * rest.item()]).pvalue > 1e-4


@pytest.mark.parametrize("dequantizer", [UniformDequantizer(), learned()], ids=["uniform", "flow"])
def test_bound_lies_below_and_tightens_to_the_truth(dequantizer):
    p = Dequantized(sharp(), dequantizer)()
    exact = quadrature(p.continuous, CELLS)
    with torch.no_grad():
        bounds = {
            n: torch.stack([p.bound(CELLS, particles=n) for _ in range(200)]).mean(0)
            for n in (1, 4, 64)
        }
    gaps = [(exact - bounds[n]).mean().item() for n in (1, 4, 64)]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert gaps[0] > 0.2
    assert gaps[2] < 0.25 * gaps[0]
    assert (bounds[1] < exact).all()


def test_average_of_probabilities_is_unbiased():
    p = Dequantized(sharp(), learned())()
    k = CELLS[quadrature(p.continuous, CELLS).topk(3).indices]  # weights of rare ones have tails
    with torch.no_grad():
        draws = p.bound(k.expand(20_000, 3, 2), particles=4).exp()
    error = draws.std(0) / len(draws) ** 0.5
    z = (draws.mean(0) - quadrature(p.continuous, k).exp()) / error
    assert z.abs().max() < 4.5  # fails once in 5e4


def test_flat_cells_have_no_gap():
    """Under a uniform density one draw is exact: 8 bits a number for 256 levels."""
    noise = dist.Uniform(torch.zeros(2), torch.full((2,), 256.0)).to_event(1)
    bound = Quantized(noise).bound(torch.tensor([[0.0, 255.0], [7.0, 9.0]]))
    assert bits_per_dim(bound, 2).tolist() == pytest.approx([8.0, 8.0])


@pytest.mark.parametrize("end", [0.0, 1 - 2**-24])
def test_values_at_the_borders_are_scored(end):
    """Rounding must not carry 255 + u to 256, where the support ends."""

    class End(UniformDequantizer):
        def forward(self, k, context, draws):
            return torch.full((draws, *k.shape), end), 0.0

    k = torch.tensor([[0.0, 255.0]])
    half_open = dist.Uniform(torch.zeros(2), 256.0, validate_args=False).to_event(1)
    for continuous in (half_open, nsf(2, support=constraints.positive)()):
        assert Quantized(continuous, End()).bound(k).isfinite().all()


def test_fractions_follow_number_and_context():
    q = awake(learned(2, 3).flow)
    draw = VariationalDequantizer(q)
    k, context = torch.zeros(2, 2).double(), torch.zeros(2, 3).double()
    context[1] = 1.0
    seen = []
    for given in ((k, context), (k + 1, context)):
        pyro.set_rng_seed(0)
        seen.append(draw(*given, 1)[0][0])
    assert not torch.allclose(seen[0], seen[1])
    pyro.set_rng_seed(0)
    without = draw(k, torch.zeros(2, 3).double(), 1)[0][0]
    assert torch.allclose(without[0], seen[0][0])
    assert not torch.allclose(without[1], seen[0][1])


@pytest.mark.slow
def test_variational_fractions_are_tighter_than_uniform_ones():
    flow = sharp().requires_grad_(False)
    gaps = []
    for dequantizer in (UniformDequantizer(), learned()):
        model = Dequantized(flow, dequantizer)
        k = model().sample((2000,))
        if list(dequantizer.parameters()):
            dequantizer.standardize(k)
            optimizer = torch.optim.Adam(dequantizer.parameters(), lr=1e-2)
            trainer = Trainer(Dequantization(model), optimizer)
            for _ in range(300):
                trainer.step(k[torch.randint(len(k), (256,))])
        with torch.no_grad():
            gaps.append((quadrature(flow(), k) - model().bound(k)).mean().item())
    uniform, variational = gaps
    assert 0 < variational < 0.3 * uniform


def test_support_is_the_floor_of_the_flows():
    def support(s):
        return Dequantized(nsf(2, support=s))().support.base_constraint

    assert support(constraints.interval(-0.5, 3.0)).upper_bound == 2
    assert support(constraints.interval(-0.5, 3.0)).lower_bound == -1
    assert support(constraints.interval(0.0, 2.0**24 + 2)).upper_bound.item() == 2**24 + 1
    assert support(constraints.positive) is constraints.nonnegative_integer
    assert support(constraints.real) is dist.constraints.integer


def test_support_of_each_number_follows_its_own_bounds():
    low, high = torch.tensor([-0.5, 0.0]), torch.tensor([3.0, 8.5])
    p = Quantized(dist.Uniform(low, high).to_event(1))
    k = torch.tensor([[-1.0, 0.0], [2.0, 8.0], [3.0, 8.0], [2.0, 9.0], [-1.0, -1.0]])
    assert p.support.check(k).tolist() == [True, True, False, False, False]
    assert p.support.check(p.sample((100,))).all()
    assert Quantized(dist.Gamma(2.0, 1.0)).support is constraints.nonnegative_integer


@pytest.mark.parametrize("check", DISTRIBUTION_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("context", [0, 3])
def test_law_is_a_distribution(check, context):
    check(Dequantized(sharp(2, context))(torch.randn(4, 3).double() if context else None))


@pytest.mark.parametrize("check", OBJECTIVE_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("context", [0, 3])
def test_objective_keeps_the_contract(check, context):
    module = Dequantized(sharp(2, context), learned(2, context))
    k = torch.randn(6, 2).double().floor()
    check(Dequantization(module, particles=2), k, *[torch.randn(6, 3).double()] * bool(context))


def test_bound_has_the_shape_of_context_and_expansion():
    module = Dequantized(sharp(2, 3), learned(2, 3))
    p = module(torch.randn(4, 1, 3).double())
    assert p.bound(torch.zeros(2).double()).shape == (4, 1)
    assert p.bound(torch.zeros(6, 4, 5, 2).double(), particles=3).shape == (6, 4, 5)
    wide = p.expand((6, 4, 5)).bounded(particles=2)
    assert wide.log_prob(wide.sample()).shape == (6, 4, 5)


def test_each_context_has_a_bound_of_its_own():
    module = Dequantized(sharp(2, 3), learned(2, 3))
    context = torch.randn(4, 3).double()
    k = torch.zeros(4, 2).double()
    exact = torch.stack([quadrature(module.flow(c), k[:1])[0] for c in context])
    with torch.no_grad():
        assert torch.allclose(module(context).bound(k, particles=20_000), exact, atol=0.1)


def test_counts_are_observed_under_svi():
    """Floors of a normal of unknown mean: the ELBO finds it as grid quadrature does."""
    pyro.set_rng_seed(0)
    k = torch.poisson(torch.full((60, 1), 6.0)).double()

    class Shifted(nn.Module):
        def forward(self, context=None):
            return dist.Normal(context, 2.0).to_event(1)

    law = Dequantized(Shifted())

    def model():
        rate = pyro.sample("rate", dist.Normal(torch.zeros(1).double(), 10.0).to_event(1))
        with pyro.plate("data", 60, subsample_size=30) as i:
            pyro.sample("k", law(rate).bounded(particles=4), obs=k[i])

    guide = AutoNormal(model, init_scale=0.1)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.3, "lrd": 0.985}), Trace_ELBO())
    for _ in range(200):
        svi.step()
    grid = torch.linspace(3, 10, 200).double()[:, None, None]
    cell = dist.Normal(grid, 2.0).cdf(k + 1) - dist.Normal(grid, 2.0).cdf(k)
    posterior = (cell.log().sum((1, 2)) - (grid[:, 0, 0] / 10) ** 2 / 2).softmax(0)
    expected = (posterior * grid[:, 0, 0]).sum()
    assert guide.median()["rate"].item() == pytest.approx(expected.item(), abs=0.25)


def test_an_open_integral_is_exact():
    """E over u of p(k + u), by the latent site that the docstring names."""
    p = Dequantized(sharp())()
    k = CELLS[:1]

    def model():
        with pyro.plate("draws", 20_000):
            u = pyro.sample("u", dist.Uniform(torch.zeros(2).double(), 1.0).to_event(1))
            pyro.factor("k", p.continuous.log_prob(k + u))

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    total = sum(trace.nodes[name]["log_prob"] for name in ("u", "k")).exp().detach()
    error = total.std() / len(total) ** 0.5
    assert abs(total.mean() - quadrature(p.continuous, k).exp().sum()) < 4.5 * error


def test_state_and_copies():
    module = Dequantized(sharp(), learned()).standardize(CELLS)
    other = Dequantized(sharp(), learned())
    other.load_state_dict(module.state_dict())
    for twin in (copy.deepcopy(module), other):
        pyro.set_rng_seed(1)
        expected = module().bound(CELLS)
        pyro.set_rng_seed(1)
        assert torch.equal(twin().bound(CELLS), expected)


def test_standardize_sets_both():
    k = 100 + 20 * torch.randn(500, 2).double().floor()
    module = Dequantized(realnvp(2).double(), learned()).standardize(k)
    assert torch.allclose(module.flow.shift, k.mean(0) + 0.5, atol=0.1)
    assert torch.allclose(module.dequantizer.scale, k.std())


@pytest.mark.parametrize("k", [torch.full((5, 2), 3.0), torch.zeros(1)], ids=["five", "one"])
def test_numbers_that_never_vary_keep_their_unit(k):
    proposal = learned().float().standardize(k)
    assert (proposal.shift.item(), proposal.scale.item()) == (k.mean().item(), 1.0)
    u, log_prob = proposal(torch.full((5, 2), 3.0), None, 3)
    assert u.isfinite().all()
    assert log_prob.isfinite().all()


def test_fractions_may_be_of_any_interval_from_0_to_1():
    each = constraints.interval(torch.zeros(2), torch.ones(2))
    half_open = constraints.half_open_interval(0.0, 1.0)
    for support in (each, half_open, constraints.independent(UNIT, 1)):
        VariationalDequantizer(realnvp(2, 2, support=support))


def law():
    return Dequantized(sharp())()


HALF = torch.full((2,), 0.5).double()
ERRORS = [
    (lambda: law().log_prob(HALF), NotImplementedError, r"no density.*bounded\(particles\).*NUTS"),
    (lambda: law().rsample(), NotImplementedError, r"whole numbers"),
    (lambda: law().bound(HALF), ValueError, r"whole numbers, got fractions"),
    (lambda: law().bound(HALF.floor(), particles=0), ValueError, r"particles >= 1, got 0"),
    (lambda: law().bound(HALF.long()), TypeError, r"floating-point"),
    (lambda: law().bound(torch.zeros(3).double()), ValueError, r"\(\*batch, 2\)"),
    (lambda: VariationalDequantizer(nsf(2, 2)), ValueError, r"of fractions, got one on Real"),
    (lambda: learned().standardize(HALF), ValueError, r"whole numbers, got fractions"),
    (lambda: learned().standardize(HALF.long()), TypeError, r"floating-point"),
    (
        lambda: Dequantization(Dequantized(sharp()), particles=0),
        ValueError,
        r"particles >= 1, got 0",
    ),
    (lambda: Dequantized(sharp()).standardize(HALF[None]), ValueError, r"got fractions"),
    (
        lambda: Dequantized(Flow(1, [Elementwise(1)])).standardize(torch.zeros(1, 1)),
        ValueError,
        "2 data",
    ),
]


@pytest.mark.parametrize(("call", "error", "match"), ERRORS)
def test_refusals_say_what_to_do(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_uniform_law_of_one_cell_is_log_one():
    assert Quantized(dist.Uniform(torch.zeros(1), 1.0).to_event(1)).bound(
        torch.zeros(1)
    ).item() == pytest.approx(math.log(1.0))
