"""Bounds at home in Pyro: SVI, autoguides, modules, plates of every kind, and what is refused."""

import copy
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from elbo_cases import BOUNDS, chosen
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, config_enumerate
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    AutoNormalMessenger,
    AutoStructured,
)
from torch import nn

from pyrogen.objectives import (
    ELBO,
    DoublyReparameterized,
    ImportanceWeighted,
    Reparameterized,
    ReweightedWakeSleep,
    ScoreFunction,
    TailAdaptive,
    Tempered,
)
from pyrogen.training import Trainer

LOSSES = {name: make for name, (make, *_) in BOUNDS.items()} | {
    "tempered": Tempered,
    "tail adaptive": TailAdaptive,
    "wake": ReweightedWakeSleep,
}
GUIDES = [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal]
DATA = torch.tensor([0.5, 1.5, 1.0, 2.0])


def regression(data):
    """A mean and a positive scale, with a plate of data; more bounds have it than one."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(data)):
        pyro.sample("x", dist.Normal(mean, scale), obs=data)


@pytest.mark.parametrize("guide", [*GUIDES, AutoStructured], ids=lambda g: g.__name__)
@pytest.mark.parametrize("bound", LOSSES)
def test_every_bound_takes_every_autoguide(bound, guide):
    loss = LOSSES[bound](2)
    guide = guide(regression)
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 1e-3}), loss=loss)
    assert svi.step(DATA) < 1e4
    before = {name: p.clone() for name, p in guide.named_parameters()}
    svi.step(DATA)
    assert any(not torch.equal(before[name], p) for name, p in guide.named_parameters())
    assert svi.evaluate_loss(DATA) < 1e4


@pytest.mark.parametrize("gradient", [Reparameterized, DoublyReparameterized, ScoreFunction])
def test_a_guide_of_points_keeps_its_path(gradient):
    """MAP by any gradient; a list of guides, points and laws together, as well."""
    guide = AutoDelta(regression)
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.05}), loss=ELBO(2, gradient=gradient()))
    for _ in range(150):
        svi.step(DATA)
    assert guide.median()["mean"].item() == pytest.approx(1.25 * 9 / 9.1, abs=0.1)

    both = AutoGuideList(regression)
    both.append(AutoDelta(poutine.block(regression, expose=["scale"])))
    both.append(AutoNormal(poutine.block(regression, expose=["mean"])))
    SVI(regression, both, pyro.optim.Adam({"lr": 0.05}), loss=ELBO(2, gradient=gradient())).step(
        DATA
    )


def test_a_guide_inside_its_model_takes_the_path():
    guide = AutoNormalMessenger(regression)
    svi = SVI(regression, guide, pyro.optim.Adam({"lr": 0.02}), loss=ImportanceWeighted(3))
    losses = [svi.step(DATA) for _ in range(60)]
    assert sum(losses[-20:]) < sum(losses[:20])
    for gradient in (ScoreFunction(), DoublyReparameterized()):
        with pytest.raises(NotImplementedError, match="runs only inside its model"):
            ELBO(gradient=gradient).differentiable_loss(regression, guide, DATA)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        with pyro.plate("data", 8, subsample_size=len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z + self.shift, 1.0), obs=x)


class Guide(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(1, 2)

    def forward(self, x):
        loc, log_scale = self.net(x[:, None]).unbind(-1)
        with pyro.plate("data", 8, subsample_size=len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bound", LOSSES)
def test_every_bound_is_a_module(bound, dtype):
    module = LOSSES[bound](3)(Model(), Guide()).to(dtype)
    x = torch.linspace(-1, 1, 4, dtype=dtype)
    loss = module(x)
    assert loss.dtype == dtype
    loss.backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in module.parameters())
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"model", "guide"}

    twin = copy.deepcopy(module)
    Trainer(twin, torch.optim.Adam(twin.parameters(), lr=0.1)).step(x)
    assert not torch.equal(twin.guide.net.weight, module.guide.net.weight)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin.guide.net.weight, module.guide.net.weight)
    assert not list(pyro.get_param_store().keys())


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("bound", LOSSES)
def test_evaluation_is_the_loss_without_a_graph(bound, vectorize):
    loss = LOSSES[bound](3, vectorize_particles=vectorize, max_plate_nesting=1)
    model, guide, x = Model(), Guide(), torch.linspace(-1, 1, 8)
    values = []
    for take in (loss.loss, loss.loss_and_grads, lambda *a: loss.differentiable_loss(*a).item()):
        pyro.set_rng_seed(0)
        values.append(take(model, guide, x))
    assert all(isinstance(value, float) for value in values)
    assert max(values) - min(values) < 1e-5
    with torch.no_grad():
        value = loss.differentiable_loss(model, guide, x)
    assert not value.requires_grad
    assert value.grad_fn is None


@pytest.mark.parametrize("particles", [1, 5])
@pytest.mark.parametrize("gradient", [Reparameterized, DoublyReparameterized])
def test_value_and_path_gradient_are_those_of_pyro(gradient, particles):
    guide, outcome = AutoNormal(regression), []
    guide(DATA)
    for loss in (Trace_ELBO(particles), ELBO(particles, gradient=gradient())):
        guide.zero_grad()
        pyro.set_rng_seed(0)
        value = loss.loss_and_grads(regression, guide, DATA)
        outcome.append((value, [p.grad.clone() for p in guide.parameters()]))
    assert outcome[0][0] == pytest.approx(outcome[1][0], rel=1e-6)
    if gradient is Reparameterized:
        assert all(
            torch.allclose(*g, rtol=1e-5) for g in zip(*(o[1] for o in outcome), strict=True)
        )


@pytest.mark.parametrize("bits", [(0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("gradient", [Reparameterized, ScoreFunction])
def test_a_loop_over_a_plate_is_its_vector(gradient, bits):
    """A draw answers for its own turn of the loop, as for its own cell."""
    logits = torch.tensor([0.3, -0.2], requires_grad=True)
    x, bits = torch.tensor([1.0, -1.0]), torch.tensor(bits)

    def vector(coin=dist.Bernoulli, observed=True):
        with pyro.plate("data", 2):
            z = pyro.sample("z", coin(0.3) if observed else coin(logits=logits))
            if observed:
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def loop(coin=dist.Bernoulli, observed=True):
        for i in pyro.plate("data", 2):
            z = pyro.sample(f"z{i}", coin(0.3) if observed else coin(logits=logits[i]))
            if observed:
                pyro.sample(f"x{i}", dist.Normal(z, 1.0), obs=x[i])

    outcome = []
    for program, draws in ((vector, bits[None]), (loop, bits)):
        coin = chosen(dist.Bernoulli, draws)
        loss = ELBO(gradient=gradient())
        value = loss.differentiable_loss(program, lambda p=program, c=coin: p(c, observed=False))
        outcome.append((value.detach(), torch.autograd.grad(value, logits)[0]))
    assert all(torch.allclose(*pair) for pair in zip(*outcome, strict=True))


@pytest.mark.parametrize("make", [ELBO, ImportanceWeighted])
def test_each_subsample_gives_its_share_of_the_gradient(make):
    """The mean over all minibatches of one is the whole, at draws of no noise."""
    loc = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)
    x = torch.tensor([1.0, -1.0, 0.5])

    def model(i):
        with pyro.plate("data", 3, subsample=i) as i:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[i])

    def guide(i):
        with pyro.plate("data", 3, subsample=i) as i:
            pyro.sample("z", dist.Delta(loc[i]))

    def gradient(i):
        loss = make(2).differentiable_loss(model, guide, torch.tensor(i))
        return torch.autograd.grad(loss, loc)[0]

    whole = gradient([0, 1, 2])
    assert torch.allclose(sum(gradient([i]) for i in range(3)) / 3, whole)
    assert torch.allclose(sum(gradient(i) for i in ([0, 1], [1, 2], [2, 0])) / 3, whole)
    assert torch.allclose(whole, 2 * loc.detach() - x)


@pytest.mark.parametrize("make", [ELBO, ImportanceWeighted])
def test_empty_programs_cost_nothing(make):
    assert make(2).loss(lambda: None, lambda: None) == 0.0
    assert make(2).differentiable_loss(lambda: None, lambda: None).item() == 0.0


def test_a_batch_without_its_plate_is_refused():
    def program():
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    for gradient in (Reparameterized(), DoublyReparameterized(), ScoreFunction()):
        for make in (ELBO, ImportanceWeighted):
            with pytest.raises(ValueError, match="invalid log_prob shape"):
                make(2, gradient=gradient).differentiable_loss(program, program)


def test_a_latent_that_the_guide_does_not_have_is_reported():
    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("k", dist.Bernoulli(0.5))

    def guide():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    for gradient in (Reparameterized(), DoublyReparameterized(), ScoreFunction()):
        with pytest.warns(UserWarning, match="Found vars in model but not guide: {'k'}"):
            ELBO(gradient=gradient).loss(model, guide)


def test_enumeration_stays_with_pyro():
    @config_enumerate
    def program():
        pyro.sample("k", dist.Bernoulli(0.5))

    with pytest.warns(UserWarning, match="TraceEnum_ELBO"):
        ELBO().loss(program, program)


@pytest.mark.parametrize("make", [ELBO, ImportanceWeighted])
def test_nan_warns(make):
    def program():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        bad = dist.Unit(torch.tensor(float("nan")), validate_args=False)
        pyro.sample("bad", bad, obs=torch.empty(0))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(2).loss(program, program)
    assert any("Encountered NaN: loss" in str(w.message) for w in caught)


def test_plates_of_random_size_differ_between_particles():
    """No particle is cut to the size of the first."""
    sizes, seen = [2, 2, 5, 5], []

    def program():
        with pyro.plate("data", sizes.pop(0)) as i:
            seen.append(len(i))
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ELBO(2).loss(program, program)
    assert seen == [2, 2, 5, 5]
