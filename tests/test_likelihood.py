"""Maximum likelihood against closed forms."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrogen.distributions import Generator
from pyrogen.objectives import MaximumLikelihood
from pyrogen.training import Trainer


class Gaussian(nn.Module):
    """Normal around a linear function of the context, of unknown scale."""

    def __init__(self, features=2, context=0):
        super().__init__()
        self.loc = nn.Linear(context, features) if context else None
        self.mean = nn.Parameter(torch.zeros(features))
        self.log_scale = nn.Parameter(torch.zeros(features))

    def forward(self, context=None):
        loc = self.mean if context is None else self.loc(context) + self.mean
        return dist.Normal(loc, self.log_scale.exp()).to_event(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_those_of_a_gaussian(dtype):
    x = torch.randn(50, 2, dtype=dtype)
    objective = MaximumLikelihood(Gaussian().to(dtype))
    loss = objective(x)
    expected = (x.square().sum(1) / 2 + torch.log(torch.tensor(2 * torch.pi))).mean()
    assert loss.dtype == dtype
    assert torch.allclose(loss, expected)
    loss.backward()
    assert torch.allclose(objective.flow.mean.grad, -x.mean(0), atol=1e-6)
    assert torch.allclose(objective.flow.log_scale.grad, 1 - x.square().mean(0), atol=1e-6)


def test_duplicating_the_data_changes_nothing():
    x, objective = torch.randn(7, 2), MaximumLikelihood(Gaussian())
    assert torch.allclose(objective(x), objective(torch.cat([x, x])))


def test_training_reaches_the_maximum_likelihood_estimate():
    x = 3 + 2 * torch.randn(500, 2)
    gaussian = Gaussian()
    objective = MaximumLikelihood(gaussian)
    trainer = Trainer(objective, torch.optim.Adam(gaussian.parameters(), 0.05))
    trainer.fit([x], steps=800, progress=False)
    assert torch.allclose(gaussian.mean, x.mean(0), atol=1e-3)
    assert torch.allclose(gaussian.log_scale.exp(), x.std(0, correction=0), atol=1e-3)


def test_each_datum_has_its_context():
    objective = MaximumLikelihood(Gaussian(context=3))
    x, c = torch.randn(5, 2), torch.randn(5, 3)
    one_by_one = torch.stack([objective(x[i : i + 1], c[i : i + 1]) for i in range(5)])
    assert torch.allclose(objective(x, c), one_by_one.mean())


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (torch.full((5, 2), torch.nan), ValueError, "expected finite data, got 10"),
        (torch.zeros(5, 2).long(), TypeError, "floating-point"),
        (torch.zeros(5, 3), ValueError, r"\(\*batch, 2\)"),
        (torch.zeros(2), ValueError, r"\(\*batch, 2\)"),
        (torch.zeros(0, 2), ValueError, "at least 1"),
        (torch.zeros(5, 2).double(), ValueError, "holds torch.float32"),
        ([[0.0, 0.0]], TypeError, "expected a tensor"),
    ],
)
def test_bad_data_are_refused(x, error, match):
    with pytest.raises(error, match=f"MaximumLikelihood .*{match}"):
        MaximumLikelihood(Gaussian())(x)


@pytest.mark.parametrize("n", [1, 4])
def test_contexts_must_match_data(n):
    with pytest.raises(ValueError, match="one context for each datum"):
        MaximumLikelihood(Gaussian(context=3))(torch.zeros(5, 2), torch.zeros(n, 3))


def test_a_law_without_density_says_what_to_do():
    generator = Generator(nn.Linear(1, 2), 1, (2,))
    with pytest.raises(NotImplementedError, match="no density"):
        MaximumLikelihood(generator)(torch.zeros(5, 2))
