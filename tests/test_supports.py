"""From a constraint to a bijection: log-determinants, known laws, Pyro's use of them, refusals."""

import copy
import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from flow_cases import awake
from pyro.distributions import constraints
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch.distributions import biject_to

from pyrogen.distributions import Flow, realnvp
from pyrogen.distributions.recipes.circular import ncsf
from pyrogen.distributions.supports import agree, angles_of, circular, from_reals, strictly_inside
from pyrogen.transforms import Elementwise


def lower(offset):
    def free(y):
        i, j = torch.tril_indices(*y.shape[-2:], offset)
        return y[..., i, j]

    return free


def all_but_last(y):
    return y[..., :-1]


def same(y):
    return y


MIXED = constraints.stack(
    [
        constraints.real,
        constraints.positive,
        constraints.positive,
        constraints.interval(-1.0, 3.0),
    ],
    dim=-1,
)
JOINED = constraints.cat(
    [constraints.simplex, constraints.positive, constraints.ordered_vector, MIXED],
    dim=-1,
    lengths=[3, 1, 2, 4],
)
PER_FEATURE = dist.Uniform(torch.tensor([0.0, -1.0]), torch.tensor([1.0, 3.0])).support
CASES = {  # support, features, free coordinates
    "real": (constraints.real, 3, same),
    "positive": (constraints.positive, 3, same),
    "softplus positive": (constraints.softplus_positive, 3, same),
    "less than": (constraints.less_than(1.0), 3, same),
    "tensor bound": (constraints.greater_than(torch.tensor(2.0)), 3, same),
    "bounds per feature": (PER_FEATURE, 2, same),
    "simplex": (constraints.simplex, 3, all_but_last),
    "ordered": (constraints.ordered_vector, 3, same),
    "positive ordered": (constraints.positive_ordered_vector, 3, same),
    "corr cholesky": (constraints.corr_cholesky, 6, lower(-1)),
    "corr matrix": (constraints.corr_matrix, 6, lower(-1)),
    "lower cholesky": (constraints.lower_cholesky, 6, lower(0)),
    "positive definite": (constraints.positive_definite, 6, lower(0)),
    "circular": (circular, 3, same),
    "stack": (MIXED, 4, same),
    "cat": (JOINED, 9, lambda y: torch.cat([y[..., :2], y[..., 3:]], -1)),
    "of a Dirichlet": (dist.Dirichlet(torch.ones(3)).support, 2, all_but_last),
    "of an event": (dist.LogNormal(torch.zeros(3), 1.0).to_event(1).support, 3, same),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    return request.param


def flow_onto(support, features, context=0):
    recipe = ncsf if support is circular else realnvp
    flow = awake(recipe(features, context, layers=2, hidden=(8,), support=support)).double()
    flow.shift.masked_fill_(flow.angles, 0.0)
    flow.scale.masked_fill_(flow.angles, 1.0)
    return flow


def total(bijection, ladj):
    return ladj if bijection.domain.event_dim else ladj.sum(-1)


# The bijection


def test_log_determinant_is_that_of_the_free_coordinates(case):
    support, features, free = case
    f = from_reals(support)
    x = torch.randn(features).double()
    _, ladj = f.call_and_ladj(x)
    jacobian = torch.autograd.functional.jacobian(lambda x: free(f(x)), x)
    assert torch.allclose(total(f, ladj), torch.linalg.slogdet(jacobian).logabsdet, atol=1e-8)


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float32, 1e-3), (torch.float64, 1e-9)])
def test_inverse_undoes_forward(case, dtype, gap):
    support, features, _ = case
    f = from_reals(support)
    x = torch.randn(5, 2, features, dtype=dtype)
    y, ladj = f.call_and_ladj(x)
    back, inverse = f.inverse_and_ladj(y.clone())
    assert y.dtype == back.dtype == dtype
    assert torch.allclose(back, x, atol=gap)
    assert torch.allclose(inverse, -ladj, atol=gap)
    assert f.forward_shape(x.shape) == y.shape
    assert f.inverse_shape(y.shape) == x.shape
    checked = f.codomain.check(y)
    assert checked.all()
    assert checked.shape == y.shape[: y.ndim - f.codomain.event_dim]


