"""Solvers: orders of convergence, an independent one, derivatives, and rows left to themselves."""

import math
from dataclasses import replace

import pytest
import torch
from scipy.integrate import solve_ivp

from pyrogen.nets import TimeMLP
from pyrogen.transforms.ode import DormandPrince, Euler, Midpoint, RungeKutta4

FIXED = [Euler, Midpoint, RungeKutta4]


def swing(t, x):
    """A clock: x'' = -x, driven; its solution is known."""
    position, speed = x.unbind(-1)
    return torch.stack([speed, -position + 2 * t.cos()], dim=-1)  # x = t sin t + cos t


def swung(t):
    x = [t * math.sin(t) + math.cos(t), t * math.cos(t)]
    return torch.tensor([x], dtype=torch.float64)


def net(scale=3.0):
    field = TimeMLP(3, hidden=(16, 16)).double()
    with torch.no_grad():
        for p in field.parameters():
            p.copy_(scale * torch.randn_like(p) / p.shape[-1] ** 0.5)
    return field


@pytest.mark.parametrize("solver", FIXED)
@pytest.mark.parametrize("ends", [(0.0, 2.0), (2.0, -1.0)], ids=["forth", "back"])
def test_order_of_convergence(solver, ends):
    start, stop = ends
    steps = torch.tensor([20, 40, 80, 160])
    errors = torch.stack(
        [(solver(int(n))(swing, swung(start), start, stop) - swung(stop)).norm() for n in steps]
    )
    order = -(errors.log2().diff()).mean()
    assert order.item() == pytest.approx(solver.order, abs=0.15)


@pytest.mark.parametrize("order", [5, 8])
def test_error_of_dormand_prince_follows_the_tolerance(order):
    calls = []

    def counted(t, x):
        calls.append(t)
        return swing(t, x)

    for tolerance in (1e-4, 1e-6, 1e-8, 1e-10, 1e-12):
        calls.clear()
        end = DormandPrince(tolerance, order=order)(counted, swung(0.0), 0.0, 3.0)
        assert (end - swung(3.0)).norm() < 5 * tolerance
        assert len(calls) < 55 + 7 * tolerance ** (-1 / order)  # steps of that order


@pytest.mark.parametrize("order", [5, 8])
def test_a_step_of_dormand_prince_has_its_order(order):
    """A tolerance that lets every step pass leaves the few steps that the first guess allows."""
    solver, spans = DormandPrince(1e6, order=order), torch.tensor([2.0, 1.0, 0.5]).double()
    errors = []
    for span in spans.tolist():
        end = solver(swing, swung(1.0), 1.0, 1.0 + span)
        errors.append((end - swung(1.0 + span)).norm())
    slope = torch.stack(errors).log2().diff().mean() / spans.log2().diff().mean()
    assert slope.item() == pytest.approx(order + 1, abs=0.5)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_default_tolerance_goes_with_the_precision(dtype, atol):
    end = DormandPrince()(swing, swung(0.0).to(dtype), 0.0, 3.0)
    assert end.dtype == dtype
    assert (end - swung(3.0)).abs().max() < atol


def test_agrees_with_scipy_on_a_network():
    field = net()
    x = torch.randn(5, 3).double()
    with torch.no_grad():
        end = DormandPrince(1e-12)(lambda t, x: field(x, t), x, 1.0, 0.0)
        for row, mine in zip(x, end, strict=True):

            def rate(t, y):
                t = torch.tensor([t]).double()
                return field(torch.from_numpy(y)[None], t)[0].numpy()

            other = solve_ivp(rate, (1.0, 0.0), row.numpy(), "DOP853", rtol=1e-12, atol=1e-12)
            assert torch.allclose(mine, torch.from_numpy(other.y[:, -1]), atol=1e-9)


def stiff_for_some(t, x, hardness):
    return -hardness * (x - t.cos().unsqueeze(-1))


@pytest.mark.parametrize("order", [5, 8])
def test_a_row_does_not_feel_its_mates(order):
    x, hardness = torch.randn(6, 2).double(), torch.logspace(-1, 3, 6).double().unsqueeze(-1)
    solver = DormandPrince(1e-3, order=order)  # loose, so that a shared step would show
    together = solver(stiff_for_some, x, 0.0, 1.0, hardness)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.allclose(
        solver(stiff_for_some, x[order], 0.0, 1.0, hardness[order]), together[order], atol=1e-14
    )
    for i in range(6):
        alone = solver(stiff_for_some, x[i : i + 1], 0.0, 1.0, hardness[i : i + 1])
        assert torch.allclose(alone, together[i : i + 1], atol=1e-14)


def test_rows_that_have_arrived_cost_nothing():
    hardness = torch.tensor([[1.0], [100.0]]).double()
    seen = []

    def record(t, x, hardness):
        seen.append(len(x))
        return stiff_for_some(t, x, hardness)

    DormandPrince()(record, torch.ones(2, 1).double(), 0.0, 1.0, hardness)
    assert seen[0] == 2
    assert seen[-1] == 1
    assert seen.count(1) > 5 * seen.count(2)


