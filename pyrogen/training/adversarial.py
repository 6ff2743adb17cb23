"""Two objectives that share a model and disagree."""

__all__ = ["AdversarialTrainer"]

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .base import Fitting
from .trainer import Trainer


class AdversarialTrainer(Fitting):
    """Alternate ``critic_steps`` steps of the critic with one of the generator.

    A GAN is two trainers, each with its optimizer, schedule, clipping and average.

    Args:
        generator: Trainer of the generator's parameters.
        critic: Trainer of the critic's parameters.
        critic_steps: Steps of the critic before each of the generator, all on the same batch,
            with fresh draws of the generator.

    Raises:
        ValueError: If both trainers move the same parameter, or ``critic_steps`` < 1.

    Example:
        >>> from pyrogen.distributions import Generator
        >>> from pyrogen.objectives import CriticLoss, GeneratorLoss
        >>> generator = Generator(nn.Linear(1, 1), latents=1, event_shape=(1,))
        >>> critic = nn.Linear(1, 1)
        >>> trainer = AdversarialTrainer(
        ...     Trainer(
        ...         GeneratorLoss(generator, critic), torch.optim.Adam(generator.parameters())
        ...     ),
        ...     Trainer(CriticLoss(generator, critic), torch.optim.Adam(critic.parameters())),
        ... )
        >>> trainer.fit([torch.randn(8, 1)], steps=3, progress=False).losses.shape
        torch.Size([3, 2])
    """

    def __init__(self, generator: Trainer, critic: Trainer, *, critic_steps: int = 1) -> None:
        if critic_steps < 1:
            raise ValueError(f"AdversarialTrainer expected critic_steps >= 1, got {critic_steps}.")
        shared = {id(p) for p in generator.moving.values()} & {
            id(p) for p in critic.moving.values()
        }
        if shared:
            raise ValueError(
                f"Generator and critic both move {len(shared)} parameters. Give each optimizer "
                "the parameters of one player."
            )
        self.generator = generator
        self.critic = critic
        self.critic_steps = critic_steps

    def step(self, *batch: Tensor) -> Tensor:
        """Take one step and return the losses of generator and critic, shape ``(2,)``."""
        self.continue_training()
        for _ in range(self.critic_steps):
            critic_loss = self.critic.step(*batch)
        return torch.stack([self.generator.step(*batch), critic_loss])

    @property
    def objectives(self) -> tuple[nn.Module, ...]:
        return (self.generator.objective, self.critic.objective)

    def weights(self) -> dict[str, Tensor]:
        return _both(self.generator.weights(), self.critic.weights())

    def average_weights(self) -> dict[str, Tensor]:
        return _both(self.generator.average_weights(), self.critic.average_weights())

    def moments(self) -> Iterator[Tensor]:
        yield from self.generator.moments()
        yield from self.critic.moments()

    def _state(self) -> dict[str, Any]:
        return {"generator": self.generator.state_dict(), "critic": self.critic.state_dict()}

    def _load_state(self, state: Mapping[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        self.critic.load_state_dict(state["critic"])


def _both(generator: Mapping[str, Tensor], critic: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {f"generator.{name}": w for name, w in generator.items()}
    return named | {f"critic.{name}": w for name, w in critic.items()}
