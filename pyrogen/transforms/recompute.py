"""Trading time for memory where derivatives are taken on the way.

``torch.utils.checkpoint`` keeps what it should forget if the function takes derivatives itself, as
a trace does: these unpack what was saved, there and then. Here the function runs without any
graph, and is run again, with one, on the way back.
"""

__all__ = ["leaves", "parameters_of", "recomputed", "transformed"]

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.utils.checkpoint import get_device_states, set_device_states

Function = Callable[..., tuple[Tensor, ...]]


def transformed() -> bool:
    """Whether more than plain autograd is at work: ``torch.func``, forward mode, or a compiler.

    Example:
        >>> transformed()
        False
        >>> torch.func.grad(lambda x: x * transformed())(torch.tensor(3.0))
        tensor(1.)
    """
    if torch.compiler.is_compiling():
        return True
    level = torch._C._functorch.maybe_current_level()  # torch has no public way to ask
    return level is not None or forward_ad._current_level >= 0


def leaves(results: Sequence[Tensor], inputs: Sequence[Tensor] = ()) -> tuple[Tensor, ...]:
    """Parameters that ``results`` were computed from, but for what lies behind ``inputs``.

    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> (found,) = leaves([weight * torch.ones(2)])
        >>> found is weight
        True
    """
    seen: set[Node | None] = {None, *(v.grad_fn for v in inputs)}
    found: list[Tensor] = []
    stack = [v.grad_fn for v in results]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)  # of a node that accumulates a gradient
        if variable is not None and all(variable is not v for v in inputs):
            found.append(variable)
        stack += [before for before, _ in node.next_functions]
    return tuple(found)


def parameters_of(function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What ``function`` depends on and may want a gradient, but for ``inputs``.

    Found by a call, so let these be few rows.

    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> (found,) = parameters_of(lambda x: (x * weight,), [torch.zeros(1, 2)])
        >>> found is weight
        True
    """
    if transformed():
        return ()  # as :func:`recomputed` has no use for them
    with torch.enable_grad():
        sources = [_source(v) for v in inputs]
        return leaves(function(*sources), sources)


def recomputed(function: Function, parameters: Sequence[Tensor]) -> Function:
    """Make ``function`` keep its inputs only, and run again on the way back.

    It must give the same results then, by the same random numbers, and may be differentiated as
    often as it is differentiable. Where more than plain autograd is at work, all is kept.

    Args:
        function: Map from tensors to a tuple of tensors.
        parameters: What else it depends on, by :func:`parameters_of`.

    Raises:
        RuntimeError: On the way back, if it depends on other parameters by then.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> (y,) = recomputed(lambda x: (x.exp(),), ())(x)
        >>> y.sum().backward()
        >>> x.grad
        tensor([2.7183, 2.7183])
    """

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        if transformed():
            return function(*inputs)
        return _Recomputed.apply(function, len(inputs), *inputs, *parameters)

    return call


def _source(x: Tensor) -> Tensor:
    """``x`` as a new source of gradients, from which no way leads back."""
    x = x.detach()
    return x.requires_grad_() if x.is_floating_point() else x


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Function, inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.function, ctx.inputs = function, inputs
        ctx.save_for_backward(*tensors)
        on_device = get_device_states(tensors[0]) if tensors[0].is_cuda else ([], [])
        ctx.random = torch.get_rng_state(), on_device  # so that dropout drops the same
        kind = tensors[0].device.type
        precision, mixed = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        # without its cache, into which a weight would go without its graph
        ctx.autocast = torch.autocast(kind, precision, mixed, cache_enabled=False)
        with ctx.autocast:
            results = function(*(v.detach() for v in tensors[:inputs]))
        return tuple(v.detach() for v in results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors, wanted = list(ctx.saved_tensors), ctx.needs_input_grad[2:]
        again = torch.is_grad_enabled()  # derivatives of the derivatives are asked for
        random, (devices, states) = ctx.random
        with torch.enable_grad(), torch.random.fork_rng(devices):
            torch.set_rng_state(random)
            set_device_states(devices, states)
            for i in range(ctx.inputs):
                # a new node, so that the way back ends here
                joined = again and tensors[i].requires_grad
                tensors[i] = tensors[i].view_as(tensors[i]) if joined else _source(tensors[i])
            inputs, parameters = tensors[: ctx.inputs], tensors[ctx.inputs :]
            with ctx.autocast:
                results = ctx.function(*inputs)
            _check_same(leaves(results, inputs), parameters)
            ends = [i for i, v in enumerate(results) if v.requires_grad]
            sources = [v for v, want in zip(tensors, wanted, strict=True) if want]
            found = iter(
                torch.autograd.grad(
                    [results[i] for i in ends],
                    sources,
                    [gradients[i] for i in ends],
                    create_graph=again,
                    retain_graph=True,  # weights may be results that other steps share
                    allow_unused=True,
                )
            )
        return (None, None, *(next(found) if want else None for want in wanted))


def _check_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    if set(map(id, found)) != set(map(id, expected)):
        raise RuntimeError(
            "A checkpointed step expected to depend on the same weights on the way back, got "
            "others. Take the gradient while they are in place, as within the module that "
            "torch.func.functional_call calls, or do without checkpoints."
        )
