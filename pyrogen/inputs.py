"""What every public door asks of the tensors that come in."""

__all__ = ["check_batch", "check_context", "check_positive", "check_varied", "is_permutation"]

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .autodiff import can_steer


def check_batch(
    x: Tensor,
    event_shape: Sequence[int],
    *,
    owner: str,
    like: Tensor | None = None,
    at_least: int = 1,
) -> None:
    """Refuse what is not a finite floating-point batch of events.

    Values are inspected on the CPU only, and not under ``vmap`` or while compiling: on an
    accelerator that would wait for the device at every step, and ``Trainer`` stops at a loss that
    is not finite anyway.

    Args:
        x: Batch, shape ``(*batch, *event_shape)`` with at least one batch dimension.
        event_shape: Shape of one datum.
        owner: Name of the class or function that asks, for the message.
        like: Tensor whose dtype and device ``x`` must share, usually a buffer of the owner.
        at_least: Least number of data that the owner can work with.

    Raises:
        TypeError: If ``x`` is not a tensor, or not of floating point.
        ValueError: If shape, size, dtype, device or values are not as expected.

    Example:
        >>> check_batch(torch.zeros(5, 2), (2,), owner="Flow")
        >>> check_batch(torch.zeros(5, 3), (2,), owner="Flow")
        Traceback (most recent call last):
            ...
        ValueError: Flow expected a batch of shape (*batch, 2), got (5, 3). Reshape ...
    """
    event = tuple(event_shape)
    expected = ", ".join(["*batch", *map(str, event)])
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{owner} expected a tensor, got {type(x).__name__}. Convert it by torch.as_tensor."
        )
    if not x.dtype.is_floating_point:
        raise TypeError(
            f"{owner} expected floating-point data, got {x.dtype}. Convert it by x.float(); "
            "for counts or pixels, add uniform noise in [0, 1) first."
        )
    if x.ndim <= len(event) or tuple(x.shape[x.ndim - len(event) :]) != event:
        raise ValueError(
            f"{owner} expected a batch of shape ({expected}), got {tuple(x.shape)}. "
            "Reshape the data, or rebuild the model for this shape."
        )
    size = math.prod(x.shape[: x.ndim - len(event)])
    if size < at_least:
        raise ValueError(
            f"{owner} needs at least {at_least} data, got {size}. Pass a larger batch."
        )
    if like is not None and x.dtype != like.dtype:
        raise ValueError(
            f"{owner} holds {like.dtype}, got data of {x.dtype}. Convert one of them: "
            "x.to(dtype) or module.to(dtype)."
        )
    if like is not None and x.device != like.device:
        raise ValueError(
            f"{owner} lives on {like.device}, got data on {x.device}. Move one of them: "
            "x.to(device) or module.to(device)."
        )
    # One sum tells finite data at a tenth of the cost of looking at each value.
    if _can_be_inspected(x) and not x.sum().isfinite() and not x.isfinite().all():
        bad = int((~x.isfinite()).sum())
        raise ValueError(
            f"{owner} expected finite data, got {bad} NaN or infinite values. Drop or impute them."
        )


def _can_be_inspected(x: Tensor) -> bool:
    """Whether looking at values costs little and can decide anything."""
    return x.device.type == "cpu" and can_steer(x)


def check_context(
    context: Tensor | None, features: int, *, owner: str, like: Tensor | None = None
) -> None:
    """Refuse a context that does not have the ``features`` the owner was built with.

    Args:
        context: What to condition on, shape ``(*batch, features)``; None where there is none.
        features: Width that the owner was built with; 0 for no context.
        owner: Name of the class that asks, for the message.
        like: Tensor whose dtype and device the context must share.

    Raises:
        TypeError: If the context is not of floating point.
        ValueError: If the context is missing, superfluous or of another width, or is not finite.

    Example:
        >>> check_context(None, 3, owner="Flow")
        Traceback (most recent call last):
            ...
        ValueError: Flow was built with context=3, got 0 context features. Pass a context of ...
    """
    if context is None and features == 0:
        return
    if context is None or not context.ndim or context.shape[-1] != features or not features:
        got = context.shape[-1] if context is not None and context.ndim else 0
        advice = "Pass a context of shape (*batch, context)" if features else "Pass no context"
        raise ValueError(
            f"{owner} was built with context={features}, got {got} context features. "
            f"{advice}, or rebuild the {owner.lower()}."
        )
    check_batch(context.unsqueeze(0), (features,), owner=f"The context of {owner}", like=like)


def check_positive(owner: str, **counts: int) -> None:
    """Refuse counts below 1.

    Args:
        owner: Name of the class or function that asks, for the message.
        counts: Each count, under the name of one of what it counts.

    Raises:
        ValueError: If a count is below 1.

    Example:
        >>> check_positive("Planar", feature=0)
        Traceback (most recent call last):
            ...
        ValueError: Planar expected at least 1 feature, got 0. Pass a positive number of features.
    """
    for name, count in counts.items():
        if count < 1:
            what = name.replace("_", " ")
            raise ValueError(
                f"{owner} expected at least 1 {what}, got {count}. Pass a positive number of "
                f"{what}s."
            )


def check_varied(x: Tensor, *, owner: str) -> None:
    """Refuse a batch in which some feature never varies: it has no scale and no density.

    Args:
        x: Batch, shape ``(batch, *event_shape)``.
        owner: Name of the class or function that asks, for the message.

    Raises:
        ValueError: If a feature is constant.

    Example:
        >>> check_varied(torch.tensor([[0.0, 1.0], [0.0, 2.0]]), owner="Flow")
        Traceback (most recent call last):
            ...
        ValueError: Flow expected features that vary, got 1 constant (first: 0). Drop them, or ...
    """
    constant = (x == x[:1]).reshape(len(x), -1).all(0)
    if constant.any():
        first = int(torch.nonzero(constant)[0])
        raise ValueError(
            f"{owner} expected features that vary, got {int(constant.sum())} constant "
            f"(first: {first}). Drop them, or add noise of the measurement's precision."
        )


def is_permutation(order: Tensor) -> bool:
    """Whether these are the whole numbers 0, 1, ... in some order.

    Example:
        >>> is_permutation(torch.tensor([2, 0, 1])), is_permutation(torch.tensor([1, 2]))
        (True, False)
    """
    if order.ndim != 1 or order.is_floating_point() or order.dtype == torch.bool:
        return False
    return sorted(order.tolist()) == list(range(len(order)))
