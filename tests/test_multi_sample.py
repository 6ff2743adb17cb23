"""Bounds that join their particles: weights against autograd, order, variance, and at the door."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from elbo_cases import BOUNDS, chosen, log_bernoulli
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import nn
from torch.autograd.functional import hessian, jacobian

from pyrogen.distributions import realnvp
from pyrogen.divergences import alpha_divergence, kl
from pyrogen.guides import AutoFlow
from pyrogen.objectives import (
    ELBO,
    ChiSquared,
    DoublyReparameterized,
    FDivergence,
    ImportanceWeighted,
    MultiSample,
    Renyi,
    Reparameterized,
    ReweightedWakeSleep,
    TailAdaptive,
    Thermodynamic,
)
from pyrogen.targets import EightSchools

F64 = torch.float64
VECTORIZED = pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorized"])
JOINT = [name for name in BOUNDS if name != "elbo"]


@pytest.mark.parametrize("spread", [0.5, 3.0, 30.0])
@pytest.mark.parametrize("bound", JOINT)
def test_weights_are_the_derivatives(bound, spread):
    make, value, _ = BOUNDS[bound]
    loss, log_w = make(5), spread * torch.randn(5, dtype=F64)
    if spread < 10:
        assert torch.allclose(loss.value(log_w), value(log_w), rtol=1e-12)
    first = jacobian(loss.value, log_w)
    second = hessian(loss.value, log_w).diagonal()
    size = 100 * (1 + first.abs().max() + second.abs().max())
    assert torch.allclose(loss.model_weight(log_w), first, atol=1e-12 * size)
    assert torch.allclose(loss.path_weight(log_w), first - second, atol=1e-12 * size)


@pytest.mark.parametrize("spread", [0.0, 1.0, 1000.0])
@pytest.mark.parametrize("bound", JOINT)
def test_leaving_one_out_is_the_bound_of_the_others(bound, spread):
    loss, log_w = BOUNDS[bound][0](4), spread * torch.randn(4, 3, dtype=F64)
    expected = torch.stack([loss.value(torch.cat([log_w[:k], log_w[k + 1 :]])) for k in range(4)])
    assert torch.allclose(loss.leave_one_out(log_w), expected, rtol=1e-12)


def test_a_particle_stays_out_of_its_own_baseline():
    """One weight above all others by a million, in single precision: no trace of it remains."""
    log_w = torch.tensor([1e6, 0.3, 0.1])
    left = ImportanceWeighted(3).leave_one_out(log_w)[0]
    assert left == pytest.approx(log_w[1:].exp().mean().log().item(), abs=1e-6)
    dead = torch.tensor([0.0, -torch.inf, -torch.inf])
    assert ImportanceWeighted(3).leave_one_out(dead).isfinite().all()


@VECTORIZED
@pytest.mark.parametrize("bound", BOUNDS)
def test_nested_discrete_draws_are_exact(bound, vectorize):
    """One draw a row and two in a plate inside it, K = 2, in all 64 outcomes of one row."""
    make, value, sign = BOUNDS[bound]
    logits = torch.tensor([0.4, -0.3, 0.2], dtype=F64, requires_grad=True)
    x = torch.tensor([[1.5, -0.5]], dtype=F64)
    outer = torch.tensor(0.6, dtype=F64)

    def model():
        with pyro.plate("rows", 3, subsample=torch.tensor([1]), dim=-2):
            g = pyro.sample("g", dist.Bernoulli(outer))
            with pyro.plate("times", 2, dim=-1):
                z = pyro.sample("z", dist.Bernoulli(0.3 + 0.4 * g))
                pyro.sample("x", dist.Normal(z + g, 1.0), obs=x)

    def guide(first, second):
        with pyro.plate("rows", 3, subsample=torch.tensor([1]), dim=-2):
            g = pyro.sample("g", first(logits=logits[:1, None]))
            with pyro.plate("times", 2, dim=-1):
                pyro.sample("z", second(logits=logits[1:] + g))

    loss = make(2, vectorize_particles=vectorize, max_plate_nesting=2)
    exact, mean = 0.0, 0.0
    for outcome in itertools.product(torch.tensor([0.0, 1.0], dtype=F64), repeat=6):
        g, z = torch.stack(outcome).split([2, 4])
        g, z = g.reshape(2, 1, 1), z.reshape(2, 1, 2)
        coins = chosen(dist.Bernoulli, g), chosen(dist.Bernoulli, z)
        estimate = loss.differentiable_loss(model, lambda c=coins: guide(*c))
        log_q = log_bernoulli(logits[0], g) + log_bernoulli(logits[1:] + g, z).sum(-1, True)
        log_x = dist.Bernoulli(0.3 + 0.4 * g).log_prob(z) + dist.Normal(z + g, 1.0).log_prob(x)
        log_w = dist.Bernoulli(outer).log_prob(g) + log_x.sum(-1, True) - log_q
        probability = log_q.sum().exp()
        mean = mean + probability.item() * torch.autograd.grad(estimate, logits)[0]
        exact = exact + 3 * sign * probability * value(log_w.flatten())
    assert torch.allclose(mean, torch.autograd.grad(exact, logits)[0], atol=1e-12)


@VECTORIZED
@pytest.mark.parametrize(
    ("bound", "expected"), [("importance", 0.0218), ("renyi .5", 0.0542), ("renyi 2", 0.151)]
)
def test_discrete_gradient_of_four_particles(bound, expected, vectorize):
    """z ~ Bernoulli(.3), x ~ N(z, 1) at 1, guide Bernoulli(1/2): the mean of all 16 outcomes."""
    logit = torch.tensor(0.0, dtype=F64, requires_grad=True)
    loss = BOUNDS[bound][0](4, vectorize_particles=vectorize, max_plate_nesting=0)

    def model():
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, dtype=F64)))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones((), dtype=F64))

    mean = 0.0
    for outcome in itertools.product(torch.tensor([0.0, 1.0], dtype=F64), repeat=4):
        coin = chosen(dist.Bernoulli, torch.stack(outcome))
        value = loss.differentiable_loss(model, lambda c=coin: pyro.sample("z", c(logits=logit)))
        mean = mean + torch.autograd.grad(value, logit)[0].item() / 16
    assert mean == pytest.approx(expected, rel=3e-3)


def test_bounds_are_ordered_draw_by_draw():
    log_w = 3 * torch.randn(50, 200, dtype=F64)
    falling = [ChiSquared(50, order=3).value(log_w)]
    falling += [Renyi(50, alpha=a).value(log_w) for a in (-1, -0.5, 0, 0.5, 0.99)]
    falling += [log_w.mean(0)]
    falling += [Renyi(50, alpha=a).value(log_w) for a in (1.01, 2, 5)]
    assert all((high > low).all() for high, low in itertools.pairwise(falling))
    assert torch.equal(Renyi(50, alpha=0).value(log_w), ImportanceWeighted(50).value(log_w))

    grids = [(0.0,), (0.0, 0.5), (0.0, 0.25, 0.5, 0.75), tuple(torch.arange(0, 1, 0.01).tolist())]
    rising = [Thermodynamic(50, betas=b).value(log_w) for b in grids]
    assert torch.allclose(rising[0], log_w.mean(0))
    rising.append(ImportanceWeighted(50).value(log_w))
    assert all((low < high).all() for low, high in itertools.pairwise(rising))
    fine = Thermodynamic(50, betas=torch.arange(0, 1, 1e-3).tolist()).value(log_w)
    assert torch.allclose(fine, rising[-1], atol=0.02)


def conjugate(loc):
    """Normal prior and observation at 1; the posterior is N(1/2, 1/2)."""

    def model():
        z = pyro.sample("z", dist.Normal(loc.new_zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=loc.new_ones(3))

    def guide():
        pyro.sample("z", dist.Normal(loc, 0.5**0.5).to_event(1))

    return model, guide


@VECTORIZED
@pytest.mark.parametrize("bound", BOUNDS)
def test_gradient_has_no_spread_at_the_posterior(bound, vectorize):
    """In single precision, with weights of the model itself that may cancel."""
    loc = torch.full((3,), 0.5, requires_grad=True)
    loss = BOUNDS[bound][0](
        4, gradient=DoublyReparameterized(), vectorize_particles=vectorize, max_plate_nesting=0
    )
    for _ in range(5):
        (gradient,) = torch.autograd.grad(loss.differentiable_loss(*conjugate(loc)), loc)
        assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize(
    ("bound", "make"),
    [
        ("importance", AutoMultivariateNormal),
        ("thermodynamic", AutoMultivariateNormal),
        ("chi", lambda m: AutoFlow(m, realnvp)),
    ],
)
def test_autoguides_keep_their_mean_gradient(bound, make):
    """Path gradients with and without the score: one mean, fewer than five standard errors off."""
    guide = make(EightSchools().non_centred)
    guide()
    with torch.no_grad():
        for p in guide.parameters():
            p.add_(0.05 * torch.randn_like(p))
    parameters, means = list(guide.parameters()), []
    for gradient in (Reparameterized(), DoublyReparameterized()):
        loss = BOUNDS[bound][0](
            4, gradient=gradient, vectorize_particles=True, max_plate_nesting=1
        )
        draws = []
        for _ in range(80):
            value = loss.differentiable_loss(guide.model, guide)
            flat = torch.autograd.grad(value, parameters, allow_unused=True)
            draws.append(torch.cat([g.flatten() for g in flat if g is not None]))
        draws = torch.stack(draws)
        means.append((draws.mean(0), draws.var(0) / len(draws)))
    (a, x), (b, y) = means
    z = (a - b) / (x + y + 1e-12).sqrt()
    size = z.square().mean()
    assert size < 2.5, size  # mean of many squared scores, each with mean 1


def slopes():
    """Of log SNR on log K: prior N(0, I), likelihood N(z, I), guide off the posterior N(x/2, I/2).

    The mean gradient is estimated by the quieter of the two estimators.
    """
    torch.manual_seed(1)
    counts, logs = (4, 16, 64), []
    for k in counts:
        cells = 60_000 // k
        loc = torch.full((cells, 5), 0.7, requires_grad=True)

        def model(cells=cells):
            with pyro.plate("cells", cells):
                z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(5))

        def guide(loc=loc):
            with pyro.plate("cells", len(loc)):
                pyro.sample("z", dist.Normal(loc, (2 / 3) ** 0.5).to_event(1))

        draws = []
        for gradient in (Reparameterized(), DoublyReparameterized()):
            loss = ImportanceWeighted(
                k, gradient=gradient, vectorize_particles=True, max_plate_nesting=1
            )
            draws += torch.autograd.grad(loss.differentiable_loss(model, guide), loc)
        mean = draws[1].mean()
        logs.append(torch.stack([mean.abs().log() - g.std().log() for g in draws]))
    log_k = torch.tensor(counts).log()
    log_k = (log_k - log_k.mean())[:, None]
    return (log_k * torch.stack(logs)).sum(0) / log_k.square().sum()


def test_signal_to_noise_falls_by_the_path_and_grows_without_the_score():
    """Theory: -1/2 and +1/2 as K grows."""
    plain, doubly = slopes()
    assert -0.6 < plain < -0.4
    assert 0.35 < doubly < 0.6


def test_weights_that_no_double_path_has_are_refused():
    class Median(MultiSample):
        def value(self, log_weight):
            return log_weight.median(0).values

    loc = torch.zeros(3, requires_grad=True)
    assert Median(3).differentiable_loss(*conjugate(loc)).requires_grad
    with pytest.raises(NotImplementedError, match=r"Median gives no path_weight.*Reparameterized"):
        Median(3, gradient=DoublyReparameterized()).differentiable_loss(*conjugate(loc))


@pytest.mark.parametrize("particles", [0, -1, 2.0, True])
@pytest.mark.parametrize(
    "make", [*[m for m, *_ in BOUNDS.values()], TailAdaptive, ReweightedWakeSleep]
)
def test_number_of_particles_is_checked(make, particles):
    with pytest.raises(ValueError, match=f"positive number of particles, got {particles}"):
        make(particles)


def test_errors_at_the_door():
    for make, *_ in BOUNDS.values():
        with pytest.raises(TypeError, match="expected a gradient, got <class"):
            make(2, gradient=DoublyReparameterized)
    for alpha in (1, 1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=r"finite alpha other than 1.*ELBO"):
            Renyi(alpha=alpha)
    for order in (1, 0.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="order above 1"):
            ChiSquared(order=order)
    for betas in ((), (0.1,), (0.0, 1.0), (0.0, 0.5, 0.5), (0.0, float("nan"))):
        with pytest.raises(ValueError, match="betas that increase from 0 to below 1"):
            Thermodynamic(betas=betas)
    with pytest.raises(ValueError, match="at least 2 particles, got 1"):
        FDivergence(1, f=kl)
    with pytest.raises(TypeError, match="function of the log-ratio, got 'kl'"):
        FDivergence(f="kl")
    for alpha in (0, 1, float("nan")):
        with pytest.raises(ValueError, match="other than 0 and 1"):
            alpha_divergence(alpha)
    for beta in (0, 0.5, -1.1, float("nan")):
        with pytest.raises(ValueError, match=r"beta in \[-1, 0\)"):
            TailAdaptive(beta=beta)


def test_a_guide_with_noise_of_its_own_is_refused():
    """Noise outside of sites, behind a bound method too, gives the second run another density."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))

        def guide(self):
            loc = self.net(torch.ones(3))
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    noisy = Noisy()
    model, _ = conjugate(torch.zeros(3))
    loss = ELBO(gradient=DoublyReparameterized())
    with pytest.raises(ValueError, match="'z' has another density when the guide runs again"):
        loss.differentiable_loss(model, noisy.guide)
    noisy.eval()
    loss.differentiable_loss(model, noisy.guide)
