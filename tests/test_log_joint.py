"""The log-joint of many unconstrained latents at once, against a loop over single traces."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal
from torch.distributions import biject_to

from pyrogen.guides.log_joint import LogJoint
from pyrogen.targets import EightSchools


def of(model, *args):
    guide = AutoMultivariateNormal(model)
    guide(*args)
    return LogJoint(model, guide, *args)


def many_shapes(x):
    pyro.sample("w", dist.Dirichlet(torch.ones(4)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    pyro.sample("l", dist.LKJCholesky(3, 1.5))
    rows = pyro.plate("rows", 2, dim=-2)
    with pyro.plate("columns", 3, dim=-1):
        pyro.sample("m", dist.Normal(0.0, scale))
        with rows:
            r = pyro.sample("r", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
            pyro.deterministic("twice", 2 * r)
            with poutine.scale(scale=0.5):
                pyro.sample("x", dist.Normal(r.sum(-1), 1.0), obs=x)
    pyro.factor("penalty", -scale.square())


def one_by_one(log_joint, u):
    """Log-density of each row, by a trace of the model alone, and its Jacobian by autograd."""
    guide, total = log_joint.guide, []
    for row in u:
        values, ladj = {}, 0.0
        for site, part in guide._unpack_latent(row):
            transform = biject_to(site["fn"].support)
            values[site["name"]] = transform(part)
            ladj = ladj + transform.log_abs_det_jacobian(part, transform(part)).sum()
        model = poutine.condition(log_joint.model, values)
        trace = poutine.trace(model).get_trace(*log_joint.args)
        total.append(trace.log_prob_sum() + ladj)
    return torch.stack(total)


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (many_shapes, (torch.tensor([[0.5, 1.0, 2.0], [1.0, 0.3, 0.7]]),)),
        (EightSchools().centred, ()),
        (EightSchools().non_centred, ()),
    ],
    ids=["shapes", "centred", "non-centred"],
)
def test_is_that_of_single_traces(model, args):
    log_joint = of(model, *args)
    u = torch.randn(7, log_joint.guide.latent_dim)
    assert torch.allclose(log_joint(u), one_by_one(log_joint, u), rtol=1e-5, atol=1e-4)
    assert log_joint(u.reshape(7, 1, -1)).shape == (7, 1)
    assert log_joint(u[0]).shape == ()


def test_gradient_is_that_of_single_traces():
    log_joint = of(EightSchools(dtype=torch.float64).centred)
    u = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    together, alone = (
        torch.autograd.grad(f.sum(), u)[0] for f in (log_joint(u), one_by_one(log_joint, u))
    )
    assert torch.allclose(together, alone, rtol=1e-10)


def test_constrained_values_have_the_shapes_of_sites():
    log_joint = of(many_shapes, torch.zeros(2, 3))
    values = log_joint.constrain(torch.randn(4, 5, log_joint.guide.latent_dim))
    assert {name: tuple(v.shape[2:]) for name, v in values.items()} == {
        "w": (4,),
        "scale": (),
        "l": (3, 3),
        "m": (3,),
        "r": (2, 3, 2),
    }
    assert torch.allclose(values["w"].sum(-1), torch.ones(4, 5))


def test_prior_draws_follow_the_prior():
    """Mean and spread of 4000 draws, each within five standard errors (one in 10^5 fails)."""
    log_joint = of(EightSchools().non_centred)
    u, log_weight = log_joint.prior(4000)
    assert u[:, 0].mean().abs() < 5 * 5 / 4000**0.5
    assert u[:, 2:].std() == pytest.approx(1.0, abs=5 / (2 * 8 * 4000) ** 0.5)
    evidence = log_weight.logsumexp(0).item() - math.log(4000)
    assert evidence == pytest.approx(EightSchools().log_evidence(), abs=0.1)
    assert u[:, 1].quantile(0.5) == pytest.approx(torch.tensor(5.0).log().item(), abs=0.15)


def test_impossible_values_have_no_density_and_raise_nothing():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("wall", torch.where(x > 1, -torch.inf, 0.0))
        pyro.sample("y", dist.Normal(0.0, x.abs()), obs=torch.tensor(1.0))

    log_p = of(model)(torch.tensor([[0.5], [2.0], [0.0]]))
    assert log_p.isfinite().tolist() == [True, False, False]
    assert log_p[1] == -torch.inf


def test_a_support_that_depends_on_another_site_is_refused():
    def model():
        high = pyro.sample("high", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Uniform(0.0, high))

    with pytest.raises(NotImplementedError, match="'x' has a support that depends"):
        of(model)(torch.zeros(3, 2))


def test_what_does_not_fit_is_refused():

    def m():
        return pyro.sample("m", dist.Normal(0.0, 1.0))

    def whole():
        loc = m()
        with pyro.plate("data", 6, subsample_size=3):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.zeros(3))

    with pytest.raises(ValueError, match=r"plate 'data' shows 3 of 6.*subsample_size"):
        of(whole)
    with pytest.raises(RuntimeError, match=r"Call guide\(\*args\)"):
        LogJoint(m, AutoMultivariateNormal(m))
    guide = AutoMultivariateNormal(m)
    guide()
    with pytest.raises(ValueError, match="latent site 'k' in the model and not in the guide"):
        LogJoint(lambda: (m(), pyro.sample("k", dist.Normal(0.0, 1.0))), guide)
    with pytest.raises(ValueError, match="site 'm' in the guide and not in the model"):
        LogJoint(lambda: pyro.factor("f", torch.zeros(())), guide)
    with pytest.raises(ValueError, match="shape"):
        LogJoint(m, guide)(torch.zeros(4, 2))
    with pytest.raises(TypeError, match="floating-point"):
        LogJoint(m, guide)(torch.zeros(4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="float32"):
        LogJoint(m, guide)(torch.zeros(4, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="NaN"):
        LogJoint(m, guide)(torch.full((4, 1), torch.nan))
