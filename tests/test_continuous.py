"""Continuous flows against closed forms, another solver, autograd, and finite differences."""

import copy
import io
import subprocess
import sys
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from continuous_cases import Linear, small, steep
from flow_cases import awake
from scipy.integrate import solve_ivp
from torch import nn
from torch.distributions import constraints

from pyrogen.distributions import Flow
from pyrogen.distributions.recipes.continuous import cnf, log_prob_and_error
from pyrogen.nets import ResidualMLP, TimeMLP
from pyrogen.objectives import MaximumLikelihood
from pyrogen.testing import (
    DISTRIBUTION_CHECKS,
    MODULE_CHECKS,
    TRANSFORM_CHECKS,
)
from pyrogen.transforms import Elementwise, Hutchinson, Permutation
from pyrogen.transforms.continuous import Continuous
from pyrogen.transforms.ode import DormandPrince, Euler, RungeKutta4


def name(solver):
    return type(solver).__name__


# The map


@pytest.mark.parametrize("solver", [RungeKutta4(40), DormandPrince()], ids=name)
def test_linear_field_has_the_density_in_closed_form(solver):
    """x(1) = e^A x(0) + A^-1 (e^A - 1) B c, so data are Gaussian."""
    layer = Continuous(Linear(3, 2), 3, 2, solver=solver).double()
    a, b = layer.field.a.detach(), layer.field.b.detach()
    c = torch.randn(7, 2).double()
    back = torch.linalg.matrix_exp(-a)
    shift = torch.linalg.solve(a, (torch.linalg.matrix_exp(a) - torch.eye(3).double()) @ b @ c.T).T
    expected = dist.MultivariateNormal(-shift @ back.T, back @ back.T)
    x = expected.sample((5,))
    flow = Flow(3, [layer], 2).double()
    assert torch.allclose(flow(c).log_prob(x), expected.log_prob(x), atol=1e-6)
    _, ladj = layer(c).call_and_ladj(x)
    assert torch.allclose(ladj, -a.trace().expand(5, 7), atol=1e-10)


def test_density_agrees_with_scipy():
    flow = steep(small().double(), 10)
    law, field = flow(), flow.layers[0].field
    x = law.sample((4,))
    mine = law.log_prob(x)
    for row, log_prob in zip(x, mine, strict=True):

        def rate(t, y):
            t = torch.tensor([t]).double()
            z = torch.from_numpy(y[:3])
            jacobian = torch.autograd.functional.jacobian(lambda z: field(z[None], t)[0], z)
            return [*field(z[None], t)[0].tolist(), jacobian.trace().item()]

        start = (row - flow.shift) / flow.scale
        end = solve_ivp(rate, (0.0, 1.0), [*start.tolist(), 0.0], "DOP853", rtol=1e-11, atol=1e-11)
        z, trace = torch.from_numpy(end.y[:3, -1]), end.y[3, -1]
        expected = law.noise.log_prob(z) + trace - flow.scale.log().sum()
        assert log_prob.item() == pytest.approx(expected.item(), abs=1e-8)