SOLVERS = [
    Euler(7),
    Midpoint(5),
    RungeKutta4(4),
    DormandPrince(1e-8, order=5),
    DormandPrince(1e-8, order=8),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_derivatives_are_those_of_the_numbers_returned(solver):
    field = net(1.0)
    x = torch.randn(2, 3).double().requires_grad_()

    def end(x):
        return solver(lambda t, x: field(x, t), x, 0.0, 1.0)

    assert torch.autograd.gradcheck(end, x, atol=1e-6)
    assert torch.autograd.gradgradcheck(end, x, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_gradients_with_and_without_checkpoints_are_equal(solver):
    field = net(1.0)
    x, held = torch.randn(4, 3).double(), torch.randn(4, 3).double().requires_grad_()
    gradients = []
    for checkpointed in (False, True):
        other = replace(solver, checkpointed=checkpointed)
        end = other(lambda t, x, c: field(x, t) + c, x, 0.0, 1.0, held)
        gradients.append(torch.autograd.grad(end.square().sum(), [held, *field.parameters()]))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


def saved(steps, *, checkpointed):
    """Numbers kept for the way back."""
    field, kept = net(1.0), []
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.numel()) or v, id):
        solver = RungeKutta4(steps, checkpointed=checkpointed)
        solver(lambda t, x: field(x, t), torch.randn(50, 3).double(), 0.0, 1.0)
    return sum(kept)


def test_memory_hardly_grows_with_checkpointed_steps():
    grown = saved(64, checkpointed=False) - saved(8, checkpointed=False)
    assert saved(64, checkpointed=True) - saved(8, checkpointed=True) < 0.05 * grown


def test_rejected_overflow_leaves_gradients_finite():
    """The first step is far too long for one row, which runs into infinity and tries again."""
    strength = torch.ones((), dtype=torch.float64, requires_grad=True)
    seen = []

    def pull(t, x):
        rate = -strength * 50 * t.unsqueeze(-1) * x * x.square().exp()
        seen.append(bool(rate.isfinite().all()))
        return rate

    x = torch.tensor([[3.0], [0.01]]).double()
    end = DormandPrince(1e-2)(pull, x, 0.0, 0.1)
    end.sum().backward()
    assert not all(seen)
    assert end.isfinite().all()
    assert strength.grad.isfinite()


def test_standing_still_is_exact():
    x = torch.randn(4, 3)
    for solver in SOLVERS:
        assert torch.equal(solver(lambda t, x: torch.zeros_like(x), x, 0.0, 1.0), x)
        assert torch.equal(solver(lambda t, x: x, x, 0.5, 0.5), x)


def test_refined_solver_is_finer():
    for solver in (Euler(10), Midpoint(10), RungeKutta4(10), DormandPrince(1e-5)):
        x = swung(0.0)
        error = (solver(swing, x, 0.0, 3.0) - swung(3.0)).norm()
        finer = (solver.refined(x.dtype)(swing, x, 0.0, 3.0) - swung(3.0)).norm()
        assert finer < 0.55 * error


ERRORS = [
    (lambda: Euler(0), ValueError, r"Euler expected steps >= 1, got 0"),
    (lambda: RungeKutta4(-2), ValueError, r"RungeKutta4 expected steps >= 1, got -2"),
    (lambda: DormandPrince(0.0), ValueError, r"tolerance > 0, got 0"),
    (lambda: DormandPrince(steps=0), ValueError, r"steps >= 1, got 0"),
    (lambda: DormandPrince(order=4), ValueError, r"expected order 5 or 8, got 4"),
    (
        lambda: DormandPrince(steps=5)(swing, swung(0.0), 0.0, 3.0),
        FloatingPointError,
        r"gave up on 1 rows, one of them at t=.*RegularizedLikelihood, loosen.*raise steps",
    ),
    (
        lambda: DormandPrince()(lambda t, x: x / 0.0, torch.ones(1, 1), 0.0, 1.0),
        FloatingPointError,
        r"not finite fails always",
    ),
    (
        lambda: DormandPrince()(lambda t, x: x**2, torch.ones(1, 1), 0.0, 2.0),  # pole at 1
        FloatingPointError,
        r"one of them at t=1",
    ),
]


@pytest.mark.parametrize(("call", "error", "match"), ERRORS)
def test_refusals_say_what_to_do(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_checkpoints_let_steps_share_what_weights_are_made_of():
    raw, x = torch.randn(2, 2).double().requires_grad_(), torch.randn(5, 2).double()
    found = []
    for checkpointed in (False, True):
        w = raw.exp()  # a result, as of a parametrization
        end = RungeKutta4(4, checkpointed=checkpointed)(lambda t, z, w=w: (z @ w).tanh(), x, 1, 0)
        found.append(torch.autograd.grad(end.sum(), raw)[0])
    assert torch.allclose(*found, atol=1e-12)
