"""Latents in plates inside the data's plate."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyrogen.guides import Amortized, Diagonal, FullCovariance
from pyrogen.objectives import ELBO, DoublyReparameterized
from pyrogen.targets import LinearGaussian


class Echo(nn.Module):
    """Location is the datum itself, so that a draw tells which datum the encoder saw."""

    def forward(self, x):
        return torch.cat([x, torch.zeros_like(x)], dim=-1)


def cells(x, *, size=None, data=-2, noise=0.5, groups=True):
    """Three numbers per datum, each with a latent of its own, and one latent for their mean."""
    with pyro.plate("data", len(x), subsample_size=size, dim=data) as rows:
        m = pyro.sample("m", dist.Normal(torch.zeros(()), 1.0)) if groups else 0.0
        with pyro.plate("inner", 3, dim=-3 - data):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            held = x[rows] if data == -2 else x[rows].T
            pyro.sample("x", dist.Normal(z, noise), obs=held)


@pytest.mark.parametrize("data", [-1, -2])
@pytest.mark.parametrize("size", [None, 4])
def test_each_cell_reads_its_own_number(data, size):
    x = torch.arange(18.0).reshape(6, 3)
    model = functools.partial(cells, data=data, size=size, groups=False)
    guide = Amortized(model, Echo(), family=Diagonal(1e-6))
    trace = poutine.trace(guide).get_trace(x)
    replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(x)
    z, held = (replayed.nodes[name]["value"] for name in "zx")
    assert z.shape == held.shape
    assert torch.allclose(z, held, atol=1e-4)
    assert replayed.nodes["x"]["scale"] == (1.0 if size is None else 1.5)
    assert torch.allclose(guide.posterior(x)["z"].mean, x)


def fit_and_gap(model, guide, x, log_evidence, steps=400):
    loss = ELBO(4, gradient=DoublyReparameterized(), vectorize_particles=True, max_plate_nesting=2)
    elbo = loss(model, guide.setup(x))
    optimizer = torch.optim.Adam(guide.parameters(), 0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        elbo(x).backward()
        optimizer.step()
        schedule.step()
    loss = ELBO(1000, vectorize_particles=True, max_plate_nesting=2)
    return (loss.loss(model, guide, x) + log_evidence) / len(x)


@pytest.mark.parametrize("data", [-1, -2])
@pytest.mark.parametrize("exact", [False, True], ids=["diagonal", "full"])
def test_nested_plates_reach_the_exact_posterior(data, exact):
    """The four latents of a datum are jointly normal given its three numbers."""
    x = torch.randn(20, 3)
    mix = torch.cat([torch.ones(3, 1), torch.eye(3)], dim=1)  # of m and z - m
    target = LinearGaussian(mix, noise=0.5)
    move = torch.cat([torch.eye(4)[:1], mix])  # from (m, z - m) to (m, z)
    precision = (move @ target.posterior(x[0]).covariance_matrix @ move.T).inverse()
    known = 0.5 * (precision.diagonal().log().sum() - precision.logdet())
    family = FullCovariance() if exact else Diagonal()
    encoder = nn.Linear(3, family.setup(4).outputs)
    model = functools.partial(cells, data=data)
    guide = Amortized(model, encoder, family=family)
    gap = fit_and_gap(model, guide, x, target.log_evidence(x).sum())
    assert gap == pytest.approx(0.0 if exact else known.item(), abs=0.01)
    mean = target.posterior(x).mean @ move.T
    median = guide.median(x)
    assert torch.allclose(median["m"].flatten(), mean[:, 0], atol=0.05)
    z = median["z"] if data == -2 else median["z"].T
    assert torch.allclose(z, mean[:, 1:], atol=0.05)
    if exact:
        assert torch.allclose(guide.joint(x).precision_matrix, precision, rtol=0.1, atol=0.3)
        with pytest.raises(NotImplementedError, match=r"FullCovariance ties m \(1\), z \(3\)"):
            guide.posterior(x)


def test_mean_field_divergence_is_that_of_draws():
    x = torch.randn(6, 3)
    guide = Amortized(cells, nn.Linear(3, 8)).setup(x)
    exact = TraceMeanField_ELBO(500, vectorize_particles=True, max_plate_nesting=2)
    drawn = Trace_ELBO(5000, vectorize_particles=True, max_plate_nesting=2)
    a, b = (elbo.loss(cells, guide, x) for elbo in (exact, drawn))
    assert a == pytest.approx(b, rel=0.02)


def test_predictive_takes_joint_draws_of_all_cells():
    x, family = torch.randn(6, 3), FullCovariance().setup(4)
    guide = Amortized(cells, nn.Linear(3, family.outputs), family=family).setup(x)
    draws = Predictive(cells, guide=guide, num_samples=7)(x)
    assert draws["z"].shape == (7, 6, 3)
    assert draws["m"].shape == (7, 6, 1)


def time_outside(x, size=None):
    data = pyro.plate("data", len(x), subsample_size=size, dim=-1)
    with pyro.plate("time", 3, dim=-2), data as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows].T)


def test_datas_plate_may_be_named():
    x = torch.arange(18.0).reshape(6, 3)
    with pytest.raises(ValueError, match="'time' holds 3 of 3 data, and the encoder got 6"):
        Amortized(time_outside, Echo())(x)
    guide = Amortized(time_outside, Echo(), plate="data", family=Diagonal(1e-6))
    assert torch.allclose(guide(x)["z"], x.T, atol=1e-4)
    with pytest.raises(ValueError, match=r"plate 'datum' to hold every latent.*such as 'time'"):
        Amortized(time_outside, Echo(), plate="datum")(x)


def test_subsampled_plate_is_that_of_the_data():
    x = torch.arange(18.0).reshape(6, 3)
    guide = Amortized(time_outside, Echo(), family=Diagonal(1e-6))
    trace = poutine.trace(guide).get_trace(x, 4)
    assert torch.allclose(trace.nodes["z"]["value"], x[trace.nodes["data"]["value"]].T, atol=1e-4)
