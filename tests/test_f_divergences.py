"""f-divergences: generators, closed forms, the particles' estimate, and the tail-adaptive one."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from elbo_cases import GENERATORS, hermite, log_normal
from pyro.infer import SVI

from pyrogen import divergences
from pyrogen.objectives import ELBO, FDivergence, TailAdaptive

F64 = torch.float64
VECTORIZED = pytest.mark.parametrize("vectorize", [False, True], ids=["looped", "vectorized"])
SHIFT = 0.6
CLOSED = {  # of p = N(SHIFT, 1) and q = N(0, 1)
    "kl": SHIFT**2 / 2,
    "reverse_kl": SHIFT**2 / 2,
    "pearson": math.exp(SHIFT**2) - 1,
    "neyman": math.exp(SHIFT**2) - 1,
    "squared_hellinger": 2 - 2 * math.exp(-(SHIFT**2) / 8),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_are_convex_and_vanish_at_one(name):
    f, by_ratio = getattr(divergences, name), GENERATORS[name]
    ratio = torch.linspace(0.01, 20, 4000, dtype=F64)
    values = f(ratio.log())
    assert torch.allclose(values, by_ratio(ratio), rtol=1e-9, atol=1e-12)
    assert (values.diff().diff() > -1e-12).all()
    assert f(torch.zeros(2)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", CLOSED)
def test_expectations_are_the_closed_forms(name):
    z, weight = hermite(60)
    value = (weight * getattr(divergences, name)(SHIFT * z - SHIFT**2 / 2)).sum()
    assert value.item() == pytest.approx(CLOSED[name], rel=1e-9)


def test_jensen_shannon_is_half_of_two_divergences_and_bounded():
    z, weight = hermite(80)
    log_ratio = SHIFT * z - SHIFT**2 / 2
    half = (weight * divergences.jensen_shannon(log_ratio)).sum()
    middle = torch.logaddexp(log_ratio, torch.zeros(())) - math.log(2)
    two = (weight * (log_ratio.exp() * (log_ratio - middle) - middle)).sum()
    assert half.item() == pytest.approx(two.item() / 2, rel=1e-9)
    far = divergences.jensen_shannon(torch.tensor([-200.0, 80.0]))
    assert far[0].item() == pytest.approx(math.log(2) / 2)
    assert far[1].item() == pytest.approx(math.exp(80) * math.log(2) / 2, rel=1e-5)
    assert not divergences.jensen_shannon(torch.tensor([1e3])).isnan()


def test_the_alpha_family_has_the_others_for_limits():
    x = torch.linspace(-2, 2, 9, dtype=F64)
    ratio = x.exp()
    for alpha, limit in (
        (1 + 1e-6, divergences.kl(x) - (ratio - 1)),
        (1e-6, divergences.reverse_kl(x) + (ratio - 1)),
        (0.5, 2 * divergences.squared_hellinger(x)),
        (2.0, divergences.pearson(x) / 2),
        (-1.0, divergences.neyman(x) / 2),
    ):
        value = divergences.alpha_divergence(alpha)(x)
        assert torch.allclose(value, limit, atol=1e-4), alpha


def shifted(loc, scale=1.0):
    """Model whose posterior is N(SHIFT, 1), with evidence e^-3, and a normal guide."""

    def model():
        pyro.sample("z", dist.Normal(SHIFT, 1.0))
        pyro.factor("evidence", torch.tensor(-3.0))

    def guide():
        pyro.sample("z", dist.Normal(loc, scale))

    return model, guide


@pytest.mark.parametrize("name", CLOSED)
def test_the_estimate_converges_to_the_divergence(name):
    loss = FDivergence(200_000, f=getattr(divergences, name), vectorize_particles=True)
    value = loss.loss(*shifted(torch.tensor(0.0)))
    assert value == pytest.approx(CLOSED[name], rel=0.03)


@VECTORIZED
@pytest.mark.parametrize("name", GENERATORS)
def test_the_estimate_is_zero_at_the_posterior(name, vectorize):
    loss = FDivergence(5, f=getattr(divergences, name), vectorize_particles=vectorize)
    assert abs(loss.loss(*shifted(torch.tensor(SHIFT)))) < 1e-6


@pytest.mark.parametrize("name", GENERATORS)
def test_descent_finds_the_posterior(name):
    loc = torch.zeros((), requires_grad=True)
    log_scale = torch.tensor(0.3, requires_grad=True)
    optimizer = torch.optim.Adam([loc, log_scale], lr=0.03)
    loss = FDivergence(64, f=getattr(divergences, name), vectorize_particles=True)
    for _ in range(300):
        optimizer.zero_grad()
        loss.differentiable_loss(*shifted(loc, log_scale.exp())).backward()
        optimizer.step()
    assert abs(loc.item() - SHIFT) < 0.1
    assert abs(log_scale.item()) < 0.1


def test_tail_adaptive_weights_rise_with_the_importance_weight():
    log_w = 5 * torch.randn(50, 30)
    weight = TailAdaptive(50).path_weight(log_w)
    assert torch.equal(weight.argsort(0), log_w.argsort(0))  # Spearman's rank correlation is one
    assert torch.allclose(weight.sum(0), torch.ones(30))
    assert (weight.max(0).values / weight.min(0).values).allclose(torch.tensor(50.0))
    flat = TailAdaptive(50, beta=-0.5).path_weight(log_w)
    assert (flat.max(0).values / flat.min(0).values).allclose(torch.tensor(50.0).sqrt())


@VECTORIZED
def test_tail_adaptive_gradient_is_that_of_the_formula(vectorize):
    """Same draws: ranks by hand, along the path alone; the value is that of the ELBO."""
    loc = torch.tensor(0.1, dtype=F64, requires_grad=True)
    scale = torch.tensor(1.3, dtype=F64, requires_grad=True)
    seen = []
    model, _ = shifted(loc)

    def guide():
        seen.append(pyro.sample("z", dist.Normal(loc, scale)))

    loss = TailAdaptive(6, vectorize_particles=vectorize, max_plate_nesting=0)
    actual = torch.autograd.grad(loss.differentiable_loss(model, guide), [loc, scale])
    z = torch.stack([s.detach() for s in seen[::2]]).flatten()
    noise = (z - loc.detach()) / scale.detach()
    z = loc + scale * noise
    fixed = [p.detach() for p in (loc, scale)]
    one = torch.ones((), dtype=F64)
    log_w = log_normal(torch.tensor(SHIFT, dtype=F64), one, z) - log_normal(*fixed, z)
    weight = 6.0 / torch.tensor([(log_w >= w).sum() for w in log_w])
    expected = torch.autograd.grad(-(weight / weight.sum() * log_w).sum(), [loc, scale])
    for a, e in zip(actual, expected, strict=True):
        assert a.item() == pytest.approx(e.item(), abs=1e-7)


def test_tail_adaptive_covers_what_the_elbo_does_not():
    """Two normals with correlation .9: the ELBO's factors have sd sqrt(1 - .81) = .436, not 1."""
    cov = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    spread = {}
    for make in (ELBO, TailAdaptive):
        log_scale = torch.zeros(2, requires_grad=True)

        def model():
            pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), cov))

        def guide(log_scale=log_scale):
            pyro.sample("z", dist.Normal(torch.zeros(2), log_scale.exp()).to_event(1))

        loss = make(128, vectorize_particles=True, max_plate_nesting=0)
        optimizer = torch.optim.Adam([log_scale], lr=0.03)
        for _ in range(300):
            optimizer.zero_grad()
            loss.differentiable_loss(model, guide).backward()
            optimizer.step()
        spread[make] = log_scale.exp().mean().item()
    assert spread[ELBO] == pytest.approx(0.436, abs=0.05)
    assert spread[TailAdaptive] > 0.55


def test_svi_takes_a_divergence():
    loc = torch.nn.Parameter(torch.zeros(()))
    model, _ = shifted(loc)

    def guide():
        loc = pyro.param("loc", torch.zeros(()))
        pyro.sample("z", dist.Normal(loc, 1.0))

    loss = FDivergence(32, f=divergences.jensen_shannon, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=loss)
    for _ in range(150):
        svi.step()
    assert abs(pyro.param("loc").item() - SHIFT) < 0.15
