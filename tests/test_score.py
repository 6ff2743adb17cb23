import pytest
import torch
from torch import nn
from torch.distributions import LogNormal, Uniform

from pyrogen.distributions import Denoiser, Diffusion, ExactDenoiser
from pyrogen.nets import ResidualMLP
from pyrogen.objectives import DenoisingScore, UniformTime, edm_weight
from pyrogen.paths import EDM, OU, VP, Linear
from pyrogen.targets import GaussianMixture

SIGMA = 0.5
TARGET = GaussianMixture(
    torch.tensor([[1.0, 0.0], [-1.0, 0.5]]),
    torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.1, 0.0], [0.0, 0.4]]]),
    torch.tensor([0.3, 0.7]),
).to(torch.float64)


class Affine(Denoiser):
    """D(x) = A x + b, whatever the noise."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x_t, sigma, context):
        return self.linear(x_t)


def at_one_level(denoiser, weight=edm_weight):
    noise = Uniform(SIGMA - 1e-6, SIGMA + 1e-6)
    return DenoisingScore(Diffusion(denoiser, (2,)).double(), noise=noise, weight=weight)


def explicit(denoiser, x, weight=edm_weight):
    """The squared error of the score itself, which only an oracle can tell."""
    sigma = torch.tensor(SIGMA).double()
    x_t = x + SIGMA * torch.randn_like(x)
    score = (denoiser(x_t, sigma.expand(len(x)), None) - x_t) / SIGMA**2
    error = score - TARGET.score(x_t, sigma=sigma)
    return (weight(sigma) * SIGMA**4 * error.square()).mean(), x_t


def test_denoising_loss_is_the_explicit_one_up_to_a_constant():
    """E|s - grad log p(x_t|x)|^2 - E|s - grad log p(x_t)|^2 = d/sigma^2 - E|grad log p|^2."""
    n, sigma = 200_000, torch.tensor(SIGMA).double()
    x = TARGET.sample((n,))
    gaps = []
    for scale in (0.0, 0.5, 2.0):
        denoiser = ExactDenoiser(lambda x, s, c, scale=scale: scale * torch.tanh(x))
        loss = at_one_level(denoiser, weight=lambda s: 2 / s**4)(x)  # 2 is the dimension
        score_error, x_t = explicit(denoiser, x, weight=lambda s: 2 / s**4)
        gaps.append((loss - score_error).item())
    constant = 2 / SIGMA**2 - TARGET.score(x_t, sigma=sigma).square().sum(-1).mean().item()
    assert gaps == pytest.approx([constant] * 3, abs=0.1)  # about four standard errors


def test_gradients_are_equal_in_expectation():
    x, affine = TARGET.sample((200_000,)), Affine().double()
    denoising = torch.autograd.grad(at_one_level(affine)(x), list(affine.parameters()))
    exact = torch.autograd.grad(explicit(affine, x)[0], list(affine.parameters()))
    for a, b in zip(denoising, exact, strict=True):
        assert torch.allclose(a, b, atol=0.02)
        assert a.abs().max() > 0.2


def test_minimiser_is_the_exact_denoiser_of_a_gaussian():
    """Weighted least squares: D(x) = m + S (S + sigma^2)^-1 (x - m)."""
    covariance = torch.tensor([[0.5, 0.3], [0.3, 0.8]]).double()
    target = GaussianMixture(torch.tensor([[1.0, -1.0]]).double(), covariance[None])
    affine = Affine().double()
    objective = at_one_level(affine)
    optimizer = torch.optim.LBFGS(affine.parameters(), line_search_fn="strong_wolfe")
    x = target.sample((100_000,))

    def closure():
        torch.manual_seed(1)  # the same noise at every call: a deterministic problem
        optimizer.zero_grad()
        loss = objective(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    gain = torch.linalg.solve(covariance + SIGMA**2 * torch.eye(2), covariance).T
    bias = target.means[0] - gain @ target.means[0]
    assert torch.allclose(affine.linear.weight, gain, atol=0.01)
    assert torch.allclose(affine.linear.bias, bias, atol=0.01)


def test_exact_denoiser_beats_its_neighbours():
    x = TARGET.sample((20_000,))

    def loss(shrink):
        torch.manual_seed(1)
        denoiser = ExactDenoiser(lambda x, s, c: shrink * TARGET.denoise(x, s))
        return DenoisingScore(Diffusion(denoiser, (2,)).double())(x).item()

    assert loss(1.0) < min(loss(0.95), loss(1.05))


def test_loss_is_one_before_training():
    """At every level the network's target has unit variance, for data of unit variance."""
    x = torch.randn(20_000, 3)
    for mean in (-4.0, 0.0, 3.0):
        diffusion = Diffusion(ResidualMLP(3, hidden=8, blocks=1), (3,))
        loss = DenoisingScore(diffusion, noise=LogNormal(mean, 0.1))(x)
        assert loss.item() == pytest.approx(1.0, abs=0.03)


