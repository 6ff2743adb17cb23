"""Annealed importance sampling and what it teaches a flow, against closed forms."""

import io
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

from pyrogen.distributions import nsf, realnvp
from pyrogen.evaluation import effective_sample_size
from pyrogen.guides import AutoFlow
from pyrogen.objectives.annealed import AnnealedBootstrap, Replay
from pyrogen.objectives.hamiltonian import adapted, evaluate, transition
from pyrogen.targets import EightSchools, GaussianMixture
from pyrogen.testing import loss_gives_gradients
from pyrogen.training import Trainer

small = partial(realnvp, layers=2, hidden=(8,))
TARGET = dist.MultivariateNormal(torch.tensor([0.5, -0.3]), torch.tensor([[0.8, 0.3], [0.3, 0.6]]))


def untrained(scale=1.0, dtype=torch.float32):
    flow = small(2).to(dtype)
    flow.scale.fill_(scale)
    return flow


def shaken(flow, size=0.1):
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(size * torch.randn_like(p))
    return flow


def square_over_normal(scale):
    """Closed form of log of the integral of p^2 / q, for q = N(0, scale^2 I)."""
    precision = TARGET.precision_matrix.double()
    mean = TARGET.mean.double()
    whole = 2 * precision - torch.eye(2) / scale**2
    shift = 2 * precision @ mean
    exponent = (shift @ torch.linalg.solve(whole, shift) - 2 * mean @ precision @ mean) / 2
    constant = torch.logdet(precision) + 2 * math.log(scale) - torch.logdet(whole) / 2
    return (exponent + constant).item()


# Hamiltonian Monte Carlo


@pytest.mark.parametrize("powers", [(1.0, 0.0), (-0.4, 1.4)])
def test_transition_leaves_its_density_invariant(powers):
    """Exact draws stay exact, by two KS tests; one seed in 5000 fails."""
    narrow, wide = dist.Normal(0.3, 0.5), dist.Normal(-0.2, 1.5)
    a = torch.tensor([wide.variance.reciprocal(), narrow.variance.reciprocal()])
    a = torch.tensor(powers) * a
    law = dist.Normal((a[0] * -0.2 + a[1] * 0.3) / a.sum(), a.sum().rsqrt())
    densities = [lambda x, law=law: law.log_prob(x).sum(-1) for law in (wide, narrow)]
    points = evaluate(law.sample((8000, 2)), densities)
    start = points.x
    for _ in range(3):  # a long step, so that many are rejected
        points, accept = transition(points, densities, powers, 1.3 * law.scale, leapfrog=3)
    assert 0.3 < accept.mean() < 0.9
    assert (points.x - start).abs().mean() > 0.3 * law.scale
    for j in range(2):
        x = ((points.x[:, j] - law.loc) / law.scale).numpy()
        assert stats.kstest(x, "norm").pvalue > 1e-4


def test_acceptance_balances_the_expectation_of_the_energy():
    """E exp(change of log-density and momentum) = 1 for a volume-preserving reversible move."""
    law = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    points = evaluate(law.sample((4000,)), [law.log_prob])
    moved, _ = transition(points, [law.log_prob], [1.0], torch.tensor(1e-3), leapfrog=2)
    assert torch.allclose(moved.log_density, law.log_prob(moved.x)[None])
    assert torch.allclose(moved.slope[0], -moved.x)
    assert (moved.x - points.x).abs().max() < 0.02


def test_walls_and_nan_are_not_entered():
    def density(x):
        return torch.where(x[:, 0] > 1, torch.nan, -x.square().sum(-1) / 2)

    points = evaluate(torch.full((200, 2), 0.9), [density])
    for _ in range(20):
        points, _ = transition(points, [density], [1.0], torch.tensor(0.8), leapfrog=3)
    assert (points.x[:, 0] <= 1).all()
    assert points.x.isfinite().all()
    far, accept = transition(points, [density], [1.0], torch.tensor(1e30), leapfrog=30)
    assert torch.equal(far.x, points.x)
    assert (accept == 0).all()


def test_a_density_of_negative_power_is_left_nowhere():
    """Where it is zero its power is infinite: no draw of it may go there."""

    def walled(x):
        return torch.where(x[:, 0] > 1, -torch.inf, -x.square().sum(-1) / 2)

    densities = [walled, lambda x: -x.square().sum(-1) / 2]
    points = evaluate(torch.full((200, 2), 0.9), densities)
    for _ in range(20):
        points, _ = transition(points, densities, [-0.4, 1.4], torch.tensor(0.8), leapfrog=3)
    assert (points.x[:, 0] <= 1).all()


