"""One posterior per datum: variational expectation maximisation, against exact answers."""

import io
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import nn

from pyrogen.distributions import maf
from pyrogen.guides import (
    Amortized,
    Descent,
    FlowFamily,
    FullCovariance,
    Local,
    Mixed,
    Refined,
    VariationalEM,
)
from pyrogen.inference import importance
from pyrogen.objectives import (
    ELBO,
    DoublyReparameterized,
    ImportanceWeighted,
    MovingAverage,
    ScoreFunction,
)
from pyrogen.targets import LinearGaussian
from pyrogen.training import Trainer

ROWS = torch.arange(40)
NOISE = 2.0  # large, so that expectation maximisation converges fast


def quiet(particles=8):
    return ELBO(particles, gradient=DoublyReparameterized(), vectorize_particles=True)


@pytest.fixture
def linear():
    """Axis-aligned, so that independent normals are exact."""
    target = LinearGaussian(torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]), noise=0.7)
    return target, torch.randn(40, 3) * torch.tensor([1.2, 2.1, 0.7])


class Factor(nn.Module):
    """One-factor analysis with unknown loadings; a minibatch is a subsample of the plate."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, 0.5]))

    def forward(self, x, rows=None):
        with pyro.plate("data", len(x), subsample=rows) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mean = z[..., None] * self.weight
            pyro.sample("x", dist.Normal(mean, NOISE).to_event(1), obs=x[rows])


def factor_data():
    """Data whose scatter is exactly that of loadings (1, 2) and this noise, all at its optimum."""
    x = torch.randn(40, 2)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T, correction=0))).T
    weight = torch.tensor([1.0, 2.0])
    scatter = weight[:, None] * weight + NOISE**2 * torch.eye(2)
    return x @ torch.linalg.cholesky(scatter).T, weight


@pytest.mark.parametrize("family", [None, FullCovariance()], ids=["diagonal", "full"])
def test_every_datum_reaches_its_exact_posterior(linear, family):
    target, x = linear
    guide = Local(target.plated, family=family)
    em = VariationalEM(ELBO()(target.plated, guide), Descent(quiet(), steps=150, lr=0.2))
    em(x)
    posterior, exact = guide.posterior(ROWS)["z"], target.posterior(x)
    assert torch.allclose(posterior.mean, exact.mean, atol=0.02)
    variance = torch.as_tensor(posterior.variance)
    assert torch.allclose(variance, exact.variance, rtol=0.04)
    em.eval()
    loss = em.bound.elbo.loss(target.plated, guide, x)
    assert loss == pytest.approx(-target.log_evidence(x).sum().item(), rel=2e-3)


@pytest.mark.parametrize("size", [None, 10], ids=["whole", "minibatch"])
def test_model_reaches_maximum_likelihood(size):
    """Principal components: with this scatter the best loadings are known."""
    x, weight = factor_data()
    model = Factor()
    loss = ELBO(64, vectorize_particles=True)
    em = VariationalEM(loss(model, Local(model)), Descent(quiet(), steps=15, lr=0.1))
    rounds, batches = (40, 1) if size is None else (12, 4)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, rounds * batches)
    trainer = Trainer(em, optimizer, schedule=decay)
    for _ in range(rounds):
        for rows in torch.randperm(40).chunk(batches):
            trainer.step(x, rows if size else None)

    exact = LinearGaussian(model.weight.detach()[:, None], NOISE)
    best = LinearGaussian(weight[:, None], NOISE)
    missing = best.log_evidence(x) - exact.log_evidence(x)
    assert 0 <= missing.sum() < 0.1  # nats for all data; they were 6 at the start
    posterior = em.bound.guide.posterior(ROWS)["z"]
    assert torch.allclose(posterior.mean, exact.posterior(x).mean[:, 0], atol=0.1)


def test_gradient_of_the_model_is_that_at_the_optimum():
    """Of the evidence, by Fisher's identity, since the posteriors reached are exact."""
    x, _ = factor_data()
    model = Factor()
    loss = ELBO(2000, vectorize_particles=True)
    em = VariationalEM(loss(model, Local(model)), Descent(quiet(), steps=150, lr=0.2))
    (gradient,) = torch.autograd.grad(em(x), [model.weight])
    weight = model.weight.detach().clone().requires_grad_()
    evidence = LinearGaussian(weight[:, None], NOISE).log_evidence(x).sum()
    (exact,) = torch.autograd.grad(-evidence, [weight])
    assert torch.allclose(gradient, exact, rtol=0.03)


def test_rows_of_other_data_stay():
    """Though their optimizer has momentum, and whatever the outer one holds."""
    x, _ = factor_data()
    model = Factor()
    em = VariationalEM(ELBO()(model, Local(model).setup(x)), Descent(ELBO(4), steps=5, lr=0.1))
    trainer = Trainer(em, torch.optim.Adam(em.parameters(), 0.1))
    trainer.step(x, ROWS[:20])
    before = em.bound.guide.table.detach().clone()
    trainer.step(x, ROWS[20:30])
    moved = (em.bound.guide.table != before).any(-1)
    assert moved.equal((ROWS >= 20) & (ROWS < 30))


