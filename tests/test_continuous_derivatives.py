"""Derivatives of continuous flows: forward and backward, of whatever the field depends on."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from continuous_cases import Linear, small
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.autograd import forward_ad

from pyrogen.distributions import Flow
from pyrogen.transforms import Hutchinson
from pyrogen.transforms.continuous import Continuous
from pyrogen.transforms.ode import DormandPrince, RungeKutta4

SOLVERS = [RungeKutta4(3), RungeKutta4(3, checkpointed=True), DormandPrince(1e-6)]
pytestmark = pytest.mark.filterwarnings(  # torch.func's own
    "ignore:.torch.jit.script:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def no_validation():  # which looks at values that torch.func hides
    with pyro.validation_enabled(False):
        yield


class Law(nn.Module):
    """Log-density and draw of a flow, so that torch.func.functional_call can reach its weights."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, x, c):
        p = self.flow(c)
        return torch.cat([p.log_prob(x).unsqueeze(-1), p.from_noise(x)], dim=-1)

    def at(self, weights, x, c):
        return torch.func.functional_call(self, weights, (x, c))


def problem(solver):
    law = Law(small(3, 2, solver=solver).double())
    x, c = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    weights = {k: v.detach() for k, v in law.named_parameters()}
    return law, [weights, x, c]


