"""Laws that an encoder chooses from."""

import functools
import io
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

from pyrogen.distributions import Flow, maf, nsf, realnvp
from pyrogen.guides import Amortized, Diagonal, Family, FlowFamily, FullCovariance, LowRank
from pyrogen.nets import mlp
from pyrogen.objectives import ELBO, DoublyReparameterized
from pyrogen.targets import LinearGaussian

small = functools.partial(nsf, layers=2, hidden=(16,))
FAMILIES = {
    "diagonal": Diagonal,
    "full": FullCovariance,
    "low rank": functools.partial(LowRank, 2),
    "flow": functools.partial(FlowFamily, small, 4),
}
families = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@families
@dtypes
def test_zeros_are_the_small_standard_normal(make, dtype):
    family = make(init_scale=0.3).setup(3).to(dtype)
    law = family(torch.zeros(5, family.outputs, dtype=dtype))
    assert (law.batch_shape, law.event_shape) == ((5,), (3,))
    z = torch.randn(7, 5, 3, dtype=dtype)
    expected = dist.Normal(0.0, 0.3).log_prob(z).sum(-1)
    assert law.log_prob(z).dtype == dtype
    assert torch.allclose(law.log_prob(z), expected, rtol=1e-4)


@families
def test_draws_have_their_density_and_gradient(make):
    """The mean of exp(log q(z + h) - log q(z)) over draws is one for any density."""
    torch.manual_seed(1)
    family = make(init_scale=1.0).setup(3).double()
    for p in family.parameters():
        nn.init.normal_(p, std=0.3)
    outputs = 0.5 * torch.randn(family.outputs, dtype=torch.double)
    law = family(outputs.requires_grad_())
    z = law.rsample((40_000,))
    ratio = (law.log_prob(z + 0.1) - law.log_prob(z)).exp().detach()
    error = (ratio.mean() - 1) / ratio.std() * len(ratio) ** 0.5
    assert abs(error) < 4.0  # fails once in 16 000
    (gradient,) = torch.autograd.grad(z.square().sum() + law.log_prob(z).sum(), outputs)
    assert gradient.isfinite().all()
    assert (gradient != 0).all()


def test_diagonal_is_that_of_scipy():
    family = Diagonal(0.5).setup(2)
    numbers = torch.tensor([1.0, -1.0, 0.3, -20.0], dtype=torch.double)
    scale = 0.5 * np.exp(10 * np.tanh(np.array([0.03, -2.0])))
    z = torch.randn(4, 2, dtype=torch.double)
    expected = stats.norm(np.array([1.0, -1.0]), scale).logpdf(z.numpy()).sum(-1)
    assert np.allclose(family(numbers).log_prob(z).numpy(), expected)


def test_full_covariance_is_that_of_scipy():
    family = FullCovariance(0.5).setup(3)
    numbers = torch.randn(9, dtype=torch.double)
    s = 0.5 * np.exp(10 * np.tanh(numbers[3:6].numpy() / 10))
    a, b, c = 100 * np.tanh(numbers[6:].numpy() / 100)
    factor = s[:, None] * np.array([[1, 0, 0], [a, 1, 0], [b, c, 1]])
    z = torch.randn(4, 3, dtype=torch.double)
    law = stats.multivariate_normal(numbers[:3].numpy(), factor @ factor.T)
    assert np.allclose(family(numbers).log_prob(z).numpy(), law.logpdf(z.numpy()))


def test_low_rank_is_that_of_scipy():
    family = LowRank(2, 0.5).setup(3)
    numbers = torch.randn(12, dtype=torch.double)
    s = 0.5 * np.exp(10 * np.tanh(numbers[3:6].numpy() / 10))
    v = 100 * np.tanh(numbers[6:].numpy() / 100).reshape(3, 2)
    covariance = s[:, None] * (np.eye(3) + v @ v.T) * s
    z = torch.randn(4, 3, dtype=torch.double)
    law = stats.multivariate_normal(numbers[:3].numpy(), covariance)
    assert np.allclose(family(numbers).log_prob(z).numpy(), law.logpdf(z.numpy()))


