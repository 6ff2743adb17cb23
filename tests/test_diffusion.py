import io
import math

import pyro
import pytest
import torch
from scipy.stats import norm
from torch import nn

from pyrogen.distributions import (
    Ancestral,
    Diffusion,
    ExactDenoiser,
    FrozenScore,
    Heun,
    Multistep,
)
from pyrogen.nets import ResidualMLP
from pyrogen.paths import EDM, OU, VP, Cosine, Linear
from pyrogen.targets import GaussianMixture
from pyrogen.transforms import ExactTrace, Hutchinson

LOW = 2e-3
RING = GaussianMixture.ring().to(torch.float64)


def exact(target=RING, event_shape=(2,), **options):
    """A diffusion that knows the truth."""
    return Diffusion(ExactDenoiser(target.denoise), event_shape, **options).double()


def random_net(features=2, context=0, **options):
    """An untrained network whose last layer is not zero."""
    net = ResidualMLP(features, context, hidden=16, blocks=2, **options)
    nn.init.normal_(net.last.weight, std=0.2)
    return net


# Density -------------------------------------------------------------------------------------


def test_density_is_that_of_the_mixture():
    x = RING.sample((500,))
    log_prob, error = exact()().log_prob_and_error(x)
    assert (log_prob - RING.log_prob(x)).mean().abs() < 1e-3
    assert (log_prob - RING.log_prob(x, sigma=LOW)).abs().max() < 5e-3  # the worst of 500
    assert (error == 0).all()


def test_density_of_an_uneven_mixture_in_three_dimensions():
    root = torch.randn(2, 3, 3, dtype=torch.float64)
    target = GaussianMixture(
        torch.randn(2, 3, dtype=torch.float64),
        root @ root.mT + 0.1 * torch.eye(3),
        torch.tensor([0.2, 0.8]).double(),
    )
    x = target.sample((200,))
    p = exact(target, (3,), path=EDM(1e4), high=1e4, steps=128)()  # far enough to forget the mean
    assert torch.allclose(p.log_prob(x), target.log_prob(x), atol=1e-3)


def test_density_converges_at_order_four():
    x = RING.sample((100,))
    errors = [
        (exact(steps=n)().log_prob(x) - exact(steps=192)().log_prob(x)).abs().mean().item()
        for n in (32, 64)
    ]
    assert math.log2(errors[0] / errors[1]) > 3.7


def test_density_integrates_to_one():
    """That of a random network, so nothing but the divergence can make it so."""
    grid = torch.linspace(-6, 6, 81)
    x = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), dim=-1)
    diffusion = Diffusion(random_net(), (2,), low=0.1, high=20.0, steps=16)
    with torch.no_grad():
        mass = diffusion().log_prob(x).exp().sum() * (grid[1] - grid[0]) ** 2
    assert mass.item() == pytest.approx(1.0, abs=5e-3)


def test_density_is_the_change_of_variables_of_the_draws():
    """Against the Jacobian of the sampler's map, by autograd."""
    diffusion = Diffusion(random_net(), (2,), sampler=Multistep(150), low=0.02, high=20.0).double()
    diffusion.standardize(torch.randn(50, 2).double() * torch.tensor([3.0, 0.1]).double())
    p = diffusion()
    noise = p.noise.sample()
    jacobian = torch.autograd.functional.jacobian(p.from_noise, noise)
    expected = p.noise.log_prob(noise) - torch.linalg.slogdet(jacobian).logabsdet
    assert torch.allclose(p.log_prob(p.from_noise(noise)), expected, atol=1e-3)


def test_start_has_the_variance_of_noised_data():
    """With N(0, high^2) in place of N(0, high^2 + 1) the first error would be over 0.1."""
    target = GaussianMixture(torch.zeros(1, 2).double(), torch.eye(2).double()[None])
    x = target.sample((200,))
    for high in (3.0, 10.0):
        gap = exact(target, high=high, low=1e-4)().log_prob(x) - target.log_prob(x)
        assert gap.abs().max() < 5e-4
    assert exact(high=3.0)().noise.base_dist.scale[0].item() == pytest.approx(math.sqrt(10))


