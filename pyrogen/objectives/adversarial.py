"""Games between a generator and a critic that compares its draws with data."""

__all__ = [
    "CriticLoss",
    "Game",
    "GeneratorLoss",
    "NonSaturating",
    "Relativistic",
    "ZeroCentred",
]

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Size, Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus

from .likelihood import check_law, check_like


class Game(ABC):
    """What the two players minimise, given the critic's logits of data and of draws.

    Logits have shape ``(batch,)``; the critic raises those of data and lowers those of draws.
    Subclass it for a game of your own.
    """

    @abstractmethod
    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        """Loss of the critic, a scalar."""

    @abstractmethod
    def generator(self, real: Tensor, fake: Tensor) -> Tensor:
        """Loss of the generator, a scalar."""


class Relativistic(Game):
    r"""Each datum against one draw: which of the two is real?

    .. math:: L_D = \mathbb E\, \zeta\big(D(\tilde x) - D(x)\big), \qquad
        L_G = \mathbb E\, \zeta\big(D(x) - D(\tilde x)\big), \qquad
        \zeta(a) = \log(1 + e^a).

    The best critic is the log-ratio of the densities of data and draws, up to a constant. The
    generator cannot win by moving all draws across one boundary, which counters mode collapse.

    References:
        Jolicoeur-Martineau. The relativistic discriminator. ICLR 2019. arXiv:1807.00734
        Huang, Gokaslan, Kuleshov, Tompkin. The GAN is dead; long live the GAN! NeurIPS 2024.
        arXiv:2501.05441

    Example:
        >>> Relativistic().critic(torch.tensor([2.0]), torch.tensor([0.0]))
        tensor(0.1269)
    """

    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        return softplus(fake - real).mean()

    def generator(self, real: Tensor, fake: Tensor) -> Tensor:
        return softplus(real - fake).mean()


class NonSaturating(Game):
    r"""Classify data and draws; the generator raises the log-probability of being data.

    .. math:: L_D = \mathbb E\, \zeta\big(-D(x)\big) + \mathbb E\, \zeta\big(D(\tilde x)\big),
        \qquad L_G = \mathbb E\, \zeta\big(-D(\tilde x)\big), \qquad \zeta(a) = \log(1 + e^a).

    The best critic is the log-ratio of the densities of data and draws.

    References:
        Goodfellow et al. Generative Adversarial Nets. NeurIPS 2014. arXiv:1406.2661

    Example:
        >>> NonSaturating().critic(torch.zeros(3), torch.zeros(3))
        tensor(1.3863)
    """

    def critic(self, real: Tensor, fake: Tensor) -> Tensor:
        return softplus(-real).mean() + softplus(fake).mean()

    def generator(self, real: Tensor, fake: Tensor) -> Tensor:
        return softplus(-fake).mean()


class ZeroCentred(nn.Module):
    r"""Penalty on the critic's slope, which makes the game converge.

    .. math:: \frac{\text{weight}}{2}\, \mathbb E \big\lVert \text{scale} \odot \nabla_x D(x)
        \big\rVert^2

    The norm is that of each datum, over all its features. :class:`CriticLoss` adds it at data
    (:math:`R_1`) and at draws (:math:`R_2`). The gradient of a sum over the batch is taken, so
    the critic must treat its data one by one: no batch norm.

    Cost: one backward pass through the critic, differentiated again.

    Args:
        weight: Strength :math:`\gamma`; 0.01 to 10 work alike in few dimensions of unit scale,
            more where the critic overwhelms the generator.
        scale: Unit in which the slope is measured, in the units of ``x``: usually the standard
            deviation of each feature, shape ``event_shape``. None if data have unit scale.

    Shape:
        ``forward(logits, x)``: ``(batch,)`` and ``(*batch, *event)``, of which the logits were
        computed with ``x.requires_grad``, to ``()``.

    Raises:
        ValueError: If the weight is negative or ``x`` carries no gradient.

    References:
        Mescheder, Geiger, Nowozin. Which training methods for GANs do actually converge? ICML
        2018. arXiv:1801.04406

    Example:
        >>> x = torch.zeros(5, 2, requires_grad=True)
        >>> ZeroCentred(10.0)(3 * x[:, 0] + 4 * x[:, 1], x)  # 10 / 2 * (3^2 + 4^2)
        tensor(125.)
    """

    scale: Tensor | None

    def __init__(self, weight: float = 1.0, *, scale: Tensor | None = None) -> None:
        super().__init__()
        if not weight >= 0:
            raise ValueError(f"ZeroCentred expected weight >= 0, got {weight}.")
        self.weight = weight
        self.register_buffer("scale", None if scale is None else scale.detach().clone())

    def forward(self, logits: Tensor, x: Tensor) -> Tensor:
        if not x.requires_grad:
            raise ValueError(
                "ZeroCentred needs the slope in x, got x without a gradient. Call "
                "x.requires_grad_() before the critic."
            )
        (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True, materialize_grads=True)
        if self.scale is not None:
            slope = slope * self.scale
        return self.weight / 2 * slope.square().sum() / logits.numel()


