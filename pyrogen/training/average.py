"""Averages of weights along the path of training."""

__all__ = ["MovingAverage"]

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class MovingAverage:
    r"""Exponential moving average of weights, with a ramp so that early weights are forgotten.

    .. math:: \bar\theta_0 = \theta_0, \qquad
        \bar\theta_t = d_t \bar\theta_{t-1} + (1 - d_t)\, \theta_t, \qquad
        d_t = \min\Big(d, \frac{1 + t}{10 + t}\Big),

    where :math:`\theta_t` are the weights after step :math:`t + 1`. Integer buffers are copied.
    Cost: one copy of the weights, and one pass over them per step.

    Args:
        decay: :math:`d` in [0, 1); the average looks back about ``1 / (1 - decay)`` steps.

    Raises:
        ValueError: If ``decay`` is not in [0, 1).

    References:
        Polyak, Juditsky. Acceleration of stochastic approximation by averaging. SIAM Journal on
        Control and Optimization 1992.

    Example:
        >>> average = MovingAverage(0.99)
        >>> average.update({"w": torch.tensor(0.0)})
        >>> average.update({"w": torch.tensor(1.0)})  # the decay is 2 / 11
        >>> average.values["w"]
        tensor(0.8182)
    """

    def __init__(self, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(
                f"MovingAverage expected a decay in [0, 1), got {decay}. Try 0.999; for no "
                "average, pass average=None to the trainer."
            )
        self.decay = decay
        self.updates = 0
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Take in the weights after one more step."""
        if not self.values:
            self.values = {name: w.detach().clone() for name, w in weights.items()}
        else:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            for name, w in weights.items():
                if w.dtype.is_floating_point or w.dtype.is_complex:
                    self.values[name].lerp_(w, 1 - decay)
                else:
                    self.values[name].copy_(w)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "values": dict(self.values)}

    def load_state_dict(self, state: Mapping[str, Any], like: Mapping[str, Tensor]) -> None:
        """Take over a state; tensors go to the device and dtype of ``like``."""
        self.updates = state["updates"]
        self.values = {name: v.to(like[name], copy=True) for name, v in state["values"].items()}
