"""The importance-weighted bound: value and gradient against enumeration and closed forms."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormal
from torch import nn

from pyrogen.objectives import ImportanceWeighted
from pyrogen.targets import LinearGaussian

VECTORIZED = pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorized"])


class Chosen(dist.Bernoulli):
    """A Bernoulli whose draws are chosen beforehand, so that a test can enumerate them."""

    draws: list = []  # noqa: RUF012

    def sample(self, sample_shape=()):
        n = self.batch_shape.numel()
        return torch.stack([Chosen.draws.pop(0) for _ in range(n)]).reshape(self.batch_shape)


def bound_by_hand(log_weight):
    return log_weight.logsumexp(0) - math.log(len(log_weight))


@VECTORIZED
@pytest.mark.parametrize(
    ("particles", "logit", "expected"), [(4, 0.0, 0.0218), (1, 0.2, None), (2, 0.2, None)]
)
def test_discrete_gradient_is_exact_in_expectation(particles, logit, expected, vectorize):
    """Every outcome of the draws, weighted by its probability: no sampling error."""
    logit, x = torch.tensor(logit, requires_grad=True), torch.tensor(1.0)
    elbo = ImportanceWeighted(particles, vectorize_particles=vectorize, max_plate_nesting=0)

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide():
        pyro.sample("z", Chosen(logits=logit))

    exact, estimate, value = 0.0, 0.0, 0.0
    for outcome in itertools.product([0.0, 1.0], repeat=particles):
        z = torch.tensor(outcome)
        log_q = dist.Bernoulli(logits=logit).log_prob(z)
        log_p = dist.Bernoulli(0.3).log_prob(z) + dist.Normal(z, 1.0).log_prob(x)
        probability = log_q.sum().exp()
        exact = exact - probability * bound_by_hand(log_p - log_q)
        Chosen.draws = list(z)
        loss = elbo.differentiable_loss(model, guide)
        value += probability.item() * loss.item()
        estimate += probability.item() * torch.autograd.grad(loss, logit)[0]
    (gradient,) = torch.autograd.grad(exact, logit)
    assert value == pytest.approx(exact.item(), abs=1e-6)
    assert estimate.item() == pytest.approx(gradient.item(), abs=1e-6)
    if expected is not None:
        assert estimate.item() == pytest.approx(expected, abs=5e-5)


def test_discrete_gradient_is_scaled_with_its_subsample():
    """All draws of two particles for one datum of three, weighted by their probability."""
    logits = torch.tensor([0.2, -0.4, 0.1], requires_grad=True)
    x = torch.tensor([1.0, 0.5, -1.0])

    def program(q):
        with pyro.plate("data", 3, subsample=torch.tensor([1])) as i:
            z = pyro.sample("z", Chosen(logits=logits[i]) if q else dist.Bernoulli(0.3))
            if not q:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    exact, gradient = 0.0, 0.0
    for outcome in itertools.product([0.0, 1.0], repeat=2):
        z = torch.tensor(outcome)
        log_q = dist.Bernoulli(logits=logits[1]).log_prob(z)
        log_p = dist.Bernoulli(0.3).log_prob(z) + dist.Normal(z, 1.0).log_prob(x[1])
        exact = exact - 3 * log_q.sum().exp() * bound_by_hand(log_p - log_q)
        Chosen.draws = list(z)
        loss = ImportanceWeighted(2).differentiable_loss(
            lambda: program(q=False), lambda: program(q=True)
        )
        gradient += log_q.sum().exp().item() * torch.autograd.grad(loss, logits)[0]
    assert torch.allclose(gradient, torch.autograd.grad(exact, logits)[0], atol=1e-6)


@VECTORIZED
def test_mixed_gradient_is_exact_in_expectation(vectorize):
    """A discrete and a reparametrized site together, K = 2, against a bound by quadrature."""
    phi = torch.tensor([0.3, 0.2], dtype=torch.float64, requires_grad=True)

    def log_joint(k, z):
        return (
            dist.Bernoulli(torch.tensor(0.4).double()).log_prob(k)
            + dist.Normal(k, 1.0).log_prob(z)
            + dist.Normal(z, 1.0).log_prob(torch.tensor(1.5).double())
        )

    cells = 20_000  # independent data with parameters of their own, so each gives one gradient
    own = phi.detach().expand(cells, 2).clone().requires_grad_()

    def model():
        with pyro.plate("data", cells):
            k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.4).double()))
            z = pyro.sample("z", dist.Normal(k, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.tensor(1.5).double().expand(cells))

    def guide():
        with pyro.plate("data", cells):
            k = pyro.sample("k", dist.Bernoulli(logits=own[:, 0]))
            pyro.sample("z", dist.Normal(own[:, 1] + k, 1.0))

    grid = torch.linspace(-7, 7, 281, dtype=torch.float64)
    step, exact = grid[1] - grid[0], 0.0
    for outcome in itertools.product([0.0, 1.0], repeat=2):
        k = torch.tensor(outcome).double()
        log_q_k = dist.Bernoulli(logits=phi[0]).log_prob(k)
        z = phi[1] + k[:, None] + grid
        log_q = log_q_k[:, None] + dist.Normal(phi[1] + k[:, None], 1.0).log_prob(z)
        log_w = log_joint(k[:, None].expand_as(z), z) - log_q
        pair = torch.logaddexp(log_w[0][:, None], log_w[1][None]) - math.log(2)
        density = dist.Normal(0.0, 1.0).log_prob(grid).exp()
        exact = (
            exact - log_q_k.sum().exp() * (density[:, None] * density * pair).sum() * step.square()
        )
    (expected,) = torch.autograd.grad(exact, phi)

    elbo = ImportanceWeighted(2, vectorize_particles=vectorize)
    (draws,) = torch.autograd.grad(elbo.differentiable_loss(model, guide), own)
    z = (draws.mean(0) - expected) / (draws.std(0) / len(draws) ** 0.5)
    assert z.abs().max() < 4.5, z  # fails once in 1e5


@VECTORIZED
@pytest.mark.parametrize("size", [1, 3, 5])
def test_value_and_gradient_are_those_of_the_formula(vectorize, size):
    """Same draws, bound by hand: per datum, scale outside the logarithm, inner plate inside."""
    data = torch.randn(5, 2)
    loc = torch.tensor(0.3, requires_grad=True)
    seen = []

    def model():
        with pyro.plate("data", 5, subsample_size=size, dim=-2) as i:
            z = pyro.sample("z", dist.Normal(torch.zeros(size, 1), 1.0))
            with pyro.plate("time", 2, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=data[i])

    def guide():
        with pyro.plate("data", 5, subsample_size=size, dim=-2) as i:
            seen.append((i, pyro.sample("z", dist.Normal(loc * data[i, :1], 1.0))))

    elbo = ImportanceWeighted(4, vectorize_particles=vectorize, max_plate_nesting=2)
    (gradient,) = torch.autograd.grad(loss := elbo.differentiable_loss(model, guide), loc)

    assert all(torch.equal(i, seen[0][0]) for i, _ in seen)  # one subsample for all particles
    i = seen[0][0]
    z = torch.cat([z for _, z in seen]).detach().reshape(4, size)
    noise = z - loc.detach() * data[i, 0]
    z = noise + loc * data[i, 0]
    log_w = dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(loc * data[i, 0], 1.0).log_prob(z)
    log_w = log_w + dist.Normal(z[..., None], 1.0).log_prob(data[i]).sum(-1)
    expected = -5 / size * bound_by_hand(log_w).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert gradient.item() == pytest.approx(torch.autograd.grad(expected, loc)[0].item(), rel=1e-4)


@pytest.fixture
def plated():
    torch.manual_seed(0)
    data = torch.randn(10) * 1.4 + 0.5

    def model(size):
        with pyro.plate("data", 10, subsample_size=size) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[i])

    def guide(size):
        with pyro.plate("data", 10, subsample_size=size) as i:
            pyro.sample("z", dist.Normal(0.3 * data[i], 1.0))

    return model, guide, dist.Normal(0.0, 2**0.5).log_prob(data).sum().item()


def estimate(elbo, model, guide, *args, repeats=150):
    losses = -torch.tensor([elbo.loss(model, guide, *args) for _ in range(repeats)])
    return losses.mean().item(), losses.std().item() / repeats**0.5


@pytest.mark.parametrize("particles", [5, 500])
@pytest.mark.parametrize("size", [1, 2, 10])
def test_subsampled_estimate_is_a_bound(plated, particles, size):
    """The mean over subsamples lies below the evidence and equals that of the whole plate."""
    model, guide, evidence = plated
    elbo = ImportanceWeighted(particles, vectorize_particles=True, max_plate_nesting=1)
    assert evidence == pytest.approx(-18.31, abs=0.005)
    whole, error = estimate(elbo, model, guide, 10)
    assert whole < evidence + 4.5 * error
    mean, spread = estimate(elbo, model, guide, size)
    assert abs(mean - whole) < 4.5 * math.hypot(spread, error)  # fails once in 1e5


def test_one_datum_at_a_time_adds_up_to_the_whole(plated):
    """Over all subsamples of one datum the mean is exact: no luck of the draw is involved."""
    torch.manual_seed(0)
    data = torch.randn(10) * 1.4 + 0.5

    def model(i):
        with pyro.plate("data", 10, subsample=i):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=data[i])

    def posterior(i):
        with pyro.plate("data", 10, subsample=i):
            pyro.sample("z", dist.Normal(data[i] / 2, 0.5**0.5))

    losses = [ImportanceWeighted(3).loss(model, posterior, i[None]) for i in torch.arange(10)]
    assert -sum(losses) / 10 == pytest.approx(plated[2], abs=1e-4)


@VECTORIZED
def test_bound_rises_with_particles_to_the_evidence(vectorize):
    target = LinearGaussian(torch.tensor([[1.0, 0.5], [0.3, 1.0]]), noise=0.8)
    x = torch.tensor([0.7, -0.4])

    def guide(x):
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    means = []
    for particles in (1, 3, 10, 1000) if vectorize else (1, 4):
        elbo = ImportanceWeighted(particles, vectorize_particles=vectorize, max_plate_nesting=0)
        means.append(estimate(elbo, target, guide, x, repeats=100))
    for (low, a), (high, b) in itertools.pairwise(means):
        assert high - low > -4.5 * math.hypot(a, b)
    evidence = target.log_evidence(x).item()
    assert means[0][0] < evidence - 0.2
    if vectorize:
        assert means[-1][0] == pytest.approx(evidence, abs=0.01)


@pytest.mark.parametrize("particles", [1, 7])
@VECTORIZED
def test_bound_is_tight_at_the_posterior(particles, vectorize):
    target = LinearGaussian(torch.tensor([[1.0, 0.5], [0.3, 1.0]]).double(), noise=0.8)
    x = torch.randn(6, 2, dtype=torch.float64)

    def guide(x):
        with pyro.plate("data", 6):
            pyro.sample("z", target.posterior(x))

    bound = ImportanceWeighted(particles, vectorize_particles=vectorize)
    loss = bound.loss(target.plated, guide, x)
    assert loss == pytest.approx(-target.log_evidence(x).sum().item(), abs=1e-9)


def joint_problem(size):
    def model():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4, subsample_size=size):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(size))

    return model


@VECTORIZED
def test_weights_are_joint_with_a_latent_outside_the_plate(vectorize):
    model, drawn = joint_problem(4), []

    def guide():
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 4):
            drawn.append((m, pyro.sample("z", dist.Normal(m / 2, 1.0))))

    elbo = ImportanceWeighted(3, vectorize_particles=vectorize, max_plate_nesting=1)
    loss = elbo.loss(model, guide)
    m = torch.stack([m for m, _ in drawn]).reshape(3, 1)
    z = torch.stack([z for _, z in drawn]).reshape(3, 4)
    log_w = dist.Normal(m, 1.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(torch.ones(()))
    log_w = (log_w - dist.Normal(m / 2, 1.0).log_prob(z)).sum(-1)
    assert loss == pytest.approx(-bound_by_hand(log_w).item(), abs=1e-5)


def test_a_joint_guide_of_local_latents_makes_the_weights_joint(plated):
    """The guide's own site counts too: its density must not be added to every datum."""
    model, _, evidence = plated
    guide = AutoDiagonalNormal(lambda: model(10), init_scale=1.0)
    guide()
    elbo = ImportanceWeighted(2000, vectorize_particles=True, max_plate_nesting=1)
    mean, error = estimate(elbo, guide.model, guide, repeats=20)
    assert evidence - 3 < mean < evidence + 4.5 * error