RELATIVISTIC = Relativistic()


class GeneratorLoss(nn.Module):
    r"""Loss of the generator in a game; gives the critic no gradient.

    Args:
        generator: Module whose ``forward(context)`` is a distribution with ``rsample``.
        critic: Module ``(x)`` or ``(x, context)`` to logits of shape ``(batch,)`` or
            ``(batch, 1)``.
        game: What the players minimise.

    Shape:
        ``forward(x, context)``: ``(*batch, *event)`` and ``(*batch, context)`` to ``()``.

    Raises:
        TypeError: If ``x`` is not of floating point.
        ValueError: If shapes or dtypes do not fit, or ``x`` is not finite.
        NotImplementedError: If the draws carry no gradient.

    Example:
        >>> from pyrogen.distributions import Generator
        >>> generator = Generator(nn.Linear(1, 2), latents=1, event_shape=(2,))
        >>> GeneratorLoss(generator, nn.Linear(2, 1))(torch.randn(8, 2)).shape
        torch.Size([])
    """

    def __init__(
        self, generator: nn.Module, critic: nn.Module, *, game: Game = RELATIVISTIC
    ) -> None:
        super().__init__()
        self.generator = generator
        self.critic = critic
        self.game = game

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        fake, batch = _draws(self.generator, x, context, owner="GeneratorLoss", moving=True)
        rest = () if context is None else (context,)
        # The critic runs on copies of its parameters that carry no gradient: the parameters and
        # their flags stay as they are.
        held = {name: p.detach() for name, p in self.critic.named_parameters()}

        def critic(*inputs: Tensor) -> Tensor:
            return functional_call(self.critic, held, inputs)

        with torch.no_grad():
            real_logits = _logits(critic, batch, x, *rest)
        fake_logits = _logits(critic, batch, fake, *rest)
        return self.game.generator(real_logits, fake_logits)


class CriticLoss(nn.Module):
    r"""Loss of the critic in a game; gives the generator no gradient.

    Args:
        generator: Module whose ``forward(context)`` is a distribution.
        critic: Module ``(x)`` or ``(x, context)`` to logits of shape ``(batch,)`` or
            ``(batch, 1)``.
        game: What the players minimise.
        penalty: Module ``(logits, x)`` to a scalar, added at data and at draws.

    Shape:
        ``forward(x, context)``: ``(*batch, *event)`` and ``(*batch, context)`` to ``()``.

    Raises:
        TypeError: If ``x`` is not of floating point.
        ValueError: If shapes or dtypes do not fit, or ``x`` is not finite.

    Example:
        >>> from pyrogen.distributions import Generator
        >>> generator = Generator(nn.Linear(1, 2), latents=1, event_shape=(2,))
        >>> loss = CriticLoss(generator, nn.Linear(2, 1), penalty=ZeroCentred(1.0))
        >>> loss(torch.randn(8, 2)).shape
        torch.Size([])
    """

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        *,
        game: Game = RELATIVISTIC,
        penalty: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.critic = critic
        self.game = game
        self.penalty = penalty

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        fake, batch = _draws(self.generator, x, context, owner="CriticLoss", moving=False)
        rest = () if context is None else (context,)
        if self.penalty is None:
            real_logits = _logits(self.critic, batch, x, *rest)
            fake_logits = _logits(self.critic, batch, fake, *rest)
            return self.game.critic(real_logits, fake_logits)
        with torch.enable_grad():  # the slope is needed also where the loss is only looked at
            x, fake = x.detach().requires_grad_(), fake.requires_grad_()
            real_logits = _logits(self.critic, batch, x, *rest)
            fake_logits = _logits(self.critic, batch, fake, *rest)
            slopes = self.penalty(real_logits, x) + self.penalty(fake_logits, fake)
            return self.game.critic(real_logits, fake_logits) + slopes


def _draws(
    generator: nn.Module, x: Tensor, context: Tensor | None, *, owner: str, moving: bool
) -> tuple[Tensor, Size]:
    """One draw for each datum, and the batch shape."""
    p = generator(context)
    check_law(p, x, like=None, owner=owner)
    batch = x.shape[: x.ndim - len(p.event_shape)]
    p = p.expand(batch)
    if not moving:
        with torch.no_grad():
            fake = p.sample()
    elif p.has_rsample:
        fake = p.rsample()
    else:
        raise NotImplementedError(
            f"{owner} needs draws that carry a gradient, and {type(p).__name__} has no rsample. "
            "Use a generator with reparameterized noise."
        )
    check_like(x, fake, owner=owner)
    return fake, batch


def _logits(critic: Callable[..., Tensor], batch: Size, *inputs: Tensor) -> Tensor:
    """Logits of shape ``batch``."""
    logits = critic(*inputs)
    if logits.shape not in (batch, (*batch, 1)):
        raise ValueError(
            f"The critic returned logits of shape {tuple(logits.shape)} for data of batch shape "
            f"{tuple(batch)}. Return one number for each datum."
        )
    return logits.reshape(batch)