@pytest.mark.parametrize("name", ["simplex", "corr cholesky"])
def test_single_precision_holds_far_out(name):
    support, features, _ = CASES[name]
    x = 4 * torch.randn(10_000, features)
    f = from_reals(support)
    y, ladj = f.call_and_ladj(x)
    back, inverse = f.inverse_and_ladj(y)
    assert (back - x).abs().max() < 1e-4
    assert (ladj + inverse).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["simplex", "ordered", "corr cholesky", "corr matrix"])
def test_map_is_the_one_that_pyro_uses(name):
    support, features, _ = CASES[name]
    x = torch.randn(5, features).double()
    assert torch.allclose(from_reals(support)(x), biject_to(support)(x), atol=1e-10)


def test_biject_to_maps_the_reals_onto_what_a_flow_declares(case):
    support, features, _ = case
    declared = from_reals(support).codomain
    chart = biject_to(declared)
    x = torch.randn(5, features).double()
    y = chart(x)
    assert declared.check(y).all()
    assert torch.allclose(chart.inv(y), x, atol=1e-8)


def test_outside_is_outside():
    check = from_reals(JOINED).codomain.check
    good = torch.tensor([0.2, 0.3, 0.5, 1.0, -1.0, 2.0, 0.0, 1.0, 1.0, 0.0])
    assert check(good)
    for i, bad in [(0, 0.9), (3, -1.0), (4, 3.0), (7, -1.0), (9, 4.0)]:
        spoiled = good.clone()
        spoiled[i] = bad
        assert not check(spoiled)


# The flow


def test_draw_and_score_agree_with_the_free_coordinates(case):
    support, features, free = case
    p = flow_onto(support, features)()
    x, log_prob = p.rsample_and_log_prob((20,))
    assert torch.allclose(p.log_prob(x), log_prob, atol=1e-8)
    assert p.support.check(x).all()
    assert p.log_prob(x).shape == (20,)
    z = p.to_noise(x[0]).detach()
    jacobian = torch.autograd.functional.jacobian(lambda z: free(p.from_noise(z)), z)
    expected = p.noise.log_prob(z) - torch.linalg.slogdet(jacobian).logabsdet
    assert torch.allclose(log_prob[0], expected, atol=1e-8)


def test_flow_has_shapes_context_and_copies(case):
    support, features, _ = case
    flow = flow_onto(support, features, 3)
    context = torch.randn(4, 1, 3).double()
    p = flow(context)
    event = from_reals(support).forward_shape((features,))
    assert (p.batch_shape, p.event_shape) == ((4, 1), event)
    wide = p.expand((4, 7))
    x = wide.sample((2,))
    assert x.shape == (2, 4, 7, *event)
    assert wide.log_prob(x).shape == (2, 4, 7)
    assert torch.equal(copy.deepcopy(flow)(context).log_prob(x[:, :, :1]), p.log_prob(x[:, :, :1]))
    with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 7):
        assert pyro.sample("x", p).shape == (4, 7, *event)


def test_standardize_gives_unit_scale(case):
    support, features, _ = case
    flow = flow_onto(support, features)
    data = flow_onto(support, features)().sample((50,))
    flow.standardize(data)
    u = flow.constrain.inv(data)
    assert torch.allclose(flow.shift, u.mean(0).masked_fill(flow.angles, 0.0))
    assert torch.allclose(flow.scale, u.std(0).masked_fill(flow.angles, 1.0))


def test_flow_is_a_prior_for_nuts_and_autoguides(case, caplog):
    caplog.set_level(logging.ERROR)
    support, features, _ = case
    flow = flow_onto(support, features).requires_grad_(False)

    def model():
        z = pyro.sample("z", flow())
        pyro.sample("y", dist.Normal(z.sum(), 1.0), obs=torch.tensor(1.0).double())

    for guide in (AutoNormal(model), AutoMultivariateNormal(model)):
        guide.double()
        SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()
        assert flow().support.check(guide()["z"]).all()
    mcmc = MCMC(NUTS(model, max_tree_depth=2), num_samples=2, warmup_steps=2, disable_progbar=True)
    mcmc.run()
    assert flow().support.check(mcmc.get_samples()["z"]).all()


# Known laws


