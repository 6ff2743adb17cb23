"""What happened in a fit."""

__all__ = ["History", "Record"]

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

Stop = Literal["steps", "end", "patience"]


@dataclass(frozen=True, eq=False)
class History:
    """The course of a fit, from its first step on, also where it was resumed.

    Args:
        losses: Loss before each step, shape ``(steps,)``; for an adversarial trainer
            ``(steps, 2)``, generator and critic.
        validation_steps: Number of steps taken before each validation.
        validation: Value of each validation.
        stopped: Why the fit ended: ``"steps"`` taken, ``"end"`` of the batches, or
            ``"patience"`` used up.
        seconds: Time spent, summed over resumed parts.
    """

    losses: Tensor
    validation_steps: Tensor
    validation: Tensor
    stopped: Stop | None
    seconds: float


class Record:
    """The growing history of a fit, and the best weights in it.

    Losses stay on their device until ``gather``, so that a step does not wait for it.
    """

    def __init__(self) -> None:
        self.step = 0
        self.stopped: Stop | None = None
        self.seconds = 0.0
        self.fresh: list[Tensor] = []
        self.chunks: list[Tensor] = []
        self.validation_steps: list[int] = []
        self.validation: list[float] = []
        self.best: dict[str, Tensor] = {}
        self.best_value = float("inf")
        self.waited = 0

    def add(self, loss: Tensor) -> None:
        self.fresh.append(loss)
        self.step += 1

    def gather(self) -> Tensor:
        """Bring the losses since the last call to the CPU and return them."""
        chunk = torch.stack(self.fresh).cpu() if self.fresh else torch.empty(0)
        if self.fresh:
            self.chunks.append(chunk)
            self.fresh = []
        return chunk

    def validated(self, value: float, weights: dict[str, Tensor]) -> None:
        """Take in a validation of ``weights``; keep a copy of them if they are the best."""
        self.validation_steps.append(self.step)
        self.validation.append(value)
        if value < self.best_value or not self.best:
            self.best = {name: w.detach().clone() for name, w in weights.items()}
            self.best_value = value
            self.waited = 0
        else:
            self.waited += 1

    def history(self) -> History:
        return History(
            losses=torch.cat(self.chunks) if self.chunks else torch.empty(0),
            validation_steps=torch.tensor(self.validation_steps, dtype=torch.long),
            validation=torch.tensor(self.validation, dtype=torch.double),
            stopped=self.stopped,
            seconds=self.seconds,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "stopped": self.stopped,
            "seconds": self.seconds,
            "losses": torch.cat(self.chunks) if self.chunks else torch.empty(0),
            "validation_steps": list(self.validation_steps),
            "validation": list(self.validation),
            "best": dict(self.best),
            "best_value": self.best_value,
            "waited": self.waited,
        }

    def load_state_dict(self, state: dict[str, Any], like: dict[str, Tensor]) -> None:
        """Take over a state; tensors go to the device and dtype of ``like``."""
        self.step = state["step"]
        self.stopped = state["stopped"]
        self.seconds = state["seconds"]
        self.fresh = []
        self.chunks = [state["losses"]] if len(state["losses"]) else []
        self.validation_steps = list(state["validation_steps"])
        self.validation = list(state["validation"])
        self.best = {name: w.to(like[name]) for name, w in state["best"].items()}
        self.best_value = state["best_value"]
        self.waited = state["waited"]