def test_plate_may_draw_the_minibatch():
    x = torch.arange(40.0)

    def model(x):
        with pyro.plate("data", 40, subsample_size=4) as rows:
            z = pyro.sample("z", dist.Normal(0.0, 100.0))
            pyro.sample("x", dist.Normal(z, 0.1), obs=x[rows])

    guide = Local(model)
    em = VariationalEM(ELBO()(model, guide), Descent(quiet(), steps=100, lr=1.0))
    em(x)
    mean = guide.posterior(ROWS)["z"].mean
    moved = mean != 0
    assert moved.sum() == 4
    assert torch.allclose(mean[moved], x[moved], atol=0.1 * 40**0.5 * 5)


def test_minibatches_descend_each_datum_alike():
    """Steps do not depend on how many data there are, nor on the plate's factor."""
    x, _ = factor_data()
    model, tables = Factor(), []
    loss = ELBO(200, vectorize_particles=True)
    descent = Descent(loss, steps=3, lr=0.05, optimizer=torch.optim.SGD)
    for rows in (ROWS[:5], None):
        guide = Local(model).setup(x)
        VariationalEM(ELBO()(model, guide), descent)(x, rows)
        tables.append(guide.table[:5].detach())
    assert torch.allclose(*tables, atol=0.005)
    assert tables[0].abs().max() > 0.05


def test_evaluation_leaves_the_posteriors():
    x, _ = factor_data()
    model = Factor()
    em = VariationalEM(ELBO()(model, Local(model).setup(x)), Descent(ELBO(4), steps=5)).eval()
    with torch.no_grad():
        assert em(x).isfinite()
    em(x).backward()
    assert not em.bound.guide.table.any()
    assert em.bound.guide.table.grad is None
    assert model.weight.grad.any()


def test_score_function_finds_the_best_logit_normal():
    """Beta-Bernoulli, never differentiated: the best logit-normal is found by quadrature."""
    heads = torch.tensor([0.0, 3.0, 7.0, 10.0])

    def model(heads):
        with pyro.plate("coins", len(heads)):
            p = pyro.sample("p", dist.Beta(2.0, 2.0)).detach()  # a simulator has no gradient
            pyro.sample("heads", dist.Binomial(10, p), obs=heads)

    guide = Local(model)
    descent = Descent(
        ELBO(64, gradient=ScoreFunction(), vectorize_particles=True), steps=250, lr=0.2
    )
    VariationalEM(ELBO()(model, guide), descent)(heads)

    loc = guide.median(heads)["p"].logit()
    scale = guide.posterior(torch.arange(4))["p"].base_dist.stddev

    def loss(loc, scale):
        """Divergence from the posterior Beta(2 + k, 12 - k), by the trapezoidal rule."""
        e = torch.linspace(-8, 8, 2001)[:, None]
        u = loc + scale * e
        log_q = dist.Normal(loc, scale).log_prob(u)
        a, b = 2 + heads, 12 - heads
        log_p = dist.Beta(a, b).log_prob(u.sigmoid()) + (u.sigmoid() * (-u).sigmoid()).log()
        return torch.trapezoid(dist.Normal(0.0, 1.0).log_prob(e).exp() * (log_q - log_p), e, dim=0)

    best = torch.stack([((2 + heads) / (12 - heads)).log(), 0.6 * torch.ones(4)])
    best.requires_grad_()
    optimizer = torch.optim.LBFGS([best], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(*best).sum()
        value.backward()
        return value

    optimizer.step(closure)
    excess = loss(loc, scale) - loss(*best)
    assert (excess.abs() < 0.01).all()  # nats a coin
    assert torch.allclose(loc, best[0], atol=0.1)


@pytest.mark.parametrize("vectorize", [False, True])
@pytest.mark.parametrize(
    "loss",
    [
        lambda **k: ELBO(4, **k),
        lambda **k: ELBO(4, gradient=ScoreFunction(MovingAverage()), **k),
        lambda **k: ImportanceWeighted(4, gradient=DoublyReparameterized(), **k),
        lambda **k: Trace_ELBO(4, **k),
    ],
    ids=["elbo", "score", "dreg", "pyro"],
)
def test_every_loss_fits_inside_and_outside(loss, vectorize):
    x, _ = factor_data()
    model = Factor()
    loss = loss(vectorize_particles=vectorize)
    em = VariationalEM(loss(model, Local(model)), Descent(loss, steps=2))
    em(x, ROWS[3:7]).backward()
    assert model.weight.grad.isfinite().all()


def test_as_an_ordinary_guide():
    x, _ = factor_data()
    model = Factor()
    guide = Local(model).setup(x)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), ELBO())
    first = svi.evaluate_loss(x)
    for _ in range(60):
        svi.step(x)
    assert svi.evaluate_loss(x) < first
    assert guide.table.abs().max() > 0
    names = {name for name in pyro.get_param_store() if "table" in name or "rows" in name}
    assert not names
    draws = Predictive(model, guide=guide, num_samples=7, parallel=True)(x)
    assert draws["z"].shape == (7, 40)
    assert math.isfinite(importance(model, guide, x, draws=50).log_evidence)
    pyro.clear_param_store()


