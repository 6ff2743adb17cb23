"""The likelihood of a continuous flow with estimated traces, and the cost of its path."""

import math

import pytest
import torch
from continuous_cases import Linear, small, steep

from pyrogen.distributions import Flow, nsf
from pyrogen.distributions.recipes.continuous import cnf
from pyrogen.objectives import MaximumLikelihood
from pyrogen.objectives.continuous import RegularizedLikelihood
from pyrogen.testing import OBJECTIVE_CHECKS
from pyrogen.transforms import ExactTrace, Hutchinson
from pyrogen.transforms.continuous import Continuous
from pyrogen.transforms.ode import RungeKutta4


def test_without_weights_it_is_the_likelihood():
    flow, x = small(3, 2).double(), torch.randn(7, 3).double()
    c = torch.randn(7, 2).double()
    losses = [f(flow)(x, c) for f in (MaximumLikelihood, RegularizedLikelihood)]
    assert torch.allclose(*losses, atol=1e-9)
    gradients = [torch.autograd.grad(loss, list(flow.parameters())) for loss in losses]
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-7)


def test_costs_of_a_linear_field():
    """Along e^{At} x: the integral of |A e^{At} x|^2, and |A|_F^2 throughout."""
    layer = Continuous(Linear(3), 3).double()
    flow, x = Flow(3, [layer]).double(), torch.randn(5, 3).double()
    a = layer.field.a.detach()
    nodes = (torch.arange(2000).double() + 0.5) / 2000
    speed = (a @ torch.linalg.matrix_exp(a * nodes[:, None, None])) @ x.T
    kinetic = speed.square().sum(1).mean(0).mean()
    zero = RegularizedLikelihood(flow)(x)
    moving = RegularizedLikelihood(flow, kinetic=0.7)(x) - zero
    assert moving.item() == pytest.approx(0.7 * kinetic.item(), rel=1e-5)
    bending = RegularizedLikelihood(flow, jacobian=0.3)(x) - zero
    assert bending.item() == pytest.approx(0.3 * a.square().sum().item(), rel=1e-8)


def test_random_probes_leave_loss_and_gradient_unbiased():
    flow = steep(small(solver=RungeKutta4(3)).double(), 5)
    x = torch.randn(2, 3).double()

    def both(trace, x):
        objective = RegularizedLikelihood(flow, kinetic=0.5, jacobian=0.5, trace=trace)
        loss = objective(x)
        gradient = torch.autograd.grad(loss, flow.layers[0].field.net[0].weight)
        return loss.detach(), gradient[0]

    loss, gradient = both(ExactTrace(), x)
    n = 100
    draws = [both(Hutchinson(2), x.repeat(10, 1)) for _ in range(n)]
    for expected, seen in ((loss, [d[0] for d in draws]), (gradient, [d[1] for d in draws])):
        seen = torch.stack(seen)
        z = (seen.mean(0) - expected) / (seen.std(0) / math.sqrt(n))
        assert z.abs().max() < 4.9  # 65 numbers, each fails once in 1e6


def test_regularisers_make_a_field_easier_to_follow():
    x = torch.randn(64, 2) ** 3
    calls = []
    for weight in (0.0, 0.3):
        torch.manual_seed(0)
        flow = cnf(2, hidden=(16, 16))
        objective = RegularizedLikelihood(
            flow, kinetic=weight, jacobian=weight, solver=RungeKutta4(2), trace=Hutchinson(2)
        )
        optimizer = torch.optim.Adam(flow.parameters(), 3e-2)
        for _ in range(40):
            optimizer.zero_grad()
            objective(x).backward()
            optimizer.step()
        count = []
        flow.layers[0].field.register_forward_hook(lambda *_, count=count: count.append(1))
        with torch.no_grad():
            flow().log_prob(x)
        calls.append(len(count))
    assert calls[1] < calls[0]


@pytest.mark.parametrize("check", OBJECTIVE_CHECKS, ids=lambda f: f.__name__)
def test_objective_keeps_every_law(check):
    objective = RegularizedLikelihood(
        cnf(3, hidden=(8,)), kinetic=0.1, jacobian=0.1, trace=Hutchinson(2), solver=RungeKutta4(2)
    )
    check(objective, torch.randn(6, 3))


ERRORS = [
    (lambda: RegularizedLikelihood(nsf(2)), ValueError, r"Continuous layer, got none.*cnf"),
    (lambda: RegularizedLikelihood(cnf(2), kinetic=-1.0), ValueError, r"kinetic >= 0, got -1"),
    (
        lambda: RegularizedLikelihood(cnf(2), jacobian=math.inf),
        ValueError,
        r"jacobian >= 0, got inf",
    ),
    (
        lambda: RegularizedLikelihood(cnf(2, 1))(torch.zeros(4, 2), torch.zeros(3, 1)),
        ValueError,
        r"one context for each datum",
    ),
]


@pytest.mark.parametrize(("call", "error", "match"), ERRORS)
def test_refusals_say_what_to_do(call, error, match):
    with pytest.raises(error, match=match):
        call()