@pytest.mark.parametrize(
    "path", [EDM(), OU(), VP(), Cosine(), Linear()], ids=lambda p: type(p).__name__
)
def test_every_path_gives_the_same_law(path):
    x = RING.sample((50,))
    assert (exact(path=path)().log_prob(x) - RING.log_prob(x, sigma=LOW)).abs().max() < 5e-3


@pytest.mark.parametrize("path", [OU(), VP(), Linear()], ids=lambda p: type(p).__name__)
def test_score_is_that_of_the_path(path):
    x_t = torch.randn(30, 2, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, 30, dtype=torch.float64)
    alpha, sigma = path(t)
    expected = RING.score(x_t, alpha=alpha, sigma=sigma)
    assert torch.allclose(exact(path=path).score(x_t, t), expected)


def test_path_bounds_the_noise():
    path = OU(horizon=2.0)
    assert exact(path=path).high == pytest.approx(path.ratio(torch.ones(())).item())
    assert exact(path=Linear()).high == 80.0


def test_conditional_density():
    """x = c + noise of scale 0.5: the context moves the law."""

    def denoise(x, sigma, context):
        return context + 0.25 / (0.25 + sigma[:, None] ** 2) * (x - context)

    diffusion = Diffusion(
        ExactDenoiser(denoise), (2,), context=2, path=EDM(1e4), high=1e4, steps=96
    ).double()
    context = torch.tensor([[0.0, 1.0], [2.0, -2.0], [0.5, 0.5]], dtype=torch.float64)
    p = diffusion(context)
    x = context + 0.5 * torch.randn(4, 3, 2, dtype=torch.float64)
    truth = torch.distributions.Normal(context, 0.5).log_prob(x).sum(-1)
    assert torch.allclose(p.log_prob(x), truth, atol=1e-3)
    assert (p.sample((2000,)).mean(0) - context).abs().max() < 0.1


# Trace ---------------------------------------------------------------------------------------


def test_hutchinson_is_unbiased_and_states_its_error():
    """z-scores over independent points: mean and scale of a standard normal."""
    diffusion = Diffusion(random_net(), (2,), low=0.01, high=20.0, steps=16)
    x = torch.randn(400, 2)
    with torch.no_grad():
        truth = diffusion().log_prob(x)
        diffusion.trace = Hutchinson(32)
        estimate, error = diffusion().log_prob_and_error(x)
    z = (estimate - truth) / error
    assert (error > 0).all()
    assert abs(z.mean().item()) < 4 / 20  # four standard errors
    assert 0.85 < z.std().item() < 1.25


def test_hutchinson_of_a_known_matrix():
    matrix = torch.randn(5, 5, dtype=torch.float64)
    forms = torch.stack(
        [v @ matrix @ v for v in Hutchinson(20_000).probes(torch.zeros(1, 5))[:, 0].double()]
    )
    estimate, error = Hutchinson(20_000).combine(forms[:, None])
    assert (estimate - matrix.trace()).abs() < 4 * error
    off_diagonal = (matrix + matrix.T).square().sum() - (2 * matrix.diagonal()).square().sum()
    assert error.item() == pytest.approx((off_diagonal / 2 / 20_000).sqrt().item(), rel=0.05)


def test_exact_trace_up_to_64_dimensions():
    assert isinstance(Diffusion(ResidualMLP(64), (8, 8)).trace, ExactTrace)
    assert isinstance(Diffusion(ResidualMLP(65), (65,)).trace, Hutchinson)


# Draws ---------------------------------------------------------------------------------------


def test_draws_and_density_agree():
    """Distances to the nearest mode follow a Rayleigh law, about four standard errors."""
    p = exact()()
    x = p.sample((2000,))
    nearest = torch.cdist(x, RING.means).min(-1).values / 0.1
    u = 1 - torch.exp(-nearest.square() / 2)  # Rayleigh
    z = norm.ppf(u.clamp(1e-9, 1 - 1e-9)).mean() * math.sqrt(2000)
    assert abs(z) < 4
    assert p.log_prob(x[:300]).mean().item() == pytest.approx(
        RING.log_prob(x[:300]).mean().item(), abs=0.01
    )


def test_from_noise_is_deterministic_and_differentiable():
    diffusion = Diffusion(random_net(), (2,), sampler=Heun(10), high=20.0).double()
    p = diffusion()
    noise = p.noise.sample((3,)).requires_grad_()
    assert torch.equal(p.from_noise(noise), p.from_noise(noise))
    assert torch.autograd.gradcheck(p.from_noise, noise)


