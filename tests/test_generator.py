"""Generators: shapes, plates, context, scale, and their law."""

import copy
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import constraints

from pyrogen.distributions import Generator, Pushforward


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


def conditional(features=2, context=3):
    return Generator(nn.Linear(4 + context, features), 4, (features,), context)


def test_linear_generator_is_the_gaussian_it_should_be(dtype):
    generator = Generator(nn.Linear(3, 2), 3, (2,)).to(dtype)
    x = generator().sample((200_000,))
    w, b = generator.net.weight, generator.net.bias
    assert x.dtype == dtype
    assert torch.allclose(x.mean(0), b, atol=0.01)  # 5 standard errors are 0.009
    assert torch.allclose(x.T.cov(), w @ w.T, atol=0.02)


def test_from_noise_is_the_map_of_the_draw():
    generator = conditional()
    p = generator(torch.randn(5, 3))
    z = p.noise.sample((7,))
    assert z.shape == (7, 5, 4)
    torch.manual_seed(1)
    x = p.rsample((7,))
    torch.manual_seed(1)
    assert torch.equal(p.from_noise(p.noise.rsample((7,))), x)
    assert torch.equal(p.from_noise(z), p.from_noise(z))


def test_from_noise_has_the_jacobian_of_the_net():
    generator = Generator(nn.Linear(4, 2), 4, (2,))
    with torch.no_grad():
        generator.scale.copy_(torch.tensor([2.0, 3.0]))
    jacobian = torch.autograd.functional.jacobian(generator().from_noise, torch.randn(4))
    assert torch.allclose(jacobian, generator.scale[:, None] * generator.net.weight)


def test_each_context_drives_its_own_draw():
    generator = conditional()
    context = torch.randn(5, 3)
    p = generator(context)
    z = torch.randn(6, 5, 4)
    x = p.from_noise(z)
    for i in range(5):
        alone = generator(context[i]).from_noise(z[:, i])
        assert torch.allclose(x[:, i], alone, atol=1e-6)
    wide = p.expand((6, 5))
    assert wide.batch_shape == (6, 5)
    assert torch.allclose(wide.from_noise(z), x)


def test_vectorized_plates_around_a_context():
    p = conditional()(torch.randn(5, 3))
    with pyro.plate("chains", 3, dim=-2), pyro.plate("data", 5, dim=-1):
        x = pyro.sample("x", p)
    assert x.shape == (3, 5, 2)
    # Rows of the chains plate are different draws.
    assert not torch.allclose(x[0], x[1])


def test_it_works_in_predictive():
    generator = conditional()

    def model(context):
        with pyro.plate("data", len(context)):
            return pyro.sample("x", generator(context))

    out = pyro.infer.Predictive(model, num_samples=7, parallel=True)(torch.randn(5, 3))
    assert out["x"].shape == (7, 5, 2)


def test_batches_are_flattened_for_convolutions():
    net = nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.ConvTranspose2d(4, 1, 3))
    p = Generator(net, 4, (1, 3, 3))().expand((5,))
    assert p.sample((2, 6)).shape == (2, 6, 5, 1, 3, 3)
    assert p.event_dim == p.support.event_dim == 3


def test_scalar_events():
    p = Generator(nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), 4, ())()
    assert p.sample((6,)).shape == (6,)


def test_standardize_gives_the_data_their_own_units(dtype):
    x = torch.tensor([3.0, -100.0], dtype=dtype) + torch.tensor([0.1, 50.0]) * torch.randn(
        1000, 2, dtype=dtype
    )
    generator = Generator(nn.Identity(), 2, (2,)).to(dtype)
    assert generator.standardize(x) is generator
    assert torch.allclose(generator.shift, x.mean(0))
    assert torch.allclose(generator.scale, x.std(0))
    draws = generator().sample((100_000,))
    error = (draws.mean(0) - x.mean(0)).abs() / x.std(0)
    assert (error < 0.02).all()  # standard error 0.003
    assert torch.allclose(draws.std(0) / x.std(0), torch.ones(2, dtype=dtype), atol=0.02)


@pytest.mark.parametrize(
    ("support", "x"),
    [
        (constraints.positive, torch.rand(100, 3) + 0.1),
        (constraints.interval(-2.0, 5.0), 7 * torch.rand(100, 3) - 2),
        (constraints.simplex, torch.rand(100, 3).softmax(-1)),
    ],
    ids=["positive", "interval", "simplex"],
)
def test_draws_stay_in_the_support(support, x):
    generator = Generator(nn.Linear(4, 3), 4, (3,), support=support).standardize(x)
    p = generator().expand((5,))
    assert p.support.event_dim == 1
    assert p.support.check(p.sample((100,))).all()
    back = constraints.independent(support, 1 - support.event_dim) if support.event_dim == 0 else 0
    assert str(p.support) == str(back or support)


