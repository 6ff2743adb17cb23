"""Flows on circles and tori: no seam at pi, unit mass, and known laws learned."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from flow_cases import awake
from pyro.distributions import constraints

from pyrogen.distributions.recipes.circular import ncsf
from pyrogen.distributions.supports import circular
from pyrogen.objectives import MaximumLikelihood
from pyrogen.testing import DISTRIBUTION_CHECKS
from pyrogen.training import Trainer

CYLINDER = constraints.stack([constraints.positive, circular, constraints.real], dim=-1)


def woken(features, context=0, **kwargs):
    """The weights of :func:`awake` with the circle left as it is."""
    flow = awake(ncsf(features, context, **{"layers": 3, "hidden": (16,), **kwargs})).double()
    flow.shift.masked_fill_(flow.angles, 0.0)
    flow.scale.masked_fill_(flow.angles, 1.0)
    return flow


FLOWS = {
    "circle": lambda context=0: woken(1, context),
    "torus": lambda context=0: woken(2, context),
    "5-torus": lambda context=0: woken(5, context, layers=5),
    "cylinder": lambda context=0: woken(3, context, support=CYLINDER),
}


@pytest.fixture(params=FLOWS.values(), ids=FLOWS)
def make(request):
    return request.param


def grid(n):
    return ((torch.arange(n).double() + 0.5) / n * 2 - 1) * math.pi


def test_untrained_flow_is_uniform():
    x = grid(7)[:, None].float()
    assert torch.allclose(ncsf(1)().log_prob(x), torch.tensor(-math.log(2 * math.pi)))


@pytest.mark.parametrize("features", [1, 2])
def test_mass_on_the_torus_is_one(features):
    flow = woken(features)
    x = torch.cartesian_prod(*[grid(400)] * features).reshape(-1, features)
    with torch.no_grad():
        mass = flow().log_prob(x).exp().mean() * (2 * math.pi) ** features
    assert mass.item() == pytest.approx(1, abs=1e-4)


def test_density_and_its_slope_have_no_seam(make):
    flow = make()
    x = flow().sample((20,))
    for i in torch.nonzero(flow.angles).flatten():
        ends = []
        for end in (math.pi, -math.pi):
            at = x.clone()
            at[:, i] = end * (1 - 1e-9)
            at.requires_grad_()
            log_prob = flow().log_prob(at)
            ends.append((log_prob, *torch.autograd.grad(log_prob.sum(), at)))
        for one, other in zip(*ends, strict=True):
            drop = torch.arange(x.shape[1]) != i if one.ndim > 1 else slice(None)
            assert torch.allclose(one[..., drop], other[..., drop], atol=1e-5)


def test_whole_turns_change_nothing(make):
    p = make()()
    x = p.sample((20,))
    for i in torch.nonzero(make().angles).flatten():
        turned = x.clone()
        turned[:, i] += 2 * math.pi
        there = p.bijection.inverse_and_ladj(turned)
        assert torch.allclose(there[0], p.to_noise(x), atol=1e-9)


def test_draw_and_score_agree_and_stay_on_the_circle(make):
    for context in (None, torch.randn(4, 2).double()):
        p = make(0 if context is None else 2)(context)
        x, log_prob = p.rsample_and_log_prob((50,))
        assert (p.log_prob(x) - log_prob).abs().max() < 1e-9
        assert p.support.check(x).all()


def test_log_determinant_matches_autograd(make):
    p = make()()
    z = p.noise.sample()
    jacobian = torch.autograd.functional.jacobian(p.from_noise, z)
    ladj = p.bijection.call_and_ladj(z)[1]
    assert torch.allclose(ladj.sum(), torch.linalg.slogdet(jacobian).logabsdet, atol=1e-9)


def test_every_feature_depends_on_every_other():
    p = woken(5, layers=6)()
    jacobian = torch.autograd.functional.jacobian(p.from_noise, p.noise.sample())
    assert (jacobian != 0).all()


def test_features_keep_their_place():
    """Only what is circular lies within pi, whatever was permuted on the way."""
    flow = woken(6, layers=6, support=constraints.stack([circular, constraints.real] * 3, dim=-1))
    flow.scale.masked_fill_(~flow.angles, 10.0)
    far = flow().sample((500,)).abs().amax(0) > math.pi
    assert torch.equal(far, ~flow.angles)


@pytest.mark.parametrize("check", DISTRIBUTION_CHECKS, ids=lambda f: f.__name__)
def test_flow_is_a_distribution(make, check):
    check(make(2)(torch.randn(4, 2).double()))


def test_copies_and_states_agree(make):
    flow = make()
    x = flow().sample((5,))
    other = make()
    other.load_state_dict(flow.state_dict())
    for twin in (copy.deepcopy(flow), other):
        assert torch.equal(twin().log_prob(x), flow().log_prob(x))


@pytest.mark.slow
def test_mixture_of_von_mises_is_learned():
    """Modes at 2 and, across the seam, at pi; the gap to the entropy is under 0.03 nats."""
    pyro.set_rng_seed(1)

    def truth():
        each = dist.VonMises(
            torch.tensor([[2.0, 0.0], [math.pi, -1.0]]), torch.tensor([[8.0, 4.0], [4.0, 8.0]])
        ).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), each)

    p = truth()
    train, test = p.sample((10_000,)), p.sample((5000,))
    flow = ncsf(2, layers=4, hidden=(32,))
    trainer = Trainer(MaximumLikelihood(flow), torch.optim.Adam(flow.parameters(), lr=3e-3))
    for _ in range(500):
        trainer.step(train[torch.randint(len(train), (256,))])
    with torch.no_grad():
        gap = (p.log_prob(test) - flow().log_prob(test)).mean()
    assert gap < 0.03


ERRORS = [
    (lambda: ncsf(2, support=constraints.real), r"support with angles, got Real.*circular"),
    (lambda: ncsf(2).double()().log_prob(torch.full((2,), 4.0)), r"within the support"),
    (lambda: ncsf(3, support=CYLINDER).standardize(torch.ones(5, 2)), r"\(\*batch, 3\)"),
]


@pytest.mark.parametrize(("call", "match"), ERRORS)
def test_refusals_say_what_to_do(call, match):
    with pytest.raises(ValueError, match=match):
        call()
