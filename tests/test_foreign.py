"""Flows of other libraries: their traps as errors, with a double of zuko and with zuko itself."""

import copy
import importlib.util
import logging
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as pt
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.autograd.function import once_differentiable
from torch.distributions import Distribution, Independent, Transform, constraints

from pyrogen.distributions import Flow
from pyrogen.distributions.foreign import PyroLayer, ZukoFlow, import_zuko
from pyrogen.objectives import MaximumLikelihood
from pyrogen.testing import DISTRIBUTION_CHECKS

HAS_ZUKO = importlib.util.find_spec("zuko") is not None
needs_zuko = pytest.mark.skipif(not HAS_ZUKO, reason="zuko is not installed")

# A double of zuko: modules that make a transform from data to noise, and a base


class Cubed(torch.autograd.Function):
    """x^3 with a derivative that nobody may differentiate, as quadratures of zuko have."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 3 * ctx.saved_tensors[0] ** 2 * g


def cube(x):
    return x**3


class Cubic(Transform):
    """z = a (x + x^3) + b, whose inverse is sought in a fixed bracket and polished once."""

    bijective = True
    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __init__(self, scale, shift, cube, bracket):
        super().__init__()
        self.scale, self.shift, self.cube, self.bracket = scale, shift, cube, bracket

    def call_and_ladj(self, x):
        # The log-slope goes through the same cube, so its own derivative is the function's too.
        slope = 1 + 3 * self.cube(x.abs() ** (2 / 3))
        z = self.scale * (x + self.cube(x)) + self.shift
        return z, (self.scale * slope).log().sum(-1)

    def _call(self, x):
        return self.call_and_ladj(x)[0]

    def log_abs_det_jacobian(self, x, z):
        return self.call_and_ladj(x)[1]

    def _inverse(self, z):
        low = torch.full_like(z, -self.bracket)
        high = -low
        with torch.no_grad():
            for _ in range(60):
                x = (low + high) / 2
                above = self._call(x) > z
                low, high = torch.where(above, low, x), torch.where(above, x, high)
        slope = self.scale * (1 + 3 * x**2)
        return x - (self._call(x) - z) / slope.detach()  # for its gradient


class Lazy(nn.Module):
    def __init__(self, context, cube, bracket):
        super().__init__()
        self.net = nn.Linear(context, 2) if context else None
        self.free = nn.Parameter(torch.zeros(2))
        self.cube, self.bracket = cube, bracket

    def forward(self, c=None):
        raw = self.free if c is None else self.net(c) + self.free
        return Cubic(raw[..., :1].exp(), raw[..., 1:], self.cube, self.bracket)


class Base(nn.Module):
    def __init__(self, family=torch.distributions.Normal):
        super().__init__()
        self.register_buffer("loc", torch.zeros(2))
        self.register_buffer("scale", torch.ones(2))
        self.family = family

    def forward(self, c=None):
        return Independent(self.family(self.loc, self.scale), 1)


class Double(nn.Module):
    def __init__(self, context=0, cube=cube, bracket=10.0):
        super().__init__()
        self.transform = Lazy(context, cube, bracket)
        self.base = Base()


def test_direction_is_from_data_to_noise():
    flow = ZukoFlow(Double().double())
    nn.init.constant_(flow.flow.transform.free, 0.4)
    x = torch.randn(5, 2).double()
    a = torch.tensor(0.4).double().exp()
    z = a * (x + x**3) + 0.4
    expected = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + (a * (1 + 3 * x**2)).log().sum(-1)
    assert torch.allclose(flow().log_prob(x), expected, atol=1e-9)


@pytest.mark.parametrize("context", [0, 3])
def test_draw_and_score_agree(context):
    flow = ZukoFlow(Double(context).double(), context)
    p = flow(torch.randn(4, 3).double() if context else None)
    x, log_prob = p.rsample_and_log_prob((50,))
    assert (p.log_prob(x) - log_prob).abs().max() < 1e-10
    assert p.batch_shape == ((4,) if context else ())
    assert isinstance(p.noise.base_dist, dist.Normal)


@pytest.mark.parametrize("check", DISTRIBUTION_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("context", [0, 3])
def test_flow_is_a_distribution(check, context):
    check(ZukoFlow(Double(context), context)(torch.randn(4, 3) if context else None))


def test_an_inverse_that_clips_is_an_error():
    """Noise of 1 lies beyond the bracket of 0.3, where the double stops without a word."""
    p = ZukoFlow(Double(bracket=0.3))()
    with pytest.raises(FloatingPointError, match=r"maps a draw back to noise .*clips"):
        p.sample((100,))
    with pytest.raises(FloatingPointError, match="clips"):
        p.rsample_and_log_prob((100,))
    assert p.log_prob(torch.zeros(3, 2)).isfinite().all()  # scoring needs no inverse


def test_right_second_derivatives_pass():
    flow = ZukoFlow(Double().double())
    assert flow.twice[1]
    x = torch.tensor([0.3, -0.4]).double()
    hessian = torch.autograd.functional.hessian(flow().log_prob, x)
    h = 1e-4 * torch.eye(2).double()
    slope = [
        torch.autograd.functional.jacobian(flow().log_prob, x + s * e) for e in h for s in (1, -1)
    ]
    expected = torch.stack([(slope[0] - slope[1]) / 2e-4, (slope[2] - slope[3]) / 2e-4])
    assert torch.allclose(hessian, expected, atol=1e-5)


@pytest.mark.parametrize("around", [torch.no_grad(), torch.device("meta")], ids=["grad", "device"])
def test_derivatives_are_compared_wherever_the_flow_is_built(around):
    flow, quadrature = Double(), Double(cube=Cubed.apply)
    with around:
        assert ZukoFlow(flow).twice == (False, True)  # its inverse is polished once
        assert ZukoFlow(quadrature).twice == (False, False)


def test_wrong_second_derivatives_are_refused():
    flow = ZukoFlow(Double(cube=Cubed.apply).double())
    assert flow.twice == (False, False)
    x = torch.tensor([0.3, -0.4]).double()
    honest = ZukoFlow(Double().double())
    one, other = (torch.autograd.functional.jacobian(f().log_prob, x) for f in (flow, honest))
    assert torch.allclose(one, other)  # the first ones are right
    with pytest.raises(NotImplementedError, match=r"wrong second ones.*Use a flow of pyrogen"):
        torch.autograd.functional.hessian(flow().log_prob, x)
    z = torch.tensor([0.3, -0.4]).double()
    with pytest.raises(NotImplementedError, match="wrong second ones"):
        torch.autograd.functional.hessian(lambda z: flow().from_noise(z).sin().sum(), z)


def test_training_needs_first_derivatives_only():
    flow = ZukoFlow(Double(cube=Cubed.apply))
    MaximumLikelihood(flow)(torch.randn(20, 2)).backward()
    assert flow.flow.transform.free.grad.abs().sum() > 0
    flow().rsample((5,)).sum().backward()


def test_flow_is_a_prior(caplog):
    caplog.set_level(logging.ERROR)
    flow = ZukoFlow(Double()).requires_grad_(False)

    def model():
        z = pyro.sample("z", flow())
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).step()
    mcmc = MCMC(NUTS(model, max_tree_depth=2), num_samples=2, warmup_steps=2, disable_progbar=True)
    mcmc.run()


def test_noise_that_is_neither_normal_nor_uniform_is_refused():
    double = Double()
    double.base = Base(torch.distributions.Laplace)
    with pytest.raises(TypeError, match=r"normal or uniform noise, got Laplace"):
        ZukoFlow(double)()
    double.base = Base(torch.distributions.Uniform)
    assert isinstance(ZukoFlow(double)().noise.base_dist, dist.Uniform)
    with pytest.raises(ValueError, match=r"context=0, got 2"):
        ZukoFlow(Double())(torch.zeros(5, 2))


# zuko itself

KEEP = """
import sys
from torch.distributions import Distribution
from pyrogen.distributions.foreign import import_zuko
for state in (True, False):
    Distribution.set_default_validate_args(state)
    sys.modules.pop("zuko", None)
    assert import_zuko().__name__ == "zuko"
    assert Distribution._validate_args is state
