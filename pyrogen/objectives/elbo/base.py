"""What every bound shares: particles, a gradient, and the manners of a Pyro ``ELBO``."""

__all__ = ["Bound"]

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.infer.elbo import ELBO as PyroELBO
from pyro.infer.elbo import ELBOModule
from pyro.util import check_if_enumerated, warn_if_nan
from torch import Tensor, nn

from ...parameters import announce
from .gradients import Gradient, Reparameterized
from .run import OneSubsample, Run


class Bound(PyroELBO):
    """A Pyro ``ELBO``: what is minimised, by draws of a guide and the gradient of one's choice.

    Fits ``SVI(loss=...)``; called on a model and a guide it gives the module that a
    :class:`~pyrogen.training.Trainer` takes, whose parameters are those of the model, of the guide
    and of the gradient's baseline. All particles see one subsample of a plate.

    Args:
        num_particles: Number of draws.
        gradient: How the gradient is estimated; by default :class:`Reparameterized`.
        max_plate_nesting: Depth of the plates; guessed from a run by default.
        vectorize_particles: Whether the draws are made by one run inside a plate.
        retain_graph: Passed to ``backward`` by ``loss_and_grads``.
    """

    def __init__(
        self,
        num_particles: int = 1,
        *,
        gradient: Gradient | None = None,
        max_plate_nesting: float = math.inf,
        vectorize_particles: bool = False,
        retain_graph: bool | None = None,
    ) -> None:
        owner = type(self).__name__
        if isinstance(num_particles, bool) or not (
            isinstance(num_particles, int) and num_particles >= 1
        ):
            raise ValueError(
                f"{owner} expected a positive number of particles, got {num_particles}. Pass an "
                "integer; every one more quiets the gradient."
            )
        gradient = Reparameterized() if gradient is None else gradient
        if not isinstance(gradient, Gradient):
            raise TypeError(
                f"{owner} expected a gradient, got {gradient!r}. Pass an object such as "
                "Reparameterized(), DoublyReparameterized() or ScoreFunction()."
            )
        super().__init__(
            num_particles=num_particles,
            max_plate_nesting=max_plate_nesting,
            vectorize_particles=vectorize_particles,
            retain_graph=retain_graph,
        )
        self.gradient = gradient

    def __call__(self, model: nn.Module, guide: nn.Module) -> ELBOModule:
        """Return the module of the loss, from the arguments of model and guide to a scalar."""
        return _BoundModule(model, guide, self)

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return an estimate of the loss, in nats, as a number."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """Return an estimate of the loss and add its gradient to the parameters'."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        if loss.requires_grad:
            loss.backward(retain_graph=self.retain_graph)
        return loss.item()

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return an estimate of the loss, in nats, whose gradient is the estimated gradient."""
        announce("baseline", self.gradient)
        with OneSubsample():
            runs = list(self._get_traces(model, guide, args, kwargs))
        value, surrogate = self._evaluate(runs, args, kwargs)
        value = value.detach()
        warn_if_nan(value, "loss")
        return _Valued.apply(value, surrogate) if surrogate.requires_grad else value

    @abstractmethod
    def _evaluate(self, runs: Sequence[Run], args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
        """Return the loss, and a scalar whose gradient is the loss's estimated gradient."""

    def _get_trace(self, model: Callable, guide: Callable, args: tuple, kwargs: dict) -> Run:
        run = self.gradient.run(model, guide, self.max_plate_nesting, args, kwargs)
        check_if_enumerated(run.guide)
        return run

    def _stack(self, runs: Sequence[Tensor]) -> Tensor:
        """Lead with the particles, given each run's tensor in the shape of the plates."""
        if not (self.vectorize_particles and self.num_particles > 1):
            return torch.stack(torch.broadcast_tensors(*runs))
        x = runs[0]
        x = x.reshape((1,) * (self.max_plate_nesting - x.ndim) + x.shape)
        x = x.movedim(-self.max_plate_nesting, 0)
        return x.expand(self.num_particles, *x.shape[1:])

    def _unstack(self, x: Tensor) -> list[Tensor]:
        """Undo ``_stack``: one tensor a run, in the shape of the plates."""
        if not (self.vectorize_particles and self.num_particles > 1):
            return list(x)
        return [x.movedim(0, -self.max_plate_nesting)]


class _Valued(torch.autograd.Function):
    """The value of one tensor with the gradient of another, which may itself be infinite."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.to(surrogate, copy=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


class _BoundModule(ELBOModule):
    def __init__(self, model: nn.Module, guide: nn.Module, elbo: Bound) -> None:
        super().__init__(model, guide, elbo)
        for name, part in vars(elbo).items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)  # what the bound learns, or remembers
