"""What an encoder may say and read: families that tie sites together, and other sites' values."""

import functools

import pyro
import pyro.distributions as dist
import pytest
import torch
from amortized_cases import DATA, linear_gaussian, local, plate_of, several
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.distributions import biject_to

from pyrogen.distributions import nsf
from pyrogen.guides import Amortized, Diagonal, FlowFamily, FullCovariance, LowRank
from pyrogen.inference import importance
from pyrogen.objectives import ELBO, DoublyReparameterized, ImportanceWeighted

# Families that tie the sites together

JOINT = {
    "full": FullCovariance,
    "low rank": functools.partial(LowRank, 2),
    "flow": functools.partial(FlowFamily, functools.partial(nsf, layers=1, hidden=(8,)), 2),
}
joint = pytest.mark.parametrize("make", JOINT.values(), ids=JOINT)


@joint
@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("vectorize", [False, True])
def test_joint_family_over_several_supports(make, size, vectorize):
    x = torch.randn(9, 2)
    family = make()
    guide = Amortized(several, nn.Linear(2, family.setup(11).outputs), family=family)
    held = size or 9
    shapes = {name: value.shape for name, value in guide(x, size).items()}
    assert shapes == {"a": (held, 2, 3), "b": (held, 3), "c": (held,), "d": (held, 2)}
    for loss in (ELBO, functools.partial(ELBO, gradient=DoublyReparameterized())):
        elbo = loss(3, vectorize_particles=vectorize)
        assert elbo.differentiable_loss(several, guide, x, size).isfinite()
    if size is None:
        bound = ImportanceWeighted(3, vectorize_particles=vectorize)
        assert bound.differentiable_loss(several, guide, x, size).isfinite()
    assert {name: value.shape for name, value in guide.median(x, size).items()} == shapes


@joint
def test_density_of_a_joint_draw_is_that_of_its_law(make):
    """Of the sites together: the law of the unconstrained latents, and the maps' Jacobians."""
    x = torch.randn(5, 2, dtype=torch.float64)
    family = make()
    encoder = nn.Linear(2, family.setup(11).outputs).double()
    guide = Amortized(several, encoder, family=family)
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    latents, ladj = [], 0.0
    for name, support in [
        ("a", dist.constraints.independent(dist.constraints.real, 2)),
        ("b", dist.constraints.simplex),
        ("c", dist.constraints.interval(1.0, 4.0)),
        ("d", dist.constraints.independent(dist.constraints.positive, 1)),
    ]:
        value, transform = trace.nodes[name]["value"], biject_to(support)
        u = transform.inv(value.clone())
        ladj = ladj + transform.log_abs_det_jacobian(u, value)
        latents.append(u.reshape(5, -1))
    expected = guide.joint(x).log_prob(torch.cat(latents, -1)) - ladj
    scored = sum(node["log_prob"] for node in trace.nodes.values() if "log_prob" in node)
    assert torch.allclose(scored, expected)


@joint
def test_one_site_is_drawn_from_the_family_itself(make):
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            pyro.sample("z", dist.LogNormal(torch.zeros(1, 2, 2), 1.0).to_event(2))

    x, family = torch.randn(5, 2), make()
    guide = Amortized(model, nn.Linear(2, family.setup(4).outputs), family=family)
    trace = poutine.trace(guide).get_trace(x)
    assert trace.nodes["z"]["value"].shape == (5, 1, 2, 2)
    assert [name for name in trace.stochastic_nodes if name != "data"] == ["z"]
    trace.compute_log_prob()
    law = guide.posterior(x)["z"]
    expected = law.log_prob(trace.nodes["z"]["value"][:, 0])
    assert torch.allclose(trace.nodes["z"]["log_prob"][:, 0], expected, rtol=1e-4)
    assert importance(model, guide, x, draws=50).log_weights.isfinite().all()


def test_parameters_of_a_family_are_trained_by_svi():
    target, x = linear_gaussian()
    family = FlowFamily(nsf, 2)
    guide = Amortized(target.plated, nn.Linear(3, 6), family=family).setup(x)
    before = {name: p.detach().clone() for name, p in family.named_parameters()}
    SVI(target.plated, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO()).step(x)
    assert any(not torch.equal(p, before[name]) for name, p in family.named_parameters())
    assert len(pyro.get_param_store()) == 0


# What else the encoder may read


class EchoContext(nn.Module):
    def forward(self, x, context):
        return torch.cat([x + context.sum(-1, keepdim=True), torch.zeros_like(x)], dim=-1)


def with_covariates(x, age):
    """Observed sites of every shape before the latent; ``g`` lies in a plate of its own."""
    pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=torch.ones(2))
    with pyro.plate("groups", 3):
        pyro.sample("g", dist.Normal(0.0, 1.0), obs=10 * torch.ones(3))
    with pyro.plate("data", len(x)):
        pyro.sample("age", dist.Normal(0.0, 1.0), obs=age)
        local(x)


@pytest.mark.parametrize(
    ("given", "added"),
    [("a", 2.0), (("a", "g"), 32.0), (("age", "g"), 30.0 + 100 * torch.arange(6))],
    ids=str,
)
def test_encoder_reads_the_sites_given(given, added):
    age = 100.0 * torch.arange(6)
    guide = Amortized(with_covariates, EchoContext(), given=given, family=Diagonal(1e-6))
    assert torch.allclose(guide(DATA, age)["z"], DATA[:, 0] + added, atol=1e-3)
    assert torch.allclose(guide.median(DATA, age)["z"], DATA[:, 0] + added)
    mean = guide.posterior(DATA, torch.tensor([0.5, 0.25]))["z"].mean
    assert torch.allclose(mean, DATA[:, 0] + 0.75)
    with pytest.raises(ValueError, match="expected a context"):
        guide.posterior(DATA)


def test_misfitting_context_is_refused():
    guide = Amortized(with_covariates, EchoContext(), given="x")
    with pytest.raises(ValueError, match=r"value of 'x'.*before its first latent.*Mixed"):
        guide(DATA, DATA[:, 0])
    plain = Amortized(plate_of(), nn.Linear(1, 2)).setup(DATA)
    with pytest.raises(ValueError, match="expected no context"):
        plain.posterior(DATA, DATA)
