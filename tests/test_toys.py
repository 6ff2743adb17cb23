"""Two-dimensional toys: the density, entropy and symmetry that they state."""

import math

import pytest
import torch

from pyrogen.targets import (
    GaussianMixture,
    checkerboard,
    eight_gaussians,
    pinwheel,
    two_spirals,
)


def test_eight_gaussians_have_the_density_and_entropy_they_state():
    x = eight_gaussians(100_000)
    ring = GaussianMixture.ring(8, radius=4 / math.sqrt(2), std=0.5 / math.sqrt(2))
    nats = -ring.log_prob(x)
    assert abs(nats.mean() - 2.833) < 4.5 * nats.std() / len(x) ** 0.5  # fails once in 1e5


def test_checkerboard_is_uniform_on_its_dark_squares():
    x = checkerboard(64_000)
    cell = ((x + 4) / 2).floor().long()
    assert (cell.sum(1) % 2 == 0).all()
    counts = torch.bincount(4 * cell[:, 0] + cell[:, 1], minlength=16)
    statistic = ((counts[counts > 0] - 8000) ** 2 / 8000).sum()
    assert (counts > 0).sum() == 8
    assert statistic < 34  # chi-squared of 7 degrees: fails once in 6e4
    place = ((x + 4) / 2) % 1
    assert (place.mean(0) - 0.5).abs().max() < 4.5 / (12 * len(x)) ** 0.5


def published_pinwheel(n):
    """Of Johnson et al., in the form in which FFJORD uses it."""
    features = torch.randn(n, 2) * torch.tensor([0.3, 0.1]) + torch.tensor([1.0, 0.0])
    angles = torch.linspace(0, 2 * math.pi, 6)[torch.randint(5, (n,))]
    angles = angles + 0.25 * features[:, 0].exp()
    rotations = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], dim=-1)
    return 2 * torch.einsum("ti,tij->tj", features, rotations.reshape(-1, 2, 2))


def published_spirals(n):
    """Of FFJORD: 540 degrees, half of the points on each arm."""
    angle = torch.rand(n // 2, 1).sqrt() * 540 * (2 * math.pi) / 360
    x = -angle.cos() * angle + torch.rand(n // 2, 1) * 0.5
    y = angle.sin() * angle + torch.rand(n // 2, 1) * 0.5
    points = torch.cat([torch.cat([x, y], dim=1), torch.cat([-x, -y], dim=1)]) / 3
    return points + torch.randn(n, 2) * 0.1


def distance(a, b):
    """Energy distance: below 0.003 in six seeds for one law, above 0.02 for its mirror image."""
    within = (torch.cdist(a, a).mean() + torch.cdist(b, b).mean()) / 2
    return 2 * (torch.cdist(a, b).mean() - within).item()


@pytest.mark.parametrize(
    ("toy", "published"), [(pinwheel, published_pinwheel), (two_spirals, published_spirals)]
)
def test_toy_has_the_law_of_its_publication(toy, published):
    assert distance(toy(4000), published(4000)) < 0.006
    assert distance(toy(4000), published(4000) * torch.tensor([1.0, -1.0])) > 0.012
