"""Roots of increasing functions of one variable, to the last digits and with all derivatives."""

__all__ = ["solve"]

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..autodiff import can_steer, transformed

Increasing = Callable[[Tensor], tuple[Tensor, Tensor]]  # x -> f(x), log f'(x), element by element


def solve(f: Increasing, y: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the :math:`x` at which :math:`f(x) = y`, and :math:`\log f'(x)` there.

    Each element is solved on its own, whatever its batch-mates: by Newton steps as long as they
    halve, else by doubling strides until the root is bracketed and by bisection after, until
    no digit changes. The derivatives of :math:`x` come from two more Newton steps, of which the
    value is known: the first makes the derivative of :math:`x` in everything that ``f`` depends
    on exact, the second those up to the third order.

    Cost: about ten calls of ``f`` without gradient, and three with it where one is wanted.

    Within ``torch.vmap`` and ``torch.compile`` values cannot end a loop, so its number of steps
    is fixed, at one that suffices in practice, and nothing is raised. Other transforms of
    ``torch.func`` change neither.

    Args:
        f: Increasing, differentiable function, from ``x`` of the shape of ``y`` to its value and
            the logarithm of its slope.
        y: Values to reach, and where the search starts.

    Shape:
        ``y`` is ``(*shape)``, and so are both outputs.

    Raises:
        FloatingPointError: If ``y`` is not finite, or no finite ``x`` reaches it.

    Example:
        >>> x, log_slope = solve(lambda x: (x.sinh(), x.cosh().log()), torch.tensor([0.0, 10.0]))
        >>> x
        tensor([0.0000, 2.9982])
    """
    with torch.no_grad():  # which leaves forward-mode derivatives, so they are detached as well
        x = _search(f, y.detach()).detach()
    value, log_slope = f(x)
    if not (value.requires_grad or y.requires_grad or transformed()):
        return x, log_slope
    for _ in range(2):
        step = (y - value) * torch.exp(-log_slope)
        x = x + (step - step.detach())  # whose value is rounding, and whose derivative is not
        value, log_slope = f(x)
    return x, log_slope


def _search(f: Increasing, y: Tensor) -> Tensor:
    x = y
    steerable = can_steer(y) and can_steer(f(x)[0])
    if steerable and not y.isfinite().all():
        raise FloatingPointError(
            f"Expected finite values to invert, got {int((~y.isfinite()).sum())} that are NaN or "
            "infinite. Look for overflow in the layers before, and lower the learning rate."
        )
    eps = torch.finfo(y.dtype).eps
    low, high = torch.full_like(y, -math.inf), torch.full_like(y, math.inf)
    stride = 1 + x.abs()
    last = torch.full_like(y, math.inf)  # size of the last step, if it was one of Newton's
    done = torch.zeros_like(y, dtype=torch.bool)
    for i in range(_LIMIT if steerable else _FIXED):
        value, log_slope = f(x)
        short = y - value
        low = torch.where(short > 0, x, low)
        high = torch.where(short < 0, x, high)
        bracketed = low.isfinite() & high.isfinite()
        newton = short * torch.exp(-log_slope)
        # Rounding near 0 is that of what f adds up, so relative precision ends at 1e-3.
        scale = eps * x.abs().clamp(min=1e-3)
        target = x + newton
        close = torch.where(bracketed, 0.5 * low + 0.5 * high, x + stride.copysign(short))
        if i % 4 == 1:  # an end of the bracket may be the root but for rounding: look beside it
            beside = target.clamp(low + 8 * scale, high - 8 * scale)
            close = torch.where(bracketed & (beside > low) & (beside < high), beside, close)
        fast = (newton.abs() < 0.5 * last) & (target > low) & (target < high)
        if i % 8 == 7:  # bisect, so that no cycle of the other steps goes on for ever
            fast = fast & ~bracketed
        following = torch.where(fast, target, close)
        done = done | (short == 0) | (newton.abs() <= scale) | (following == x)
        done = done | (bracketed & (high - low <= scale))
        x = torch.where(done | ~following.isfinite(), x, following)
        last = torch.where(fast, newton.abs(), math.inf)
        stride = torch.maximum(torch.where(fast | bracketed, stride, 2 * stride), x.abs())
        if steerable and done.all():
            return x
        if steerable and not (done | following.isfinite()).all():
            break
    if steerable:
        lost = ~done
        raise FloatingPointError(
            f"Expected an increasing function that reaches every value, got {int(lost.sum())} "
            f"without a root (first: {y[lost][0].item():g}). Lower the scale of the parameters "
            "or of the data, or use float64."
        )
    return x


_LIMIT = 4_000  # bisection from the largest double to the smallest takes 2,100
_FIXED = 64
