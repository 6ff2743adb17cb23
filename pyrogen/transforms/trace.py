"""The trace of a Jacobian: exact, or estimated with a stated error."""

__all__ = ["ExactTrace", "Hutchinson", "Trace", "pulled_back", "quadratic_forms"]

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..autodiff import leaves, transformed


def pulled_back(
    field: Callable[[Tensor], Tensor], x: Tensor, probes: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Evaluate a vector field and :math:`v^\top J` for its Jacobian J and each probe v.

    Both are differentiable in whatever the field depends on, backward and forward.

    Cost: one backward pass per probe, all in one batch; half the time of forward mode.

    Args:
        field: Map from ``x`` to its own shape, each row by itself.
        x: Points, shape ``(batch, *event)``.
        probes: Directions, shape ``(probes, batch, *event)``.

    Returns:
        The field at ``x`` and the products, of the shape of ``probes``.

    Example:
        >>> value, pulled = pulled_back(torch.square, torch.ones(5, 3), torch.ones(2, 5, 3))
        >>> pulled[0, 0].tolist()
        [2.0, 2.0, 2.0]
    """
    if transformed():
        value, pull = torch.func.vjp(field, x)[:2]
        with torch.enable_grad():  # without it, torch has no forward mode for some derivatives
            pulled = torch.vmap(lambda probe: pull(probe)[0])(probes)
        return value, pulled.clone()  # which has a graph only where the caller wants one
    # Plain autograd does the same in less time, but has to be told who may want a graph.
    differentiable = torch.is_grad_enabled()
    wanted = differentiable and x.requires_grad
    with torch.enable_grad():
        x = x if wanted else x.detach().requires_grad_()
        value = field(x)
        if not value.requires_grad:
            return value, torch.zeros_like(probes)
        wanted = wanted or (differentiable and bool(leaves([value], [x])))
        (pulled,) = torch.autograd.grad(
            value,
            x,
            probes,
            is_grads_batched=True,
            create_graph=wanted,
            allow_unused=True,
        )
    pulled = torch.zeros_like(probes) if pulled is None else pulled  # a field without x
    return (value, pulled) if wanted else (value.detach(), pulled)


def quadratic_forms(
    field: Callable[[Tensor], Tensor], x: Tensor, probes: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Evaluate a vector field and :math:`v^\top J v` for its Jacobian J and each probe v.

    Cost: that of :func:`pulled_back`.

    Args:
        field: Map from ``x`` to its own shape, each row by itself.
        x: Points, shape ``(batch, *event)``.
        probes: Directions, shape ``(probes, batch, *event)``.

    Returns:
        The field at ``x`` and the forms, of shape ``(probes, batch)``.

    Example:
        >>> value, forms = quadratic_forms(torch.square, torch.ones(5, 3), torch.ones(2, 5, 3))
        >>> forms.shape, forms[0, 0].item()
        (torch.Size([2, 5]), 6.0)
    """
    value, pulled = pulled_back(field, x, probes)
    return value, (pulled * probes).flatten(2).sum(-1)


class Trace(ABC):
    """How to get a trace from quadratic forms; linear, so that forms can be integrated first."""

    @abstractmethod
    def probes(self, x: Tensor) -> Tensor:
        """Directions, shape ``(probes, batch, *event)``, for points ``(batch, *event)``."""

    @abstractmethod
    def combine(self, forms: Tensor) -> tuple[Tensor, Tensor]:
        """Trace and its standard error, each ``(batch,)``, from forms ``(probes, batch)``."""


@dataclass(frozen=True)
class ExactTrace(Trace):
    """The sum over all axes. Cost: one derivative per dimension."""

    def probes(self, x: Tensor) -> Tensor:
        event = x.shape[1:]
        axes = torch.eye(math.prod(event), dtype=x.dtype, device=x.device)
        return axes.reshape(-1, 1, *event).expand(-1, *x.shape)

    def combine(self, forms: Tensor) -> tuple[Tensor, Tensor]:
        return forms.sum(0), forms.new_zeros(forms.shape[1:])


@dataclass(frozen=True)
class Hutchinson(Trace):
    r"""Average of :math:`v^\top J v` over random signs v: unbiased, with a standard error.

    Cost: one derivative per draw.

    Args:
        draws: Number of random directions, at least 2 so that their spread tells the error.

    Raises:
        ValueError: If ``draws`` is less than 2.

    References:
        Hutchinson. A stochastic estimator of the trace of the influence matrix for Laplacian
        smoothing splines. Communications in Statistics 1990.
        Grathwohl, Chen, Bettencourt, Sutskever, Duvenaud. FFJORD: free-form continuous dynamics
        for scalable reversible generative models. ICLR 2019. arXiv:1810.01367
    """

    draws: int = 16

    def __post_init__(self) -> None:
        if self.draws < 2:
            raise ValueError(
                f"Hutchinson expected at least 2 draws, got {self.draws}: one has no standard "
                "error, and even a 2-D density is then about 1 nat off."
            )

    def probes(self, x: Tensor) -> Tensor:
        signs = torch.randint(0, 2, (self.draws, *x.shape), device=x.device)
        return (2 * signs - 1).to(x)

    def combine(self, forms: Tensor) -> tuple[Tensor, Tensor]:
        return forms.mean(0), forms.std(0) / math.sqrt(self.draws)