@pytest.mark.parametrize("recipe", [realnvp, nsf, maf])
def test_flow_family_is_the_flow_moved_and_scaled(recipe):
    family = FlowFamily(recipe, 4, init_scale=0.5).setup(2).double()
    for p in family.parameters():
        nn.init.normal_(p, std=0.2)
    numbers = torch.randn(5, 8, dtype=torch.double)
    scale = 0.5 * (10 * (numbers[:, 2:4] / 10).tanh()).exp()
    z = torch.randn(5, 2, dtype=torch.double)
    unit = family.flow(numbers[:, 4:]).log_prob((z - numbers[:, :2]) / scale)
    assert torch.allclose(family(numbers).log_prob(z), unit - scale.log().sum(-1))


@families
@pytest.mark.parametrize("size", [1e6, 1e30])
def test_no_encoder_makes_a_law_overflow(make, size):
    """Single precision, the numbers at both ends of what they may be."""
    family = make().setup(4)
    for signs in torch.randn(20, family.outputs).sign():
        numbers = size * signs
        numbers[:4] = 0.0  # locations are what the encoder says
        law = family(numbers)
        z = law.sample((10,))
        assert z.isfinite().all()
        assert law.log_prob(z).isfinite().all()


@families
def test_median_is_that_of_draws(make):
    family = make(init_scale=1.0).setup(3)
    for p in family.parameters():
        nn.init.normal_(p, std=0.3)
    numbers = torch.randn(2, family.outputs)
    draws = family(numbers).sample((20_000,))
    assert torch.allclose(
        family.median(numbers), draws.median(0).values, atol=0.15 * draws.std(0).max().item()
    )


