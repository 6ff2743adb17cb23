"""Couplings against brute force, a linear program's dual, and closed forms of Gaussian bridges."""

import itertools
import math
import sys

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from pyrogen.objectives.matching import IndependentCoupling, OptimalTransport, SchroedingerBridge
from pyrogen.objectives.matching.couplings import sinkhorn

COUPLINGS = [IndependentCoupling(), OptimalTransport(block=16), SchroedingerBridge(0.7, block=16)]


def name(coupling):
    return type(coupling).__name__


def length(x, z):
    return (x - z).square().sum(-1).mean().item()


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.squeeze(-1), b.squeeze(-1)]))[0, 1].item()


def test_optimal_transport_beats_every_permutation():
    for _ in range(20):
        x, z = 3 + 2 * torch.randn(6, 2) @ torch.randn(2, 2), torch.randn(6, 2)
        best = min(length(x, z[list(p)]) for p in itertools.permutations(range(6)))
        assert length(x, OptimalTransport()(x, z, None)) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("features", [1, 3, 30])
def test_optimal_transport_is_that_of_the_plain_distances(features):
    """The costs that are searched differ from these in rows and columns only."""
    x = 5 + torch.randn(100, features) * torch.logspace(-2, 2, features)
    z = torch.randn(100, features)
    _, columns = linear_sum_assignment(torch.cdist(x.double(), z.double()).square().numpy())
    paired = OptimalTransport(block=100)(x, z, None)
    assert length(x, paired) == pytest.approx(length(x, z[columns]), rel=1e-5)


def test_on_the_line_order_is_kept():
    x, z = torch.randn(64, 1), torch.randn(64, 1).exp()
    paired = OptimalTransport()(x, z, None)
    assert torch.equal(paired.squeeze().argsort(), x.squeeze().argsort())


@pytest.mark.parametrize("n", [1, 5, 16, 40])
def test_every_draw_of_noise_is_used_once_and_in_its_block(n):
    x, z = torch.randn(n, 2), torch.arange(n).float().unsqueeze(-1).expand(-1, 2)
    x[:, 1] = 0  # a feature without spread
    index = OptimalTransport(block=16)(x, z, None)[:, 0].long()
    assert torch.equal(index.sort().values, torch.arange(n))
    assert torch.equal(index // 16, torch.arange(n) // 16)


@pytest.mark.parametrize("coupling", COUPLINGS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_keeps_its_rows_and_its_dtype(coupling, dtype):
    x, z = torch.randn(40, 3, dtype=dtype), torch.randn(40, 3, dtype=dtype)
    paired = coupling(x, z, torch.randn(40, 2, dtype=dtype))
    assert paired.dtype == dtype
    assert (paired.unsqueeze(1) == z).all(-1).any(-1).all()


# Contexts


def scene(n=2048):
    """Data that follow their context closely, and noise that knows nothing of it."""
    context = torch.randn(n, 1)
    return context + 0.1 * torch.randn(n, 1), torch.randn(n, 1), context


@pytest.mark.parametrize("sort", [OptimalTransport, SchroedingerBridge])
def test_noise_keeps_its_law_for_every_context(sort):
    """E[z | c] = 0 and E[z^2 | c] = 1; with the data's distance alone z would follow c."""
    x, z, context = scene()
    options = {} if sort is OptimalTransport else {"sigma": 0.5}
    blind = sort(context_weight=0.0, **options)(x, z, context)
    assert correlation(blind, context) > 0.8
    paired = sort(**options)(x, z, context)
    assert abs(correlation(paired, context)) < 0.15
    for low, high in [(-9, -1), (-1, 0), (0, 1), (1, 9)]:
        mine = paired[(context > low) & (context < high)]
        assert abs(mine.mean()) < 0.25
        assert mine.std().item() == pytest.approx(1.0, abs=0.15)


def test_classes_do_not_mix():
    """Within a class the pairs are optimal, as if each had been paired alone."""
    label = torch.arange(60) % 3
    context = torch.nn.functional.one_hot(label).float()
    x, z = torch.randn(60, 2) + 3 * context[:, :2], torch.randn(60, 2)
    paired = OptimalTransport()(x, z, context)
    for k in range(3):
        alone = OptimalTransport()(x[label == k], z[label == k], None)
        assert torch.equal(paired[label == k], alone)


def test_constant_context_changes_nothing():
    x, z = torch.randn(60, 2), torch.randn(60, 2)
    expected = OptimalTransport()(x, z, None)
    assert torch.equal(OptimalTransport()(x, z, torch.ones(60, 1)), expected)


# Entropic plans


def test_plan_has_its_marginals_and_its_form():
    """Optimality: log plan + cost / eps is a sum of a row term and a column term."""
    cost = torch.cdist(torch.randn(20, 2), torch.randn(20, 2)).square().double()
    log_plan = sinkhorn(cost, 0.3, tolerance=1e-9, iterations=10_000)
    plan = log_plan.exp()
    share = torch.full((20,), 1 / 20).double()
    assert torch.allclose(plan.sum(0), share, atol=1e-12)
    assert torch.allclose(plan.sum(1), share, atol=1e-9)
    rest = log_plan + cost / 0.3
    rest = rest - rest[:1] - rest[:, :1] + rest[0, 0]
    assert rest.abs().max() < 1e-10


def test_plan_of_gaussians_has_the_covariance_in_closed_form():
    r"""For N(0, 1) and N(0, s^2): c solves c^2 + eps c / 2 = s^2 with cost |x - z|^2."""
    n, scale, sigma = 1500, 2.0, 1.0
    quantiles = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(n).double() + 0.5) / n)
    x, z = scale * quantiles.unsqueeze(-1), quantiles.unsqueeze(-1)
    regularization = 2 * sigma**2
    plan = sinkhorn(torch.cdist(x, z).square(), regularization, tolerance=1e-6).exp()
    covariance = (x.T @ plan @ z).item()
    expected = -regularization / 4 + math.sqrt(regularization**2 / 16 + scale**2)
    assert covariance == pytest.approx(expected, rel=0.01)