@pytest.mark.parametrize("check", TRANSFORM_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("context", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_layer_keeps_every_law(check, context, dtype):
    layer = small(3, context).layers[0].to(dtype)
    c = torch.randn(5, 2, dtype=dtype) if context else None
    check(layer, torch.randn(5, 3, dtype=dtype), c)


def test_untrained_layer_is_the_identity():
    z = torch.randn(5, 3)
    for field in (TimeMLP(3), ResidualMLP(3)):
        x, ladj = Continuous(field, 3)().call_and_ladj(z)
        assert torch.equal(x, z)
        assert not ladj.any()


def test_untrained_flow_learns_at_once():
    flow = cnf(3)
    MaximumLikelihood(flow)(torch.randn(8, 3) ** 3).backward()
    assert flow.layers[0].field.net[-1].weight.grad.abs().sum() > 0


@pytest.mark.parametrize(("dtype", "nats"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("factor", [0, 1, 10])
def test_draw_and_score_agree(dtype, nats, factor):
    flow = steep(small(6).to(dtype), factor)
    with torch.no_grad():
        x, log_prob = flow().rsample_and_log_prob((100,))
        assert x.dtype == log_prob.dtype == dtype
        assert (flow().log_prob(x) - log_prob).abs().max() <= nats


def test_density_does_not_depend_on_the_batch():
    """With a loose solver, so that steps in common would show."""
    flow = steep(small(solver=DormandPrince(1e-3)).double(), 10)
    x = 3 * torch.randn(20, 3).double()
    x[0] *= 20
    with torch.no_grad():
        together = flow().log_prob(x)
        alone = torch.stack([flow().log_prob(row) for row in x])
        assert torch.allclose(together, alone, atol=1e-11)


def test_chunks_do_not_show(monkeypatch):
    flow, x = small().double(), torch.randn(20, 3).double()
    whole = flow().log_prob(x)
    monkeypatch.setattr("pyrogen.transforms.continuous.COTANGENTS_AT_ONCE", 10)
    assert torch.allclose(flow().log_prob(x), whole, atol=1e-12)


def test_density_integrates_to_one():
    flow = steep(small(2, solver=RungeKutta4(6)).double(), 3)
    grid = torch.linspace(-12, 12, 101).double()
    with torch.no_grad():
        p = flow().log_prob(torch.cartesian_prod(grid, grid)).exp()
    assert (p.sum() * (grid[1] - grid[0]) ** 2).item() == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("solver", [RungeKutta4(5), DormandPrince()], ids=name)
def test_hessian_matches_finite_differences(solver):
    p = small(3, 2, solver=solver).double()(torch.ones(2).double())

    def slope(x):
        return torch.autograd.functional.jacobian(p.log_prob, x)

    x = torch.tensor([0.3, -0.4, 0.7]).double()
    hessian = torch.autograd.functional.hessian(p.log_prob, x)
    step = 1e-5 * torch.eye(3).double()
    expected = torch.stack([(slope(x + h) - slope(x - h)) / 2e-5 for h in step])
    assert torch.allclose(hessian, expected, atol=1e-6)
    assert torch.allclose(hessian, hessian.T, atol=1e-10)


@pytest.mark.parametrize("solver", [RungeKutta4(3), DormandPrince(1e-6)], ids=name)
def test_checkpoints_change_no_derivative(solver):
    flow = small(3, 2, solver=solver).double()
    x, c = torch.randn(4, 3).double(), torch.randn(4, 2).double().requires_grad_()
    found = []
    for checkpointed in (False, True):
        flow.layers[0].solver = replace(solver, checkpointed=checkpointed)
        weights = [c, *flow.parameters()]
        gradient = torch.autograd.grad(flow(c).log_prob(x).sum(), weights)
        hessian = torch.autograd.functional.hessian(lambda x: flow(c).log_prob(x).sum(), x)
        found.append([*gradient, hessian])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-11)


@pytest.mark.slow
def test_memory_of_a_checkpointed_density_hardly_grows_with_steps():
    """Memory is measured by a child process, for a checkpoint may keep what it should forget."""
    script = """
import resource, sys, torch
from pyrogen.distributions.recipes.continuous import cnf
from pyrogen.transforms.ode import RungeKutta4
flow = cnf(8, solver=RungeKutta4(int(sys.argv[1]), checkpointed=True))
flow().log_prob(torch.randn(200, 8)).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    few, many = (
        int(subprocess.check_output([sys.executable, "-c", script, n])) for n in ("4", "24")
    )
    assert many < 1.1 * few


def test_values_alone_take_no_derivative():
    layer, seen = small().layers[0], []
    layer.field.register_forward_hook(lambda _, args, v: seen.append(args[0].requires_grad))
    with torch.no_grad():
        z = torch.randn(5, 3)
        x = layer()(z)
        assert torch.allclose(layer()._inverse(x), z, atol=1e-4)
    assert not any(seen)
    layer().call_and_ladj(z)
    assert seen[-1]


def test_no_graph_is_kept_where_nobody_wants_one():
    flow = small().requires_grad_(requires_grad=False)
    assert not flow().log_prob(torch.randn(5, 3)).requires_grad
    with torch.no_grad():
        assert not small()().log_prob(torch.randn(5, 3)).requires_grad


def test_every_support_has_its_jacobian():
    for support in (constraints.positive, constraints.unit_interval, constraints.simplex):
        p = small(3, support=support).double()()
        x, log_prob = p.rsample_and_log_prob((20,))
        reference = dist.TransformedDistribution(p.noise, p.transforms)
        assert torch.allclose(log_prob, reference.log_prob(x), atol=1e-6)


@pytest.mark.parametrize("check", DISTRIBUTION_CHECKS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("context", [0, 2])
def test_flow_is_a_distribution(check, context):
    check(small(3, context)(torch.randn(4, 2) if context else None))


@pytest.mark.parametrize("check", MODULE_CHECKS, ids=lambda f: f.__name__)
def test_flow_is_a_module(check):
    check(small(3, 2), torch.randn(4, 2))


def test_state_survives_a_file_and_a_copy():
    flow = small()
    file = io.BytesIO()
    torch.save(flow.state_dict(), file)
    file.seek(0)
    other = cnf(3, hidden=(16, 16))
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(5, 3)
    for twin in (other, copy.deepcopy(flow)):
        assert torch.equal(twin().log_prob(x), flow().log_prob(x))


def test_context_is_broadcast():
    flow = small(2, 3).double()
    context, x = torch.randn(4, 1, 3).double(), torch.randn(4, 7, 2).double()
    p = flow(context)
    assert (p.batch_shape, p.sample((5,)).shape) == ((4, 1), (5, 4, 1, 2))
    one = flow(context[2, 0]).log_prob(x[2, 3])
    assert torch.allclose(p.log_prob(x)[2, 3], one, atol=1e-9)


def test_steps_that_are_fixed_can_be_mapped_over():
    flow = small(3, 2, solver=RungeKutta4(4))
    x, c = torch.randn(5, 3), torch.randn(5, 2)
    with pyro.validation_enabled(False):
        for f in (lambda x, c: flow(c).log_prob(x), lambda x, c: flow(c).from_noise(x)):
            assert torch.allclose(torch.vmap(f)(x, c), f(x, c), atol=1e-5)
        jacobian = torch.func.jacrev(flow(c[0]).log_prob)(x[0])
    x = x[0].requires_grad_()
    (expected,) = torch.autograd.grad(flow(c[0]).log_prob(x), x)
    assert torch.allclose(jacobian, expected, atol=1e-5)


# Error of a density


def test_error_covers_that_of_the_solver():
    flow = steep(small(2, solver=RungeKutta4(3)).double(), 20)
    x = torch.randn(100, 2).double()
    with torch.no_grad():
        log_prob, error = log_prob_and_error(flow, x)
        coarse = flow().log_prob(x)
        flow.layers[0].solver = DormandPrince(1e-11)
        exact = flow().log_prob(x)
    assert ((log_prob - exact).abs() < (coarse - exact).abs()).double().mean() > 0.9
    assert ((coarse - exact).abs() < 1.5 * error + 1e-8).double().mean() > 0.95
    assert (error < 3 * (coarse - exact).abs() + 1e-8).double().mean() > 0.95


def test_error_of_an_estimated_trace_is_its_standard_error():
    flow = steep(small(4, solver=RungeKutta4(6)).double(), 10)
    x = torch.randn(400, 4).double()
    with torch.no_grad():
        exact, none = log_prob_and_error(flow, x)
        log_prob, error = log_prob_and_error(flow, x, trace=Hutchinson(12))
    assert none.max() < 1e-2 * error.mean()
    score = (log_prob - exact) / error
    assert abs(score.mean()) < 4.5 / 20  # 400 rows; fails once in 1e5
    assert score.std().item() == pytest.approx(1.1, abs=0.2)  # Student's t of 11


def test_error_goes_through_other_layers_and_contexts():
    first, last = (Continuous(TimeMLP(3, 2), 3, 2) for _ in range(2))
    layers = [first, Permutation([2, 0, 1]), Elementwise(3, 2), last]
    flow = awake(Flow(3, layers, 2, support=constraints.positive))
    c = torch.randn(4, 2)
    x = flow(c).sample((5,))
    log_prob, error = log_prob_and_error(flow, x, c)
    assert log_prob.shape == error.shape == (5, 4)
    assert torch.allclose(log_prob, flow(c).log_prob(x), atol=1e-4)
    assert (error < 1e-4).all()


# Refusals


def in_inference_mode():
    with torch.inference_mode():
        cnf(2)().log_prob(torch.zeros(2))


ERRORS = [
    (lambda: Continuous(TimeMLP(2), 0), ValueError, r"at least 1 feature, got 0"),
    (lambda: cnf(2, 3)(), ValueError, r"context=3, got 0"),
    (lambda: Continuous(TimeMLP(2), 2)(torch.zeros(4, 1)), ValueError, r"context=0, got 1"),
    (
        lambda: Continuous(ResidualMLP(2), 2).velocity(torch.zeros(4), torch.zeros(4, 3)),
        RuntimeError,
        r"shapes",
    ),
    (
        lambda: Flow(2, [Continuous(Pair(), 2)])().sample(),
        ValueError,
        r"return shape \(1, 2\), as its input, got \(1, 4\). Change its last layer",
    ),
    (in_inference_mode, RuntimeError, r"inference mode forbids. Use torch.no_grad"),
    (
        lambda: torch.vmap(cnf(2)().bijection)(torch.zeros(4, 2)),
        NotImplementedError,
        r"vmap hides.*RungeKutta4",
    ),
    (
        lambda: log_prob_and_error(cnf(2), torch.zeros(3)),
        ValueError,
        r"log_prob_and_error expected a batch of shape \(\*batch, 2\)",
    ),
    (
        lambda: log_prob_and_error(cnf(2), torch.full((2,), torch.nan)),
        ValueError,
        r"expected finite data",
    ),
]


class Pair(nn.Module):
    def forward(self, x, t, context):
        return torch.cat([x, x], dim=-1)


@pytest.mark.parametrize(("call", "error", "match"), ERRORS)
def test_refusals_say_what_to_do(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_euler_is_as_wrong_as_it_says():
    flow = steep(small(2, solver=Euler(10)).double(), 5)
    x = torch.randn(50, 2).double()
    _, error = log_prob_and_error(flow, x)
    flow.layers[0].solver = DormandPrince()
    gap = (flow().log_prob(x) - log_prob_and_error(flow, x)[0]).abs()
    assert gap.max() < 1e-8
    assert error.mean() > 1e-4