def test_rows_follow_the_subsample():
    x, _ = factor_data()
    guide = Local(Factor()).setup(x)
    with torch.no_grad():
        guide.table[:, 0] = torch.arange(40.0)
        guide.table[:, 1] = -100.0
    rows = torch.tensor([31, 4, 17])
    assert guide(x, rows)["z"].round().long().equal(rows)
    assert guide.median(x, rows)["z"].equal(rows.float())
    assert guide.posterior(rows)["z"].mean.equal(rows.float())


def test_beside_a_guide_for_what_is_shared():
    x = torch.randn(40)

    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 40, subsample_size=8) as rows:
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    guide = Mixed(model, globals=pyro.infer.autoguide.AutoNormal, locals=Local).setup(x)
    assert ELBO(2).differentiable_loss(model, guide, x).requires_grad
    assert guide.locals.table.shape == (40, 2)


def test_state_dict_restores_a_guide_that_has_not_run():
    x, _ = factor_data()
    model = Factor()
    guide = Local(model, family=FullCovariance()).setup(x)
    nn.init.normal_(guide.table)
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    fresh = Local(model, family=FullCovariance())
    fresh.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(fresh.setup(x).table, guide.table)


def test_double_precision_follows_the_model():
    x = torch.randn(5, 2, dtype=torch.float64)
    model = Factor().double()
    guide = Local(model).setup(x)
    guide.double()  # the prior of this model is in single precision
    em = VariationalEM(ELBO()(model, guide), Descent(ELBO(), steps=3))
    assert em(x).dtype == torch.float64
    assert guide.table.dtype == torch.float64


def test_shared_part_of_the_family_moves_with_the_model():
    x, _ = factor_data()
    model = Factor()
    guide = Local(model, family=FlowFamily(maf, context=3)).setup(x)
    em = VariationalEM(ELBO()(model, guide), Descent(ELBO(), steps=1))
    em(x).backward()
    assert any(p.grad is not None and p.grad.any() for p in guide.family.parameters())
    assert guide.table.grad is None


def test_refusals_say_what_to_do():
    x, _ = factor_data()
    model = Factor()
    guide = Local(model)
    with pytest.raises(RuntimeError, match=r"guide.setup\(\*args\)"):
        _ = guide.table
    guide.setup(x)
    with pytest.raises(ValueError, match=r"posteriors of 40 data.*'data' has 39.*Amortized"):
        guide(x[:39])
    with pytest.raises(TypeError, match="integers of shape"):
        guide.posterior(x)
    for rows in (torch.tensor([3, 40]), torch.tensor([-1])):
        with pytest.raises(ValueError, match=r"40 data, got rows from .*Pass rows in 0, ..., 39"):
            guide.joint(rows)
    with pytest.raises(TypeError, match=r"guide is Local, got Amortized.*use Refined"):
        VariationalEM(ELBO()(model, Amortized(model, nn.Linear(2, 2))), Descent(ELBO()))
    with pytest.raises(TypeError, match=r"Pass loss\(model, guide\)"):
        VariationalEM(ELBO(), Descent(ELBO()))
    leaps = Descent(ELBO(), steps=9, lr=1e30, optimizer=torch.optim.SGD)
    with pytest.raises(FloatingPointError, match="Descent diverged within 9 steps"):
        VariationalEM(ELBO()(model, guide), leaps)(x)
    assert guide.table.isfinite().all()


def test_failed_setup_is_none():
    def reordered(x, rows):
        with pyro.plate("data", 3, subsample=rows):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide, x = Local(reordered), torch.zeros(3)
    with pytest.raises(NotImplementedError, match="'data' reorders all its 3 data"):
        guide(x, torch.tensor([2, 0, 1]))
    assert guide(x, torch.tensor([2, 0]))["z"].shape == (2,)


def test_refined_for_a_new_look_at_old_data(linear):
    """Refinement may start from a table too, and leaves it as it is."""
    target, x = linear
    guide = Local(target.plated)
    refined = Refined(guide, Descent(quiet(), steps=100, lr=0.2))
    assert torch.allclose(refined.median(x)["z"], target.posterior(x).mean, atol=0.05)
    assert not guide.table.any()
    trace = poutine.trace(refined).get_trace(x)
    assert set(trace.stochastic_nodes) == {"data", "_Refined_noise", "z"}
