"""Trading time for memory where derivatives are taken on the way.

``torch.utils.checkpoint`` keeps what it should forget if the function takes derivatives itself, as
a trace does: these unpack what was saved, there and then. Here the function runs without any
graph, and is run again, with one, on the way back.
"""

__all__ = ["parameters_of", "recomputed"]

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.utils.checkpoint import get_device_states, set_device_states

from ..autodiff import leaves, transformed

Function = Callable[..., tuple[Tensor, ...]]


def parameters_of(function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What ``function`` depends on and may want a gradient, but for ``inputs``.

    Found by a call, so let these be few rows; what depends on other weights for other rows or
    at other times cannot be recomputed.

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
        kind = tensors[0].device.type
        on_device = ([], []) if kind == "cpu" else get_device_states(tensors[0])
        ctx.random = torch.get_rng_state(), kind, on_device  # so that dropout drops the same
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
        random, kind, (devices, states) = ctx.random
        with torch.enable_grad(), torch.random.fork_rng(devices, device_type=kind):
            torch.set_rng_state(random)
            set_device_states(devices, states, device_type=kind)
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
    if _nodes(found) != _nodes(expected):
        raise RuntimeError(
            "A checkpointed step expected to depend on the same weights on the way back, and at "
            "all times, got others. Take the gradient while they are in place, as within the "
            "module that torch.func.functional_call calls, or do without checkpoints."
        )


def _nodes(parameters: Sequence[Tensor]) -> set[Node]:
    """Where gradients gather: saved tensors may come back as others, these stay."""
    return {get_gradient_edge(v).node for v in parameters if v.requires_grad}
