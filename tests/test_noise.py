"""The laws that a flow starts from: their densities, their gradients, and flows upon them."""

import copy
import io
import logging
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from flow_cases import awake
from pyro.infer import MCMC, NUTS
from scipy import stats
from torch.distributions import biject_to, constraints

from pyrogen.distributions import Flow, nsf
from pyrogen.distributions.noise import CircularNoise, MixtureNoise, StudentTNoise, UniformNoise
from pyrogen.objectives import MaximumLikelihood
from pyrogen.testing import DISTRIBUTION_CHECKS
from pyrogen.transforms import Elementwise
from pyrogen.transforms.spline import BoundedSpline

NOISES = {
    "student": lambda n: StudentTNoise(n, df=3.0),
    "uniform": lambda n: UniformNoise(n),
    "circular": lambda n: CircularNoise([i % 2 == 0 for i in range(n)]),
    "mixture": lambda n: MixtureNoise(n, components=3),
}


@pytest.fixture(params=NOISES.values(), ids=NOISES)
def noise(request):
    return request.param


def flow_on(noise, context=0, **kwargs):
    """Splines, whose tails are the identity, over any noise."""
    layers = nsf(2, context, layers=2, hidden=(8,)).layers
    return Flow(2, layers, context, noise=noise, **kwargs)


@pytest.mark.parametrize("check", DISTRIBUTION_CHECKS, ids=lambda f: f.__name__)
def test_noise_is_a_distribution(noise, check):
    check(noise(3)())


def test_student_has_scipys_density():
    noise = StudentTNoise(2, df=[1.5, 7.0]).double()
    x = 5 * torch.randn(10, 2).double()
    expected = stats.t.logpdf(x.numpy(), noise.df.detach().numpy()).sum(-1)
    assert torch.allclose(noise().log_prob(x), torch.as_tensor(expected), atol=1e-10)
    assert noise.df.tolist() == pytest.approx([1.5, 7.0], rel=1e-6)


def test_a_draw_moves_with_the_degrees_of_freedom():
    """d/dnu E|t|^(1/2) by draws and by quadrature."""
    noise = StudentTNoise(1, df=4.0).double()
    draws = noise().rsample((200_000,)).abs().sqrt()
    (slope,) = torch.autograd.grad(draws.mean(), noise.rho)

    def moment(df):
        return stats.t.expect(lambda t: abs(t) ** 0.5, args=(df,))

    df_slope = (moment(4.01) - moment(3.99)) / 0.02
    expected = df_slope * torch.sigmoid(noise.rho).item()
    assert slope.item() == pytest.approx(expected, rel=0.1)


def test_degrees_of_freedom_are_learned():
    x = torch.as_tensor(stats.t.rvs(3.0, size=(4000, 1), random_state=0))
    noise = StudentTNoise(1, df=20.0).double()
    optimizer = torch.optim.Adam(noise.parameters(), lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        (-noise().log_prob(x).mean()).backward()
        optimizer.step()
    assert noise.df.item() == pytest.approx(stats.t.fit(x.numpy(), floc=0, fscale=1)[0], rel=0.03)


def test_degrees_of_freedom_stay_above_their_floor():
    noise = StudentTNoise(2, df=2.5, floor=2.0)
    torch.nn.init.constant_(noise.rho, -1e4)
    assert (noise.df >= 2.0).all()
    assert noise().log_prob(torch.ones(2)).isfinite()


def test_uniform_noise_has_both_ends_and_nothing_beyond():
    p = UniformNoise(2, low=-1.0, high=3.0)()
    x = torch.tensor([[-1.0, 3.0], [0.0, 3.1]])
    assert p.log_prob(x).tolist() == pytest.approx([-2 * math.log(4), -math.inf])


def test_circular_noise_is_uniform_beside_normal():
    p = CircularNoise([True, False]).double()()
    x = torch.tensor([2.0, 0.7]).double()
    expected = -math.log(2 * math.pi) + stats.norm.logpdf(0.7)
    assert p.log_prob(x).item() == pytest.approx(expected)
    draws = p.sample((5000,))
    assert stats.kstest(draws[:, 0], stats.uniform(-math.pi, 2 * math.pi).cdf).pvalue > 1e-4
    assert stats.kstest(draws[:, 1], stats.norm.cdf).pvalue > 1e-4
    assert biject_to(p.support)(torch.zeros(2)).shape == (2,)


def test_mixture_noise_has_the_density_of_its_normals():
    noise = MixtureNoise(2, components=3).double()
    torch.nn.init.normal_(noise.logits)
    torch.nn.init.normal_(noise.log_scale)
    x = torch.randn(5, 2).double()
    weight = noise.logits.softmax(-1)
    each = dist.Normal(noise.loc, noise.log_scale.exp()).to_event(1).log_prob(x[:, None]).exp()
    assert torch.allclose(noise().log_prob(x), (weight * each).sum(-1).log())


# Flows upon them


def test_flow_on_any_noise_keeps_the_laws(noise):
    flow = awake(flow_on(noise(2), 3)).double()
    context = torch.randn(4, 1, 3).double()
    p = flow(context)
    assert (p.batch_shape, p.event_shape) == ((4, 1), (2,))
    wide = p.expand((6, 4, 5))
    x = wide.sample((2,))
    assert x.shape == (2, 6, 4, 5, 2)
    assert torch.allclose(wide.log_prob(x), p.log_prob(x))
    expected = p.noise.log_prob(p.to_noise(x)) + p.bijection.inverse_and_ladj(x)[1]
    assert torch.allclose(p.log_prob(x), expected)
    with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 7):
        assert pyro.sample("x", p).shape == (4, 7, 2)