def test_step_size_finds_its_acceptance():
    law = dist.Normal(torch.zeros(5), 1.0).to_event(1)
    points, step = evaluate(law.sample((400,)), [law.log_prob]), torch.tensor(0.01)
    for _ in range(100):
        points, accept = transition(points, [law.log_prob], [1.0], step, leapfrog=4)
        step = adapted(step, accept.mean(), target=0.8)
    assert accept.mean() == pytest.approx(0.8, abs=0.05)


# Annealing


@pytest.mark.parametrize("intermediate", [0, 1, 3])
def test_mean_weight_is_unbiased(intermediate):
    """By a z-test of 40,000 weights against the closed form; one seed in 10,000 fails."""
    objective = AnnealedBootstrap(
        untrained(1.3), TARGET.log_prob, intermediate=intermediate, leapfrog=3, step=0.6
    ).eval()
    x, log_weight, log_q = objective.anneal(40_000)
    weight = (log_weight.double() - square_over_normal(1.3)).exp()
    z = (weight.mean() - 1) / weight.std() * math.sqrt(len(weight))
    assert 2 * stats.norm.sf(abs(z.item())) > 1e-4
    assert torch.allclose(log_q, objective.flow().log_prob(x), atol=1e-5)


def test_annealing_quiets_the_weights():
    flow, spread = untrained(2.5), []
    for intermediate in (0, 8):
        objective = AnnealedBootstrap(
            flow, TARGET.log_prob, intermediate=intermediate, leapfrog=5, step=0.4
        )
        _, log_weight, _ = objective.eval().anneal(4000)
        spread.append(effective_sample_size(log_weight).item())
    assert spread[1] > 1.5 * spread[0]


def test_without_densities_between_it_is_the_estimate_by_squared_weights():
    flow = shaken(untrained(1.3, torch.float64))
    target = dist.Normal(torch.zeros(2, dtype=torch.float64), 0.7).to_event(1)
    objective = AnnealedBootstrap(flow, target.log_prob, draws=50, intermediate=0)
    pyro.set_rng_seed(3)
    loss = objective()
    pyro.set_rng_seed(3)
    x = flow().sample((50,))
    log_w = target.log_prob(x) - flow().log_prob(x)
    expected = (2 * log_w).logsumexp(0) - math.log(50)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-10)
    share = (2 * log_w).softmax(0).detach()
    surrogate = -(share * flow().log_prob(x)).sum()
    parameters = list(flow.parameters())
    for one, other in zip(
        torch.autograd.grad(loss, parameters),
        torch.autograd.grad(surrogate, parameters),
        strict=True,
    ):
        assert torch.allclose(one, other, atol=1e-10)


@pytest.mark.parametrize("intermediate", [0, 2])
def test_loss_and_gradient_are_those_of_the_divergence(intermediate):
    """Gradient in the flow's scale by its closed form, 40 batches; one seed in 5000 fails."""
    flow = untrained(1.3)
    flow.layers = nn.ModuleList([Scale()])
    objective = AnnealedBootstrap(
        flow, TARGET.log_prob, draws=5000, intermediate=intermediate, leapfrog=3, step=0.6
    ).eval()
    values = []
    for _ in range(40):
        loss = objective()
        (gradient,) = torch.autograd.grad(loss, flow.layers[0].log_scale)
        values.append((loss.item(), gradient.item()))
    loss, gradient = torch.tensor(values).T
    h = 1e-4
    slope = (square_over_normal(1.3 * math.exp(h)) - square_over_normal(1.3 * math.exp(-h))) / (
        2 * h
    )
    for estimate, exact in ((loss, square_over_normal(1.3)), (gradient, slope)):
        z = (estimate.mean() - exact) / estimate.std() * math.sqrt(len(estimate))
        assert 2 * stats.norm.sf(abs(z.item())) > 1e-4