def test_units_of_the_data_do_not_matter():
    x = TARGET.sample((1000,))
    losses = []
    for shift, scale in [(0.0, 1.0), (5.0, 0.01)]:
        torch.manual_seed(0)
        diffusion = Diffusion(ResidualMLP(2), (2,)).double()
        diffusion.standardize(shift + scale * x)
        losses.append(DenoisingScore(diffusion)(shift + scale * x).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_noise_levels_are_stratified():
    seen = []

    def record(x_t, sigma, context):
        seen.append(sigma)
        return x_t

    x = torch.randn(8, 8, 2)
    DenoisingScore(Diffusion(ExactDenoiser(record), (2,)))(x)
    quantiles = LogNormal(-1.2, 1.2).cdf(seen[0])
    assert torch.equal((64 * quantiles).long().sort().values, torch.arange(64))
    assert not torch.equal((64 * quantiles).long(), torch.arange(64))  # no order over the batch


@pytest.mark.parametrize("path", [Linear(), VP()])
def test_uniform_time_is_uniform_on_the_path(path):
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    levels = UniformTime(path, low=0.01, high=50.0)
    times = path.time(levels.icdf(u))
    ends = path.time(torch.tensor([0.01, 50.0]).double())
    assert torch.allclose(times, ends[0] + (ends[1] - ends[0]) * u)
    assert DenoisingScore(Diffusion(ResidualMLP(2), (2,)), noise=levels)(torch.randn(9, 2)) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_parameter_gets_a_gradient(dtype):
    diffusion = Diffusion(ResidualMLP(2, context=3), (2,), context=3).to(dtype)
    nn.init.normal_(diffusion.denoiser.net.last.weight)  # at zero it stops the gradient below it
    loss = DenoisingScore(diffusion)(
        torch.randn(7, 2, dtype=dtype), torch.randn(7, 3, dtype=dtype)
    )
    loss.backward()
    assert loss.dtype == dtype
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in diffusion.parameters())


def test_training_reaches_the_entropy_of_a_gaussian():
    """Two hundred steps on correlated normals: the density is right within 0.05 nats."""
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    truth = torch.distributions.MultivariateNormal(torch.zeros(2), covariance)
    diffusion = Diffusion(ResidualMLP(2, hidden=32, blocks=1), (2,), steps=24)
    diffusion.standardize(truth.sample((2000,)))
    objective = DenoisingScore(diffusion)
    optimizer = torch.optim.Adam(objective.parameters(), lr=5e-3)
    for _ in range(200):
        optimizer.zero_grad()
        objective(truth.sample((256,))).backward()
        optimizer.step()
    x = truth.sample((300,))
    with torch.no_grad():
        gap = truth.log_prob(x) - diffusion().log_prob(x)
    assert abs(gap.mean().item()) < 0.05


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            (torch.zeros(4, 3),),
            ValueError,
            r"DenoisingScore expected a batch of shape \(\*batch, 2",
        ),
        ((torch.zeros(0, 2),), ValueError, r"needs at least 1 data, got 0"),
        ((torch.full((4, 2), float("nan")),), ValueError, r"finite data, got 8 NaN"),
        (
            (torch.zeros(4, 2, dtype=torch.long),),
            TypeError,
            r"floating-point data, got torch.int64",
        ),
        (
            (torch.zeros(4, 2).double(),),
            ValueError,
            r"holds torch.float32, got data of torch.float64",
        ),
        ((torch.zeros(4, 2), torch.zeros(4, 1)), ValueError, r"built with context=0, got 1"),
    ],
)
def test_bad_batches_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        DenoisingScore(Diffusion(ResidualMLP(2), (2,)))(*arguments)


@pytest.mark.parametrize("context", [None, torch.zeros(4, 2)])
def test_wrong_context_is_refused(context):
    objective = DenoisingScore(Diffusion(ResidualMLP(2, context=3), (2,), context=3))
    with pytest.raises(ValueError, match=r"DenoisingScore was built with context=3, got [02]"):
        objective(torch.zeros(4, 2), context)


def test_one_context_for_many_data_is_refused():
    objective = DenoisingScore(Diffusion(ResidualMLP(2, context=3), (2,), context=3))
    with pytest.raises(ValueError, match=r"one context per datum, got \(1, 3\)"):
        objective(torch.zeros(4, 2), torch.zeros(1, 3))


@pytest.mark.parametrize("path", [EDM(10.0), VP(1.0, 0.1), OU()], ids=str)
def test_times_end_where_the_path_ends(path):
    sigma = UniformTime(path).icdf(torch.tensor([0.5, 1.0]))
    assert sigma.isfinite().all()
    assert sigma[-1] <= path.ratio(torch.ones(())) * (1 + 1e-4)