@VECTORIZED
def test_subsample_with_a_latent_outside_is_refused(vectorize):
    model = joint_problem(2)
    guide = AutoNormal(model)
    elbo = ImportanceWeighted(3, vectorize_particles=vectorize)
    with pytest.raises(NotImplementedError, match=r"'data' holds a subsample, 2 of 4, and site"):
        elbo.loss(model, guide)


def test_one_particle_is_the_elbo():
    model, losses = joint_problem(2), []
    guide = AutoNormal(model)
    guide()
    for elbo in (Trace_ELBO(), ImportanceWeighted(1)):
        pyro.set_rng_seed(0)
        losses.append(elbo.loss(model, guide))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_scale_of_every_site_stands_outside(plated):
    model, guide, _ = plated
    pyro.set_rng_seed(0)
    plain = ImportanceWeighted(3).loss(model, guide, 2)
    pyro.set_rng_seed(0)
    scaled = ImportanceWeighted(3).loss(poutine.scale(model, 0.1), poutine.scale(guide, 0.1), 2)
    assert scaled == pytest.approx(0.1 * plain, rel=1e-5)


def test_scale_of_one_site_tempers_it():
    z, calls = torch.tensor([0.4, -1.0]), []

    def model():
        value = pyro.sample("z", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(value, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Delta(z[len(calls)]))
        calls.append(0)

    log_w = dist.Normal(0.0, 1.0).log_prob(z) + 0.5 * dist.Normal(z, 1.0).log_prob(torch.ones(()))
    loss = ImportanceWeighted(2).loss(model, guide)
    assert loss == pytest.approx(-bound_by_hand(log_w).item(), abs=1e-6)


def test_masked_data_count_nothing():
    mask = torch.tensor([True, False, True])

    def model(mask):
        with pyro.plate("data", 3), poutine.mask(mask=mask):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(3))

    def posterior(mask):
        with pyro.plate("data", 3), poutine.mask(mask=mask):
            pyro.sample("z", dist.Normal(0.5, 0.5**0.5))

    loss = ImportanceWeighted(3).loss(model, posterior, mask)
    expected = -2 * dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0))
    assert loss == pytest.approx(expected.item(), abs=1e-5)