@pytest.mark.parametrize("sampler", [Ancestral(10), FrozenScore(10)])
def test_random_samplers_have_no_noise_space(sampler):
    p = exact(sampler=sampler)()
    assert p.sample((3,)).isfinite().all()
    with pytest.raises(NotImplementedError, match=r"draws fresh noise.*Multistep\(\) or Heun\(\)"):
        p.from_noise(p.noise.sample())


def test_same_seed_same_draw():
    p = Diffusion(random_net(), (2,), sampler=Ancestral(10))()
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(p.sample((5,)))
    assert torch.equal(*draws)
    assert not torch.equal(p.sample((5,)), draws[0])


def test_nothing_depends_on_batch_mates(monkeypatch):
    monkeypatch.setattr("pyrogen.distributions.diffusion.COTANGENTS_AT_ONCE", 8)  # many chunks
    p = Diffusion(random_net(context=1), (2,), context=1, steps=12).double()(
        torch.randn(9, 1).double()
    )
    one = p.diffusion(p.context[4:5])
    noise, x = p.noise.sample(), torch.randn(9, 2, dtype=torch.float64)
    assert torch.allclose(p.from_noise(noise)[4], one.from_noise(noise[4:5])[0], atol=1e-10)
    assert torch.allclose(p.log_prob(x)[4], one.log_prob(x[4:5])[0], atol=1e-10)


# Standardisation, shapes, modules ------------------------------------------------------------


def test_model_follows_the_units_of_the_data():
    x = RING.sample((300,))
    shift, scale = torch.tensor([5.0, -2.0]).double(), torch.tensor([10.0, 0.01]).double()
    diffusion = Diffusion(random_net(), (2,), steps=16).double()
    noise = diffusion().noise.sample((20,))
    p = diffusion.standardize(x)()
    density, draws = p.log_prob(x[:20]), p.from_noise(noise)
    p = diffusion.standardize(shift + scale * x)()
    moved = p.log_prob(shift + scale * x[:20])
    assert torch.allclose(moved, density - scale.log().sum(), atol=1e-8)
    assert torch.allclose(p.from_noise(noise), shift + scale * draws, atol=1e-8)


def test_standardize_sets_buffers_and_returns_itself():
    x = torch.randn(50, 4, 2) * 3 + 1
    diffusion = Diffusion(ResidualMLP(2), (2,))
    assert diffusion.standardize(x) is diffusion
    assert torch.allclose(diffusion.shift, x.flatten(0, 1).mean(0))
    assert torch.allclose(diffusion.scale, x.flatten(0, 1).std(0))


def test_every_row_has_its_own_level():
    net = random_net()
    x, sigma = torch.randn(5, 2), torch.rand(5) + 0.1
    together = Diffusion(net, (2,)).denoise(x, sigma)
    for i in range(5):
        assert torch.allclose(together[i], Diffusion(net, (2,)).denoise(x[i], sigma[i]), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_is_the_module_s(dtype):
    p = Diffusion(random_net(), (2,), steps=8).to(dtype)()
    x = p.sample((3,))
    assert x.dtype == p.log_prob(x).dtype == dtype


def test_single_precision_is_enough():
    x = RING.sample((100,))
    single = Diffusion(ExactDenoiser(RING.to(torch.float32).denoise), (2,))().log_prob(x.float())
    assert (single.double() - exact()().log_prob(x)).abs().max() < 1e-4


def test_expand_and_plate():
    p = Diffusion(random_net(context=1), (2,), context=1, steps=5)(torch.zeros(3, 1))
    wide = p.expand((5, 3))
    assert wide.shape() == (5, 3, 2)
    assert wide.sample((2,)).shape == (2, 5, 3, 2)
    assert wide.log_prob(torch.zeros(2)).shape == (5, 3)
    assert wide.has_rsample
    assert wide.support.event_dim == 1

    def model():
        with pyro.plate("rows", 3):
            return pyro.sample("x", Diffusion(random_net(), (2,), steps=5)())

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["x"]["value"].shape == (3, 2)
    assert trace.nodes["x"]["log_prob"].shape == (3,)


def test_state_survives_a_file():
    diffusion = Diffusion(random_net(), (2,)).standardize(torch.randn(50, 2) * 3)
    file = io.BytesIO()
    torch.save(diffusion.state_dict(), file)
    file.seek(0)
    copy = Diffusion(ResidualMLP(2, hidden=16, blocks=2), (2,))
    copy.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 2)
    assert torch.equal(copy().log_prob(x), diffusion().log_prob(x))


