"""Draws for data in batches are those for all data at once."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuideList
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyrogen.distributions import maf, nsf
from pyrogen.export import to_arviz
from pyrogen.guides import Amortized, AutoFlow, Diagonal, FlowFamily, FullCovariance, Mixed
from pyrogen.inference import posterior_draws
from pyrogen.training import Batches

N = 11


class Echo(nn.Module):
    """Locations are the datum and the context, so that a draw tells what the encoder saw."""

    def forward(self, x, *context):
        loc = x + sum(c.sum(-1, keepdim=True) for c in context)
        return torch.cat([loc, torch.zeros_like(x)], dim=-1)


def model(x, *, size=None, data=-1):
    """Plates of the data and of cells inside, and two sites outside, one in a plate."""
    a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("groups", 3, dim=-1):
        pyro.sample("g", dist.LogNormal(0.0, 1.0))
    rows = pyro.plate("data", size or len(x), subsample_size=len(x), dim=data)
    with rows, pyro.plate("cells", 2, dim=-3 - data):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        held = x if data == -2 else x.T
        pyro.sample("x", dist.Normal(z + a.sum(-1)[..., None, None], 1.0), obs=held)


X = 1000 * torch.arange(2.0 * N).reshape(N, 2)


def mixed(program, **options):
    return Mixed(
        program,
        globals=lambda m: AutoFlow(m, nsf),
        locals=lambda m: Amortized(m, Echo(), family=Diagonal(1e-3), **options),
        plate="data",
    )


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("size", [None, 500], ids=["whole", "of 500"])
@pytest.mark.parametrize("data", [-1, -2])
def test_rows_keep_their_order_and_globals_are_shared(chunk, size, data):
    guide = mixed(functools.partial(model, size=size, data=data), given=("a", "g"))
    draws = posterior_draws(guide, X.split(4), draws=7, chunk=chunk, plate="data")
    assert set(draws) == {"a", "g", "z"}
    assert (draws["a"].shape, draws["g"].shape) == ((7, 2), (7, 3))
    z = draws["z"] if data == -2 else draws["z"].mT
    assert z.shape == (7, N, 2)
    shared = draws["a"].sum(-1) + draws["g"].sum(-1)
    assert len(shared.unique()) == 7
    assert torch.allclose(z - X, shared[:, None, None].expand_as(z), atol=0.05)


def test_one_batch_gives_what_many_give_in_law():
    """Moments of exact conditionals, seeded; fails once in about 10 000."""

    def guide(x):
        m = pyro.sample("m", dist.Normal(1.0, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(m + x, 2.0))

    x = torch.arange(5.0)
    draws = posterior_draws(guide, x.split(2), draws=20_000, chunk=20_000)
    covariance = torch.cat([draws["m"][:, None], draws["z"]], dim=-1).T.cov()
    expected = 0.25 * torch.ones(6, 6) + torch.diag(torch.tensor([0.0] + [4.0] * 5))
    assert torch.allclose(covariance, expected, atol=0.2)
    assert torch.allclose(draws["z"].mean(0), 1 + x, atol=0.07)


def hierarchical(x, *, size=100):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", size, subsample_size=len(x)):
        z = pyro.sample("z", dist.Normal(m[..., None] * torch.ones(3), 1.0).to_event(1))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.sum(-1), s), obs=x[:, 0])


FAMILIES = [Diagonal, FullCovariance, functools.partial(FlowFamily, nsf, 2)]


@pytest.mark.parametrize("make", FAMILIES, ids=["diagonal", "full", "flow"])
@pytest.mark.parametrize("chunk", [1, 100])
def test_every_family_is_taken_and_auxiliary_sites_are_left_out(make, chunk):
    family = make()
    guide = Mixed(
        hierarchical,
        globals=lambda m: AutoFlow(m, maf),
        locals=lambda m: Amortized(m, nn.Linear(1, family.setup(4).outputs), family=family),
    )
    draws = posterior_draws(guide, torch.randn(N, 1).split(4), draws=5, chunk=chunk)
    shapes = {name: value.shape for name, value in draws.items()}
    assert shapes == {"m": (5,), "z": (5, N, 3), "s": (5, N)}


def test_guide_list_with_a_flow_for_the_globals():
    def whole(x):
        hierarchical(x, size=len(x))

    guide = AutoGuideList(whole)
    guide.append(AutoFlow(poutine.block(whole, hide=["z", "s"]), maf))
    guide.append(Amortized(poutine.block(whole, hide=["m"]), nn.Linear(1, 8)))
    x = torch.randn(9, 1)
    draws = posterior_draws(guide, x.split(3), draws=5)
    assert {name: value.shape for name, value in draws.items()} == {
        "m": (5,),
        "z": (5, 9, 3),
        "s": (5, 9),
    }


def test_local_sites_alone():
    def local(x, index):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = Amortized(local, Echo(), family=Diagonal(1e-3))
    loader = DataLoader(TensorDataset(X, torch.arange(N)), batch_size=4)
    draws = posterior_draws(guide, loader, draws=6)
    assert torch.allclose(draws["z"], X.expand(6, N, 2), atol=0.01)
    assert not draws["z"].requires_grad


def test_draws_go_to_arviz():
    x = torch.randn(N, 1)
    guide = Mixed(
        hierarchical,
        globals=lambda m: AutoFlow(m, maf),
        locals=lambda m: Amortized(m, nn.Linear(1, 8)),
    )
    draws = posterior_draws(guide, x.split(4), draws=20)
    data = to_arviz(draws, functools.partial(hierarchical, size=N), x, chains=2)
    assert data.posterior["z"].shape == (2, 10, N, 3)
    assert data.posterior["z"].dims[2] == "data"
    assert data.posterior["m"].shape == (2, 10)
    assert data.log_likelihood["x"].shape == (2, 10, N)


def square(x):
    with pyro.plate("groups", len(x), dim=-2):
        pyro.sample("g", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x[:, 0], 1.0))


def three_of(x):
    with pyro.plate("data", N, subsample_size=3):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def first_fits(x):
    with pyro.plate("data", 4):
        pyro.sample("z", dist.Normal(0.0, 1.0))


@pytest.mark.parametrize(
    ("guide", "loader", "options", "error", "match"),
    [
        (square, [X], {}, ValueError, r"one plate with the 11 cells.*'groups': 11, 'data': 11"),
        (three_of, [X], {}, ValueError, r"11 cells.*got \{'data': 3\}.*takes all"),
        (first_fits, X.split(4), {}, ValueError, "'data' to hold the batch of 3, got 4 cells"),
        (square, [X], {"plate": "datum"}, ValueError, "expected a plate 'datum', got .*'data'"),
        (square, [X], {"draws": 0}, ValueError, "draws >= 1 and chunk >= 1, got 0 and 100"),
        (square, [], {}, ValueError, "batches are empty"),
        (square, [{"x": X}], {}, TypeError, "tuple of tensors, got dict"),
        (square, Batches(X, batch_size=4), {}, ValueError, "known order, got a Batches"),
        (square, DataLoader(X, shuffle=True), {}, ValueError, "DataLoader that shuffles.*split"),
    ],
)
def test_misfits_say_what_to_do(guide, loader, options, error, match):
    with pytest.raises(error, match=match):
        posterior_draws(guide, loader, **options)


def test_guide_that_cannot_run_many_draws_at_once_has_a_way():
    def guide(x):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, scale.item()))

    with pytest.raises(RuntimeError) as caught:
        posterior_draws(guide, X.split(4), draws=3)
    assert "pass chunk=1" in caught.value.__notes__[0]
    draws = posterior_draws(guide, X.split(4), draws=3, chunk=1)
    assert draws["z"].shape == (3, N)


def test_batches_of_other_sites_are_refused():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))
            if x[0] > 0:
                pyro.sample("more", dist.Normal(x, 1.0))

    for signs in ((-1.0, 1.0), (1.0, -1.0)):
        loader = [(sign * torch.ones(3),) for sign in signs]
        with pytest.raises(ValueError, match="expected the same sites in every batch"):
            posterior_draws(guide, loader, draws=4)
