"""Data with gaps: the encoder sees what was observed, the model scores it."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyrogen.guides import Amortized, FullCovariance
from pyrogen.nets import Incomplete, Standardized, conv_encoder, mlp
from pyrogen.objectives import ELBO, DoublyReparameterized, ImportanceWeighted
from pyrogen.targets import LinearGaussian


def incomplete(target, x):
    """The model of the observed numbers alone."""
    seen = ~x.isnan()
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(target.weight.shape[1]), 1.0).to_event(1))
        law = dist.Normal(z @ target.weight.T, target.noise).mask(seen).to_event(1)
        pyro.sample("x", law, obs=x.nan_to_num())


def exact_given_observed(target, x):
    """Mean, covariance and log-evidence of one datum with gaps."""
    seen = ~x.isnan()
    part = LinearGaussian(target.weight[seen], target.noise)
    return part.posterior(x[seen]), part.log_evidence(x[seen]) if seen.any() else torch.zeros(())


def test_encoder_of_incomplete_data_approaches_the_posterior_given_the_observed():
    target = LinearGaussian(torch.tensor([[1.0, 0.5], [0.5, -1.0], [1.0, 1.0]]), noise=0.7)
    model = functools.partial(incomplete, target)

    def draw(n):
        x = torch.randn(n, 2) @ target.weight.T + 0.7 * torch.randn(n, 3)
        return x.masked_fill(torch.rand(n, 3) < 0.4, torch.nan)

    family = FullCovariance().setup(2)
    guide = Amortized(model, Incomplete(mlp(6, family.outputs, (64,))), family=family)
    guide.setup(draw(3))
    elbo = ELBO(1, gradient=DoublyReparameterized())(model, guide)
    optimizer = torch.optim.Adam(guide.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 900)
    for _ in range(900):
        optimizer.zero_grad()
        elbo(draw(128)).backward()
        optimizer.step()
        schedule.step()

    x = draw(200)
    exact = [exact_given_observed(target, row) for row in x]
    evidence = torch.stack([log_evidence for _, log_evidence in exact]).mean()
    bounds = [
        -bound(k, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, x) / 200
        for bound, k in [(ELBO, 500), (ImportanceWeighted, 500)]
    ]
    assert evidence - 0.05 < bounds[0] < evidence  # nats per datum
    assert bounds[1] == pytest.approx(evidence.item(), abs=0.005)
    mean = torch.stack([law.mean for law, _ in exact])
    sd = torch.stack([law.stddev for law, _ in exact])
    law = guide.posterior(x)["z"]
    assert ((law.mean - mean) / sd).square().mean().sqrt() < 0.15
    assert (law.stddev / sd).log().abs().mean() < 0.1


def test_only_an_encoder_of_incomplete_data_takes_nan():
    model = functools.partial(incomplete, LinearGaussian(torch.ones(3, 1), 1.0))
    x = torch.tensor([[1.0, torch.nan, 2.0], [torch.nan] * 3])
    with pytest.raises(ValueError, match="expected finite data, got 4 NaN"):
        Amortized(model, nn.Linear(3, 2))(x)
    net = Incomplete(nn.Linear(6, 2))
    for encoder in (net, Standardized(net, torch.ones(3), torch.ones(3))):
        guide = Amortized(model, encoder)
        assert guide(x)["z"].isfinite().all()
        assert ELBO().loss(model, guide, x) > 0
        with pytest.raises(ValueError, match="expected finite data, got 1 "):
            guide(x / torch.tensor([0.0, 1.0, 1.0]))


def test_images_carry_their_mask_as_a_channel():
    net = Incomplete(conv_encoder((2, 4, 4), 3, channels=(4,)), dim=-3)
    x = torch.randn(5, 1, 4, 4)
    x[0, 0, 1, 1] = torch.nan
    assert net(x).isfinite().all()
