"""Refinement at the data: the gap that an encoder leaves closes, by exact evidence."""

import math
from itertools import pairwise

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyrogen.distributions import LatentVariable
from pyrogen.evaluation import log_evidence
from pyrogen.guides import Amortized, Descent, FullCovariance, Mixed, Refined, Unrolled
from pyrogen.inference import importance
from pyrogen.objectives import (
    ELBO,
    DoublyReparameterized,
    ImportanceWeighted,
    Reparameterized,
    ReweightedWakeSleep,
    ScoreFunction,
)
from pyrogen.targets import LinearGaussian
from pyrogen.training import Trainer


def quiet(particles=8):
    return ELBO(particles, gradient=DoublyReparameterized(), vectorize_particles=True)


def plain(particles=8):
    return ELBO(particles, vectorize_particles=True)


@pytest.fixture
def linear():
    target = LinearGaussian(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), noise=0.7)
    return target, torch.randn(20, 3) * torch.tensor([1.2, 2.1, 0.7])


def frozen(target, **kwargs):
    """An encoder that knows nothing: every posterior is the same."""
    encoder = nn.Linear(3, 4)
    nn.init.zeros_(encoder.weight)
    nn.init.zeros_(encoder.bias)
    return Amortized(target.plated, encoder, **kwargs)


def gap(target, guide, x, particles=500):
    """Nats a datum between the evidence, known exactly, and the bound."""
    loss = plain(particles).loss(target.plated, guide, x)
    return (loss + target.log_evidence(x).sum().item()) / len(x)


def test_gap_closes_as_steps_grow(linear):
    target, x = linear
    guide = frozen(target)
    gaps = [
        gap(target, Refined(guide, Descent(quiet(), steps=steps, lr=0.2)), x)
        for steps in (0, 10, 30, 90)
    ]
    assert gaps[0] > 4
    assert all(after < 0.6 * before for before, after in pairwise(gaps))
    assert abs(gaps[-1]) < 0.01


def test_small_steps_never_do_harm(linear):
    target, x = linear
    guide = frozen(target)
    gaps = [
        gap(target, Refined(guide, Unrolled(plain(64), steps=steps, lr=0.02, momentum=0.0)), x)
        for steps in (0, 1, 2, 4, 8)
    ]
    assert gaps == sorted(gaps, reverse=True)


def test_family_with_correlations_is_refined_too():
    target = LinearGaussian(torch.tensor([[1.0, 0.9], [0.9, 1.0]]), noise=0.5)
    x = torch.randn(10, 2)
    encoder = nn.Linear(2, 5)
    guide = Refined(
        Amortized(target.plated, encoder, family=FullCovariance()),
        Descent(quiet(), steps=100, lr=0.3),
    )
    assert abs(gap(target, guide, x)) < 0.02
    diagonal = Amortized(target.plated, nn.Linear(2, 4))
    limit = Refined(diagonal, Descent(quiet(), steps=100, lr=0.3))
    covariance = target.posterior(x).covariance_matrix[0]
    exact = (covariance.inverse().diag().log().sum() + covariance.logdet()) / 2
    assert gap(target, limit, x) == pytest.approx(exact.item(), abs=0.03)  # of the family


def test_no_steps_leave_the_guide_as_it_is(linear):
    target, x = linear
    guide = Amortized(target.plated, nn.Linear(3, 4))
    for refinement in (Descent(ELBO(), steps=0), Unrolled(ELBO(), steps=0)):
        refined = Refined(guide, refinement)
        assert torch.equal(refined.median(x)["z"], guide.median(x)["z"])
    (gradient,) = torch.autograd.grad(refined(x)["z"].sum(), [guide.encoder.bias])
    assert gradient.any()  # unrolled, it is the encoder's own


def test_unrolled_and_descent_take_the_same_steps():
    def objective(numbers):
        return (numbers**4).sum() + numbers.prod()

    start = torch.tensor([1.0, -0.5])
    unrolled = Unrolled(ELBO(), steps=7, lr=0.05, momentum=0.6)(objective, start)

    def sgd(params, lr):
        return torch.optim.SGD(params, lr=lr, momentum=0.6)

    descent = Descent(ELBO(), steps=7, lr=0.05, optimizer=sgd)(objective, start)
    assert torch.allclose(unrolled, descent)
    assert not descent.requires_grad
    assert start.tolist() == [1.0, -0.5]