# Gradients -----------------------------------------------------------------------------------


def test_gradient_of_the_density_is_the_score():
    x = RING.sample((20,)).requires_grad_()
    p = exact(steps=96)()
    (gradient,) = torch.autograd.grad(p.log_prob(x).sum(), x)
    assert (gradient - RING.score(x)).abs().max() < 0.05  # scores reach 30 here


def test_gradient_of_the_density_is_exact_for_what_is_computed():
    diffusion = Diffusion(random_net(), (2,), steps=5, high=20.0).double()
    x = torch.randn(3, 2, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(diffusion().log_prob, x)


@pytest.mark.parametrize("use", ["density", "draw"])
def test_every_parameter_gets_a_gradient(use):
    diffusion = Diffusion(random_net(context=1), (2,), context=1, steps=5)
    p = diffusion(torch.randn(3, 1))
    loss = p.log_prob(torch.randn(3, 2)) if use == "density" else p.rsample().square()
    loss.sum().backward()
    assert all(w.grad is not None and w.grad.abs().sum() > 0 for w in diffusion.parameters())


def test_sample_carries_no_gradient():
    p = Diffusion(random_net(), (2,))()
    assert not p.sample().requires_grad
    assert p.rsample().requires_grad


def test_known_density_costs_no_graph():
    assert not exact()().log_prob(RING.sample((3,))).requires_grad


# Doors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        (lambda d: d.standardize(torch.zeros(1, 2)), ValueError, r"at least 2 data, got 1"),
        (lambda d: d.standardize(torch.zeros(5, 2)), ValueError, r"that vary, got 2 constant"),
        (lambda d: d.standardize(torch.zeros(5, 3)), ValueError, r"shape \(\*batch, 2\), got"),
        (lambda d: d.standardize(torch.full((5, 2), torch.inf)), ValueError, r"finite data"),
        (lambda d: d(torch.zeros(5, 3)), ValueError, r"context=0, got 3.*rebuild the diffusion"),
        (
            lambda d: d().log_prob(torch.zeros(3)),
            ValueError,
            r"Diffused expected a batch of shape",
        ),
        (lambda d: d().log_prob(torch.zeros(2).long()), TypeError, r"floating-point.*int64"),
        (lambda d: d().log_prob(torch.zeros(2).double()), ValueError, r"holds torch.float32"),
        (lambda d: d().log_prob(torch.full((2,), torch.nan)), ValueError, r"got 2 NaN"),
        (
            lambda d: Diffusion(d, (2,), low=2.0, high=1.0),
            ValueError,
            r"0 < low < high, got low=2",
        ),
        (lambda d: Diffusion(d, (2,), steps=4), ValueError, r"steps >= 5, got 4"),
        (
            lambda d: Diffusion(d, (2,), path=OU(horizon=0.01), low=1.0),
            ValueError,
            r"at most the end of OU",
        ),
        (lambda d: Hutchinson(1), ValueError, r"at least 2 draws, got 1.*standard error"),
        (
            lambda d: Diffusion(ResidualMLP(2), (2,)).denoise(torch.zeros(2), torch.ones(3)),
            ValueError,
            r"noise levels of shape \(\) at most, got \(3,\)",
        ),
    ],
)
def test_bad_input_is_refused(act, error, message):
    with pytest.raises(error, match=message):
        act(Diffusion(ResidualMLP(2), (2,)))


@pytest.mark.parametrize("context", [None, torch.zeros(2, 4)])
def test_wrong_context_is_refused(context):
    with pytest.raises(ValueError, match=r"Diffusion was built with context=3, got [04]"):
        Diffusion(ResidualMLP(2, context=3), (2,), context=3)(context)


def test_inference_mode_is_refused_in_words():
    law = Diffusion(ResidualMLP(2), (2,))()
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"Use torch.no_grad instead"):
        law.log_prob(torch.zeros(3, 2))
