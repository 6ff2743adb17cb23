"""A flow for what all data share, an encoder for what each has."""

import functools
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyrogen.distributions import maf, nsf
from pyrogen.export import to_arviz
from pyrogen.guides import Amortized, AutoFlow, Diagonal, FlowFamily, FullCovariance, Mixed
from pyrogen.inference import importance
from pyrogen.objectives import ELBO, DoublyReparameterized, ImportanceWeighted
from pyrogen.training import Batches, Trainer

NOISE = 0.7
N = 12


def hierarchical(x, *, size=None):
    """Conjugate: the mean of all, one latent for each, a noisy look at it."""
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=size) as rows:
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x[rows, 0])


def precision():
    """Of the posterior of ``m`` and the ``z``."""
    p = torch.zeros(N + 1, N + 1)
    p[0, 0] = 1.0 + N
    p[0, 1:] = p[1:, 0] = -1.0
    return p + torch.diag(torch.tensor([0.0] + [1 + NOISE**-2] * N))


def evidence(x):
    covariance = torch.ones(N, N) + (1 + NOISE**2) * torch.eye(N)
    return dist.MultivariateNormal(torch.zeros(N), covariance).log_prob(x[:, 0])


class Linear(nn.Linear):
    """A linear encoder of the datum and of what was drawn before."""

    def forward(self, x, *context):
        return super().forward(torch.cat([x, *context], dim=-1))


def make(model=hierarchical, *, given=(), recipe=None):
    recipe = recipe or functools.partial(maf, layers=1, hidden=(2,))
    return Mixed(
        model,
        globals=lambda m: AutoFlow(m, recipe),
        locals=lambda m: Amortized(m, Linear(1 + len(given), 2), given=given),
    )


@pytest.fixture
def x():
    return 0.5 + torch.randn(N, 1) * (1 + NOISE**2) ** 0.5


