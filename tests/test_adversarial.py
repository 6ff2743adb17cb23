"""Games: losses, gradients, penalties, and dynamics with known answers."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from pyrogen.distributions import Generator, Pushforward
from pyrogen.objectives import (
    CriticLoss,
    Game,
    GeneratorLoss,
    NonSaturating,
    Relativistic,
    ZeroCentred,
)
from pyrogen.training import AdversarialTrainer, Trainer

GAMES = [Relativistic(), NonSaturating()]


class Joint(nn.Module):
    """Critic of pairs (x, context)."""

    def __init__(self, features=2, context=3):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(features + context, 8), nn.SiLU(), nn.Linear(8, 1))

    def forward(self, x, context):
        return self.net(torch.cat([x, context], -1)).squeeze(-1)


def players(dtype=torch.float32):
    generator = Generator(nn.Linear(3, 2), 3, (2,)).to(dtype)
    critic = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 1)).to(dtype)
    return generator, critic


# Losses


def test_losses_are_those_of_the_formulas():
    real, fake = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([0.3, 4.0, -1.0]).double()
    sigmoid = torch.sigmoid
    r, ns = Relativistic(), NonSaturating()
    assert torch.allclose(r.critic(real, fake), -sigmoid(real - fake).log().mean())
    assert torch.allclose(r.generator(real, fake), -sigmoid(fake - real).log().mean())
    expected = -sigmoid(real).log().mean() - (1 - sigmoid(fake)).log().mean()
    assert torch.allclose(ns.critic(real, fake), expected)
    assert torch.allclose(ns.generator(real, fake), -sigmoid(fake).log().mean())


@pytest.mark.parametrize("game", GAMES)
@pytest.mark.parametrize("logit", [-30.0, -90.0])
def test_generator_never_saturates(game, logit):
    fake = torch.tensor([logit], requires_grad=True)
    game.generator(torch.zeros(1), fake).backward()
    assert fake.grad.item() == pytest.approx(-1.0)


@pytest.mark.parametrize("game", GAMES)
def test_a_confident_critic_has_a_finite_loss(game):
    huge = torch.tensor([1e4])
    assert game.critic(-huge, huge).isfinite()
    assert game.critic(huge, -huge).item() == 0.0


@pytest.mark.parametrize("game", GAMES)
def test_the_modules_evaluate_their_game(game):
    generator, critic = players(torch.double)
    x = torch.randn(16, 2).double()
    torch.manual_seed(3)
    fake = generator().expand((16,)).sample()
    real_logits, fake_logits = critic(x).squeeze(-1), critic(fake).squeeze(-1)
    torch.manual_seed(3)
    assert torch.allclose(
        CriticLoss(generator, critic, game=game)(x), game.critic(real_logits, fake_logits)
    )
    torch.manual_seed(3)
    assert torch.allclose(
        GeneratorLoss(generator, critic, game=game)(x), game.generator(real_logits, fake_logits)
    )


def test_a_game_sees_one_logit_for_each_datum():
    class Spy(Relativistic):
        def critic(self, real, fake):
            assert real.shape == fake.shape == (8,)
            return super().critic(real, fake)

        def generator(self, real, fake):
            assert real.shape == fake.shape == (8,)
            return super().generator(real, fake)

    for loss in (GeneratorLoss, CriticLoss):
        loss(*players(), game=Spy())(torch.randn(8, 2))  # the critic returns (8, 1)


# Optimal critics, on three points where everything is a sum


@pytest.mark.parametrize("game", GAMES)
def test_the_best_critic_is_the_log_ratio(game):
    p, q = torch.tensor([0.5, 0.3, 0.2]).double(), torch.tensor([0.2, 0.2, 0.6]).double()
    logits = torch.zeros(3, dtype=torch.double, requires_grad=True)
    pairs = [(i, j) for i in range(3) for j in range(3)]

    def loss():  # expectation over all pairs of a datum and a draw
        parts = [p[i] * q[j] * game.critic(logits[i : i + 1], logits[j : j + 1]) for i, j in pairs]
        return torch.stack(parts).sum()

    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    error = logits.detach() - (p / q).log()
    if isinstance(game, Relativistic):
        error = error - error.mean()  # known up to a constant
    assert error.abs().max() < 1e-4


# Penalty


@pytest.mark.parametrize("batch", [1, 2, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_penalty_of_a_linear_critic_is_exact_for_any_batch(batch, dtype):
    critic = nn.Linear(3, 1).to(dtype)
    x = torch.randn(batch, 3, dtype=dtype, requires_grad=True)
    penalty = ZeroCentred(7.0)(critic(x), x)
    assert penalty.dtype == dtype
    assert torch.allclose(penalty, 7.0 / 2 * critic.weight.square().sum())
    penalty.backward()
    assert torch.allclose(critic.weight.grad, 7.0 * critic.weight)


def test_penalty_sums_over_all_axes_of_a_datum():
    critic = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 1)).double()
    x = torch.randn(5, 2, 3, 3, dtype=torch.double, requires_grad=True)
    slopes = torch.stack(
        [torch.autograd.functional.jacobian(lambda v: critic(v).sum(), one[None]) for one in x]
    )
    expected = 4.0 / 2 * slopes.flatten(1).square().sum(1).mean()
    assert torch.allclose(ZeroCentred(4.0)(critic(x), x), expected)


def test_penalty_does_not_change_with_the_units():
    critic, unit = nn.Linear(3, 1), torch.tensor([10.0, 0.1, 3.0])
    x = torch.randn(6, 3, requires_grad=True)
    y = (x.detach() * unit).requires_grad_()
    plain = ZeroCentred(2.0)(critic(x), x)
    scaled = ZeroCentred(2.0, scale=unit)(critic(y / unit), y)
    assert torch.allclose(plain, scaled)


def test_critic_loss_adds_the_penalty_at_data_and_at_draws():
    generator, critic = Generator(nn.Linear(3, 2), 3, (2,)), nn.Linear(2, 1)
    x = torch.randn(8, 2)
    torch.manual_seed(1)
    plain = CriticLoss(generator, critic)(x)
    torch.manual_seed(1)
    penalized = CriticLoss(generator, critic, penalty=ZeroCentred(3.0))(x)
    assert torch.allclose(penalized - plain, 3.0 * critic.weight.square().sum(), atol=1e-5)


def test_a_flat_critic_has_no_penalty():
    x = torch.randn(4, 2, requires_grad=True)
    assert ZeroCentred()(torch.zeros(4) + nn.Parameter(torch.ones(())), x).item() == 0.0


def test_critic_loss_can_be_looked_at_without_gradients():
    generator, critic = players()
    with torch.no_grad():
        loss = CriticLoss(generator, critic, penalty=ZeroCentred(1.0))(torch.randn(4, 2))
        assert not torch.is_grad_enabled()
    assert loss.isfinite()


# No leaks


@pytest.mark.parametrize("game", GAMES)
def test_no_gradient_leaks_to_the_other_player(game):
    generator, critic = players()
    x = torch.randn(8, 2)
    CriticLoss(generator, critic, game=game, penalty=ZeroCentred(1.0))(x).backward()
    assert all(p.grad is None for p in generator.parameters())
    # The last bias cancels in a relativistic game.
    assert all(p.grad is not None for p in critic[0].parameters())
    critic.zero_grad()
    GeneratorLoss(generator, critic, game=game)(x).backward()
    assert all(p.grad is None for p in critic.parameters())
    assert all(p.grad is not None for p in generator.parameters())
    assert all(p.requires_grad for p in critic.parameters())
    assert x.grad is None
    assert not x.requires_grad


def test_generator_gradient_passes_through_the_critic():
    generator, critic = players(torch.double)
    x = torch.randn(8, 2).double()
    torch.manual_seed(1)
    GeneratorLoss(generator, critic)(x).backward()
    got = generator.net.weight.grad.clone()
    generator.zero_grad()
    torch.manual_seed(1)
    fake = generator().expand((8,)).rsample()
    softplus(critic(x) - critic(fake)).mean().backward()
    assert torch.allclose(got, generator.net.weight.grad)


def test_spectral_norm_and_dropout_critics_work():
    critic = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(2, 4)), nn.Dropout(), nn.Linear(4, 1)
    )
    generator = Generator(nn.Linear(3, 2), 3, (2,))
    x = torch.randn(8, 2)
    GeneratorLoss(generator, critic)(x).backward()
    CriticLoss(generator, critic, penalty=ZeroCentred())(x).backward()
    assert critic[2].weight.grad is not None


# Conditional games, and any distribution


def test_draws_are_paired_with_their_context():
    seen = []

    class Spy(Joint):
        def forward(self, x, context):
            seen.append((x.detach(), context))
            return super().forward(x, context)

    class Echo(nn.Module):  # a draw is its context
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(()))

        def forward(self, z):
            return self.w * z[..., 1:3] + 0 * z[..., :1]

    generator = Generator(Echo(), 1, (2,), context=3)
    x, context = torch.randn(6, 2), torch.randn(6, 3)
    for loss in (GeneratorLoss(generator, Spy()), CriticLoss(generator, Spy())):
        seen.clear()
        loss(x, context).backward()
        (real, c), (fake, d) = seen
        assert torch.equal(real, x)
        assert torch.allclose(fake, context[:, :2])
        assert torch.equal(c, context)
        assert torch.equal(d, context)


def test_any_reparameterized_distribution_can_play():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(2))

        def forward(self, context=None):
            return dist.Normal(self.loc, 1.0).to_event(1)

    shifted = Shifted()
    GeneratorLoss(shifted, nn.Linear(2, 1))(torch.randn(4, 2)).backward()
    assert shifted.loc.grad is not None


# Dynamics


class Point(nn.Module):
    """A generator whose only draw is theta."""

    def __init__(self, theta):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([theta], dtype=torch.double))
        self.register_buffer("zero", torch.zeros(1, dtype=torch.double))

    def forward(self, context=None):
        noise = dist.Normal(self.zero, 1.0).to_event(1)
        return Pushforward(lambda z: self.theta.expand(z.shape), noise, (1,))


class Minimax(Game):
    """The zero-sum game, as a user would write it."""

    def critic(self, real, fake):
        return softplus(-real).mean() + softplus(fake).mean()

    def generator(self, real, fake):
        return -self.critic(real, fake)


def dirac(game, gamma, psi=-1.0):
    generator, critic = Point(1.0), nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(critic.weight, psi)
    penalty = None if gamma is None else ZeroCentred(gamma)
    return (
        Trainer(
            GeneratorLoss(generator, critic, game=game),
            torch.optim.SGD(generator.parameters(), 0.2),
        ),
        Trainer(
            CriticLoss(generator, critic, game=game, penalty=penalty),
            torch.optim.SGD(critic.parameters(), 0.2),
        ),
    )


def norm(generator, critic):
    theta, psi = generator.objective.generator.theta, critic.objective.critic.weight
    return math.hypot(theta.item(), psi.item())


@pytest.mark.parametrize(
    ("game", "gamma", "expected"),
    [
        (Minimax(), None, 1.421),  # an orbit
        (NonSaturating(), None, 0.284),  # slow
        (Minimax(), 0.15, 2.3e-7),  # R1 + R2: twice the slope's penalty, as R1 of 0.3
        (NonSaturating(), 0.15, 1.5e-7),
    ],
    ids=["minimax", "nonsaturating", "minimax-penalty", "nonsaturating-penalty"],
)
def test_dirac_gan_moves_as_published(game, gamma, expected):
    """Mescheder et al. 2018: data at 0, one draw at theta, critic psi x, h = 0.2, 500 steps."""
    generator, critic = dirac(game, gamma)
    x = torch.zeros(1, 1, dtype=torch.double)
    for _ in range(500):  # the authors alternate in this order
        generator.step(x)
        critic.step(x)
    assert norm(generator, critic) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("critic_steps", [1, 2])
@pytest.mark.parametrize("gamma", [0.05, 0.25])
def test_relativistic_dirac_gan_follows_its_recursion(gamma, critic_steps):
    trainer = AdversarialTrainer(*dirac(Relativistic(), gamma), critic_steps=critic_steps)
    trainer.fit([torch.zeros(1, 1, dtype=torch.double)], steps=200, progress=False)

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    theta, psi = 1.0, -1.0
    for _ in range(200):
        for _ in range(critic_steps):
            psi -= 0.2 * (theta * sigmoid(psi * theta) + 2 * gamma * psi)
        theta -= 0.2 * -psi * sigmoid(-psi * theta)
    assert trainer.generator.objective.generator.theta.item() == pytest.approx(theta, rel=1e-9)
    assert trainer.critic.objective.critic.weight.item() == pytest.approx(psi, rel=1e-9)


def test_penalty_makes_the_relativistic_game_converge():
    ends = {}
    for gamma in (None, 0.15):
        generator, critic = dirac(Relativistic(), gamma)
        for _ in range(500):
            critic.step(torch.zeros(1, 1, dtype=torch.double))
            generator.step(torch.zeros(1, 1, dtype=torch.double))
        ends[gamma] = norm(generator, critic)
    assert ends[None] > 0.2
    assert ends[0.15] < 1e-6


def test_a_linear_gan_learns_a_gaussian():
    x = torch.tensor([2.0, -1.0]) + torch.randn(4000, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])
    generator = Generator(nn.Linear(2, 2), 2, (2,))

    class Quadratic(nn.Module):  # the log-ratio of two Gaussians is quadratic
        def __init__(self):
            super().__init__()
            self.out = nn.Linear(5, 1)

        def forward(self, x):
            a, b = x.unbind(-1)
            return self.out(torch.stack([a, b, a * a, a * b, b * b], -1))

    critic = Quadratic()

    def trainer(objective, module):
        optimizer = torch.optim.Adam(module.parameters(), 0.01, betas=(0.0, 0.99))
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
        return Trainer(objective, optimizer, schedule=cosine)

    AdversarialTrainer(
        trainer(GeneratorLoss(generator, critic), generator),
        trainer(CriticLoss(generator, critic, penalty=ZeroCentred(0.1)), critic),
    ).fit([x[i : i + 400] for i in range(0, 4000, 400)], steps=1500, progress=False)
    w, b = generator.net.weight.detach(), generator.net.bias.detach()
    assert torch.allclose(b, x.mean(0), atol=0.1)
    assert torch.allclose(w @ w.T, x.T.cov(), atol=0.15)


# Doors


@pytest.mark.parametrize("loss", [GeneratorLoss, CriticLoss])
@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (torch.full((4, 2), torch.nan), ValueError, "finite"),
        (torch.zeros(4, 3), ValueError, r"\(\*batch, 2\)"),
        (torch.zeros(4, 2).long(), TypeError, "floating-point"),
        (torch.zeros(4, 2).double(), ValueError, "holds torch.float32"),
        (torch.zeros(0, 2), ValueError, "at least 1"),
        ([0.0], TypeError, "expected a tensor"),
    ],
)
def test_bad_data_are_refused(loss, x, error, match):
    with pytest.raises(error, match=f"{loss.__name__} .*{match}"):
        loss(*players())(x)


@pytest.mark.parametrize("loss", [GeneratorLoss, CriticLoss])
def test_one_context_for_each_datum(loss):
    generator = Generator(nn.Linear(4, 2), 1, (2,), context=3)
    with pytest.raises(ValueError, match="one context for each datum"):
        loss(generator, Joint())(torch.zeros(4, 2), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="built with context=3, got 0"):
        loss(generator, Joint())(torch.zeros(4, 2))


@pytest.mark.parametrize("loss", [GeneratorLoss, CriticLoss])
def test_critic_must_return_one_number_for_each_datum(loss):
    generator, _ = players()
    for critic in (
        nn.Linear(2, 2),
        nn.Sequential(nn.Linear(2, 1), nn.Flatten(0, 0), nn.Flatten(0)),
    ):
        if isinstance(critic, nn.Sequential):
            loss(generator, critic)(torch.zeros(4, 2))  # (batch,) is fine
            continue
        with pytest.raises(ValueError, match=r"logits of shape \(4, 2\)"):
            loss(generator, critic)(torch.zeros(4, 2))


def test_draws_without_gradient_cannot_learn():
    class Coins(nn.Module):
        def forward(self, context=None):
            return dist.Bernoulli(torch.full((2,), 0.5)).to_event(1)

    with pytest.raises(NotImplementedError, match="has no rsample"):
        GeneratorLoss(Coins(), nn.Linear(2, 1))(torch.zeros(4, 2))


def test_penalty_arguments_are_checked():
    with pytest.raises(ValueError, match="weight >= 0"):
        ZeroCentred(-1.0)
    with pytest.raises(ValueError, match=r"x.requires_grad_\(\)"):
        ZeroCentred()(torch.zeros(3), torch.zeros(3, 2))
