"""Flows as citizens of Pyro: plates, subsamples, particles, every autoguide, poutines."""

import copy
import logging
from functools import partial

import pyro
import pyro.distributions as dist
import pyro.infer.autoguide as autoguide
import pytest
import torch
from flow_cases import RECIPES, awake
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Importance,
    Predictive,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.infer.inspect import (
    generate_graph_specification,
    get_dependencies,
    get_model_relations,
)

from pyrogen.distributions import Transformed, nsf, realnvp
from pyrogen.distributions.recipes.circular import ncsf
from pyrogen.distributions.supports import circular
from pyrogen.guides import AutoFlow


@pytest.fixture(params=RECIPES.values(), ids=RECIPES)
def recipe(request):
    return request.param


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


SIMPLEX = constraints.cat([constraints.simplex, constraints.positive], dim=-1, lengths=[3, 1])
FLOWS = {
    "real": lambda: awake(realnvp(2, layers=2, hidden=(8,))),
    "positive": lambda: awake(nsf(2, layers=2, hidden=(8,), support=constraints.positive)),
    "simplex and positive": lambda: awake(realnvp(3, layers=2, hidden=(8,), support=SIMPLEX)),
    "covariance": lambda: awake(
        realnvp(3, layers=2, hidden=(8,), support=constraints.positive_definite)
    ),
    "angles": lambda: ncsf(2, layers=2, hidden=(8,)),
    "angle and real": lambda: ncsf(
        2,
        layers=2,
        hidden=(8,),
        support=constraints.stack([circular, constraints.real], dim=-1),
    ),
}


@pytest.fixture(params=FLOWS.values(), ids=FLOWS)
def flow(request):
    return request.param().requires_grad_(False)


def observed(flow):
    def model():
        z = pyro.sample("z", flow())
        pyro.sample("y", dist.Normal(z.flatten().sum(), 1.0), obs=torch.tensor(1.0))

    return model


# Shapes


def test_shapes_need_an_instance():
    with pytest.raises(NotImplementedError, match=r"depend on its transforms. Build it"):
        Transformed.infer_shapes(noise=torch.Size([3]))
    p = nsf(3, 2, support=constraints.corr_cholesky)(torch.randn(5, 2))
    assert (p.batch_shape, p.event_shape) == ((5,), (3, 3))


# Structure, by tensors that remember their sites and whose shapes are plain tuples


def test_sites_above_and_below_a_flow_are_seen(recipe):
    flow = awake(recipe(2, 3))

    def model():
        c = pyro.sample("c", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("lone", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 2):
            z = pyro.sample("z", flow(c))
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.zeros(2))

    relations = get_model_relations(model)
    assert relations["sample_sample"] == {"c": [], "lone": [], "z": ["c"], "y": ["z"]}
    assert relations["plate_sample"] == {"n": ["z", "y"]}
    graph = generate_graph_specification(relations)  # what render_model draws
    assert sorted(graph["edge_list"]) == [("c", "z"), ("z", "y")]
    assert get_dependencies(model)["posterior_dependencies"] == {
        "c": {"c": set(), "z": set()},
        "lone": {"lone": set()},
        "z": {"z": set(), "y": set()},
    }


def test_parameters_of_a_guide_are_seen():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = AutoFlow(model, partial(nsf, layers=1, hidden=(8,))).setup()
    relations = get_model_relations(guide)
    assert relations["sample_sample"] == {"_AutoFlow_latent": [], "z": ["_AutoFlow_latent"]}
    assert set(relations["param_constraint"].values()) == {"Real()"}
    assert len(relations["param_constraint"]) == len(list(guide.parameters()))


def test_structure_is_seen_on_every_support(flow):
    relations = get_model_relations(observed(flow))
    assert relations["sample_sample"] == {"z": [], "y": ["z"]}
    assert get_dependencies(observed(flow))["posterior_dependencies"] == {
        "z": {"z": set(), "y": set()}
    }


def test_to_event_and_mask_reach_the_density(recipe):
    p = awake(recipe(2, 3))(torch.randn(4, 7, 3))
    x = p.sample()
    assert p.to_event(1).batch_shape == (4,)
    assert torch.allclose(p.to_event(1).log_prob(x), p.log_prob(x).sum(-1))
    keep = torch.rand(4, 7) < 0.5
    assert torch.equal(p.mask(keep).log_prob(x), torch.where(keep, p.log_prob(x), 0.0))
    assert p.to_event(2).mask(False).expand([3]).log_prob(x.expand(3, 4, 7, 2)).tolist() == [0] * 3
    assert p.to_event(1).support.event_dim == 2