def test_unrolled_gradient_agrees_with_finite_differences():
    """Of the bound at the end of the steps, in the encoder and in the model."""
    weight = nn.Parameter(torch.tensor([[1.0], [0.5]], dtype=torch.float64))
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.3]], dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal((z @ weight.T).tanh(), 0.5).to_event(1), obs=x)

    encoder = nn.Linear(2, 2).double()
    guide = Refined(Amortized(model, encoder), Unrolled(plain(4), steps=4, lr=0.05))
    loss = plain(4)

    def value():
        pyro.set_rng_seed(3)
        return loss.differentiable_loss(model, guide, x)

    value()  # the first run looks at the plates
    parameters = [encoder.weight, weight]
    gradients = torch.autograd.grad(value(), parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        for index in [(0, 0), (1, 0)]:
            values = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    parameter[index] += step
                    values.append(value().item())
                    parameter[index] -= step
            expected = (values[0] - values[1]) / 2e-5
            assert gradient[index].item() == pytest.approx(expected, rel=1e-5)


def test_descent_trains_the_model_but_not_the_encoder(linear):
    _, x = linear
    decoder = nn.Linear(2, 3)
    vae = LatentVariable(decoder, latents=2, event_shape=(3,))
    guide = Amortized(vae.model, nn.Linear(3, 4))
    refined = Refined(guide, Descent(plain(), steps=3))
    ELBO()(vae.model, refined)(x).backward()
    assert decoder.weight.grad.any()
    assert guide.encoder.weight.grad is None


def test_gradient_of_the_model_is_that_of_the_evidence(linear):
    """By Fisher's identity, since the refined posteriors are exact."""
    _, x = linear
    weight = nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.5], [0.0, 0.0]]))
    target = LinearGaussian(weight, noise=0.7)
    guide = Refined(frozen(target), Descent(quiet(), steps=160, lr=0.2))
    loss = plain(2000).differentiable_loss(target.plated, guide, x)
    (gradient,) = torch.autograd.grad(loss, [weight])
    (exact,) = torch.autograd.grad(-target.log_evidence(x).sum(), [weight])
    assert torch.allclose(gradient, exact, rtol=0.05, atol=0.5)


def test_encoder_learns_where_to_start():
    """Three steps from the learned start are better than three from anywhere else."""
    target = LinearGaussian(torch.tensor([[1.0], [2.0]]), noise=0.7)
    x = torch.randn(50, 2) @ torch.tensor([[1.2, 1.0], [0.0, 1.5]])
    guide = Amortized(target.plated, nn.Linear(2, 2))
    refined = Refined(guide, Unrolled(plain(), steps=3, lr=0.02))
    before = gap(target, refined, x)
    objective = plain(4)(nn.Module(), refined)
    objective.model.forward = target.plated
    optimizer = torch.optim.Adam(guide.parameters(), 0.1)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 80)
    Trainer(objective, optimizer, schedule=decay).fit([(x,)], steps=80, progress=False)
    assert before > 0.5
    assert abs(gap(target, refined, x)) < 0.03


@pytest.mark.parametrize("refinement", [Descent, Unrolled])
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize(
    "outer",
    [
        lambda **k: ELBO(3, **k),
        lambda **k: ELBO(3, gradient=DoublyReparameterized(), **k),
        lambda **k: ELBO(3, gradient=ScoreFunction(), **k),
        lambda **k: ImportanceWeighted(3, gradient=DoublyReparameterized(), **k),
        lambda **k: Trace_ELBO(3, **k),
    ],
    ids=["elbo", "stl", "score", "dreg", "pyro"],
)
def test_every_loss_takes_it(linear, outer, vectorize, refinement):
    _, x = linear
    inner = ELBO(2, gradient=Reparameterized(), vectorize_particles=vectorize)
    vae = LatentVariable(nn.Linear(2, 3), latents=2, event_shape=(3,))
    guide = Refined(Amortized(vae.model, nn.Linear(3, 4)), refinement(inner, steps=2))
    loss = outer(vectorize_particles=vectorize)
    loss(vae.model, guide)(x).backward()
    assert all(p.grad.isfinite().all() for p in vae.parameters())


def test_second_run_on_the_same_draws_makes_the_same_steps(linear):
    """So that sticking the landing subtracts the score of the law that was drawn from."""
    target, x = linear
    guide = Refined(frozen(target), Descent(plain(1), steps=5, lr=0.3))
    drawn = poutine.trace(guide).get_trace(x)
    again = poutine.trace(poutine.replay(guide, trace=drawn)).get_trace(x)
    other = poutine.trace(guide).get_trace(x)
    means = [trace.nodes["z"]["fn"].mean for trace in (drawn, again, other)]
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[0], means[2])


def test_steps_are_invisible_and_leave_nothing(linear):
    target, x = linear
    guide = Amortized(target.plated, nn.Linear(3, 4))
    refined = Refined(guide, Descent(plain(4), steps=3, lr=0.3)).setup(x)
    before = {name: value.clone() for name, value in refined.state_dict().items()}
    with torch.no_grad(), poutine.trace() as outside:
        refined(x)
    assert set(outside.trace.stochastic_nodes) == {"data", "_Refined_noise", "z"}
    assert refined.state_dict().keys() == guide.state_dict().keys()
    assert all(torch.equal(refined.state_dict()[name], before[name]) for name in before)
    assert all(p.grad is None for p in refined.parameters())
    assert len(pyro.get_param_store()) == 0


def test_random_numbers_outside_do_not_depend_on_the_steps(linear):
    target, x = linear
    guide, after = frozen(target), []
    for steps in (1, 9):
        refined = Refined(guide, Descent(plain(), steps=steps, lr=1e-9))
        refined(x)  # the first run looks at the plates
        pyro.set_rng_seed(1)
        refined(x)
        after.append(torch.rand(3))
    assert torch.equal(*after)


