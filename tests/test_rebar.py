"""REBAR: the exact mean gradient, by enumeration, and less noise than the plain score."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI
from torch.distributions import kl_divergence

from pyrogen.objectives import (
    ELBO,
    MovingAverage,
    NoBaseline,
    Rebar,
    Reparameterized,
    Tempered,
)

torch.manual_seed(0)
W, X = torch.randn(6, 4), 2 * torch.randn(4)  # six Bernoullis that explain four numbers
BITS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)))
LIMIT = 5.0  # standard errors: six of them beyond it once in 3e5 runs


def model(logits, w=W):
    with pyro.plate("copies", len(logits)):
        z = pyro.sample("z", dist.Bernoulli(torch.full((6,), 0.3).to(w)).to_event(1))
        pyro.sample("x", dist.Normal(z @ w, 1.0).to_event(1), obs=X.to(w).expand(len(logits), 4))


def guide(logits, w=W):
    with pyro.plate("copies", len(logits)):
        pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))


def enumerated(logits, w=W, beta=1.0):
    """The exact loss of one copy, by its 64 states."""
    states = BITS.to(w)
    log_q = dist.Bernoulli(logits=logits).log_prob(states).sum(-1)
    log_prior = dist.Bernoulli(torch.full((6,), 0.3).to(w)).log_prob(states).sum(-1)
    fit = dist.Normal(states @ w, 1.0).log_prob(X.to(w)).sum(-1)
    return -(log_q.exp() * (fit + beta * (log_prior - log_q))).sum()


def exact_gradient(logits, **options):
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(enumerated(logits, **options), logits)[0]


def copies(logits, count=20_000):
    """Many copies of one guide, in a plate: each row has a gradient of its own."""
    return logits.expand(count, *logits.shape).clone().requires_grad_()


def gradients(bound, logits, model=model, guide=guide):
    return torch.autograd.grad(bound.differentiable_loss(model, guide, logits), logits)[0]


def assert_mean(draws, exact):
    z = (draws.mean(0) - exact) / (draws.std(0) / len(draws) ** 0.5)
    assert z.abs().max() < LIMIT, z


ELSEWHERE = torch.tensor([1.5, -1.5, 1.0, -1.0, 0.5, -0.5])


@pytest.mark.parametrize("at", [torch.zeros(6), ELSEWHERE], ids=["even odds", "elsewhere"])
@pytest.mark.parametrize("particles", [1, 4])
def test_mean_gradient_is_that_of_enumeration_and_quieter(particles, at):
    logits = copies(at)
    plain, rebar = (
        gradients(ELBO(particles, gradient=g, vectorize_particles=True), logits)
        for g in (Reparameterized(), Rebar())
    )
    assert_mean(rebar, exact_gradient(at))
    share = rebar.var(0).sum() / plain.var(0).sum()
    assert share < {1: 0.1, 4: 0.5}[particles]  # measured: 0.065 and 0.33 at even odds


@pytest.mark.parametrize("temperature", [0.1, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("coefficient", [-0.5, 0.5, 2.0])
def test_temperature_and_coefficient_leave_the_mean(temperature, coefficient):
    logits = copies(ELSEWHERE)
    rebar = Rebar(temperature=temperature, coefficient=coefficient)
    assert_mean(gradients(ELBO(gradient=rebar), logits), exact_gradient(ELSEWHERE))


def test_no_coefficient_is_the_plain_score():
    logits = copies(ELSEWHERE, 10)
    gradient = Rebar(NoBaseline(), coefficient=0.0)
    pyro.set_rng_seed(1)
    got = gradients(ELBO(gradient=gradient, max_plate_nesting=1), logits)
    pyro.set_rng_seed(1)
    run = gradient.run(model, guide, 1, (logits,), {})
    z = run.q["z"]["value"]
    cost = run.p["x"]["log_prob"] + run.p["z"]["log_prob"] - run.q["z"]["log_prob"]
    expected = -cost[:, None] * (z - logits.sigmoid())
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_variance_at_even_odds():
    """Without a baseline by enumeration; with the control variate as measured."""
    f = dist.Normal(BITS @ W, 1.0).log_prob(X).sum(-1) + dist.Bernoulli(0.3).log_prob(BITS).sum(-1)
    signal = f - 6 * torch.tensor(0.5).log()
    plain = (signal[:, None] * (BITS - 0.5)).var(0, correction=0).sum()
    logits = copies(torch.zeros(6))
    got = gradients(ELBO(gradient=Reparameterized(NoBaseline())), logits).var(0).sum()
    assert got == pytest.approx(plain.item(), rel=0.05)
    quiet = gradients(ELBO(gradient=Rebar(coefficient=1.0)), logits).var(0).sum()
    assert quiet == pytest.approx(36.8, rel=0.1)


def test_the_coefficient_is_the_best_of_the_past():
    logits = copies(torch.zeros(6))
    for particles, temperature, best in ((1, 0.5, 1.075), (4, 1.0, 1.306), (4, 0.1, 0.503)):
        rebar = Rebar(temperature=temperature)
        bound = ELBO(particles, gradient=rebar, vectorize_particles=True)
        assert rebar.coefficient == 1.0
        first = gradients(bound, logits)
        assert rebar.coefficient == pytest.approx(best, rel=0.05)  # by a computation without Pyro
        assert gradients(bound, logits).var(0).sum() < 1.05 * first.var(0).sum()
        assert_mean(gradients(bound, logits), exact_gradient(torch.zeros(6)))


@pytest.mark.parametrize("vectorize", [False, True])
def test_the_coefficient_is_the_same_by_runs_and_by_a_plate(vectorize):
    rebar = Rebar(temperature=0.2)
    logits = copies(ELSEWHERE)
    gradients(ELBO(3, gradient=rebar, vectorize_particles=vectorize), logits)
    assert rebar.coefficient == pytest.approx(0.65, rel=0.1)
    copy = Rebar()
    copy.load_state_dict(rebar.state_dict())
    assert copy.coefficient == rebar.coefficient


def test_evaluation_and_a_fixed_coefficient_learn_nothing():
    logits = copies(torch.zeros(6), 100)
    rebar, fixed_one = Rebar(), Rebar(coefficient=0.7)
    ELBO(2, gradient=rebar).loss(model, guide, logits)
    gradients(ELBO(2, gradient=fixed_one), logits)
    assert rebar.past == fixed_one.past == {}
    assert fixed_one.coefficient == 0.7


def test_the_score_function_toy():
    """E (b - t)^2 at even odds: a gradient of 5e-4 under noise of 1.6e-2."""
    t = 0.499

    def toy(logits):
        with pyro.plate("copies", len(logits)):
            b = pyro.sample("b", dist.Bernoulli(logits=logits.detach()))
            pyro.factor("cost", -(b - t).square())

    def by(logits):
        with pyro.plate("copies", len(logits)):
            pyro.sample("b", dist.Bernoulli(logits=logits))

    logits = torch.zeros(200_000, requires_grad=True)
    exact = (1 - 2 * t) * 0.25
    assert_mean(gradients(ELBO(gradient=Rebar(coefficient=1.0)), logits, toy, by), exact)
    for particles, known in ((1, 1.563e-2), (4, 4.167e-8)):
        rebar = Rebar()
        bound = ELBO(particles, gradient=rebar, vectorize_particles=True, max_plate_nesting=1)
        gradients(bound, logits, toy, by)  # there is nothing to foretell
        got = gradients(bound, logits, toy, by)
        assert_mean(got, exact)
        assert got.var() < 1.1 * known


def test_categories_have_the_mean_gradient_of_enumeration():
    """Two sites of three categories, one of them of two draws."""
    torch.manual_seed(5)
    a0, b0 = torch.randn(3), torch.randn(2, 3)
    u, v = torch.randn(3), torch.randn(2, 3)
    count = 20_000

    def mean(a, b):
        return 2 * (a @ u + (b * v).sum((-1, -2))).square().sqrt()

    def categories(a, b):
        with pyro.plate("copies", count):
            i = pyro.sample("a", dist.OneHotCategorical(torch.tensor([0.5, 0.3, 0.2])))
            j = pyro.sample("b", dist.OneHotCategorical(torch.ones(2, 3) / 3).to_event(1))
            pyro.sample("x", dist.Normal(mean(i, j), 1.0), obs=torch.full((count,), 1.5))

    def by(a, b):
        with pyro.plate("copies", count):
            pyro.sample("a", dist.OneHotCategorical(logits=a))
            pyro.sample("b", dist.OneHotCategorical(logits=b).to_event(1))

    logits = [copies(a0, count), copies(b0, count)]
    got, plain = (
        torch.autograd.grad(
            ELBO(2, gradient=g, vectorize_particles=True).differentiable_loss(
                categories, by, *logits
            ),
            logits,
        )
        for g in (Rebar(), Reparameterized())
    )

    a, b = a0.clone().requires_grad_(), b0.clone().requires_grad_()
    eye = torch.eye(3)
    total = torch.zeros(())
    for i, j, k in itertools.product(range(3), repeat=3):
        log_q = a.log_softmax(-1)[i] + b.log_softmax(-1)[0, j] + b.log_softmax(-1)[1, k]
        log_p = torch.tensor([0.5, 0.3, 0.2])[i].log() - 2 * torch.tensor(3.0).log()
        x = dist.Normal(mean(eye[i], torch.stack([eye[j], eye[k]])), 1.0)
        total = total - log_q.exp() * (log_p + x.log_prob(torch.tensor(1.5)) - log_q)
    for draws, exact, noisy in zip(got, torch.autograd.grad(total, (a, b)), plain, strict=True):
        assert_mean(draws, exact)
        assert draws.var(0).sum() < noisy.var(0).sum()


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("baseline", [None, MovingAverage()], ids=["others", "past"])
def test_baselines_on_top_leave_the_mean(vectorize, baseline):
    logits = copies(ELSEWHERE)
    bound = ELBO(3, gradient=Rebar(baseline), vectorize_particles=vectorize)
    gradients(bound, logits)  # the past
    assert_mean(gradients(bound, logits), exact_gradient(ELSEWHERE))


def test_tempered_bound_weighs_the_control_variate_too():
    logits = copies(ELSEWHERE)
    got = gradients(Tempered(beta=3.0, gradient=Rebar()), logits)
    assert_mean(got, exact_gradient(ELSEWHERE, beta=3.0))


def test_double_precision():
    w = W.double()
    logits = copies(ELSEWHERE.double())
    bound = ELBO(gradient=Rebar())
    loss = bound.differentiable_loss(model, guide, logits, w)
    (got,) = torch.autograd.grad(loss, logits)
    assert got.dtype == torch.float64
    assert_mean(got, exact_gradient(ELSEWHERE.double(), w=w))


def test_the_model_learns_from_the_draws_alone():
    """Its gradient is that of log p at the discrete draws, untouched by the control variate."""
    w = W.clone().requires_grad_()
    logits = copies(ELSEWHERE, 50)
    pyro.set_rng_seed(1)
    loss = ELBO(gradient=Rebar()).differentiable_loss(model, guide, logits, w)
    (got,) = torch.autograd.grad(loss, w)
    pyro.set_rng_seed(1)
    z = Rebar().run(model, guide, 1, (logits, w), {}).q["z"]["value"]
    fit = dist.Normal(z @ w, 1.0).log_prob(X).sum()
    assert torch.allclose(got, -torch.autograd.grad(fit, w)[0], rtol=1e-4, atol=1e-3)


def test_continuous_sites_plates_and_subsamples_together():
    """A global Bernoulli, a global normal, local Bernoullis, data subsampled: all by algebra."""
    torch.manual_seed(3)
    data = torch.randn(6)
    start = [torch.tensor(0.7), torch.tensor(-0.3), torch.linspace(-1, 1, 6)]

    def program(top, loc, local):
        g = pyro.sample("g", dist.Bernoulli(0.4))
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6, subsample_size=3) as i:
            b = pyro.sample("b", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(m + g * 1.5 - b, 1.0), obs=data[i])

    def by(top, loc, local):
        pyro.sample("g", dist.Bernoulli(logits=top))
        pyro.sample("m", dist.Normal(loc, 0.5))
        with pyro.plate("data", 6, subsample_size=3) as i:
            pyro.sample("b", dist.Bernoulli(logits=local[i]))

    parameters = [p.clone().requires_grad_() for p in start]
    top, loc, local = parameters
    bound = -kl_divergence(dist.Normal(loc, 0.5), dist.Normal(0.0, 1.0))
    bound = bound - kl_divergence(dist.Bernoulli(logits=top), dist.Bernoulli(0.4))
    bound = bound - kl_divergence(dist.Bernoulli(logits=local), dist.Bernoulli(0.3)).sum()
    for g, b in itertools.product([0.0, 1.0], repeat=2):
        weight = dist.Bernoulli(logits=top).log_prob(torch.tensor(g)).exp()
        weight = weight * dist.Bernoulli(logits=local).log_prob(torch.tensor(b)).exp()
        fit = dist.Normal(loc + g * 1.5 - b, 1.0).log_prob(data) - 0.5 * 0.5**2
        bound = bound + (weight * fit).sum()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(-bound, parameters)])

    for vectorize, particles, batches in ((True, 500, 40), (False, 2, 300)):
        elbo = ELBO(
            particles, gradient=Rebar(), vectorize_particles=vectorize, max_plate_nesting=1
        )
        draws = []
        for _ in range(batches):
            loss = elbo.differentiable_loss(program, by, *parameters)
            draws.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
        got = torch.stack(draws)
        assert_mean(got, exact)  # t with 39 degrees of freedom: eight beyond once in 1e4


def test_sequential_plates_are_apart():
    """One site an iteration: the control variate of one does not enter the signal of another."""
    logits = torch.tensor([0.5, -1.0], requires_grad=True)

    def program():
        for i in pyro.plate("data", 2):
            b = pyro.sample(f"b{i}", dist.Bernoulli(0.3))
            pyro.sample(f"x{i}", dist.Normal(100.0 * i + b, 1.0), obs=torch.tensor(100.0 * i))

    def by():
        for i in pyro.plate("data", 2):
            pyro.sample(f"b{i}", dist.Bernoulli(logits=logits[i]))

    def exact():
        p = logits.sigmoid()
        kl = kl_divergence(dist.Bernoulli(logits=logits), dist.Bernoulli(0.3)).sum()
        return torch.autograd.grad(kl + 0.5 * p.sum(), logits)[0]

    bound = ELBO(2000, gradient=Rebar(), vectorize_particles=True, max_plate_nesting=1)
    got = torch.stack(
        [torch.autograd.grad(bound.differentiable_loss(program, by), logits)[0] for _ in range(40)]
    )
    assert_mean(got, exact())  # t with 39 degrees of freedom: two beyond once in 4e4


def test_value_is_that_of_the_elbo_and_needs_no_relaxation():
    calls = []

    def counted(logits):
        calls.append(1)
        model(logits)

    logits = copies(torch.zeros(6), 5000)
    loss = ELBO(gradient=Rebar()).loss(counted, guide, logits) / 5000
    assert len(calls) == 1
    assert loss == pytest.approx(enumerated(torch.zeros(6)).item(), abs=1.0)  # 5 standard errors


def test_without_discrete_sites_it_is_the_path():
    loc = torch.zeros(3, requires_grad=True)

    def prior():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))

    def by():
        pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))

    both = []
    for gradient in (Reparameterized(), Rebar()):
        pyro.set_rng_seed(3)
        loss = ELBO(2, gradient=gradient).differentiable_loss(prior, by)
        both.append(torch.autograd.grad(loss, loc)[0])
    assert torch.equal(*both)


def test_it_learns_with_svi():
    def prior():
        model(torch.zeros(1, 6))

    def stored():
        guide(pyro.param("logits", torch.zeros(1, 6)))

    svi = SVI(prior, stored, pyro.optim.Adam({"lr": 0.1}), loss=ELBO(2, gradient=Rebar()))
    for _ in range(150):
        svi.step()
    assert enumerated(pyro.param("logits")[0]) < enumerated(torch.zeros(6)) - 3