"""


def test_import_keeps_validation(tmp_path):
    """With a double that does to torch what zuko does, and with zuko where it is installed."""
    (tmp_path / "zuko.py").write_text(
        "from torch.distributions import Distribution\nDistribution._validate_args = False\n"
    )
    path = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    subprocess.run([sys.executable, "-c", path + KEEP], check=True)
    if HAS_ZUKO:
        subprocess.run([sys.executable, "-c", KEEP], check=True)


def test_missing_zuko_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(ImportError, match="pip install zuko"):
        import_zuko()
    assert Distribution._validate_args


@needs_zuko
@pytest.mark.parametrize("name", ["MAF", "NSF", "NICE", "NCSF", "NAF", "UNAF", "BPF", "CNF"])
@pytest.mark.parametrize("context", [0, 2])
def test_flows_of_zuko_score_as_they_do_there(name, context):
    flow = ZukoFlow(getattr(import_zuko().flows, name)(3, context), context).double()
    c = torch.randn(4, 2).double() if context else None
    x, log_prob = flow(c).rsample_and_log_prob((20,))
    assert torch.allclose(flow(c).log_prob(x), flow.flow(c).log_prob(x))
    assert (flow(c).log_prob(x) - log_prob).abs().max() < 1e-3
    assert flow.twice[1] == (name not in {"UNAF", "CNF"})


# Transforms of Pyro

LAYERS = {
    "iaf": lambda c: pt.affine_autoregressive(3, hidden_dims=[8]),
    "coupling": lambda c: pt.affine_coupling(3, hidden_dims=[8]),
    "spline coupling": lambda c: pt.spline_coupling(3, hidden_dims=[8]),
    "spline": lambda c: pt.spline(3),
    "permutation": lambda c: pt.householder(3),
    "conditional iaf": lambda c: pt.conditional_affine_autoregressive(3, c, hidden_dims=[8]),
    "conditional spline": lambda c: pt.conditional_spline(3, c, hidden_dims=[8]),
}


def pyro_flow(name):
    context = 2 if "conditional" in name else 0
    return Flow(3, [PyroLayer(LAYERS[name](2), context)], context)


def given(name):
    return torch.randn(4, 2) if "conditional" in name else None


@pytest.mark.parametrize("name", LAYERS)
def test_pyro_layers_score_what_they_draw(name):
    p = pyro_flow(name)(given(name))
    x, log_prob = p.rsample_and_log_prob((20,))
    assert torch.allclose(p.log_prob(x.clone()), log_prob, atol=1e-2)  # their splines lose digits
    assert p.sample((2,)).shape == (2, *p.batch_shape, 3)


@pytest.mark.parametrize("name", LAYERS)
def test_pyro_layers_are_copied_after_use_and_never_stale(name):
    flow, context = pyro_flow(name), given(name)
    x = torch.randn(20, 1, 3)
    before = flow(context).log_prob(x)
    flow(context).rsample((2,)).sum().backward()
    assert torch.equal(copy.deepcopy(flow)(context).log_prob(x), before)
    with torch.no_grad():
        for w in flow.parameters():
            w.add_(0.2 * torch.randn_like(w))
    assert not torch.equal(flow(context).log_prob(x), before)


def test_pyro_layer_learns():
    flow = pyro_flow("conditional iaf")
    MaximumLikelihood(flow)(torch.randn(20, 3), torch.randn(20, 2)).backward()
    assert any((w.grad != 0).any() for w in flow.parameters())


ERRORS = [
    (
        lambda: PyroLayer(pt.ExpTransform()),
        TypeError,
        r"transform module of Pyro, got ExpTransform",
    ),
    (lambda: PyroLayer(pt.spline(2), 2), ValueError, r"context=2 for Spline"),
    (lambda: PyroLayer(pt.conditional_spline(2, 2)), ValueError, r"context=0 for Conditional"),
    (
        lambda: Flow(2, [PyroLayer(pt.planar(2))])().log_prob(torch.zeros(2)),
        NotImplementedError,
        r"no inverse.*Choose an auto",
    ),
]


@pytest.mark.parametrize(("call", "error", "match"), ERRORS)
def test_refusals_say_what_to_do(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_density_that_depends_on_its_batch_is_refused():
    with pytest.raises(ValueError, match=r"BatchNorm.*depends on the others.*standardize"):
        PyroLayer(dist.transforms.BatchNorm(2))