def fit(guide, x, *, size=None, steps=400, lr=0.05):
    model = functools.partial(hierarchical, size=size)
    guide = guide(model).setup(x)
    loss = ELBO(8, gradient=DoublyReparameterized(), vectorize_particles=True, max_plate_nesting=1)
    elbo = loss(model, guide)
    optimizer = torch.optim.Adam(guide.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        elbo(x).backward()
        optimizer.step()
        schedule.step()
    whole = guide_of_all(guide)
    held = ELBO(2000, vectorize_particles=True, max_plate_nesting=1)
    return whole, (held.loss(hierarchical, whole, x) + evidence(x)).item()


def guide_of_all(guide):
    """The same guide for a model that takes all data at once."""
    whole = Mixed(
        hierarchical,
        globals=lambda m: AutoFlow(m, guide.globals.recipe),
        locals=lambda m: Amortized(m, guide.locals.encoder, given=guide.locals.given),
    )
    whole.load_state_dict(guide.state_dict())
    return whole


@pytest.mark.parametrize("size", [None, 4], ids=["whole", "subsampled"])
def test_encoder_that_reads_the_global_reaches_the_exact_posterior(x, size):
    guide, gap = fit(functools.partial(make, given=("m",)), x, size=size)
    assert abs(gap) < (0.02 if size is None else 0.15)  # nats for all data
    p = precision()
    mean = torch.linalg.solve(p, torch.cat([torch.zeros(1), x[:, 0] / NOISE**2]))
    median = guide.median(x)
    assert torch.allclose(median["m"], mean[0], atol=0.1)
    assert torch.allclose(median["z"], mean[1:], atol=0.1)
    posterior = importance(hierarchical, guide, x, draws=4000)
    assert posterior.log_evidence == pytest.approx(evidence(x).item(), abs=0.02)
    assert posterior.reliable
    assert torch.allclose(posterior.std("z"), p.inverse().diagonal()[1:].sqrt(), rtol=0.1)


def test_encoder_that_does_not_keeps_the_gap_of_the_best_product(x):
    guide, gap = fit(make, x)
    p = precision()
    known = 0.5 * (p.diagonal().log().sum() - p.logdet())
    assert known > 0.1
    assert gap == pytest.approx(known.item(), abs=0.03)
    law = guide.locals.posterior(x)["z"]
    assert torch.allclose(law.stddev, p.diagonal()[1:].rsqrt(), rtol=0.05)


@pytest.mark.parametrize("given", [(), ("m",)], ids=["free", "given"])
def test_minibatch_elbo_is_unbiased(x, given):
    """The scale of the plate is the same in model and guide, and global sites have none."""
    guide = make(given=given).setup(x)
    whole = ELBO(4000, vectorize_particles=True, max_plate_nesting=1)
    expected = whole.loss(hierarchical, guide, x)
    part = functools.partial(hierarchical, size=3)
    small = make(part, given=given)
    small.load_state_dict(guide.state_dict())
    losses = torch.tensor([Trace_ELBO().loss(part, small, x) for _ in range(600)])
    error = losses.std() * (1 / 600 + 1 / 4000) ** 0.5
    assert abs(losses.mean() - expected) < 4 * error  # fails once in 16 000
    trace = poutine.trace(small).get_trace(x)
    assert trace.nodes["z"]["scale"] == N / 3
    assert trace.nodes["_AutoFlow_latent"]["scale"] == 1.0


class Echo(nn.Module):
    """Location is the datum and the context, so that a draw tells what the encoder saw."""

    def forward(self, x, context):
        return torch.cat([x + context.sum(-1, keepdim=True), torch.zeros_like(x)], dim=-1)


def shared(x, *, size=None):
    """Global sites of several shapes, one in a plate of its own."""
    a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("groups", 3):
        g = pyro.sample("g", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=size) as rows:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        mean = z + a.sum(-1) + g.sum(-1, keepdim=g.ndim > 1).squeeze(-1)[..., None]
        pyro.sample("x", dist.Normal(mean, 1.0), obs=x[rows, 0])


@pytest.mark.parametrize("draws", [None, 5])
@pytest.mark.parametrize("size", [None, 4])
def test_encoder_reads_the_globals_of_its_own_draw(draws, size):
    x = 100 * torch.arange(N, dtype=torch.float)[:, None]
    guide = Mixed(
        functools.partial(shared, size=size),
        globals=lambda m: AutoFlow(m, nsf),
        locals=lambda m: Amortized(m, Echo(), given=("a", "g"), family=Diagonal(1e-6)),
    ).setup(x)
    program = pyro.plate("draws", draws, dim=-2)(guide) if draws else guide
    trace = poutine.trace(program).get_trace(x)
    a, g, z = (trace.nodes[name]["value"] for name in "agz")
    rows = trace.nodes["data"]["value"]
    total = a.sum(-1).squeeze(-1) + g.sum(-1) if draws else a.sum(-1) + g.sum(-1)
    expected = x[rows, 0] + total[..., None]
    assert z.shape == expected.shape == ((draws,) if draws else ()) + (size or N,)
    assert torch.allclose(z, expected, atol=1e-2)
    assert guide._drawn == {}


def test_gradient_reaches_the_globals_through_the_encoder(x):
    guide = Mixed(
        hierarchical,
        globals=lambda m: AutoFlow(m, functools.partial(maf, layers=1)),
        locals=lambda m: Amortized(m, Echo(), given=("m",)),
    ).setup(x)
    guide(x)["z"].sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in guide.globals.parameters())


@pytest.mark.parametrize("given", [(), ("m",)], ids=["free", "given"])
@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize("size", [None, 4])
def test_every_bound_takes_it(x, given, vectorize, size):
    model = functools.partial(hierarchical, size=size)
    guide = make(model, given=given)  # the first run may be one of many at once
    bounds = [ELBO, functools.partial(ELBO, gradient=DoublyReparameterized())]
    bounds += [Trace_ELBO, TraceMeanField_ELBO] + ([ImportanceWeighted] if size is None else [])
    for bound in bounds:
        bound = bound(3, vectorize_particles=vectorize, max_plate_nesting=1)
        loss = bound.differentiable_loss(model, guide, x)
        assert loss.isfinite()
        loss.backward()