def test_draws_follow_the_plan():
    x, z = torch.tensor([[0.0], [1.0]]), torch.tensor([[0.2], [0.9]])
    coupling = SchroedingerBridge(0.8, block=2)
    plan = sinkhorn(torch.cdist(x, z).square(), 2 * 0.8**2).exp()
    n = 20_000
    first = coupling(x.repeat(n, 1), z.repeat(n, 1), None)[::2, 0] == z[0, 0]
    p = (2 * plan[0, 0]).item()
    assert abs(first.float().mean().item() - p) < 4.5 * math.sqrt(p * (1 - p) / n)


def test_little_noise_is_optimal_transport_and_much_is_independence():
    x, z = torch.randn(64, 2).double(), torch.randn(64, 2).double()
    best = length(x, OptimalTransport()(x, z, None))
    assert length(x, SchroedingerBridge(0.1)(x, z, None)) == pytest.approx(best, rel=0.15)
    wide = torch.stack([SchroedingerBridge(30.0)(x, z, None) for _ in range(200)])
    chance = torch.cdist(x, z).square().mean().item()
    assert length(x, wide) == pytest.approx(chance, rel=0.05)


ERRORS = [
    (
        lambda: OptimalTransport(block=0),
        ValueError,
        r"OptimalTransport expected block >= 1",
    ),
    (lambda: OptimalTransport(context_weight=-1.0), ValueError, r"context_weight >= 0, got -1"),
    (lambda: SchroedingerBridge(0.0), ValueError, r"sigma > 0, got 0.0.*use OptimalTransport"),
    (lambda: SchroedingerBridge(block=0), ValueError, r"block >= 1, got 0"),
    (
        lambda: SchroedingerBridge(1e-3)(torch.randn(64, 2), torch.randn(64, 2), None),
        FloatingPointError,
        r"settle in 2000 iterations.*Raise sigma.*OptimalTransport",
    ),
]


@pytest.mark.parametrize(("call", "error", "match"), ERRORS)
def test_refusals_say_what_to_do(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_missing_scipy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"OptimalTransport needs SciPy.*pip install scipy"):
        OptimalTransport()(torch.randn(4, 2), torch.randn(4, 2), None)