def shifted(values, ways, size):
    return torch.utils._pytree.tree_map(lambda v, way: v + size * way, values, ways)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_forward_derivatives_match_finite_differences(solver, which):
    """In the weights, the data, the context, and all of them."""
    law, point = problem(solver)
    ways = torch.utils._pytree.tree_map(torch.randn_like, point)

    def f(*moved):
        arguments = list(point)
        for i, v in zip(which, moved, strict=True):
            arguments[i] = v
        return law.at(*arguments)

    start, way = tuple(point[i] for i in which), tuple(ways[i] for i in which)
    value, slope = torch.func.jvp(f, start, way)
    with torch.no_grad():
        ahead, behind = (f(*shifted(start, way, h)) for h in (1e-5, -1e-5))
        assert torch.allclose(value, f(*start), atol=1e-12)
        quiet = torch.func.jvp(f, start, way)[1]
    assert torch.allclose(slope, (ahead - behind) / 2e-5, atol=1e-6)
    assert torch.allclose(quiet, slope, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("learned", [False, True])
def test_dual_numbers_carry_the_backward_derivatives(solver, learned):
    law, (_, x, c) = problem(solver)
    law.requires_grad_(learned)
    way, rows = torch.randn_like(x), torch.randn(4, 4).double()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(law(leaf, c), leaf, rows)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled), forward_ad.dual_level():
            value, slope = forward_ad.unpack_dual(law(forward_ad.make_dual(x, way), c))
            assert value.requires_grad == (learned and enabled)
            assert torch.allclose((rows * slope).sum(), (gradient * way).sum(), atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_forward_over_backward_is_the_hessian(solver):
    law, (_, x, c) = problem(solver)

    def score(x):
        return law(x.unsqueeze(0), c[:1])[0, 0]

    expected = torch.autograd.functional.hessian(score, x[0])
    assert torch.allclose(torch.func.hessian(score)(x[0]), expected, atol=1e-10)
    assert torch.allclose(torch.func.jacfwd(torch.func.jacfwd(score))(x[0]), expected, atol=1e-10)


def test_costs_have_forward_derivatives():
    law, (_, x, c) = problem(RungeKutta4(3))
    trace = Hutchinson(4)
    probes, way = trace.probes(x), torch.randn_like(x)

    def costs(x):
        part = law.flow(c).bijection.parts[0]
        return torch.stack(part.inverse_and_costs(x, trace=trace, probes=probes)[1:])

    ahead, behind = costs(x + 1e-5 * way), costs(x - 1e-5 * way)
    slope = torch.func.jvp(costs, (x,), (way,))[1]
    assert torch.allclose(slope, (ahead - behind) / 2e-5, atol=1e-6)


# Weights that are no parameters of the layer


class Held(nn.Module):
    """A field of weights that the module does not know of."""

    def __init__(self, a, b):
        super().__init__()
        self.weights = (a, b)

    def forward(self, x, t, context):
        a, b = self.weights
        return torch.tanh(x @ a.T + b)


class Sampled(PyroModule):
    def __init__(self, a, b):
        super().__init__()
        self.a = PyroSample(lambda _: dist.Delta(a, event_dim=2))
        self.b = PyroSample(lambda _: dist.Delta(b, event_dim=1))

    def forward(self, x, t, context):
        return torch.tanh(x @ self.a.T + self.b)


class Learned(nn.Module):
    def __init__(self, a, b):
        super().__init__()
        self.a, self.b = nn.Parameter(a.detach()), nn.Parameter(b.detach())

    def forward(self, x, t, context):
        return torch.tanh(x @ self.a.T + self.b)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("kind", [Held, Sampled])
def test_weights_need_not_be_parameters(solver, kind):
    a = torch.randn(2, 2).double().requires_grad_()
    b = torch.randn(2).double().requires_grad_()
    x = torch.randn(5, 2).double()

    def score(field):
        return Flow(2, [Continuous(field, 2, solver=solver)]).double()().log_prob(x).sum()

    known = Learned(a, b)
    expected = torch.autograd.grad(score(known), [known.a, known.b])
    found = torch.autograd.grad(score(kind(a, b)), [a, b])
    made = torch.autograd.grad(score(kind(1 * a, 1 * b)), [a, b])  # as by a hypernetwork
    for truth, *others in zip(expected, found, made, strict=True):
        assert all(torch.allclose(other, truth, atol=1e-10) for other in others)


def test_constant_field_has_the_gradient_of_its_value():
    drift = torch.ones(2, dtype=torch.float64, requires_grad=True)
    field = nn.Module()
    field.forward = lambda x, t, context: drift.expand_as(x)
    flow = Flow(2, [Continuous(field, 2, solver=RungeKutta4(2))]).double()
    x = torch.randn(5, 2).double()
    (gradient,) = torch.autograd.grad(flow().log_prob(x).sum(), drift)
    assert torch.allclose(gradient, -(x + 1).sum(0))


def test_field_may_be_the_gradient_of_an_energy():
    """Plain autograd within the field goes through, as torch.func would not let it."""
    width = torch.randn(2, 3).double().requires_grad_()
    plain = Linear(2).double()
    with torch.no_grad():
        plain.a.copy_(width @ width.T)

    class Slope(nn.Module):
        def forward(self, x, t, context):
            with torch.enable_grad():
                x = x if x.requires_grad else x.detach().requires_grad_()
                energy = (x @ width).square().sum() / 2
                return torch.autograd.grad(energy, x, create_graph=True)[0]

    x = torch.randn(5, 2).double()
    densities = [
        Flow(2, [Continuous(field, 2, solver=RungeKutta4(3))]).double()().log_prob(x)
        for field in (Slope(), plain)
    ]
    assert torch.allclose(*densities, atol=1e-10)
    (by_a,) = torch.autograd.grad(densities[1].sum(), plain.a)
    (gradient,) = torch.autograd.grad(densities[0].sum(), width)
    assert torch.allclose(gradient, (by_a + by_a.T) @ width.detach(), atol=1e-9)


def test_checkpoints_ask_for_the_weights_they_saw():
    """Once functional_call is over, the module's own are back; the gradient would be lost."""
    law, (weights, x, c) = problem(RungeKutta4(3, checkpointed=True))
    other = {k: (v + 0.1).requires_grad_() for k, v in weights.items()}
    with pytest.raises(RuntimeError, match=r"same weights on the way back.*functional_call"):
        law.at(other, x, c).sum().backward()
    found = torch.func.grad(lambda w: law.at(w, x, c).sum())(other)
    law.flow.layers[0].solver = RungeKutta4(3)
    expected = torch.autograd.grad(law.at(other, x, c).sum(), list(other.values()))
    for a, b in zip(found.values(), expected, strict=True):
        assert torch.allclose(a, b, atol=1e-10)


# One datum standing for many, and compiled code


@pytest.mark.parametrize("solver", SOLVERS[:2], ids=repr)
def test_each_argument_can_be_mapped_over_alone(solver):
    law, (weights, x, c) = problem(solver)

    def score(weights, x, c):
        return law.at(weights, x.unsqueeze(0), c.unsqueeze(0))[0]

    for i in range(3):
        many = [v if j == i else v[0] for j, v in enumerate((x, x, c))]
        if i == 0:
            many[0] = {k: torch.stack([v, 2 * v]) for k, v in weights.items()}
            rows = [{k: v[j] for k, v in many[0].items()} for j in range(2)]
        else:
            many[0], rows = weights, many[i]
        mapped = torch.vmap(score, tuple(0 if j == i else None for j in range(3)))(*many)
        expected = [score(*many[:i], row, *many[i + 1 :]) for row in rows]
        assert torch.allclose(mapped, torch.stack(expected), atol=1e-10)


def test_derivatives_within_vmap_are_refused_where_steps_are_chosen():
    flow = small(3, 2)
    c = torch.randn(2)
    score = torch.func.grad(lambda x: flow(c).log_prob(x))
    assert score(torch.zeros(3)).shape == (3,)
    with pytest.raises(NotImplementedError, match=r"vmap hides.*RungeKutta4"):
        torch.vmap(score)(torch.zeros(4, 3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
@pytest.mark.parametrize("checkpointed", [False, True])
def test_fixed_steps_are_one_graph(checkpointed, monkeypatch):
    validation = torch.distributions.Distribution._validate_args
    monkeypatch.setattr(  # tracing switches it off for good
        torch.distributions.Distribution, "_validate_args", validation
    )
    torch.compiler.reset()
    law, (_, x, c) = problem(RungeKutta4(2, checkpointed=checkpointed))
    compiled = torch.compile(law, fullgraph=True, backend="eager")
    x.requires_grad_()
    both = [f(x, c) for f in (compiled, law)]
    assert torch.allclose(*both)
    gradients = [torch.autograd.grad(v.sum(), [x, *law.parameters()]) for v in both]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-10)