def test_globals_may_have_one_of_pyros_guides(x):
    with pyro.settings.context(module_local_params=True):
        guide = Mixed(
            hierarchical, globals=AutoNormal, locals=lambda m: Amortized(m, nn.Linear(1, 2))
        )
        svi = SVI(hierarchical, guide.setup(x), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        first = guide.median(x)["m"].clone()
        for _ in range(5):
            svi.step(x)
        assert guide.median(x)["m"] != first


def test_trainer_moves_both_parts(x):
    guide = make(given=("m",)).setup(x)
    before = {name: p.detach().clone() for name, p in guide.named_parameters()}
    elbo = ELBO()(hierarchical, guide)
    trainer = Trainer(elbo, torch.optim.Adam(elbo.parameters(), 0.01))
    trainer.fit(Batches(x, batch_size=N), steps=3)
    moved = {name for name, p in guide.named_parameters() if not torch.equal(p, before[name])}
    assert {name.split(".")[0] for name in moved} == {"globals", "locals"}
    assert "locals.encoder.weight" in moved
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("family", [FullCovariance, functools.partial(FlowFamily, nsf, 2)])
def test_state_dict_restores_a_fresh_guide(x, family):
    def model(x):
        m = pyro.sample("m", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(m, 1.0).to_event(1))
            pyro.sample("scale", dist.LogNormal(0.0, 1.0))

    def fresh():
        law = family()
        return Mixed(
            model,
            globals=lambda m: AutoFlow(m, nsf),
            locals=lambda m: Amortized(m, nn.Linear(1, law.setup(3).outputs), family=law),
        )

    guide = fresh().setup(x)
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    other = fresh()
    other.load_state_dict(torch.load(file, weights_only=True))
    pyro.set_rng_seed(1)
    first = guide(x)
    other.setup(x)
    pyro.set_rng_seed(1)
    for name, value in other(x).items():
        assert torch.equal(value, first[name])


def test_draws_go_on_to_predictions_and_arviz(x):
    guide = make(given=("m",)).setup(x)
    draws = Predictive(hierarchical, guide=guide, num_samples=6, parallel=True)(x)
    assert draws["z"].numel() == 6 * N
    posterior = importance(hierarchical, guide, x, draws=50)
    data = to_arviz(posterior, hierarchical)
    assert data.posterior["z"].shape == (1, 50, N)
    assert data.posterior["m"].shape == (1, 50)


def features_and_data(x):
    features = pyro.plate("features", 3, dim=-1)
    with features:
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x), dim=-2):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
        with features:
            pyro.sample("x", dist.Normal(z * w, 1.0), obs=x)


def mixture(x):
    with pyro.plate("components", 2):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("cells", 4, dim=-2):
            pyro.sample("w", dist.Normal(z, 1.0))
        pyro.sample("x", dist.Normal(z + mean.sum(), 1.0), obs=x[:, 0])


def parts(model, inputs=1, outputs=2, **options):
    return Mixed(
        model,
        globals=lambda m: AutoFlow(m, maf),
        locals=lambda m: Amortized(m, nn.Linear(inputs, outputs)),
        **options,
    )


def test_plate_of_the_data_is_found_or_named(x):
    assert parts(mixture, 1, 10)(x)["w"].shape == (4, N)
    with pytest.raises(ValueError, match=r"one plate.*got latents in features, rows.*plate="):
        parts(features_and_data)(torch.randn(5, 3))
    guide = parts(features_and_data, 3, plate="rows").setup(torch.randn(5, 3))
    shapes = {name: value.shape for name, value in guide(torch.randn(5, 3)).items()}
    assert shapes == {"w": (3,), "z": (5, 1)}


def no_locals(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(m, 1.0), obs=x[:, 0])


def no_globals(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x[:, 0])


def test_misfits_say_what_to_do(x):
    with pytest.raises(ValueError, match=r"latents in the data's plate, got.*m.*AutoFlow alone"):
        parts(no_locals)(x)
    with pytest.raises(ValueError, match=r"outside the data's plate 'data'.*Amortized alone"):
        parts(no_globals)(x)
    with pytest.raises(ValueError, match=r"latents in the data's plate.*plate="):
        parts(hierarchical, plate="datum")(x)
    with pytest.raises(TypeError, match=r"globals= to make a guide, got AutoFlow.*lambda m"):
        Mixed(hierarchical, globals=AutoFlow(hierarchical, maf), locals=lambda m: m)
    with pytest.raises(TypeError, match=r"locals= to return a guide that is a module"):
        Mixed(hierarchical, globals=AutoNormal, locals=lambda m: m)
