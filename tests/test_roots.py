"""Roots of increasing functions: last digits, derivatives of three orders, and honest failure."""

import math

import pytest
import torch

from pyrogen.transforms.roots import solve


def power(x):
    return x + x**5, (1 + 5 * x**4).log()


def cube_root(x):  # on which Newton's steps alone run away
    return x.sign() * x.abs() ** (1 / 3), -(3 * x.abs() ** (2 / 3)).log()


def exponential(x):
    return x.expm1(), x


def steps(x):  # nearly flat, with two steep rises
    a, b = 40 * (x - 3), 40 * (x + 3)
    slope = 20 / a.clamp(-40, 40).cosh() ** 2 + 20 / b.clamp(-40, 40).cosh() ** 2
    return (a.tanh() + b.tanh()) / 2 + 1e-4 * x, (slope + 1e-4).log()


FUNCTIONS = {"power": power, "cube root": cube_root, "exponential": exponential, "steps": steps}


@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_roots_are_right_to_the_last_digits(f, dtype):
    x = torch.cat([3 * torch.randn(500), torch.tensor([-7.5, 0.01, 7.5])]).to(dtype)
    y, log_slope = f(x)
    found, slope_there = solve(f, y)
    assert found.dtype == dtype
    eps = torch.finfo(dtype).eps
    error = (f(found)[0] - y).abs()
    assert (error <= 4 * eps * (y.abs() + (x * log_slope.exp()).abs() + eps)).all()
    assert torch.equal(slope_there, f(found)[1])


def test_far_roots_are_found():
    y = torch.tensor([-1e30, -1e10, 1e10, 1e30], dtype=torch.float64)
    x, _ = solve(power, y)
    assert torch.allclose(power(x)[0], y, rtol=1e-12)
    x, _ = solve(exponential, torch.tensor([-1 + 1e-12, 1e300], dtype=torch.float64))
    assert x[0].item() == pytest.approx(-27.63, abs=0.01)
    assert x[1].item() == pytest.approx(300 * math.log(10))


def test_neighbours_do_not_matter():
    wild = torch.tensor([-1e20, 0.0, 1e-20, 1e20] * 8)
    for f in FUNCTIONS.values():
        y = f(2 * torch.randn(320))[0]
        far = f(wild.sign() * wild.abs().log1p())[0]
        assert torch.equal(solve(f, torch.cat([y, far]))[0][:320], solve(f, y)[0])


def test_derivatives_are_exact_to_the_third_order():
    """Of x = arcsinh(y) / a, in y and in a."""
    y, a = torch.tensor(0.8).double(), torch.tensor(1.3).double()

    def found(y, a):
        return solve(lambda x: ((a * x).sinh(), (a * (a * x).cosh()).log()), y)[0]

    def known(y, a):
        return y.asinh() / a

    def derivatives(f):
        v = [y.clone().requires_grad_(), a.clone().requires_grad_()]
        level, every = [f(*v)], []
        for _ in range(3):
            level = [g for out in level for g in torch.autograd.grad(out, v, create_graph=True)]
            every += level
        return torch.stack(every)

    assert torch.allclose(derivatives(found), derivatives(known), atol=1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch.func's own
def test_forward_and_mapped_derivatives_agree():
    def found(y):
        return solve(power, y)[0]

    y = torch.randn(4).double()
    x = found(y)
    slope = 1 / (1 + 5 * x**4)
    assert torch.allclose(torch.func.jvp(found, (y,), (torch.ones_like(y),))[1], slope)
    assert torch.allclose(torch.vmap(torch.func.grad(found))(y), slope)
    curve = -20 * x**3 * slope**3
    assert torch.allclose(torch.vmap(torch.func.hessian(found))(y), curve)


def test_without_need_no_graph_is_made():
    calls = []

    def counted(x):
        calls.append(torch.is_grad_enabled())
        return power(x)

    x, _ = solve(counted, torch.randn(5))
    assert not x.requires_grad
    assert sum(calls) == 1


def test_search_takes_few_steps():
    """The bound is twice what was seen: a regression shows, rounding does not."""
    count = []

    def counted(x):
        count.append(1)
        return steps(x)

    solve(counted, torch.linspace(-0.99, 0.99, 1001).double())
    assert len(count) <= 80


def keep_validation(monkeypatch):  # tracing switches it off for good
    kind = torch.distributions.Distribution
    monkeypatch.setattr(kind, "_validate_args", kind._validate_args)


def bounded(x):
    return x.tanh(), -2 * x.cosh().log()


@pytest.mark.parametrize("y", [2.0, -1.0001])
def test_value_out_of_reach_is_refused(y):
    with pytest.raises(FloatingPointError, match=r"reaches every value, got 1.*Lower the scale"):
        solve(bounded, torch.tensor([0.0, y]))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch.func's own
def test_torch_func_hides_no_value():
    """Of one datum, which only vmap makes to stand for many."""
    count = []

    def counted(x):
        count.append(1)
        return power(x)

    def found(y, f=power):
        return solve(f, y)[0]

    y = torch.tensor(2.0).double()
    slope = torch.func.grad(lambda y: found(y, counted))(y)
    assert torch.allclose(slope, 1 / (1 + 5 * found(y) ** 4))
    assert len(count) <= 20
    for derivative in (torch.func.grad, torch.func.jacfwd, torch.func.hessian):
        with pytest.raises(FloatingPointError, match=r"reaches every value, got 1"):
            derivative(lambda y: found(y, bounded))(y)


@pytest.mark.parametrize("y", [math.nan, math.inf])
def test_value_that_is_no_number_is_refused(y):
    with pytest.raises(FloatingPointError, match=r"finite values to invert, got 1 .*overflow"):
        solve(power, torch.tensor([0.0, y]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, while it compiles
def test_search_is_one_graph(monkeypatch):
    keep_validation(monkeypatch)
    compiled = torch.compile(lambda y: solve(power, y), fullgraph=True, backend="eager")
    y = torch.randn(10)
    assert torch.allclose(compiled(y)[0], solve(power, y)[0])
