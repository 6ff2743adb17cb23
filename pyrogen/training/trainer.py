"""One objective, one optimizer."""

__all__ = ["Trainer"]

from collections.abc import Iterator, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from .average import MovingAverage
from .base import Fitting


class Trainer(Fitting):
    """Minimise an objective by gradient steps.

    ``step`` is the algorithm. ``fit`` is a loop over it that you may as well write yourself,
    with checkpoints, validation and early stopping.

    Every Pyro ELBO fits: ``Trainer(Trace_ELBO()(model, guide), optimizer)`` for a model and a
    guide that are modules. Each step runs in an empty scope of Pyro's parameter store, so
    training leaves the store as it was, and two models with equal names do not collide.

    Args:
        objective: Module whose ``forward(*batch)`` returns a scalar loss.
        optimizer: Holds the parameters that move; the objective may hold more.
        clip: Largest norm of the gradient; longer ones are shortened to it. None for any.
        schedule: Learning rate schedule of the optimizer, moved at every step.
        average: Moving average of the weights that move and of the buffers beside them, or its
            decay. It is what ``fit`` validates and leaves in the modules.

    Raises:
        TypeError: If ``objective`` is not a module or ``schedule`` needs a metric.
        ValueError: If the optimizer and the objective or the schedule do not belong together.

    Example:
        >>> class Distance(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.theta = nn.Parameter(torch.tensor(3.0))
        ...
        ...     def forward(self, x):
        ...         return (self.theta - x).abs()
        >>> distance = Distance()
        >>> trainer = Trainer(distance, torch.optim.SGD(distance.parameters(), lr=1.0))
        >>> trainer.step(torch.tensor(0.0))
        tensor(3.)
        >>> trainer.fit([torch.tensor(0.0)], steps=2, progress=False).losses
        tensor([2., 1.])
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizer: Optimizer,
        *,
        clip: float | None = None,
        schedule: LRScheduler | None = None,
        average: MovingAverage | float | None = None,
    ) -> None:
        if not isinstance(objective, nn.Module):
            raise TypeError(
                f"Trainer expected an objective that is an nn.Module, got "
                f"{type(objective).__name__}. Wrap it in a module that holds its parameters."
            )
        if clip is not None and not clip > 0:
            raise ValueError(f"Trainer expected clip > 0, got {clip}. Pass None not to clip.")
        if isinstance(schedule, ReduceLROnPlateau):
            raise TypeError(
                "Trainer moves its schedule at every step, and ReduceLROnPlateau needs a metric. "
                "Use another schedule, for instance CosineAnnealingLR."
            )
        if schedule is not None and schedule.optimizer is not optimizer:
            raise ValueError("Trainer got a schedule of another optimizer. Pass its own.")
        self.objective = objective
        self.optimizer = optimizer
        self.clip = clip
        self.schedule = schedule
        self.average = MovingAverage(average) if isinstance(average, (int, float)) else average
        self.steps = 0
        self.moving = _moving(objective, optimizer)
        self._buffers = _buffers_beside(objective, self.moving)

    def step(self, *batch: Tensor) -> Tensor:
        """Take one step and return the loss before it, detached and still on its device.

        Raises:
            TypeError: If the objective does not return a tensor.
            ValueError: If the loss is not a scalar, or has no gradient in what moves.
        """
        self.continue_training()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            with pyro.get_param_store().scope() as store:
                loss = self.objective(*batch)
            self._check(loss)
            loss.backward()
        if self.steps == 0:
            self._check_first(store["params"])
        parameters = list(self.moving.values())
        if self.clip is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip)
        self.optimizer.step()
        if self.schedule is not None:
            self.schedule.step()
        if self.average is not None:
            self.average.update(self.weights())
        self.steps += 1
        return loss.detach()

    @property
    def objectives(self) -> tuple[nn.Module, ...]:
        return (self.objective,)

    def weights(self) -> dict[str, Tensor]:
        found = {name: p.detach() for name, p in self.moving.items()}
        for name in self._buffers:  # looked up anew: some modules replace their buffers
            found[name] = self.objective.get_buffer(name)
        return found

    def average_weights(self) -> dict[str, Tensor]:
        return {} if self.average is None else self.average.values

    def moments(self) -> Iterator[Tensor]:
        for moments in self.optimizer.state.values():
            yield from (m for m in moments.values() if isinstance(m, Tensor))

    def _check(self, loss: Tensor) -> None:
        name = type(self.objective).__name__
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"{name} returned {type(loss).__name__}, a tensor is needed to get a gradient. "
                "Return the loss itself, not loss.item()."
            )
        if loss.ndim:
            raise ValueError(
                f"{name} returned a loss of shape {tuple(loss.shape)}, a scalar is needed. "
                "Average it over the batch."
            )
        if not loss.requires_grad:
            raise ValueError(
                f"The loss of {name} does not depend on any parameter. Look for detach, no_grad "
                "or requires_grad=False in it."
            )

    def _check_first(self, stored: Mapping[str, Tensor]) -> None:
        name = type(self.objective).__name__
        if all(p.grad is None for p in self.moving.values()):
            raise ValueError(
                f"No parameter of the optimizer has a gradient of {name}: nothing would move. "
                "Give the optimizer the parameters that the loss depends on."
            )
        own = {id(p) for p in self.objective.parameters()}
        strange = sorted(site for site, p in stored.items() if id(p) not in own)
        if strange:
            raise ValueError(
                f"{name} calls pyro.param({strange[0]!r}), which is in no module, so the "
                "optimizer cannot move it. Make it a PyroParam of a PyroModule, or use SVI."
            )

    def _state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "objective": dict(self.objective.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def _load_state(self, state: Mapping[str, Any]) -> None:
        for name, part in {"schedule": self.schedule, "average": self.average}.items():
            if (part is None) != (state[name] is None):
                there, here = ("without", "with") if state[name] is None else ("with", "without")
                raise ValueError(
                    f"the state is of a trainer {there} {name}, this one is {here}. Build it as "
                    "it was"
                )
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule is not None:
            self.schedule.load_state_dict(state["schedule"])
        if self.average is not None:
            self.average.load_state_dict(state["average"], self.weights())
        self.steps = state["steps"]


def _moving(objective: nn.Module, optimizer: Optimizer) -> dict[str, nn.Parameter]:
    """Parameters that the optimizer moves, by their names in the objective."""
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = {name: p for name, p in objective.named_parameters() if id(p) in moved}
    name = type(objective).__name__
    if not named:
        raise ValueError(
            f"The optimizer holds no parameter of {name}: nothing would move. Build it from the "
            "objective's modules; parameters in Pyro's store need SVI, or a PyroModule."
        )
    if len(named) < len(moved):
        raise ValueError(
            f"The optimizer holds {len(moved) - len(named)} parameters that {name} does not, so "
            "they would neither move nor be saved. Give it parameters of the objective only."
        )
    return named


def _buffers_beside(objective: nn.Module, moving: Mapping[str, nn.Parameter]) -> list[str]:
    """Buffers that belong to what moves: the nearest module around with parameters moves."""
    moved = {id(p) for p in moving.values()}
    modules = dict(objective.named_modules())
    found = []
    for name, _ in objective.named_buffers():
        owner = name.rpartition(".")[0]
        while owner and next(modules[owner].parameters(), None) is None:
            owner = owner.rpartition(".")[0]
        if any(id(p) in moved for p in modules[owner].parameters()):
            found.append(name)
    return found