def test_log_normal_beside_normal():
    flow = Flow(
        2,
        [Elementwise(2)],
        support=constraints.stack([constraints.positive, constraints.real], -1),
    )
    flow.double().shift.fill_(0.3)
    flow.scale.fill_(2.0)
    x = torch.tensor([0.7, -0.4]).double()
    expected = dist.LogNormal(0.3, 2.0).log_prob(x[0]) + dist.Normal(0.3, 2.0).log_prob(x[1])
    assert torch.allclose(flow().log_prob(x), expected)


KNOWN = {
    "dirichlet": lambda: dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0]).double()),
    "lkj cholesky": lambda: dist.LKJCholesky(3, torch.tensor(1.5).double()),
    "lkj": lambda: dist.LKJ(3, torch.tensor(1.5).double()),
    "wishart": lambda: torch.distributions.Wishart(
        torch.tensor(8.0).double(), torch.eye(2).double()
    ),
}


def draws(p):
    if isinstance(p, torch.distributions.Wishart):  # whose own draws warn without a cause
        root = torch.randn(500, 2, 8).double()
        return root @ root.mT
    return p.sample((500,))


@pytest.mark.parametrize("name", KNOWN)
def test_known_law_integrates_to_one_by_importance_sampling(name):
    """E[p/q] = 1 under a flow q on the support of p: a wrong unit of volume shows."""
    p = KNOWN[name]()
    f = from_reals(p.support)
    features = f.inverse_shape(p.event_shape)[0]
    flow = realnvp(features, layers=1, support=p.support).double()
    with torch.no_grad():
        flow.standardize(draws(p))
        flow.scale.mul_(1.3)  # wider than the target, so that weights are bounded
        x, log_q = flow().rsample_and_log_prob((20_000,))
        weight = (p.log_prob(x) - log_q).exp()
    error = weight.std() / len(weight) ** 0.5
    assert error < 0.05
    assert abs(weight.mean() - 1) < 4.5 * error  # fails once in 1e5


# Angles


def test_angles_are_found():
    s = constraints.cat([constraints.simplex, circular], dim=-1, lengths=[3, 2])
    assert angles_of(s, 4).tolist() == [False, False, True, True]
    assert angles_of(circular, 2).tolist() == [True, True]
    assert angles_of(constraints.independent(circular, 1), 1).tolist() == [True]
    assert not angles_of(JOINED, 9).any()


def test_both_ends_of_the_circle_are_on_it():
    for dtype in (torch.float32, torch.float64):
        ends = torch.tensor([-math.pi, math.pi], dtype=dtype)
        assert circular.check(ends).all()
    assert not circular.check(torch.tensor(3.15))


# Comparing


def test_constraints_agree_when_they_say_the_same():
    assert agree(constraints.interval(0.0, 1.0), constraints.interval(0.0, 1.0))
    assert not agree(constraints.interval(0.0, 1.0), constraints.interval(0.0, 2.0))
    assert agree(
        constraints.interval(0.0, torch.ones(2)), constraints.interval(0.0, torch.ones(2))
    )
    assert not agree(constraints.real, constraints.positive)
    for name, (support, *_) in CASES.items():
        once, again = from_reals(support).codomain, from_reals(support).codomain
        assert agree(once, again), name
    assert not agree(from_reals(MIXED).codomain, from_reals(JOINED).codomain)


def test_borders_are_not_inside():
    s = from_reals(MIXED).codomain
    x = torch.tensor([[0.0, 1.0, 1.0, 3.0], [0.0, 1.0, 1.0, 2.0]])
    assert strictly_inside(s, x).tolist() == [False, True]


# Refusals


def of_matrix(support, data):
    return lambda: Flow(3, [], support=support).standardize(data)


