"""One encoder for the posteriors of all data."""

import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from amortized_cases import DATA, linear_gaussian, local, plate_of, several
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoGuideList, AutoNormal
from torch import nn

from pyrogen.guides import Amortized, Diagonal
from pyrogen.objectives import ELBO, DoublyReparameterized, ImportanceWeighted


def fit(model, guide, *args, steps=300, lr=0.03):
    loss = ELBO(4, gradient=DoublyReparameterized(), vectorize_particles=True, max_plate_nesting=1)
    elbo = loss(model, guide)
    optimizer = torch.optim.Adam(guide.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        elbo(*args).backward()
        optimizer.step()
        schedule.step()


@pytest.fixture
def linear():
    return linear_gaussian()


@pytest.mark.parametrize("size", [None, 20], ids=["whole", "subsampled"])
def test_linear_encoder_reaches_the_exact_posterior(linear, size):
    target, x = linear
    guide = Amortized(target.plated, nn.Linear(3, 4))

    def model(x):
        target.plated(x, subsample_size=size)

    guide._model = (model,)
    fit(model, guide, x)
    loss = Trace_ELBO(200, vectorize_particles=True, max_plate_nesting=1).loss(
        target.plated, Amortized(target.plated, guide.encoder), x
    )
    gap = (loss + target.log_evidence(x).sum()) / len(x)
    assert 0 <= gap + 1e-3 < 0.01  # nats per datum
    posterior, exact = guide.posterior(x)["z"], target.posterior(x)
    assert torch.allclose(posterior.mean, exact.mean, atol=0.03)
    assert torch.allclose(posterior.stddev, exact.stddev, rtol=0.05)


def test_store_stays_empty_and_two_guides_do_not_meet(linear):
    target, x = linear
    guides = [Amortized(target.plated, nn.Linear(3, 4)) for _ in range(2)]
    before = [guide.encoder.weight.detach().clone() for guide in guides]
    svi = SVI(target.plated, guides[1], pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    first = svi.evaluate_loss(x)
    for _ in range(30):
        svi.step(x)
    assert svi.evaluate_loss(x) < first
    assert torch.equal(guides[0].encoder.weight, before[0])
    assert not torch.equal(guides[1].encoder.weight, before[1])
    assert len(pyro.get_param_store()) == 0


def test_positive_site_learns_its_best_approximation():
    """Gamma-Poisson: the rate's best log-normal is known, given its posterior Gamma(a, 2)."""
    counts = torch.arange(8.0)[:, None]
    one_hot = torch.eye(8)

    def model(counts):
        with pyro.plate("data", len(counts)):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("n", dist.Poisson(rate), obs=counts[:, 0])

    guide = Amortized(model, nn.Linear(8, 2), select=lambda counts: one_hot)
    fit(model, guide, counts, lr=0.1)
    a = 2 + counts[:, 0]
    assert torch.allclose(guide.median(counts)["rate"], a / 2 * (-0.5 / a).exp(), rtol=0.05)
    log_rate = guide.posterior(one_hot)["rate"].base_dist
    assert torch.allclose(log_rate.stddev, a.rsqrt(), rtol=0.1)


@pytest.mark.parametrize("size", [None, 4, 9])
@pytest.mark.parametrize("vectorize", [False, True])
def test_several_sites_with_events_and_supports(size, vectorize):
    x = torch.randn(9, 2)
    guide = Amortized(several, nn.Linear(2, 2 * (6 + 2 + 1 + 2)))
    assert guide.setup(x, size).latents == 11
    held = size or 9
    shapes = {name: value.shape for name, value in guide(x, size).items()}
    assert shapes == {"a": (held, 2, 3), "b": (held, 3), "c": (held,), "d": (held, 2)}
    for elbo in (ELBO, ImportanceWeighted):
        loss = elbo(3, vectorize_particles=vectorize)(nn.Module(), guide).elbo
        assert loss.differentiable_loss(several, guide, x, size).isfinite()
    for name, q in guide.posterior(x).items():
        assert q.batch_shape == (9,)
        assert q.log_prob(q.sample()).isfinite().all(), name


def test_density_of_a_draw_is_that_of_its_site():
    x = torch.randn(5, 2, dtype=torch.float64)
    guide = Amortized(several, nn.Linear(2, 22).double())
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    for name, q in guide.posterior(x).items():
        value = trace.nodes[name]["value"]
        assert value.dtype == torch.float64
        assert torch.allclose(trace.nodes[name]["log_prob"], q.log_prob(value))


class Echo(nn.Module):
    """Location is the datum itself, so that a draw tells which datum the encoder saw."""

    def forward(self, x):
        return torch.cat([x, torch.zeros_like(x)], dim=-1)


def peek(model, *args, **kwargs):
    guide = Amortized(model, Echo(), family=Diagonal(1e-6), **kwargs)
    trace = poutine.trace(guide).get_trace(*args)
    replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(*args)
    return trace.nodes["z"]["value"], replayed.nodes["x"]["value"], replayed.nodes["x"]["scale"]


def drawn_by_plate(x):
    with pyro.plate("data", 6, subsample_size=3) as rows:
        local(x[rows])


def drawn_by_caller(x):
    with pyro.plate("data", 6, subsample_size=len(x)):
        local(x)


def indices_by_caller(x, rows):
    with pyro.plate("data", 6, subsample=rows):
        local(x[rows])


@pytest.mark.parametrize(
    ("model", "args"),
    [
        (drawn_by_plate, (DATA,)),
        (drawn_by_caller, (DATA[[4, 1, 2]],)),
        (indices_by_caller, (DATA, torch.tensor([5, 0, 3]))),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_encoder_sees_the_data_of_the_subsample(model, args):
    for _ in range(3):
        z, x, scale = peek(model, *args)
        assert torch.allclose(z, x, atol=1e-4)
        assert scale == 2.0


def test_batch_size_may_change_between_calls():
    def model(x):
        with pyro.plate("data", len(x)):
            local(x)

    guide = Amortized(model, nn.Linear(1, 2))
    for size in (6, 2, 5):
        assert guide(DATA[:size])["z"].shape == (size,)
        assert ELBO().loss(model, guide, DATA[:size]) > 0


def test_encoder_may_read_another_argument():
    def model(scale, x):
        with pyro.plate("data", len(x)):
            local(scale * x)

    guide = Amortized(model, Echo(), select=lambda scale, x: scale * x, family=Diagonal(1e-6))
    assert torch.allclose(guide(2.0, DATA)["z"], 2 * DATA[:, 0], atol=1e-4)


def test_plate_further_left_keeps_its_dimension():
    def model(x):
        with pyro.plate("data", len(x), dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0))
            with pyro.plate("features", 2, dim=-1):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = Amortized(model, nn.Linear(2, 2))
    assert guide(torch.randn(5, 2))["z"].shape == (5, 1)
    assert ELBO().loss(model, guide, torch.randn(5, 2)) > 0


def hierarchical(x):
    m = pyro.sample("m", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 6, subsample_size=3) as rows:
        z = pyro.sample("z", dist.Normal(m, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows, 0])


def test_global_site_is_refused_and_has_a_place_beside():
    with pytest.raises(NotImplementedError, match=r"'m' lies in no plate.*Mixed"):
        Amortized(hierarchical, nn.Linear(1, 2)).setup(DATA)

    guide = AutoGuideList(hierarchical)
    guide.append(AutoNormal(poutine.block(hierarchical, expose=["m"])))
    local_part = Amortized(poutine.block(hierarchical, hide=["m"]), Echo(), family=Diagonal(1e-6))
    guide.append(local_part)
    trace = poutine.trace(guide).get_trace(DATA)
    replayed = poutine.trace(poutine.replay(hierarchical, trace=trace)).get_trace(DATA)
    assert torch.allclose(trace.nodes["z"]["value"], replayed.nodes["x"]["value"], atol=1e-4)
    assert ELBO(2).loss(hierarchical, guide, DATA) > 0


def test_initial_scale_is_small_and_bounded():
    encoder = nn.Linear(1, 2)
    nn.init.zeros_(encoder.weight)
    nn.init.zeros_(encoder.bias)

    def model(x):
        with pyro.plate("data", len(x)):
            local(x)

    guide = Amortized(model, encoder).setup(DATA)
    assert torch.allclose(guide.posterior(DATA)["z"].stddev, torch.tensor(0.1))
    for extreme in (-1e6, 1e6):
        nn.init.constant_(encoder.bias, extreme)
        scale = guide.posterior(DATA)["z"].stddev
        assert scale.isfinite().all()
        assert (scale > 0).all()


def test_state_dict_restores_a_fresh_guide(linear):
    target, x = linear
    guide = Amortized(target.plated, nn.Linear(3, 4))
    guide(x)
    file = io.BytesIO()
    torch.save(guide.state_dict(), file)
    file.seek(0)
    fresh = Amortized(target.plated, nn.Linear(3, 4))
    fresh.load_state_dict(torch.load(file, weights_only=True))
    a, b = (g.setup(x).posterior(x)["z"] for g in (guide, fresh))
    assert torch.equal(a.mean, b.mean)


def test_predictive_draws_from_it(linear):
    target, x = linear
    guide = Amortized(target.plated, nn.Linear(3, 4))
    draws = Predictive(target.plated, guide=guide, num_samples=7)(x)
    assert draws["z"].shape == (7, 50, 2)


def test_module_local_parameters_work(linear):
    target, x = linear
    with pyro.settings.context(module_local_params=True):
        guide = Amortized(target.plated, nn.Linear(3, 4))
        fit(target.plated, guide, x, steps=3)
        SVI(target.plated, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO()).step(x)


def inner_part(x):
    with pyro.plate("data", 9, subsample_size=len(x), dim=-2), pyro.plate("inner", 3, 2, dim=-1):
        pyro.sample("z", dist.Normal(0.0, 1.0))


def two_plates(x):
    for name in ("a", "b"):
        with pyro.plate(f"plate {name}", len(x)):
            pyro.sample(name, dist.Normal(0.0, 1.0))


def observed_only(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=x[:, 0])


def reordered(x):
    with pyro.plate("data", 6, subsample=torch.arange(6).flip(0)) as rows:
        local(x[rows])


@pytest.mark.parametrize(
    ("model", "error", "match"),
    [
        (plate_of(fn=dist.Bernoulli(0.5)), NotImplementedError, "'z' is discrete.*TraceEnum_ELBO"),
        (inner_part, NotImplementedError, "'inner' holds a subsample inside .*'data'.*plate="),
        (two_plates, NotImplementedError, "sites in several.*plate a.*AutoGuideList"),
        (observed_only, ValueError, "no latent site"),
        (reordered, NotImplementedError, "'data' reorders all its 6 data"),
        (
            plate_of(fn=dist.Uniform(torch.zeros(6), torch.arange(1.0, 7.0))),
            NotImplementedError,
            "support of site 'z' differs between data",
        ),
    ],
)
def test_model_that_does_not_fit_is_refused_by_name(model, error, match):
    with pytest.raises(error, match=match):
        Amortized(model, nn.Linear(1, 2))(DATA)


@pytest.mark.parametrize(
    ("x", "error", "match"),
    [
        (DATA.double(), ValueError, "holds torch.float32"),
        (DATA.long(), TypeError, "floating-point"),
        (DATA / 0, ValueError, "finite"),
        (DATA[:0], ValueError, "at least 1"),
    ],
)
def test_bad_data_are_refused(x, error, match):
    guide = Amortized(plate_of(), nn.Linear(1, 2)).setup(DATA)
    with pytest.raises(error, match=match):
        guide.posterior(x)


def test_misfits_say_what_to_do():
    with pytest.raises(
        ValueError, match=r"shape \(6, 2\), got \(6, 3\).*2 outputs.*Diagonal.*z \(1\)"
    ):
        Amortized(plate_of(), nn.Linear(1, 3))(DATA)
    with pytest.raises(ValueError, match=r"shape \(6, 2\), got tuple"):
        Amortized(plate_of(), nn.LSTM(1, 2))(DATA)
    with pytest.raises(ValueError, match=r"holds 3 of 6 data, and the encoder got 5.*select="):
        Amortized(drawn_by_plate, nn.Linear(1, 2), select=lambda x: x[:5])(DATA)
    with pytest.raises(TypeError, match="expected a family, got float"):
        Amortized(plate_of(), nn.Linear(1, 2), family=0.1)
    with pytest.raises(RuntimeError, match=r"guide.setup\(\*args\)"):
        Amortized(plate_of(), nn.Linear(1, 2)).posterior(DATA)


def test_constant_bounds_are_those_of_one_datum():
    guide = Amortized(several, nn.Linear(2, 22), family=Diagonal(100.0)).setup(torch.randn(9, 2))
    draws = guide.posterior(torch.randn(3, 2))["c"].sample((500,))
    assert draws.shape == (500, 3)
    assert draws.min() == pytest.approx(1.0, abs=0.01)
    assert draws.max() == pytest.approx(4.0, abs=0.01)


def test_bounds_repeated_for_every_datum_do_not_fix_the_batch_size():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(torch.ones(len(x)), torch.full((len(x),), 4.0)))

    guide = Amortized(model, nn.Linear(1, 2)).setup(DATA)
    assert guide(DATA[:2])["z"].shape == (2,)
    assert ELBO().loss(model, guide, DATA[:4]) != 0
