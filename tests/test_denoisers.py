"""Denoisers: the exact one of a mixture, and the networks."""

import math

import pytest
import torch
from torch import nn

from pyrogen.distributions import Diffusion, Preconditioned
from pyrogen.nets import ResidualMLP, conv_decoder, conv_encoder
from pyrogen.targets import GaussianMixture

RING = GaussianMixture.ring().to(torch.float64)


def test_preconditioning_is_the_published_one():
    class Constant(nn.Module):
        def forward(self, x, level, context):
            self.seen = x, level
            return torch.ones_like(x)

    net, sigma = Constant(), torch.tensor([0.5])
    out = Preconditioned(net)(torch.tensor([[3.0]]), sigma, None)
    c_skip, c_out, c_in = 1 / 1.25, 0.5 / math.sqrt(1.25), 1 / math.sqrt(1.25)
    assert out.item() == pytest.approx(c_skip * 3 + c_out)
    assert net.seen[0].item() == pytest.approx(c_in * 3)
    assert net.seen[1].item() == pytest.approx(math.log(0.5) / 4)


def test_image_networks_fit():
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = conv_encoder((1, 4, 4), 8, channels=(4,))
            self.decode = conv_decoder(8, (1, 4, 4), channels=(4,))

        def forward(self, x, level, context):
            return self.decode(self.encode(x) + level[:, None])

    p = Diffusion(Images(), (1, 4, 4), steps=5)().expand((3,))
    x = p.sample((2,))
    assert x.shape == (2, 3, 1, 4, 4)
    with torch.no_grad():
        assert p.log_prob(x).shape == (2, 3)


def test_wrong_network_is_refused():
    class Wrong(nn.Module):
        def forward(self, x, level, context):
            return x[:, :1]

    with pytest.raises(ValueError, match=r"expected to return shape \(4, 2\).*got \(4, 1\)"):
        Diffusion(Wrong(), (2,)).denoise(torch.zeros(4, 2), torch.ones(4))


def test_mixture_agrees_with_pyro_and_with_autograd():
    x = torch.randn(50, 2, dtype=torch.float64).requires_grad_()
    alpha, sigma = torch.tensor(0.6).double(), torch.linspace(0.1, 2, 50).double()
    assert torch.allclose(RING.log_prob(x), RING.distribution().log_prob(x))
    noised = RING.log_prob(x, alpha, sigma)
    (score,) = torch.autograd.grad(noised.sum(), x)
    assert torch.allclose(RING.score(x, alpha, sigma), score)
    tweedie = (x + sigma[:, None] ** 2 * score) / alpha
    assert torch.allclose(RING.denoise(x, sigma, alpha=alpha), tweedie)
    spread = alpha**2 * RING.covariances + sigma[3] ** 2 * torch.eye(2)
    components = torch.distributions.MultivariateNormal(alpha * RING.means, spread)
    expected = (components.log_prob(x[3]) - math.log(8)).logsumexp(-1)
    assert torch.allclose(noised[3], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), torch.eye(3)), r"covariances of shape \(2, 3, 3\).*got \(3, 3\)"),
        ((torch.zeros(1, 2), torch.eye(2)[None], torch.tensor([-1.0])), r"1 positive weights"),
        ((torch.zeros(1, 2), -torch.eye(2)[None]), r"positive definite.*eigenvalue of -1"),
    ],
)
def test_impossible_mixtures_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*arguments)


def test_residual_network_starts_at_zero_and_hears_its_level():
    net = ResidualMLP(2, context=3)
    x, level, context = torch.randn(4, 2), torch.zeros(4), torch.randn(4, 3)
    assert (net(x, level, context) == 0).all()
    nn.init.normal_(net.last.weight)
    base = net(x, level, context)
    assert not torch.allclose(net(x, level + 1, context), base)
    assert not torch.allclose(net(x, level, context + 1), base)


@pytest.mark.parametrize("build", [lambda s: conv_encoder(s, 2), lambda s: conv_decoder(2, s)])
def test_images_that_cannot_be_halved_are_refused(build):
    with pytest.raises(ValueError, match=r"2 layers halve.*6 by 8.*multiples of 4"):
        build((1, 6, 8))


def test_dropout_is_for_training_only():
    net = ResidualMLP(2, dropout=0.5)
    nn.init.normal_(net.last.weight)
    x, level = torch.randn(4, 2), torch.zeros(4)
    assert not torch.equal(net(x, level), net(x, level))
    assert torch.equal(net.eval()(x, level), net(x, level))