ERRORS = [
    (lambda: from_reals(constraints.sphere), r"sphere, which is none.*circular"),
    (lambda: from_reals(dist.Uniform.support), r"depends on\s+parameters.*instance"),
    (lambda: from_reals(dist.Poisson(1.0).support), r"reals map onto.*add uniform noise"),
    (lambda: from_reals(dist.Categorical(torch.ones(3)).support), r"reals map onto"),
    (lambda: from_reals(constraints.positive_semidefinite), r"reals map onto.*by torch.*biject"),
    (lambda: from_reals(constraints.one_hot), r"reals map onto.*add uniform noise"),
    (lambda: from_reals(constraints.stack([constraints.real], dim=0)), r"dim=0. Pass dim=-1"),
    (
        lambda: from_reals(constraints.stack([constraints.simplex], dim=-1)),
        r"single features. Join vectors by\s+constraints.cat",
    ),
    (
        lambda: from_reals(constraints.cat([constraints.corr_cholesky], dim=-1, lengths=[3])),
        r"got a matrix among them",
    ),
    (
        lambda: from_reals(constraints.interval(torch.zeros(2, 2), 1.0)),
        r"bounds for each feature.*got \(2, 2\)",
    ),
    (
        lambda: Flow(4, [], support=constraints.corr_cholesky),
        r"fill CorrCholesky.*got 4.*n \(n - 1",
    ),
    (
        lambda: Flow(4, [], support=constraints.lower_cholesky),
        r"fill LowerCholesky.*got 4.*n \(n \+",
    ),
    (lambda: Flow(3, [], support=MIXED), r"fill.*got 3.*need 4\s+features"),
    (
        lambda: Flow(1, [], event_shape=(), support=constraints.simplex),
        r"events of at least 1 dimensions",
    ),
    (lambda: Flow(2, [], support=circular), r"on the circle.*ncsf"),
    (of_matrix(constraints.lower_cholesky, torch.eye(2).expand(5, 2, 2)), r"3 constant|vary"),
    (of_matrix(constraints.lower_cholesky, -torch.eye(2).expand(5, 2, 2)), r"5 outside"),
    (of_matrix(constraints.lower_cholesky, torch.ones(5, 3)), r"\(\*batch, 2, 2\), got \(5, 3\)"),
]


@pytest.mark.parametrize(("call", "match"), ERRORS)
def test_refusals_say_what_to_do(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_large_correlations_are_kept_by_their_factor_and_in_double_precision():
    x = torch.randn(200, 120)  # 16 rows
    matrix = from_reals(constraints.corr_matrix)
    exact = matrix(x.double())
    assert torch.linalg.cholesky_ex(exact).info.eq(0).all()
    rounded = torch.linalg.cholesky_ex(exact.float().double())
    assert rounded.info.gt(0).float().mean() > 0.2  # whatever computes them
    assert (matrix.inv(exact) - x).abs().amax(-1).median() < 1e-6
    factor = from_reals(constraints.corr_cholesky)
    y = factor(x)
    assert constraints.corr_cholesky.check(y).all()
    assert (factor.inv(y) - x).abs().max() < 1e-3


def test_a_matrix_that_is_not_positive_definite_has_no_density():
    p = Flow(3, [], support=constraints.positive_definite)()
    with pytest.raises(ValueError, match="within the support"):
        p.log_prob(torch.ones(2, 2))
    p = Flow(3, [], support=constraints.positive_definite)
    both = torch.stack([torch.ones(2, 2), torch.eye(2)])
    x, ladj = p.constrain.inverse_and_ladj(both)
    assert x.isnan().any(-1).tolist() == ladj.isnan().tolist() == [True, False]


@pytest.mark.parametrize("name", [name for name in CASES if name != "circular"])
def test_support_of_a_flow_makes_another_flow_of_the_same_support(name):
    support, features, _ = CASES[name]
    first = Flow(features, [], support=support).double()
    second = Flow(features, [], support=first().support).double()
    x = first().sample((5,))
    assert torch.allclose(second().log_prob(x), first().log_prob(x))
    chart = biject_to(second().support)
    assert torch.allclose(chart(chart.inv(x)), x, atol=1e-6)
    with pytest.raises(ValueError, match=r"within the support"):
        second().log_prob(torch.full_like(x, math.nan))


def test_data_on_a_nested_border_are_refused():
    bounds = constraints.interval(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
    support = constraints.cat([bounds, constraints.real], dim=-1, lengths=[2, 1])
    x = torch.tensor([[0.0, 1.5, 0.0], [0.5, 1.2, 1.0], [0.7, 1.7, 2.0]])
    with pytest.raises(ValueError, match="border"):
        Flow(3, [], support=support).standardize(x)
