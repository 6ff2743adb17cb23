"""Generators: networks that push noise forward to data."""

__all__ = ["Generator", "Pushforward"]

from collections.abc import Callable, Sequence
from functools import partial
from typing import Self

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints, transform_to

from ..inputs import check_context
from .base import LikelihoodFree
from .standard import standard_units


class Pushforward(LikelihoodFree):
    r"""Law of :math:`g(z)` for :math:`z \sim p(z)`.

    Args:
        transform: Map :math:`g` from ``(*shape, latents)`` to ``(*shape, *event_shape)`` for
            any ``shape`` that ends with the batch shape of ``latent``.
        latent: Distribution :math:`p(z)`.
        event_shape: Shape of one draw.
        support: Constraint that every draw fulfils.

    Example:
        >>> noise = dist.Normal(torch.zeros(5, 2), 1.0).to_event(1)
        >>> squares = Pushforward(torch.square, noise, event_shape=(2,))
        >>> squares.batch_shape, squares.event_shape
        (torch.Size([5]), torch.Size([2]))
        >>> squares.sample((3,)).shape
        torch.Size([3, 5, 2])
        >>> squares.from_noise(torch.tensor([2.0, 3.0]))
        tensor([4., 9.])
    """

    def __init__(
        self,
        transform: Callable[[Tensor], Tensor],
        latent: dist.TorchDistribution,
        event_shape: Sequence[int],
        *,
        support: constraints.Constraint = constraints.real,
    ) -> None:
        super().__init__(latent.batch_shape, Size(event_shape), validate_args=False)
        self.transform = transform
        self.latent = latent
        self._support = support

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.latent.has_rsample

    def __call__(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw, with gradient to the map, and to the latent's parameters if it has ``rsample``."""
        return self.transform(self.latent(Size(sample_shape)))

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        missing = self.event_dim - self._support.event_dim
        return constraints.independent(self._support, missing) if missing else self._support

    @property
    def noise(self) -> dist.TorchDistribution:
        """Law of the noise, with a density."""
        return self.latent

    def from_noise(self, noise: Tensor) -> Tensor:
        """Map noise of shape ``(*shape, latents)`` to draws, deterministically."""
        return self.transform(noise)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.transform(self.latent.rsample(Size(sample_shape)))

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self.transform(self.latent.sample(Size(sample_shape)))

    def expand(self, batch_shape: Sequence[int], _instance: None = None) -> "Pushforward":
        latent = self.latent.expand(Size(batch_shape))
        return Pushforward(self.transform, latent, self.event_shape, support=self._support)


class Generator(nn.Module):
    r"""A trainable pushforward; call it to get the distribution.

    .. math:: x = c\big(\text{shift} + \text{scale} \odot \text{net}([z, \text{context}])\big),
        \qquad z \sim \mathcal N(0, I),

    where :math:`c` maps real numbers to the support (the identity for ``real``).

    Args:
        net: Network from ``(n, latents + context)`` to ``(n, *event_shape)``; leading
            dimensions are flattened to ``n``, so convolutions and batch norms see one batch.
        latents: Number of noise features.
        event_shape: Shape of one draw.
        context: Number of features to condition on; 0 for none.
        support: Constraint that every draw fulfils.

    Shape:
        ``forward(context)``: ``(*batch, context)`` to a distribution of batch shape ``batch``.

    Raises:
        ValueError: If a size is not positive, or the support changes the shape of a draw.

    References:
        Goodfellow et al. Generative Adversarial Nets. NeurIPS 2014. arXiv:1406.2661

    Example:
        >>> generator = Generator(nn.Linear(8, 2), latents=8, event_shape=(2,))
        >>> pyro.sample("x", generator().expand((10,))).shape
        torch.Size([10, 2])
        >>> generator = Generator(nn.Linear(8 + 3, 2), latents=8, event_shape=(2,), context=3)
        >>> generator(torch.zeros(5, 3)).batch_shape
        torch.Size([5])
    """

    zero: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        net: nn.Module,
        latents: int,
        event_shape: Sequence[int],
        context: int = 0,
        *,
        support: constraints.Constraint = constraints.real,
    ) -> None:
        super().__init__()
        shape = Size(event_shape)
        if latents < 1 or context < 0 or any(size < 1 for size in shape):
            raise ValueError(
                "Generator expected latents >= 1, context >= 0 and positive sizes, got "
                f"{latents}, {context} and {tuple(shape)}."
            )
        if support.event_dim > len(shape) or transform_to(support).forward_shape(shape) != shape:
            raise ValueError(
                f"Generator expected a support whose draws have the shape of the net's output, "
                f"got {support} for event_shape {tuple(shape)}. Give the net's Pushforward "
                "a transform of your own."
            )
        self.net = net
        self.event_shape = shape
        self.context = context
        self.support = support
        self.register_buffer("zero", torch.zeros(latents))  # follows .to(device, dtype)
        self.register_buffer("shift", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))

    def forward(self, context: Tensor | None = None) -> Pushforward:
        """Return the distribution of draws, given ``context``.

        Raises:
            TypeError: If the context is not of floating point.
            ValueError: If the context does not have the features that the generator was built
                with, is not finite, or has another dtype or device.
        """
        check_context(context, self.context, owner="Generator", like=self.zero)
        batch_shape = Size() if context is None else context.shape[:-1]
        latent = dist.Normal(self.zero.expand(*batch_shape, -1), 1.0).to_event(1)
        push = partial(self._push, context=context)
        return Pushforward(push, latent, self.event_shape, support=self.support)

    def standardize(self, x: Tensor) -> Self:
        """Set shift and scale to those of the data, so that the net works in unit scale.

        Data are first mapped to the real numbers, if the support is bounded.

        Args:
            x: Data, shape ``(*batch, *event_shape)``; at least two.

        Returns:
            The generator itself.

        Raises:
            TypeError: If ``x`` is not of floating point.
            ValueError: If ``x`` is not finite, has fewer than two data or another shape or
                dtype, has a constant feature, or lies outside or at the edge of the support.
        """
        shift, scale = standard_units(
            x,
            self.event_shape,
            owner="Generator",
            like=self.shift,
            support=self.support,
            to_real=transform_to(self.support).inv,
        )
        self.shift.copy_(shift)
        self.scale.copy_(scale)
        return self

    def _push(self, z: Tensor, context: Tensor | None) -> Tensor:
        if context is not None:
            z = torch.cat([z, context.expand(*z.shape[:-1], -1)], -1)
        out = self.net(z.reshape(-1, z.shape[-1]))
        if out.shape[1:] != self.event_shape:
            raise ValueError(
                f"Generator expected its net to return draws of shape {tuple(self.event_shape)}, "
                f"got {tuple(out.shape[1:])}. Change the net's output or event_shape."
            )
        out = out.reshape(*z.shape[:-1], *self.event_shape)
        return transform_to(self.support)(self.shift + self.scale * out)