def test_draw_and_score_agree_or_are_refused(noise):
    p = awake(flow_on(noise(2))).double()()
    if p.has_rsample:
        x, log_prob = p.rsample_and_log_prob((50,))
        assert (p.log_prob(x) - log_prob).abs().max() < 1e-10
        return
    with pytest.raises(NotImplementedError, match=r"no reparameterized draw.*Use sample"):
        p.rsample_and_log_prob((50,))
    with pytest.raises(NotImplementedError, match="no reparameterized draw"):
        p.rsample()


def test_every_parameter_of_the_noise_learns(noise):
    flow = flow_on(noise(2))
    MaximumLikelihood(flow)(torch.rand(20, 2)).backward()
    assert all((w.grad != 0).any() for w in flow.noise.parameters())


def test_state_survives_a_file_and_a_copy(noise):
    flow = awake(flow_on(noise(2)))
    x = flow().sample((5,))
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    other = flow_on(noise(2))
    other.load_state_dict(torch.load(file, weights_only=True))
    for twin in (other, copy.deepcopy(flow)):
        assert torch.equal(twin().log_prob(x), flow().log_prob(x))


def test_heavy_noise_is_a_prior_under_nuts(caplog):
    caplog.set_level(logging.ERROR)
    flow = awake(flow_on(StudentTNoise(2), support=constraints.positive)).requires_grad_(False)

    def model():
        z = pyro.sample("z", flow())
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    mcmc = MCMC(NUTS(model, max_tree_depth=2), num_samples=3, warmup_steps=3, disable_progbar=True)
    mcmc.run()
    assert (mcmc.get_samples()["z"] > 0).all()


def test_heavy_noise_keeps_heavy_tails():
    """Far out a spline flow is as heavy as its noise: the density falls by a power."""
    flow = awake(flow_on(StudentTNoise(2, df=3.0)).double())
    flow.shift.zero_()
    far = torch.tensor([[1e3, 0.0], [1e4, 0.0]]).double()
    drop = flow().log_prob(far).diff().item() / math.log(10)
    normal = flow_on(None).double()().log_prob(far).diff().item()
    assert -8.5 < drop < -3.5  # between one and both features in their tails, of slope 4 each
    assert normal < -1e6


def test_bounded_layers_on_uniform_noise_fill_the_box():
    layer = Elementwise(2, elementwise=BoundedSpline(bound=1.0))
    flow = Flow(2, [layer], noise=UniformNoise(2)).double()
    torch.nn.init.normal_(layer.params)
    x = flow().sample((1000,))
    assert (x.abs() <= 1).all()
    grid = ((torch.arange(300).double() + 0.5) / 150) - 1
    mass = flow().log_prob(torch.cartesian_prod(grid, grid)).exp().mean() * 4
    assert mass.item() == pytest.approx(1, abs=1e-3)


ERRORS = [
    (lambda: StudentTNoise(0), r"at least 1 feature, got 0"),
    (lambda: StudentTNoise(2, df=0.5), r"above 1.0, got 0.5.*Raise df"),
    (lambda: StudentTNoise(2, df=math.nan), r"above 1.0, got nan"),
    (lambda: StudentTNoise(2, df=math.inf), r"got inf.*for normal tails leave"),
    (lambda: StudentTNoise(2, df=[3.0, 0.5]), r"above 1.0, got \[3.0, 0.5\]"),
    (lambda: StudentTNoise(3, df=[3.0, 4.0]), r"each of 3, got shape \(2,\).*one number, or 3"),
    (lambda: StudentTNoise(2, floor=-1.0), r"floor of at least 0, got -1.0"),
    (lambda: UniformNoise(0), r"at least 1 feature, got 0"),
    (lambda: UniformNoise(2, low=1.0, high=1.0), r"low < high, got 1.0 and 1.0"),
    (lambda: UniformNoise(2, high=math.inf), r"finite low < high, got -1.0 and inf.*the box"),
    (lambda: CircularNoise(3), r"flag for each feature, got shape \(\).*list"),
    (lambda: CircularNoise(torch.ones(2, 2)), r"flag for each feature, got shape \(2, 2\)"),
    (lambda: MixtureNoise(0), r"at least 1 feature, got 0"),
    (lambda: CircularNoise([]), r"at least 1 feature"),
    (lambda: MixtureNoise(2, components=1), r"at least 2 components, got 1"),
]


@pytest.mark.parametrize(("call", "match"), ERRORS)
def test_refusals_say_what_to_do(call, match):
    with pytest.raises(ValueError, match=match):
        call()
