"""Models with a latent for every datum, shared by the tests of the guides that read data."""

import pyro
import pyro.distributions as dist
import torch

from pyrogen.targets import LinearGaussian

DATA = torch.arange(6.0)[:, None]


def local(x):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])


def plate_of(*shape, fn=None, dim=-1):
    def model(x):
        with pyro.plate("data", len(x), dim=dim):
            pyro.sample("z", fn or dist.Normal(0.0, 1.0))

    return model


def several(x, size=None):
    with pyro.plate("data", len(x), subsample_size=size) as rows:
        a = pyro.sample("a", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        b = pyro.sample("b", dist.Dirichlet(torch.ones(3)))
        c = pyro.sample("c", dist.Uniform(1.0, 4.0))
        d = pyro.sample("d", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
        mean = a.sum((-1, -2)) + b[..., 0] + c + d.sum(-1)
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x[rows, 0])


def linear_gaussian():
    """A target whose posterior is known, and data of its law."""
    target = LinearGaussian(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), noise=0.7)
    return target, torch.randn(50, 3) * torch.tensor([1.2, 2.1, 0.7])
