"""Steps computed anew on the way back: what they depend on, and what they keep."""

import subprocess
import sys

import pyro
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pyrogen.autodiff import leaves
from pyrogen.distributions.diffusion import Diffusion
from pyrogen.nets import ResidualMLP
from pyrogen.transforms import ExactTrace
from pyrogen.transforms.recompute import parameters_of, recomputed


def test_parameters_are_what_is_not_an_input():
    a, b, unused = (torch.randn(3).double().requires_grad_() for _ in range(3))
    x = (2 * a).expand(4, 3)  # behind an input

    def function(x, kind):
        return ((x * b.exp())[kind], unused.detach())

    kind = torch.zeros(4, dtype=torch.long)
    assert [v is b for v in parameters_of(function, [x[:1], kind[:1]])] == [True]
    assert {id(v) for v in leaves(function(x, kind))} == {id(a), id(b)}
    assert leaves(function(x, kind), [x]) == (b,)
    assert parameters_of(lambda x: (x,), [x[:1]]) == ()


@pytest.mark.parametrize("known", [False, True])
def test_gradients_of_both_orders_are_those_of_the_function(known):
    w, x = (torch.randn(3).double().requires_grad_() for _ in range(2))
    u = torch.randn(3).double()

    def function(x):
        return ((x * w).sin(), x.square())

    found = []
    for f in (function, recomputed(function, parameters_of(function, [x]))):
        y, z = f(x.detach() if known else x)
        wanted = [w] if known else [w, x]
        first = torch.autograd.grad((y * u + z).sum(), wanted, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), wanted)
        found.append(torch.stack([*first, *second]))
    assert torch.allclose(*found, atol=1e-12)


def test_batched_gradients_go_through():
    w, x = (torch.randn(3).double().requires_grad_() for _ in range(2))

    def function(x):
        return ((x * w).sin(),)

    (y,) = recomputed(function, (w,))(x)
    found = torch.autograd.grad(y, [x, w], torch.eye(3).double(), is_grads_batched=True)
    slope = (x * w).cos().detach()
    assert torch.allclose(found[0], (slope * w).detach().diag())
    assert torch.allclose(found[1], (slope * x).detach().diag())


@pytest.mark.parametrize("outer", ["checkpoint", "saved elsewhere"])
def test_what_was_saved_may_come_back_as_other_tensors(outer):
    w = torch.randn(3).double().requires_grad_()

    def function(x):
        return ((x * w).sin(),)

    def total(x):
        step = recomputed(function, parameters_of(function, [x]))
        return step(step(x)[0])[0].sum()

    x = torch.randn(4, 3).double()
    if outer == "checkpoint":
        value = checkpoint(total, x, use_reentrant=False)
    else:
        with torch.autograd.graph.save_on_cpu():
            value = total(x)
    (found,) = torch.autograd.grad(value, w)
    (expected,) = torch.autograd.grad(function(function(x)[0])[0].sum(), w)
    assert torch.allclose(found, expected)


def test_randomness_is_repeated_and_left_alone():
    w, x = torch.ones(1000, requires_grad=True), torch.randn(1000)
    (y,) = recomputed(lambda x: (nn.functional.dropout(x * w),), (w,))(x)
    torch.rand(())
    state = torch.get_rng_state()
    (gradient,) = torch.autograd.grad(y.sum(), w)
    assert torch.equal(gradient, y.detach())
    assert torch.equal(torch.get_rng_state(), state)


def test_mixed_precision_is_repeated():
    layer, x, seen = nn.Linear(64, 64), torch.randn(8, 64), []

    def function(x):
        y = layer(x).tanh()
        seen.append(y.dtype)
        return (y,)

    found = []
    for f in (function, recomputed(function, tuple(layer.parameters()))):
        with torch.autocast("cpu", torch.bfloat16):
            total = f(x)[0].float().sum() + layer(x).float().square().sum()  # of the same weight
        found.append(torch.autograd.grad(total, layer.weight)[0])
    assert seen == [torch.bfloat16] * 3
    exact, anew = found
    assert (anew - exact).abs().max() < 2**-7 * exact.abs().max()  # two roundings in place of one


def test_weights_exchanged_in_between_are_refused():
    layer = nn.Linear(2, 2)
    x = torch.randn(5, 2)
    (y,) = recomputed(lambda x: (layer(x),), tuple(layer.parameters()))(x)
    layer.bias = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match=r"same weights on the way back, and at all times"):
        y.sum().backward()


# A diffusion's density, step by step


def denoiser(steps=6):
    diffusion = Diffusion(
        ResidualMLP(2, context=1, hidden=8, blocks=1),
        (2,),
        context=1,
        steps=steps,
        high=20.0,
        trace=ExactTrace(),
    )
    with torch.no_grad():
        for p in diffusion.parameters():
            p.normal_(0, 0.3)
    return diffusion.double()


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch.func's own
def test_density_of_a_diffusion_has_derivatives_of_every_kind():
    diffusion = denoiser()
    x, c = torch.randn(3, 2).double(), torch.randn(3, 1).double()
    ways = torch.randn_like(x), torch.randn_like(c)

    def score(x, c):
        return diffusion(c).log_prob(x)

    with pyro.validation_enabled(False):
        slope = torch.func.jvp(score, (x, c), ways)[1]
        mapped = torch.vmap(lambda x, c: score(x[None], c[None])[0])(x, c)
        with torch.no_grad():
            plain = score(x, c)
            ahead, behind = (score(x + h * ways[0], c + h * ways[1]) for h in (1e-5, -1e-5))
    assert torch.allclose(mapped, plain, atol=1e-10)
    assert torch.allclose(slope, (ahead - behind) / 2e-5, atol=1e-5)
    leaf = [x.requires_grad_(), c.requires_grad_()]
    gradient = torch.autograd.grad(score(x, c).sum(), leaf)
    backward = sum((g * way).sum() for g, way in zip(gradient, ways, strict=True))
    assert torch.allclose(slope.sum(), backward, atol=1e-10)


def test_density_of_a_diffusion_asks_for_the_weights_it_saw():
    diffusion = denoiser()
    x, c = torch.randn(3, 2).double(), torch.randn(3, 1).double()
    log_prob = diffusion(c).log_prob(x)
    diffusion.denoiser = denoiser().denoiser
    with pytest.raises(RuntimeError, match=r"same weights on the way back, and at all times"):
        log_prob.sum().backward()


@pytest.mark.slow
def test_memory_of_a_diffusion_s_gradient_hardly_grows_with_steps():
    script = """
import resource, sys, torch
from pyrogen.autodiff import leaves
from pyrogen.distributions.diffusion import Diffusion
from pyrogen.nets import ResidualMLP
diffusion = Diffusion(ResidualMLP(16), (16,), steps=int(sys.argv[1]))
diffusion().log_prob(torch.randn(200, 16)).sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    few, many = (
        int(subprocess.check_output([sys.executable, "-c", script, n])) for n in ("6", "24")
    )
    assert many < 1.1 * few
