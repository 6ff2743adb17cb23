"""Mixtures of flows: exact draws and densities, and modes that one flow cannot part."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from scipy import stats
from torch import nn
from torch.distributions import constraints

from pyrogen.distributions import Flow, nsf, realnvp
from pyrogen.distributions.mixture import FlowMixture, Mixture
from pyrogen.distributions.supports import agree, from_reals
from pyrogen.objectives import MaximumLikelihood
from pyrogen.testing import DISTRIBUTION_CHECKS, MODULE_CHECKS
from pyrogen.training import Trainer
from pyrogen.transforms import Elementwise


def small(context=0, **kwargs):
    return FlowMixture(
        [realnvp(2, context, layers=2, hidden=(8,), **kwargs) for _ in range(3)], context
    )


def shaken(mixture):
    for w in mixture.parameters():
        nn.init.normal_(w, std=0.4)
    return mixture


@pytest.mark.parametrize("check", DISTRIBUTION_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("context", [0, 2])
def test_mixture_is_a_distribution(check, context):
    check(shaken(small(context))(torch.randn(4, 2) if context else None))


@pytest.mark.parametrize("check", MODULE_CHECKS, ids=lambda f: f.__name__)
def test_module_keeps_the_contract(check):
    check(small(2), torch.randn(4, 2))


def test_density_is_that_of_the_normals():
    logits = torch.tensor([0.3, -1.0]).double()
    normals = [dist.Normal(-1.0, 0.5), dist.Normal(2.0, 1.5)]
    x = torch.randn(7).double()
    one, other = logits.softmax(-1).tolist()
    first = one * stats.norm.pdf(x.numpy(), -1.0, 0.5)
    both = first + other * stats.norm.pdf(x.numpy(), 2.0, 1.5)
    p = Mixture(logits, normals)
    assert torch.allclose(p.log_prob(x).exp(), torch.as_tensor(both), atol=1e-7)
    assert torch.allclose(p.responsibilities(x)[:, 0], torch.as_tensor(first / both), atol=1e-7)


def test_draws_follow_the_weights():
    p = Mixture(torch.tensor([0.0, 1.0]), [dist.Normal(-9.0, 1.0), dist.Normal(9.0, 1.0)])
    x = p.sample((4000,))
    assert stats.binomtest(int((x > 0).sum()), 4000, 1 / (1 + math.exp(-1))).pvalue > 1e-4
    assert stats.kstest(x[x > 0], stats.norm(9, 1).cdf).pvalue > 1e-4


def test_weights_and_draws_follow_the_context():
    """A context for each datum: weights may turn over from one to the next."""
    logits = torch.tensor([[20.0, -20.0], [-20.0, 20.0]])
    p = Mixture(logits, [dist.Normal(-9.0, 1.0), dist.Normal(9.0, 1.0)]).expand((5, 2))
    assert (p.sample((3,)).sign() == torch.tensor([-1.0, 1.0])).all()


def test_mass_is_one():
    p = shaken(small().double())()
    grid = torch.linspace(-12, 12, 301).double()
    with torch.no_grad():
        mass = p.log_prob(torch.cartesian_prod(grid, grid)).exp().sum() * (grid[1] - grid[0]) ** 2
    assert mass.item() == pytest.approx(1, abs=1e-3)


def test_far_from_one_component_the_gradient_is_clean():
    flows = [Flow(1, [Elementwise(1)]) for _ in range(2)]
    flows[0].shift.fill_(1e4)
    mixture = FlowMixture(flows)
    mixture().log_prob(torch.zeros(3, 1)).sum().backward()
    assert all(w.grad.isfinite().all() for w in mixture.parameters())


def test_standardize_gives_each_flow_a_cluster():
    pyro.set_rng_seed(2)
    centres = torch.tensor([[-8.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    x = torch.cat([c + torch.randn(n, 2) for c, n in zip(centres, (100, 200, 300), strict=True)])
    mixture = small().standardize(x)
    found = torch.stack([flow.shift for flow in mixture.flows])
    nearest = torch.cdist(centres, found)
    assert nearest.amin(1).max() < 0.5
    weights = mixture().log_weights.exp()[nearest.argmin(1)]
    assert torch.allclose(weights, torch.tensor([1.0, 2.0, 3.0]) / 6, atol=0.01)
    assert mixture().log_prob(x).mean() > small().standardize(x[:100])().log_prob(x).mean()


def test_standardize_survives_clusters_of_one():
    x = torch.tensor([[0.0, 0.0], [0.1, 0.2], [0.2, 0.1], [50.0, 50.0], [0.1, 0.0], [0.3, 0.3]])
    assert small().standardize(x)().log_prob(x).isfinite().all()


def test_supports_are_kept():
    mixture = shaken(small(support=constraints.positive))
    assert mixture().support.check(mixture().sample((50,))).all()
    simplices = FlowMixture([nsf(2, support=constraints.simplex) for _ in range(2)])
    assert simplices().event_shape == (3,)


def test_supports_agree_whoever_states_them():
    charted = from_reals(constraints.lower_cholesky).codomain
    assert agree(charted, constraints.lower_cholesky)
    assert agree(constraints.lower_cholesky, charted)
    assert not agree(charted, constraints.positive_definite)
    zeros = torch.zeros
    assert agree(constraints.interval(0.0, 1.0), constraints.interval(zeros(2), torch.ones(2)))
    assert not agree(constraints.interval(zeros(2), 1.0), constraints.interval(zeros(3), 1.0))


@pytest.mark.filterwarnings("ignore:Singular sample")  # torch's own, whatever the sample
def test_flow_mixes_with_a_law_of_pyro_on_its_support():
    flow = nsf(3, support=constraints.positive_definite)
    wishart = dist.Wishart(torch.tensor(3.0), torch.eye(2))
    for parts in ([flow(), wishart], [wishart, flow()]):
        p = Mixture(torch.zeros(2), parts)
        x = p.sample((5,))
        each = torch.stack([part.log_prob(x) for part in parts])
        assert torch.allclose(p.log_prob(x), each.logsumexp(0) - math.log(2), atol=1e-4)


def test_mixture_is_a_prior_and_a_likelihood():
    mixture = shaken(small(2)).requires_grad_(False)
    data = torch.randn(10, 2)

    def model():
        z = pyro.sample("z", mixture(torch.zeros(2)))
        with pyro.plate("data", 10, subsample_size=5) as i:
            pyro.sample("x", mixture(z), obs=data[i])

    elbo = Trace_ELBO(num_particles=3, vectorize_particles=False)
    SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), elbo).step()
    with pyro.plate("particles", 3, dim=-2):
        trace = pyro.poutine.trace(model).get_trace()
    z = trace.nodes["z"]["value"]
    assert z.shape == (3, 1, 2)
    trace.compute_log_prob()
    expected = mixture(z).log_prob(data[trace.nodes["data"]["value"]])
    assert torch.allclose(trace.nodes["x"]["unscaled_log_prob"], expected)


def test_copies_are_independent():
    mixture = shaken(small())
    x = torch.randn(5, 2)
    assert torch.equal(copy.deepcopy(mixture)().log_prob(x), mixture().log_prob(x))


@pytest.mark.slow
def test_two_flows_beat_one_on_two_modes():
    """Two normals ten scales apart: with as many layers in all, the gap to the entropy is less."""

    def truth():
        each = dist.Normal(torch.tensor([[-5.0, 0.0], [5.0, 0.0]]), 1.0).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), each)

    p = truth()
    test = p.sample((5000,))
    gaps = []
    for model in (
        realnvp(2, layers=4, hidden=(16,)),
        FlowMixture([realnvp(2, layers=2, hidden=(16,)) for _ in range(2)]),
    ):
        model.standardize(p.sample((500,)))
        trainer = Trainer(MaximumLikelihood(model), torch.optim.Adam(model.parameters(), lr=5e-3))
        for _ in range(300):
            trainer.step(p.sample((256,)))
        with torch.no_grad():
            gaps.append((p.log_prob(test) - model().log_prob(test)).mean().item())
    one, two = gaps
    assert two < 0.02
    assert two < one / 5


ERRORS = [
    (lambda: FlowMixture([nsf(2)]), ValueError, r"at least 2 flows, got 1"),
    (lambda: FlowMixture([nsf(2), nsf(3)])(), ValueError, r"one event shape and support, got \(2"),
    (
        lambda: FlowMixture([nsf(2), nsf(2, support=constraints.positive)])(),
        ValueError,
        r"one event shape and support.*Build them alike",
    ),
    (lambda: Mixture(torch.zeros(3), [dist.Normal(0.0, 1.0)] * 2), ValueError, r"logit for each"),
    (lambda: small(2)(), ValueError, r"context=2, got 0"),
    (lambda: small().standardize(torch.zeros(5, 2)), ValueError, r"at least 6 data, got 5"),
    (lambda: small().standardize(torch.zeros(50, 2)), ValueError, r"2 constant"),
    (lambda: small()().rsample(), NotImplementedError, r"which component.*Trace_ELBO"),
]


@pytest.mark.parametrize(("call", "error", "match"), ERRORS)
def test_refusals_say_what_to_do(call, error, match):
    with pytest.raises(error, match=match):
        call()
