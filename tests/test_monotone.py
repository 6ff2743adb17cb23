"""Monotone networks and polynomials: each against another way to compute the same map."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.interpolate import BPoly
from torch import distributions as td
from univariate_cases import MONOTONE

from pyrogen.distributions import Flow
from pyrogen.transforms import Autoregressive, Elementwise, RationalQuadratic
from pyrogen.transforms.base import Bijection
from pyrogen.transforms.integrated import Integrated, SumOfSquares
from pyrogen.transforms.monotone import Bernstein, LogisticMixture, Monotone
from pyrogen.transforms.univariate import Inverted


@pytest.fixture(params=MONOTONE.values(), ids=MONOTONE)
def family(request):
    return request.param


def squash(x, limit):
    return x / (1 + (x / limit) ** 2) ** 0.5


def test_mixture_is_a_distribution_function_then_logit():
    family = LogisticMixture(components=4)
    params = torch.randn(family.parameters).double()
    x = torch.linspace(-4, 4, 33).double()
    weights, slopes, centers = params.unflatten(0, (3, 4))
    centers = squash(centers, 20) + torch.tensor([-0.75, -0.25, 0.25, 0.75]).double()
    logistic = td.TransformedDistribution(
        td.Uniform(torch.zeros(4).double(), 1.0),
        [
            td.SigmoidTransform().inv,
            td.AffineTransform(centers, squash(slopes, math.log(100)).neg().exp()),
        ],
    )
    below = td.MixtureSameFamily(td.Categorical(logits=weights), logistic).cdf(x)
    expected = (below.logit() + 1e-3 * x) / (1 + 1e-3)
    assert torch.allclose(family(params).inv(x), expected, atol=1e-10)


def test_mixture_neither_saturates_nor_clips():
    """Where the distribution function itself is 0 or 1 in single precision."""
    mixture = LogisticMixture(components=3)(torch.randn(9))
    x = torch.tensor([-1e4, -100.0, 100.0, 1e4])
    z, ladj = mixture.inverse_and_ladj(x)
    exact, exact_ladj = LogisticMixture(components=3)(
        torch.cat([mixture.log_weights, torch.zeros(6)]).double()
    ).inverse_and_ladj(x.double())
    assert z.isfinite().all()
    assert (z.abs() > 0.05 * x.abs()).all()
    assert torch.allclose(mixture(z), x, rtol=1e-5)
    assert exact.isfinite().all()
    assert exact_ladj.isfinite().all()
    assert ladj.isfinite().all()


@pytest.mark.parametrize("components", [1, 2, 8, 256])
def test_untrained_mixture_is_nearly_the_identity(components):
    family = LogisticMixture(components)
    x = torch.linspace(-30, 30, 2001).double()
    z, ladj = family(torch.zeros(family.parameters).double()).inverse_and_ladj(x)
    assert (z - x).abs().max() < 0.17
    assert ladj.exp().min() > 1 / 1.09
    assert ladj.max() < 1e-12


def test_bernstein_is_that_of_scipy():
    family = Bernstein(degree=7, bound=2.0)
    params = torch.randn(8).double()
    steps = 4 / 7 * np.exp(squash(params[:7].numpy() / 2, math.log(100)))
    heights = np.concatenate([[0], steps.cumsum()])
    heights = heights - heights[-1] / 2 + params[7].item()
    reference = BPoly(heights[:, None], [-2.0, 2.0])
    x = np.linspace(-2, 2, 21)
    z, ladj = family(params).inverse_and_ladj(torch.from_numpy(x))
    assert np.allclose(z, reference(x), atol=1e-12)
    assert np.allclose(ladj.exp(), reference.derivative()(x), atol=1e-10)
    for end in (-2.0, 2.0):
        out = 3 * end
        z, ladj = family(params).inverse_and_ladj(torch.tensor([end, out]).double())
        assert ladj[0] == ladj[1]
        assert (z[1] - z[0]).item() == pytest.approx(2 * end * ladj[0].exp().item())


@pytest.mark.parametrize("hidden", [4, 8, 16])
@pytest.mark.parametrize("scale", [1.0, 5.0, 100.0])
def test_integral_is_that_of_its_slope(hidden, scale):
    family = Integrated(hidden=hidden)
    net = family(scale * torch.randn(family.parameters).double())

    def slope(x):
        return net.value_and_log_slope(torch.tensor(x, dtype=torch.float64))[1].exp().item()

    zero = net.inv(torch.tensor(0.0).double()).item()
    for x in (-5.0, -1.3, 2.4, 4.9):
        exact = quad(slope, 0, x, epsabs=1e-11, epsrel=1e-11, limit=500)[0]
        got = net.inv(torch.tensor(x, dtype=torch.float64)).item() - zero
        assert got == pytest.approx(exact, rel=2e-8, abs=1e-8)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.parametrize("family", [Integrated(hidden=4), SumOfSquares(degree=2)], ids=repr)
def test_integral_is_one_graph(family, monkeypatch):
    kind = torch.distributions.Distribution
    monkeypatch.setattr(kind, "_validate_args", kind._validate_args)  # tracing switches it off
    torch.compiler.reset()
    params, x = torch.randn(5, family.parameters), torch.randn(5)

    def score(params, x):
        return family(params).inverse_and_ladj(x)

    compiled = torch.compile(score, fullgraph=True, backend="eager")
    for a, b in zip(compiled(params, x), score(params, x), strict=True):
        assert torch.allclose(a, b)


def test_sum_of_squares_is_the_integral_of_a_polynomial():
    family = SumOfSquares(degree=3, polynomials=2)
    params = torch.randn(family.parameters).double()
    coefficients = squash(params[:-1].numpy() / 3, 10.0).reshape(2, 4)
    coefficients[:, 0] += np.sqrt(0.9 * np.array([1, 2]) / 3)
    coefficients /= 3.0 ** np.arange(4)
    squares = sum(np.polynomial.Polynomial(c) ** 2 for c in coefficients) + 0.1
    x = np.linspace(-20, 20, 41)
    z, ladj = family(params).inverse_and_ladj(torch.from_numpy(x))
    assert np.allclose(z, squares.integ()(x) + params[-1].item(), rtol=1e-12)
    assert np.allclose(ladj.exp(), squares(x), rtol=1e-12)


def test_own_map_needs_one_method():
    class Cubic(Monotone):
        def value_and_log_slope(self, x):
            return x + x**3, (1 + 3 * x**2).log()

    z, ladj = Cubic().call_and_ladj(torch.tensor([2.0, 10.0]).double())
    assert torch.allclose(z, torch.tensor([1.0, 2.0]).double())
    assert torch.allclose(ladj, -torch.tensor([4.0, 13.0]).double().log())


def test_draws_score_as_they_were_drawn(family):
    flow = Flow(3, [Autoregressive(3, elementwise=family, hidden=(16,))])
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.4)
    for dtype, nats in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        p = flow.to(dtype)()
        x, log_prob = p.rsample_and_log_prob((300,))
        assert (p.log_prob(x) - log_prob).abs().max() <= nats


def test_density_has_mass_one(family):
    flow = Flow(2, [Autoregressive(2, elementwise=family, hidden=(16,))]).double()
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.3)
    grid = torch.linspace(-30, 30, 401).double()
    with torch.no_grad():
        mass = flow().log_prob(torch.cartesian_prod(grid, grid)).exp().sum() * 0.15**2
    assert mass.item() == pytest.approx(1, abs=1e-3)


def test_inverted_family_draws_in_one_pass(family, monkeypatch):
    searches = []
    value_and_log_slope = type(family(torch.zeros(family.parameters))).value_and_log_slope

    def counted(self, x):
        searches.append(1)
        return value_and_log_slope(self, x)

    bijection = Inverted(family)(torch.randn(family.parameters))
    assert isinstance(bijection, Bijection)
    monkeypatch.setattr(type(bijection.inv), "value_and_log_slope", counted)
    bijection(torch.randn(5))
    assert len(searches) == 1


def test_rounding_does_not_prolong_the_search(family):
    """A root at one end of a wide bracket, hidden by rounding, once took twice as many steps."""
    bijection, calls = family(torch.randn(2000, family.parameters)), []

    class Counted(Monotone):
        def value_and_log_slope(self, x):
            calls.append(1)
            return bijection.value_and_log_slope(x)

    Counted((2000,))(3 * torch.randn(2000))
    assert len(calls) <= 33


def test_overflow_is_an_error():
    cubes = SumOfSquares(degree=5)(torch.randn(13))
    with pytest.raises(FloatingPointError, match=r"finite values to invert"):
        cubes(torch.tensor(math.inf))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "nats"),
    [
        (LogisticMixture(), 0.05),
        (RationalQuadratic(), 0.35),
        (Integrated(hidden=12), 0.35),
        (SumOfSquares(degree=5), 0.7),
        (Bernstein(degree=24), 0.7),
    ],
    ids=lambda v: type(v).__name__,
)
def test_untrained_map_learns_three_modes(family, nats):
    """Equal components that stayed equal would end 0.8 nats above the entropy."""
    target = td.MixtureSameFamily(
        td.Categorical(torch.ones(3)),
        td.Normal(torch.tensor([-3.0, 0.0, 2.0]), torch.tensor([0.3, 0.5, 0.2])),
    )
    data = target.sample((10_000, 1))
    flow = Flow(1, [Elementwise(1, elementwise=family)]).standardize(data)
    optimizer = torch.optim.Adam(flow.parameters(), 2e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        optimizer.zero_grad()
        loss = -flow().log_prob(data[torch.randint(len(data), (256,))]).mean()
        loss.backward()
        optimizer.step()
        decay.step()
    x = target.sample((20_000, 1))
    with torch.no_grad():
        gap = target.log_prob(x.squeeze(-1)) - flow().log_prob(x)
    error = gap.std() / len(x) ** 0.5
    assert -4.5 * error < gap.mean() < nats


ERRORS = [
    (
        lambda: LogisticMixture(components=0),
        r"LogisticMixture expected 1 to 256 components, got 0",
    ),
    (lambda: Bernstein(degree=1), r"Bernstein expected a degree from 2 to 64, got 1"),
    (lambda: Bernstein(bound=-1), r"Bernstein expected a positive bound, got -1\. Try 5"),
    (lambda: Integrated(hidden=2), r"Integrated expected 4 to 64 hidden units, got 2"),
    (lambda: Integrated(bound=0), r"Integrated expected a positive bound, got 0\. Try 5"),
    (lambda: SumOfSquares(degree=9), r"degree from 1 to 5, got 9.*stack several"),
    (lambda: SumOfSquares(polynomials=0), r"expected 1 to 64 polynomials, got 0"),
]


@pytest.mark.parametrize(("call", "match"), ERRORS)
def test_refusals_say_what_to_do(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("at", [-6.0, -5.0, 5.0, 6.0])
def test_bernstein_has_second_derivatives_at_its_ends_and_beyond(at):
    def score(x):
        return Bernstein(degree=6)(torch.zeros(7).double()).inverse_and_ladj(x)[1]

    x = torch.tensor(at).double()
    assert torch.autograd.functional.hessian(score, x).isfinite()