@pytest.mark.parametrize("vectorize", [False, True])
def test_subsample_is_shared(vectorize):
    x = torch.arange(30.0)[:, None]

    def model(x):
        with pyro.plate("data", 30, subsample_size=4) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 100.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x[rows, 0])

    encoder = nn.Linear(1, 2).requires_grad_(False)
    guide = Refined(Amortized(model, encoder), Descent(plain(64), steps=150, lr=2.0))
    particles = pyro.plate("particles", 5, dim=-2) if vectorize else poutine.block(expose=["z"])
    trace = poutine.trace(guide).get_trace(x)
    rows = trace.nodes["data"]["value"]
    assert torch.allclose(trace.nodes["z"]["fn"].mean, rows.float(), atol=0.5)
    assert trace.nodes["z"]["scale"] == 30 / 4
    with particles:
        assert guide(x)["z"].shape == ((5, 4) if vectorize else (4,))


def test_stands_wherever_a_guide_stands(linear):
    target, x = linear
    x = x[:5]
    guide = Refined(frozen(target), Descent(quiet(4), steps=50, lr=0.4))
    exact = target.log_evidence(x)
    bound = log_evidence(target.plated, guide, x, particles=20)
    assert torch.allclose(bound.log_prob, exact, atol=0.1)
    posterior = importance(target.plated, guide, x[:2], draws=500)
    assert posterior.log_evidence == pytest.approx(exact[:2].sum().item(), abs=0.05)
    draws = Predictive(target.plated, guide=guide, num_samples=400, parallel=True)(x)
    mean = target.posterior(x).mean
    assert torch.allclose(draws["z"].mean(0), mean, atol=0.25)
    svi = SVI(target.plated, guide, pyro.optim.Adam({"lr": 0.1}), ReweightedWakeSleep(4))
    assert math.isfinite(svi.evaluate_loss(x))


def test_what_is_shared_may_be_drawn_beside():
    x = torch.randn(6, 1)

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def local(m):
        return Refined(Amortized(m, nn.Linear(1, 2)), Descent(quiet(), steps=100, lr=0.2))

    guide = Mixed(model, globals=AutoNormal, locals=local).setup(x)
    trace = poutine.trace(guide).get_trace(x)
    exact = (trace.nodes["m"]["value"] + x[:, 0]) / 2
    assert torch.allclose(trace.nodes["z"]["fn"].mean, exact, atol=0.05)


def test_many_draws_of_what_is_given_are_refused():
    """Each would need steps of its own."""

    class Encoder(nn.Linear):
        def forward(self, x, context):
            return super().forward(torch.cat([x, context], dim=-1))

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])

    def local(m):
        return Refined(Amortized(m, Encoder(2, 2), given="m"), Descent(plain(3), steps=2))

    guide = Mixed(model, globals=AutoNormal, locals=local)
    x = torch.randn(6, 1)
    assert math.isfinite(ELBO(3).loss(model, guide, x))
    with pytest.raises(NotImplementedError, match=r"6 data, got .*vectorize_particles=False"):
        plain(3).loss(model, guide, x)


def test_plate_of_the_data_may_be_named():
    def model(x):
        with pyro.plate("rows", 2, dim=-2), pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0].expand(2, -1))

    x = torch.tensor([[0.0], [2.0], [4.0]])
    named = Amortized(model, nn.Linear(1, 4), plate="data")
    guide = Refined(named, Descent(quiet(), steps=400, lr=0.2))
    assert torch.allclose(guide.median(x)["z"], (x[:, 0] / 2).expand(2, -1), atol=0.05)


def test_double_precision(linear):
    target = LinearGaussian(torch.eye(2, dtype=torch.float64), noise=0.5)
    x = torch.randn(4, 2, dtype=torch.float64)
    guide = Refined(Amortized(target.plated, nn.Linear(2, 4).double()), Descent(quiet(), steps=5))
    assert guide(x)["z"].dtype == torch.float64
    assert plain(3).differentiable_loss(target.plated, guide, x).dtype == torch.float64


def test_refusals_say_what_to_do(linear):
    target, x = linear
    with pytest.raises(TypeError, match="Descent expected a bound, got int"):
        Descent(3)
    with pytest.raises(ValueError, match="steps >= 0 and lr > 0"):
        Unrolled(ELBO(), steps=-1)
    with pytest.raises(ValueError, match="steps >= 0 and lr > 0"):
        Descent(ELBO(), lr=0.0)
    with pytest.raises(ValueError, match=r"momentum in \[0, 1\)"):
        Unrolled(ELBO(), momentum=1.0)
    with pytest.raises(TypeError, match=r"got AutoNormal.* Pass Amortized or Local"):
        Refined(AutoNormal(target.plated), Descent(ELBO()))
    guide = Refined(frozen(target), Unrolled(plain(), steps=9, lr=1e25))
    with pytest.raises(FloatingPointError, match="Unrolled diverged within 9 steps"):
        guide(x)
    with pytest.raises(NotImplementedError, match="needs the arguments of its model"):
        guide.posterior(x)
