"""Trading time for memory where derivatives are taken on the way.

``torch.utils.checkpoint`` keeps what it should forget if the function takes derivatives itself, as
a trace does: these unpack what was saved, there and then. Here the function runs without any
graph, and is run again, with one, on the way back.
"""

__all__ = ["leaves", "recomputed"]

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

Function = Callable[..., tuple[Tensor, ...]]


def leaves(result: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Parameters that ``result`` was computed from, but for what lies behind ``inputs``.

    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> (found,) = leaves(weight * torch.ones(2))
        >>> found is weight
        True
    """
    seen: set[Node | None] = {None, *(v.grad_fn for v in inputs)}
    found: list[Tensor] = []
    stack = [result.grad_fn]
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


def recomputed(
    function: Function, inputs: Sequence[Tensor], parameters: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Call ``function(*inputs)`` and keep the inputs only.

    It must give the same results when it is run again, and may be differentiated as often as
    it is differentiable.

    Args:
        function: Map from tensors to a tuple of tensors.
        inputs: What to call it with.
        parameters: What else it depends on and is to have a gradient, as :func:`leaves` finds.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> (y,) = recomputed(lambda x: (x.exp(),), (x,), ())
        >>> y.sum().backward()
        >>> x.grad
        tensor([2.7183, 2.7183])
    """
    return _Recomputed.apply(function, len(inputs), *inputs, *parameters)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Function, inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.function, ctx.inputs = function, inputs
        ctx.save_for_backward(*tensors)
        results = function(*(v.detach() for v in tensors[:inputs]))
        return tuple(v.detach() for v in results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors, wanted = list(ctx.saved_tensors), ctx.needs_input_grad[2:]
        again = torch.is_grad_enabled()  # derivatives of the derivatives are asked for
        with torch.enable_grad():
            for i in range(ctx.inputs):
                # a new node, so that the way back ends here
                tensors[i] = tensors[i].view_as(tensors[i]) if again else tensors[i].detach()
                if wanted[i] and not again:
                    tensors[i].requires_grad_()
            results = ctx.function(*tensors[: ctx.inputs])
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