def test_expand_by_and_expanded_masks(flow):
    p = flow()
    x = p.expand_by([3, 2]).sample()
    assert x.shape == (3, 2, *p.event_shape)
    assert p.expand([3, 1]).expand([3, 2]).log_prob(x).shape == (3, 2)
    assert type(p.expand_by([3])) is Transformed
    assert p.support.check(x).all()


def test_an_expanded_flow_is_validated_like_the_flow():
    p = nsf(2, support=constraints.positive)().expand([3])
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(-torch.ones(3, 2))


# Plates


def test_nested_plates_with_subsamples_scale_the_density(recipe):
    flow = awake(recipe(2, 3)).requires_grad_(False)
    context, data = torch.randn(6, 10, 3), torch.randn(6, 10, 2)

    def model():
        rows = pyro.plate("rows", 6, subsample_size=3, dim=-2)
        columns = pyro.plate("columns", 10, subsample_size=5, dim=-1)
        with rows as i, columns as j:
            at = i[:, None], j
            pyro.sample("x", flow(context[at]), obs=data[at])
            pyro.sample("z", flow(context[at]).mask(i[:, None] > 2))

    trace = poutine.trace(model).get_trace()
    i, j = (trace.nodes[name]["value"] for name in ("rows", "columns"))
    trace.compute_log_prob()
    expected = flow(context[i[:, None], j]).log_prob(data[i[:, None], j])
    assert torch.allclose(trace.nodes["x"]["unscaled_log_prob"], expected, atol=1e-5)
    assert trace.nodes["x"]["scale"] == 4
    assert (trace.nodes["z"]["log_prob"] == 0).all(-1).tolist() == (i <= 2).tolist()


@pytest.mark.parametrize("vectorize", [False, True])
def test_particles_agree_whether_vectorized(recipe, vectorize):
    """A conditional guide in a plate: the bound has one mean, however particles are run."""
    prior = awake(recipe(2)).requires_grad_(False)
    guide_flow = awake(recipe(2, 1)).requires_grad_(False)
    data = torch.linspace(-1, 1, 5)

    def model():
        with pyro.plate("data", 5):
            z = pyro.sample("z", prior())
            pyro.sample("x", dist.Normal(z.sum(-1), 5.0), obs=data)

    def guide():
        with pyro.plate("data", 5):
            pyro.sample("z", guide_flow(data[:, None]))

    elbo = Trace_ELBO(num_particles=100, vectorize_particles=vectorize, max_plate_nesting=1)
    with torch.no_grad():
        loss = elbo.loss(model, guide)
        x, log_q = guide_flow(data[:, None]).rsample_and_log_prob((20_000,))
        log_p = prior().log_prob(x) + dist.Normal(x.sum(-1), 5.0).log_prob(data)
    terms = (log_q - log_p).sum(-1)
    assert abs(loss - terms.mean()) < 5 * terms.std() / 100**0.5


ELBOS = [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, RenyiELBO]


@pytest.mark.parametrize("elbo", ELBOS, ids=lambda e: e.__name__)
def test_flow_is_prior_and_guide_under_every_elbo(flow, elbo):
    prior, posterior = flow, copy.deepcopy(flow).requires_grad_()

    def guide():
        pyro.module("posterior", posterior)
        pyro.sample("z", posterior())

    loss = elbo(num_particles=2)
    value = loss.loss(observed(prior), guide)
    assert torch.isfinite(torch.as_tensor(value))
    SVI(observed(prior), guide, pyro.optim.Adam({"lr": 1e-3}), elbo(num_particles=2)).step()


def test_wake_sleep_and_importance_take_a_flow():
    prior = FLOWS["real"]().requires_grad_(False)
    posterior = FLOWS["real"]()

    def guide():
        pyro.module("posterior", posterior)
        pyro.sample("z", posterior())

    loss = ReweightedWakeSleep(num_particles=4, vectorize_particles=False)
    assert loss.loss(observed(prior), guide) is not None
    run = Importance(observed(prior), guide, num_samples=20).run()
    assert run.get_ESS() >= 1


