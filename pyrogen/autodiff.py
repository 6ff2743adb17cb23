"""What torch is doing to a tensor: which transforms are at work, and what it was computed from."""

__all__ = ["can_steer", "leaves", "transformed"]

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import Node


def can_steer(x: Tensor) -> bool:
    """Whether values can decide what is computed.

    They cannot while compiling, nor under ``vmap``, where the values of one datum stand for many.

    Args:
        x: Tensor whose values are to decide.

    Example:
        >>> can_steer(torch.zeros(3))
        True
    """
    if torch.compiler.is_compiling():
        return False
    layers = torch._C._functorch  # torch has no public way to ask
    while layers.is_functorch_wrapped_tensor(x):  # also by torch.func.grad, where values are one's
        if layers.is_batchedtensor(x):
            return False
        x = layers.get_unwrapped(x)
    return True


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
