"""Gradient steps on the numbers that describe posteriors, and how gradients pass through them."""

__all__ = ["Descent", "Refinement", "Unrolled"]

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from pyro.infer import ELBO
from torch import Tensor
from torch.optim import Optimizer


class Refinement(ABC):
    """How the numbers that describe posteriors move down a loss, from where they start.

    The step size falls linearly towards zero, so that the noise of the loss dies out.

    Args:
        loss: Bound that is minimised, summed over the data at hand, so that each datum descends
            its own.
        steps: Number of gradient steps; 0 for none.
        lr: Size of the first step.

    Raises:
        TypeError: If ``loss`` is not a bound.
        ValueError: If ``steps`` is negative, or ``lr`` is not positive.
    """

    def __init__(self, loss: ELBO, *, steps: int, lr: float) -> None:
        owner = type(self).__name__
        if not isinstance(loss, ELBO):
            raise TypeError(
                f"{owner} expected a bound, got {type(loss).__name__}. Pass an object such as "
                "ELBO(8)."
            )
        if steps < 0 or not lr > 0:
            raise ValueError(
                f"{owner} expected steps >= 0 and lr > 0, got steps={steps} and lr={lr}. Pass "
                "steps=0 to stay at the start."
            )
        self.loss = loss
        self.steps = steps
        self.lr = lr

    @abstractmethod
    def __call__(self, objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
        """Return where the steps lead, of the shape of ``start``.

        Args:
            objective: Loss of numbers of that shape, a scalar in nats.
            start: One row of numbers per datum.
        """

    @property
    def rates(self) -> list[float]:
        """Learning rate of each step."""
        return [self.lr * (1 - t / self.steps) for t in range(self.steps)]


class Descent(Refinement):
    """Steps of an optimizer that is new for every start; no gradient flows through them.

    What follows sees a constant: a model trained on the refined bound gets its gradient at the
    end of the path, and whatever gave the start gets none. Train an encoder by its own bound
    beside, ``loss(model, guide)``.

    Cost: one run of guide and model, with gradient, per step.

    Args:
        loss: Bound that is minimised; any gradient estimator will do.
        steps: Number of gradient steps; 0 for none.
        lr: Learning rate of the first step.
        optimizer: Called with a list of one tensor, and ``lr``.

    References:
        Cremer, Li, Duvenaud. Inference Suboptimality in Variational Autoencoders. ICML 2018.
        arXiv:1801.03558

    Example:
        >>> from pyrogen.objectives import ELBO
        >>> descent = Descent(ELBO(), steps=100, lr=0.1)
        >>> descent(lambda numbers: (numbers - 3.0).square().sum(), torch.zeros(2)).round()
        tensor([3., 3.])
    """

    def __init__(
        self,
        loss: ELBO,
        *,
        steps: int = 20,
        lr: float = 0.05,
        optimizer: Callable[..., Optimizer] = torch.optim.Adam,
    ) -> None:
        super().__init__(loss, steps=steps, lr=lr)
        self.optimizer = optimizer

    def __call__(self, objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
        numbers = start.detach().clone().requires_grad_()
        optimizer = self.optimizer([numbers], lr=self.lr)
        for rate in self.rates:
            for group in optimizer.param_groups:
                group["lr"] = rate
            (numbers.grad,) = torch.autograd.grad(objective(numbers), [numbers])
            optimizer.step()
        return numbers.detach()


class Unrolled(Refinement):
    r"""Gradient steps with momentum, through which gradients flow back to start and model.

    .. math:: v_{t+1} = m v_t + \nabla_\lambda L(\lambda_t), \qquad
        \lambda_{t+1} = \lambda_t - \eta_t\, v_{t+1}

    Same values as :class:`Descent` with SGD of this momentum. An encoder trained through it learns
    where to start, and the model learns what its steps do.

    Cost: one run of guide and model, differentiated twice, per step; all are kept in memory.

    Args:
        loss: Bound that is minimised. It is differentiated twice, so its gradient must be that
            along the path of the draws: with others, such as the score function's, what flows
            back is not the derivative of the steps.
        steps: Number of gradient steps; 0 for none.
        lr: Size :math:`\eta_0` of the first step.
        momentum: Part :math:`m` in [0, 1) of the last step that is kept.

    Raises:
        ValueError: If ``momentum`` is not in [0, 1).

    References:
        Kim, Wiseman, Miller, Sontag, Rush. Semi-Amortized Variational Autoencoders. ICML 2018.
        arXiv:1802.02550

    Example:
        >>> from pyrogen.objectives import ELBO
        >>> start = torch.tensor([1.0], requires_grad=True)
        >>> unrolled = Unrolled(ELBO(), steps=2, lr=0.1, momentum=0.0)
        >>> unrolled(lambda numbers: numbers.square().sum(), start).backward()
        >>> start.grad  # (1 - 0.1 * 2) * (1 - 0.05 * 2)
        tensor([0.7200])
    """

    def __init__(
        self, loss: ELBO, *, steps: int = 20, lr: float = 0.05, momentum: float = 0.5
    ) -> None:
        super().__init__(loss, steps=steps, lr=lr)
        if not 0 <= momentum < 1:
            raise ValueError(f"Unrolled expected a momentum in [0, 1), got {momentum}. Try 0.5.")
        self.momentum = momentum

    def __call__(self, objective: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
        numbers = start if start.requires_grad else start.detach().requires_grad_()
        speed = torch.zeros_like(start)
        for rate in self.rates:
            (slope,) = torch.autograd.grad(objective(numbers), [numbers], create_graph=True)
            speed = self.momentum * speed + slope
            numbers = numbers - rate * speed
        return numbers