def fitted(target, x, family, steps=700, seed=0):
    """Nats per datum by which the fitted guide's ELBO misses the evidence, and the guide."""
    torch.manual_seed(seed)
    outputs = family.setup(target.weight.shape[1]).outputs
    guide = Amortized(target.plated, nn.Linear(x.shape[1], outputs), family=family).setup(x)
    elbo = ELBO(8, gradient=DoublyReparameterized(), vectorize_particles=True)
    elbo = elbo(target.plated, guide)
    optimizer = torch.optim.Adam(guide.parameters(), 0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        elbo(x).backward()
        optimizer.step()
        schedule.step()
    loss = ELBO(2000, vectorize_particles=True, max_plate_nesting=1)
    gap = loss.loss(target.plated, guide, x) + target.log_evidence(x).sum()
    return gap.item() / len(x), guide


@pytest.fixture(scope="module")
def linear():
    torch.manual_seed(3)
    target = LinearGaussian(torch.randn(4, 3) @ torch.diag(torch.tensor([2.0, 1.0, 1.0])), 0.5)
    return target, torch.randn(30, 3) @ target.weight.T + 0.5 * torch.randn(30, 4)


def test_diagonal_keeps_the_gap_of_the_best_product(linear):
    """The best product of normals has the precision's diagonal; the divergence is known."""
    target, x = linear
    precision = target.posterior(x[0]).precision_matrix
    known = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    gap, guide = fitted(target, x, Diagonal())
    assert known > 0.1  # correlated: there is something to miss
    assert gap == pytest.approx(known.item(), abs=0.01)
    law = guide.posterior(x)["z"]
    assert torch.allclose(law.stddev, precision.diagonal().rsqrt(), rtol=0.03)


@pytest.mark.parametrize(
    "make", [FullCovariance, functools.partial(LowRank, 2)], ids=["full", "low rank"]
)
def test_covariance_reaches_the_exact_posterior(linear, make):
    """A rank of two is enough: three normals have their least variance as common part."""
    target, x = linear
    gap, guide = fitted(target, x, make())
    assert abs(gap) < 0.01
    law, exact = guide.posterior(x)["z"], target.posterior(x)
    assert torch.allclose(law.mean, exact.mean, atol=0.05)
    assert torch.allclose(law.covariance_matrix, exact.covariance_matrix, atol=0.02)


def ring(x):
    """Two latents of which only the squared radius is seen: the posterior is a ring."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z.square().sum(-1), 0.5), obs=x[:, 0])


def test_flow_family_beats_normals_where_the_posterior_is_not_normal():
    x = torch.linspace(1.0, 4.0, 20)[:, None]
    radius = torch.linspace(0, 8, 4001, dtype=torch.double)[1:]  # r^2 is exponential of rate 1/2
    joint = 0.5 * (-radius / 2).exp() * dist.Normal(radius, 0.5).log_prob(x.double()).exp()
    evidence = torch.trapezoid(joint, radius).log().mean()
    losses = {}
    for family in (FullCovariance(), FlowFamily(functools.partial(nsf, layers=2), 8)):
        torch.manual_seed(0)
        family.setup(2)
        guide = Amortized(ring, mlp(1, family.outputs, (16,)), family=family).setup(x)
        elbo = ELBO(8, gradient=DoublyReparameterized(), vectorize_particles=True)(ring, guide)
        optimizer = torch.optim.Adam(guide.parameters(), 0.01)
        for _ in range(200):
            optimizer.zero_grad()
            elbo(x).backward()
            optimizer.step()
        held = ELBO(500, vectorize_particles=True, max_plate_nesting=1)
        losses[type(family)] = held.loss(ring, guide, x) / len(x) + evidence
    assert all(gap > -0.02 for gap in losses.values())  # a bound
    assert losses[FullCovariance] > losses[FlowFamily] + 0.5  # nats per datum


@families
def test_state_dict_restores_a_family_that_has_not_been_set_up(make):
    family = make().setup(3)
    for p in family.parameters():
        nn.init.normal_(p)
    file = io.BytesIO()
    torch.save(family.state_dict(), file)
    file.seek(0)
    fresh = make()
    fresh.load_state_dict(torch.load(file, weights_only=True))
    numbers, z = torch.randn(family.outputs), torch.randn(3)
    assert torch.equal(fresh.setup(3)(numbers).log_prob(z), family(numbers).log_prob(z))


class Laplace(Family):
    @property
    def outputs(self):
        return 2 * self.latents

    def law(self, outputs):
        loc, log_scale = outputs.chunk(2, -1)
        return dist.Laplace(loc, self.init_scale * log_scale.exp()).to_event(1)


def test_a_family_of_ones_own_needs_two_things():
    family = Laplace(0.2).setup(2)
    assert family(torch.zeros(4)).stddev == pytest.approx(0.2 * 2**0.5)
    assert torch.equal(family.median(torch.ones(4)), torch.ones(2))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Diagonal(0.0), ValueError, "Diagonal expected a positive init_scale, got 0"),
        (lambda: FullCovariance(math.nan), ValueError, "positive init_scale, got nan"),
        (lambda: LowRank(0), ValueError, "rank >= 1, got 0"),
        (lambda: LowRank(3).setup(3), ValueError, "rank below its 3 latents, got 3"),
        (lambda: Diagonal().setup(0), ValueError, "at least 1 latents, got 0"),
        (lambda: Diagonal().setup(2).setup(3), ValueError, "expected 2 latents, got 3.*its own"),
        (lambda: Diagonal().outputs, RuntimeError, "does not know the number of latents"),
        (lambda: Diagonal().setup(2)(torch.zeros(5)), ValueError, r"\(\*batch, 4\), got \(5,\)"),
        (lambda: FlowFamily(nsf(2, 3), 3), TypeError, "expected a recipe.*got Flow"),
        (lambda: FlowFamily(nsf, 0), ValueError, "context >= 1, got 0"),
        (
            lambda: FlowFamily(lambda n, c: nsf(n), 3).setup(2),
            ValueError,
            "Flow of context 3, got Flow",
        ),
    ],
)
def test_misfits_say_what_to_do(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_flow_family_takes_any_recipe():
    assert isinstance(FlowFamily(maf, 2).setup(1).flow, Flow)