def test_standardize_pulls_back_through_the_support():
    x = (0.5 + 2 * torch.randn(1000, 2)).exp()
    generator = Generator(nn.Identity(), 2, (2,), support=constraints.positive).standardize(x)
    assert torch.allclose(generator.shift, x.log().mean(0))
    assert torch.allclose(generator.scale, x.log().std(0))


def test_state_dict_round_trip():
    generator = conditional().standardize(torch.randn(50, 2) * 3)
    file = io.BytesIO()
    torch.save(generator.state_dict(), file)
    file.seek(0)
    other = conditional()
    other.load_state_dict(torch.load(file, weights_only=True))
    z, c = torch.randn(5, 4), torch.randn(5, 3)
    assert torch.equal(generator(c).from_noise(z), other(c).from_noise(z))
    twin = copy.deepcopy(generator)
    assert torch.equal(twin(c).from_noise(z), other(c).from_noise(z))


def test_gradient_reaches_every_parameter_and_not_a_sample():
    p = conditional()(torch.randn(5, 3))
    p.rsample().sum().backward()
    generator = conditional()
    generator(torch.randn(5, 3)).rsample().sum().backward()
    assert all(q.grad is not None and q.grad.abs().sum() > 0 for q in generator.parameters())
    assert not generator(torch.randn(5, 3)).sample().requires_grad


def test_discrete_noise_is_drawn_without_gradient():
    p = Pushforward(torch.neg, dist.Bernoulli(torch.full((3,), 0.5)).to_event(1), (3,))
    assert not p.has_rsample
    assert p.sample((4,)).shape == (4, 3)
    with pytest.raises(NotImplementedError):
        p.rsample()


def test_log_prob_is_refused():
    with pytest.raises(NotImplementedError, match="Pushforward has draws but no density"):
        conditional()(torch.zeros(1, 3)).log_prob(torch.zeros(1, 2))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda g: g(), ValueError, "built with context=3, got 0"),
        (lambda g: g(torch.zeros(5, 2)), ValueError, "built with context=3, got 2"),
        (lambda g: g(torch.zeros(5, 3, dtype=torch.long)), TypeError, "floating-point"),
        (lambda g: g(torch.zeros(5, 3, dtype=torch.double)), ValueError, "holds torch.float32"),
        (lambda g: g(torch.full((5, 3), torch.nan)), ValueError, "finite"),
        (lambda g: g(torch.zeros(0, 3)), ValueError, "at least 1"),
        (lambda g: g.standardize(torch.randn(1, 2)), ValueError, "at least 2 data"),
        (lambda g: g.standardize(torch.ones(5, 2)), ValueError, "features that vary"),
        (lambda g: g.standardize(torch.randn(5, 3)), ValueError, r"\(\*batch, 2\)"),
        (lambda g: g.standardize(torch.ones(5, 2).long()), TypeError, "floating-point"),
        (lambda g: g.standardize(torch.full((5, 2), torch.inf)), ValueError, "finite"),
        (lambda g: Generator(nn.Linear(1, 1), 0, (1,)), ValueError, "latents >= 1"),
        (lambda g: Generator(nn.Linear(1, 1), 1, (0,)), ValueError, "positive sizes"),
        (
            lambda g: Generator(nn.Linear(4, 3), 4, (2,))().sample((5,)),
            ValueError,
            r"net .*\(3,\)",
        ),
        (
            lambda g: Generator(nn.Linear(1, 1), 1, (), support=constraints.simplex),
            ValueError,
            "shape of the net's output",
        ),
        (
            lambda g: Generator(nn.Linear(1, 1), 1, (6,), support=constraints.corr_cholesky),
            ValueError,
            "shape of the net's output",
        ),
        (
            lambda g: Generator(
                nn.Linear(1, 2), 1, (2,), support=constraints.positive
            ).standardize(torch.tensor([[0.0, 1.0], [1.0, 2.0]])),
            ValueError,
            "outside or on its border",
        ),
        (
            lambda g: Generator(
                nn.Linear(1, 2), 1, (2,), support=constraints.unit_interval
            ).standardize(torch.tensor([[0.5, 1.5], [0.1, 0.2]])),
            ValueError,
            "outside or on its border",
        ),
        (
            lambda g: Generator(
                nn.Linear(1, 2), 1, (2,), support=constraints.unit_interval
            ).standardize(torch.tensor([[0.5, 0.0], [0.1, 0.2]])),
            ValueError,
            "outside or on its border",
        ),
    ],
)
def test_bad_input_is_refused(call, error, match):
    with pytest.raises(error, match=match):
        call(conditional())


def test_gradient_reaches_the_map_under_discrete_noise():
    w = torch.ones((), requires_grad=True)
    law = Pushforward(lambda z: w * z, dist.Poisson(torch.ones(3)).to_event(1), (3,))
    assert pyro.sample("x", law).requires_grad
    assert not law.sample().requires_grad


def test_standardize_keeps_no_graph():
    x = (torch.randn(10, 2, requires_grad=True)) * 2
    generator = Generator(nn.Linear(2, 2), 2, (2,)).standardize(x)
    assert not generator.shift.requires_grad