def test_deterministic_sites_do_not_join_the_weights():
    def model():
        pyro.deterministic("two", torch.tensor(2.0))
        with pyro.plate("data", 4, subsample_size=2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=torch.ones(2))

    def posterior():
        with pyro.plate("data", 4, subsample_size=2):
            pyro.sample("z", dist.Normal(0.5, 0.5**0.5))

    expected = -4 * dist.Normal(0.0, 2**0.5).log_prob(torch.tensor(1.0))
    assert ImportanceWeighted(3).loss(model, posterior) == pytest.approx(expected.item(), abs=1e-5)


@VECTORIZED
def test_svi_and_module_take_the_same_gradient(vectorize):
    target, x = LinearGaussian(torch.eye(2), noise=1.0), torch.tensor([1.0, -1.0])
    elbo = ImportanceWeighted(4, vectorize_particles=vectorize, max_plate_nesting=0)
    guide = AutoNormal(target)
    guide(x)
    gradients = []
    for take in (elbo.loss_and_grads, lambda *a: elbo.differentiable_loss(*a).backward()):
        guide.zero_grad()
        pyro.set_rng_seed(3)
        take(target, guide, x)
        gradients.append([p.grad.clone() for p in guide.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert isinstance(elbo(guide, guide), nn.Module)

    svi = SVI(target, guide, pyro.optim.Adam({"lr": 0.1}), loss=elbo)
    losses = [svi.step(x) for _ in range(100)]
    assert sum(losses[-20:]) < sum(losses[:20])


@pytest.mark.parametrize("particles", [0, -1, 2.0])
def test_number_of_particles_is_checked(particles):
    with pytest.raises(ValueError, match="positive number of particles"):
        ImportanceWeighted(particles)


@pytest.mark.parametrize("vectorize", [False, True])
def test_one_draw_of_a_sequential_plate_is_a_cell(vectorize):
    data = torch.linspace(-1, 1, 10)

    def model():
        for i in pyro.plate("data", 10, subsample_size=1):
            z = pyro.sample(f"z{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=data[i])

    def guide():
        for i in pyro.plate("data", 10, subsample_size=1):
            pyro.sample(f"z{i}", dist.Normal(data[i] / 2, 0.5**0.5))  # the posterior

    elbo = ImportanceWeighted(num_particles=3, vectorize_particles=vectorize, max_plate_nesting=0)
    possible = -10 * dist.Normal(0.0, 2**0.5).log_prob(data)
    assert (possible - elbo.loss(model, guide)).abs().min() < 1e-4