def test_guide_is_drawn_beside_an_enumerated_site():
    flow = awake(realnvp(2, layers=2, hidden=(8,)))

    def model():
        z = pyro.sample("z", flow())
        k = pyro.sample("k", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(z.sum(-1) + k, 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    elbo = TraceEnum_ELBO(max_plate_nesting=0)
    z = torch.tensor([0.3, 0.4])
    conditioned = pyro.condition(model, {"z": z})
    loss = elbo.loss(conditioned, lambda: None)
    each = dist.Normal(0.7 + torch.arange(3.0), 1.0).log_prob(torch.tensor(1.0))
    expected = flow().log_prob(z) + each.logsumexp(0) - torch.tensor(3.0).log()
    assert loss == pytest.approx(-expected.item(), abs=1e-5)


# Every automatic guide

GUIDES = {
    "delta": autoguide.AutoDelta,
    "laplace": autoguide.AutoLaplaceApproximation,
    "low rank": autoguide.AutoLowRankMultivariateNormal,
    "normal": autoguide.AutoNormal,
    "diagonal": autoguide.AutoDiagonalNormal,
    "multivariate": autoguide.AutoMultivariateNormal,
    "iaf": autoguide.AutoIAFNormal,
    "structured": autoguide.AutoStructured,
    "gaussian": autoguide.AutoGaussian,
}


@pytest.mark.parametrize("make", GUIDES.values(), ids=GUIDES)
def test_every_autoguide_takes_a_flow_as_prior(flow, make):
    model = observed(flow)
    iaf = make is autoguide.AutoIAFNormal
    guide = make(model, hidden_dim=[8]) if iaf else make(model, init_loc_fn=init_to_sample)
    SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step()
    if make is autoguide.AutoLaplaceApproximation:
        return
    draws = Predictive(model, guide=guide, num_samples=3)()["z"]
    assert flow().support.check(draws.reshape(3, *flow().event_shape)).all()


def test_semi_automatic_guides_take_a_flow(flow):
    model = observed(flow)
    groups = autoguide.AutoGuideList(model)
    groups.append(autoguide.AutoNormal(poutine.block(model, expose=["z"])))
    SVI(model, groups, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step()
    messenger = autoguide.AutoNormalMessenger(model)
    SVI(model, messenger, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO()).step()


def test_laplace_uses_a_right_hessian():
    """The prior is an affine flow, so Laplace is exact: N(0.8 y, 0.8) by conjugacy."""
    flow = realnvp(2, layers=1).double().requires_grad_(False)
    flow.scale.fill_(2.0)

    def model():
        z = pyro.sample("z", flow())
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.tensor([1.0, 5.0]).double())

    guide = autoguide.AutoLaplaceApproximation(model)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.3, "lrd": 0.985}), Trace_ELBO())
    for _ in range(500):
        svi.step()
    found = guide.laplace_approximation().get_posterior()
    assert torch.allclose(found.mean, torch.tensor([0.8, 4.0]).double(), atol=1e-2)
    assert torch.allclose(found.covariance_matrix, 0.8 * torch.eye(2).double(), atol=1e-6)


# Chains


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.filterwarnings("ignore")  # torch's, while it traces
def test_nuts_runs_on_every_support(flow, jit):
    kernel = NUTS(observed(flow), max_tree_depth=3, jit_compile=jit, ignore_jit_warnings=True)
    mcmc = MCMC(kernel, num_samples=5, warmup_steps=15, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["z"]
    assert flow().support.check(draws).all()
    assert len(draws.flatten(1).unique(dim=0)) > 1


def test_a_chain_of_a_flow_prior_has_its_law():
    """With no data NUTS must give back the prior, here a log-normal beside a normal."""
    flow = realnvp(
        2, layers=1, support=constraints.stack([constraints.positive, constraints.real], dim=-1)
    )
    flow.requires_grad_(False)
    flow.shift.copy_(torch.tensor([0.5, -1.0]))
    flow.scale.copy_(torch.tensor([0.3, 2.0]))
    mcmc = MCMC(
        NUTS(lambda: pyro.sample("z", flow())),
        num_samples=200,
        warmup_steps=50,
        disable_progbar=True,
    )
    mcmc.run()
    z = mcmc.get_samples()["z"]
    u = torch.stack([z[:, 0].log(), z[:, 1]], -1)
    assert torch.allclose(u.mean(0), torch.tensor([0.5, -1.0]), atol=0.45)
    assert torch.allclose(u.std(0), torch.tensor([0.3, 2.0]), rtol=0.3)


def test_poutines_reach_a_flow(recipe):
    p = awake(recipe(2))()
    x = p.sample()

    def model():
        return pyro.sample("x", p)

    assert torch.equal(poutine.condition(model, {"x": x})(), x)
    trace = poutine.trace(poutine.scale(poutine.condition(model, {"x": x}), 3.0)).get_trace()
    assert torch.allclose(trace.log_prob_sum(), 3 * p.log_prob(x), atol=1e-5)
    replayed = poutine.replay(model, trace=poutine.trace(model).get_trace())
    assert torch.equal(replayed(), replayed())
    lifted = poutine.uncondition(poutine.condition(model, {"x": x}))
    assert lifted().shape == (2,)