class Scale(nn.Module):
    """One learned scale of all features."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, context=None):
        return dist.transforms.IndependentTransform(
            torch.distributions.AffineTransform(0.0, self.log_scale.exp()), 1
        )


def test_replayed_weights_follow_the_flow():
    """After the flow has moved, the kept weights still integrate p^2 / q; one in 10,000 fails."""
    flow = untrained(1.3)
    replay = Replay(capacity=40_000, reuse=1000, fill=1)
    objective = AnnealedBootstrap(
        flow, TARGET.log_prob, draws=40_000, leapfrog=3, step=0.6, replay=replay
    )
    objective()
    assert len(replay) == 40_000
    flow.scale.fill_(1.1)
    index = torch.arange(40_000)
    replay.correct(index, flow().log_prob(replay.kept["x"]).detach())
    weight = (replay.kept["log_weight"].double() - square_over_normal(1.1)).exp()
    z = (weight.mean() - 1) / weight.std() * math.sqrt(len(weight))
    assert 2 * stats.norm.sf(abs(z.item())) > 1e-4


def test_replayed_loss_is_that_of_the_moved_flow():
    """Mean over 30 choices within five standard errors, from one large batch."""
    flow = untrained(1.3)
    replay = Replay(capacity=100_000, reuse=1000, fill=1)
    objective = AnnealedBootstrap(
        flow, TARGET.log_prob, draws=100_000, leapfrog=3, step=0.6, replay=replay
    )
    objective()
    objective.draws = 2000
    kept = dict(replay.kept)
    flow.scale.fill_(1.1)
    losses = []
    for _ in range(30):
        replay.kept = kept
        losses.append(objective().item())
    losses = torch.tensor(losses)
    assert losses.mean() == pytest.approx(square_over_normal(1.1), abs=0.03)


def test_repeated_draws_are_corrected_once():
    replay = Replay(capacity=10)
    replay.add(torch.zeros(3, 2), torch.tensor([0.0, 1.0, 2.0]), torch.zeros(3))
    replay.correct(torch.tensor([1, 1, 2]), torch.tensor([0.5, 0.5, -1.0]))
    assert replay.kept["log_weight"].tolist() == [0.0, 0.5, 3.0]
    assert replay.kept["log_q"].tolist() == [0.0, 0.5, -1.0]


def test_draws_are_chosen_by_weight_and_the_oldest_leave():
    replay = Replay(capacity=4)
    weight = torch.tensor([0.1, 0.2, 0.7])
    replay.add(torch.zeros(3, 2), weight.log(), torch.zeros(3))
    counts = torch.bincount(replay.choose(10_000), minlength=3)
    assert stats.chisquare(counts.numpy(), (10_000 * weight).numpy()).pvalue > 1e-4
    replay.add(torch.ones(2, 2), torch.zeros(2), torch.zeros(2))
    assert len(replay) == 4
    assert replay.kept["x"][:, 0].tolist() == [0.0, 0.0, 1.0, 1.0]


def test_annealed_batches_come_when_due():
    calls = []

    def density(x):
        calls.append(len(x))
        return TARGET.log_prob(x)

    objective = AnnealedBootstrap(
        untrained(), density, draws=16, intermediate=0, replay=Replay(reuse=3, fill=2)
    )
    seen = []
    for _ in range(7):
        objective()
        seen.append(len(calls))
    assert seen == [2, 2, 2, 3, 3, 3, 4]
    assert len(objective.replay) == 16 * 4


# As an objective


def test_state_is_saved_and_training_resumes():
    def build():
        pyro.set_rng_seed(1)
        flow = untrained()
        return AnnealedBootstrap(flow, TARGET.log_prob, draws=32, replay=Replay(reuse=3, fill=2))

    first = build()
    trainer = Trainer(first, torch.optim.Adam(first.parameters(), 1e-2))
    trainer.fit([()], steps=5, progress=False)
    assert first.steps != [0.1]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = build()
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.steps == first.steps
    losses = []
    for objective in (first, second):
        pyro.set_rng_seed(7)
        losses.append([objective().item() for _ in range(5)])
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match="intermediate=2, and the state is of 1"):
        AnnealedBootstrap(untrained(), TARGET.log_prob, intermediate=2).load_state_dict(
            AnnealedBootstrap(untrained(), TARGET.log_prob).state_dict()
        )


def test_evaluation_changes_nothing():
    objective = AnnealedBootstrap(untrained(), TARGET.log_prob, draws=32, replay=Replay(fill=1))
    objective()
    before = objective.state_dict()
    objective.eval()
    with torch.no_grad():
        assert objective().isfinite()
    after = objective.state_dict()
    assert after["_extra_state"] == before["_extra_state"]
    old, new = before["replay._extra_state"], after["replay._extra_state"]
    assert old["age"] == new["age"]
    assert all(torch.equal(old["kept"][k], new["kept"][k]) for k in old["kept"])


@pytest.mark.parametrize("replay", [None, Replay(fill=1)], ids=["fresh", "replayed"])
def test_loss_is_a_scalar_with_gradients(replay):
    objective = AnnealedBootstrap(untrained(), TARGET.log_prob, draws=16, replay=replay)
    assert objective().shape == ()
    assert objective().isfinite()
    loss_gives_gradients(objective)


def test_precision_follows_the_flow():
    target = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1)
    objective = AnnealedBootstrap(
        untrained(dtype=torch.float64), target.log_prob, draws=16, replay=Replay(fill=1)
    )
    assert objective().dtype == torch.float64
    assert all(t.dtype == torch.float64 for t in objective.replay.kept.values())


def test_a_pyro_model_is_learned_through_its_guide():
    """The evidence of eight schools, by importance weights of the flow that was learned."""
    model = EightSchools().non_centred
    guide = AutoFlow(model, partial(realnvp, layers=4, hidden=(16,))).setup()
    objective = AnnealedBootstrap(guide.flow, guide.log_density(), draws=64, replay=Replay())
    trainer = Trainer(objective, torch.optim.Adam(guide.parameters(), 5e-3), clip=10.0)
    trainer.fit([()], steps=250, progress=False)
    with torch.no_grad():
        u, log_q = guide.flow().rsample_and_log_prob((4000,))
        log_weight = guide.log_density()(u) - log_q
    evidence = log_weight.logsumexp(0).item() - math.log(4000)
    assert evidence == pytest.approx(EightSchools().log_evidence(), abs=0.1)
    assert effective_sample_size(log_weight) > 1000


def learned(target, objective, flow, steps):
    flow.scale.fill_(12.0)
    trainer = Trainer(objective, torch.optim.Adam(flow.parameters(), 2e-3), clip=10.0)
    trainer.fit([()], steps=steps, progress=False)
    with torch.no_grad():
        x = flow().sample((4000,))
        distance = torch.cdist(x, target.means)
        near = distance.argmin(1)[distance.amin(1) < 4.0]
        found = int((torch.bincount(near, minlength=len(target.means)) > 20).sum())
        y = target.sample((2000,))
        divergence = (target.log_prob(y) - flow().log_prob(y)).mean().item()
    return found, divergence


class ReverseKL(nn.Module):
    def __init__(self, flow, log_density):
        super().__init__()
        self.flow = flow
        self.log_density = log_density

    def forward(self):
        x, log_q = self.flow().rsample_and_log_prob((128,))
        return (log_q - self.log_density(x)).mean()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_modes_are_kept_that_reverse_kl_drops(seed):
    generator = torch.Generator().manual_seed(seed)
    means = 40 * torch.rand(8, 2, generator=generator) - 20
    target = GaussianMixture(means, torch.eye(2).expand(8, 2, 2))
    results = []
    for kind in ("annealed", "reverse"):
        pyro.set_rng_seed(seed)
        flow = nsf(2, layers=6)
        objective = (
            AnnealedBootstrap(flow, target.log_prob, step=1.0, replay=Replay())
            if kind == "annealed"
            else ReverseKL(flow, target.log_prob)
        )
        results.append(learned(target, objective, flow, 400 if kind == "annealed" else 1000))
    (kept, forward), (dropped, worse) = results
    assert kept == 8
    assert forward < 0.6 < worse
    assert dropped < 8


# Doors


def test_what_does_not_fit_is_refused():
    log_prob = TARGET.log_prob
    with pytest.raises(TypeError, match="expected a Flow, got Linear"):
        AnnealedBootstrap(nn.Linear(2, 2), log_prob)
    with pytest.raises(ValueError, match="real vectors without context"):
        AnnealedBootstrap(small(2, context=1), log_prob)
    with pytest.raises(ValueError, match="real vectors without context"):
        AnnealedBootstrap(small(2, support=dist.constraints.positive), log_prob)
    for wrong in ({"draws": 0}, {"intermediate": -1}, {"leapfrog": 0}, {"step": math.inf}):
        with pytest.raises(ValueError, match="expected draws >= 1, intermediate >= 0"):
            AnnealedBootstrap(untrained(), log_prob, **wrong)
    for wrong in ({"capacity": 0}, {"reuse": 0}, {"fill": 0}):
        with pytest.raises(ValueError, match="Replay expected positive numbers"):
            Replay(**wrong)


@pytest.mark.parametrize(
    ("density", "error", "message"),
    [
        (lambda x: x.sum(-1).sqrt(), FloatingPointError, "NaN or infinity at a draw"),
        (lambda x: x.sum(-1) * 0 - torch.inf, FloatingPointError, "no draw of the flow that"),
        (lambda x: x, ValueError, "expected one log-density a draw"),
        (lambda x: x.detach().sum(-1), ValueError, "has no gradient"),
    ],
)
def test_a_density_that_cannot_be_learned_is_refused(density, error, message):
    with pytest.raises(error, match=message):
        AnnealedBootstrap(untrained(), density)()
