"""Bijections that return their value and their log-determinant together.

A value and the log-determinant that belongs to it come from one call, so nothing is cached: a
bijection can be deep-copied, compiled, differentiated twice, and is never stale.
"""

__all__ = ["Bijection", "Composed", "Inverse", "SizedBijection", "Wrapped"]

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Size, Tensor, nn
from torch.distributions import Transform, constraints


class Bijection(Transform, ABC):
    """A transform whose value and log-determinant come from one call.

    Subclasses implement ``call_and_ladj`` and ``inverse_and_ladj``; the methods of
    :class:`torch.distributions.Transform` follow, so a bijection fits wherever a transform
    does. ``domain`` and ``codomain`` default to real vectors.

    Args:
        batch_shape: Leading shape that the parameters carry, for instance that of a context.

    Example:
        >>> double = Wrapped(torch.distributions.AffineTransform(0.0, 2.0))
        >>> y, ladj = double.call_and_ladj(torch.ones(()))
        >>> y, ladj
        (tensor(2.), tensor(0.6931))
        >>> double.inv.call_and_ladj(y)
        (tensor(1.), tensor(-0.6931))
    """

    bijective = True
    domain: constraints.Constraint = constraints.real_vector
    codomain: constraints.Constraint = constraints.real_vector

    def __init__(self, batch_shape: Iterable[int] = ()) -> None:
        super().__init__(cache_size=0)
        self.batch_shape = Size(batch_shape)

    @abstractmethod
    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`y = f(x)` and :math:`\log|\det \partial y / \partial x|`."""

    @abstractmethod
    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`x = f^{-1}(y)` and :math:`\log|\det \partial x / \partial y|`."""

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inverse_and_ladj(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log-determinant at ``x``; costs a call, so prefer ``call_and_ladj``."""
        return self.call_and_ladj(x)[1]

    @property
    def inv(self) -> "Bijection":
        """The inverse, itself a bijection."""
        return _Inverse(self)

    def with_cache(self, cache_size: int = 1) -> "Bijection":
        """Return self: nothing is ever computed twice, so there is nothing to cache."""
        return self

    def forward_shape(self, shape: Iterable[int]) -> Size:
        return self._broadcast(shape, self.domain.event_dim)

    def inverse_shape(self, shape: Iterable[int]) -> Size:
        return self._broadcast(shape, self.codomain.event_dim)

    def _broadcast(self, shape: Iterable[int], event_dim: int) -> Size:
        shape = Size(shape)
        cut = len(shape) - event_dim
        return torch.broadcast_shapes(shape[:cut], self.batch_shape) + shape[cut:]


class SizedBijection(Bijection):
    """A bijection of events with a given number of features, which refuses any other number.

    Without this door parameters of several features would meet an event of one, and broadcast.
    Subclasses implement ``_call_and_ladj`` and ``_inverse_and_ladj``.

    Args:
        features: Length of the first dimension of an event: the features of a vector, the
            channels of an image.
        batch_shape: As for :class:`Bijection`.
        owner: Name of the layer, for the message.
    """

    def __init__(self, features: int, batch_shape: Iterable[int] = (), *, owner: str) -> None:
        super().__init__(batch_shape)
        self.features = features
        self.owner = owner

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check(x.shape)
        return self._call_and_ladj(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        self._check(y.shape)
        return self._inverse_and_ladj(y)

    @abstractmethod
    def _call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]: ...

    @property
    def _dim(self) -> int:
        """Where the features of an event are."""
        return -self.domain.event_dim

    def _check(self, shape: Size) -> None:
        if len(shape) < -self._dim or shape[self._dim] != self.features:
            event = ["*batch", str(self.features), "height", "width"][: 1 - self._dim]
            raise ValueError(
                f"{self.owner} expected shape ({', '.join(event)}), got {tuple(shape)}. Reshape "
                "the tensor, or rebuild the layer for its features."
            )

    def _broadcast(self, shape: Iterable[int], event_dim: int) -> Size:
        shape = Size(shape)
        self._check(shape)
        return super()._broadcast(shape, event_dim)


class _Inverse(Bijection):
    def __init__(self, bijection: Bijection) -> None:
        super().__init__(bijection.batch_shape)
        self.bijection = bijection
        self.domain = bijection.codomain
        self.codomain = bijection.domain

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse_and_ladj(x)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.bijection.call_and_ladj(y)

    def _call(self, x: Tensor) -> Tensor:
        return self.bijection._inverse(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.bijection._call(y)

    @property
    def inv(self) -> Bijection:
        return self.bijection

    def forward_shape(self, shape: Iterable[int]) -> Size:
        return self.bijection.inverse_shape(shape)

    def inverse_shape(self, shape: Iterable[int]) -> Size:
        return self.bijection.forward_shape(shape)


class Inverse(nn.Module):
    """Layer that goes the other way: what cost one pass from data to noise costs one to draw.

    Args:
        layer: Module ``context -> Bijection``.

    Example:
        >>> from pyrogen.transforms import Autoregressive
        >>> layer = Inverse(Autoregressive(3))
        >>> layer().call_and_ladj(torch.zeros(5, 3))[1].shape
        torch.Size([5])
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, context: Tensor | None = None) -> Bijection:
        return self.layer(context).inv


class Wrapped(Bijection):
    """Any bijective transform of torch or Pyro, as a :class:`Bijection`.

    A cache that the transform keeps is used within one call and never across calls, so a
    trainable Pyro transform cannot return values of earlier parameters.

    Args:
        transform: The transform to wrap.
        codomain: Where its values lie, if that is narrower than the transform says.

    Raises:
        ValueError: If the transform is not bijective.

    Example:
        >>> exp = Wrapped(torch.distributions.ExpTransform())
        >>> exp.inverse_and_ladj(torch.tensor(1.0))
        (tensor(0.), tensor(-0.))
    """

    def __init__(
        self, transform: Transform, *, codomain: constraints.Constraint | None = None
    ) -> None:
        if not transform.bijective:
            raise ValueError(
                f"Wrapped expected a bijective transform, got {type(transform).__name__}. "
                "A density needs an inverse: choose a bijective transform."
            )
        super().__init__()
        self.transform = transform
        self.domain = transform.domain
        self.codomain = transform.codomain if codomain is None else codomain

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.view_as(x)  # a new object: the transform's cache is keyed by identity
        y = self.transform(x)
        return y, self.transform.log_abs_det_jacobian(x, y)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y = y.view_as(y)
        x = self.transform.inv(y)
        return x, -self.transform.log_abs_det_jacobian(x, y)

    def forward_shape(self, shape: Iterable[int]) -> Size:
        return Size(self.transform.forward_shape(Size(shape)))

    def inverse_shape(self, shape: Iterable[int]) -> Size:
        return Size(self.transform.inverse_shape(Size(shape)))


class Composed(Bijection):
    """The bijection that applies its parts in turn; the log-determinants add up.

    Args:
        parts: Transforms, in the order in which they are applied; at least one.

    Example:
        >>> exp = torch.distributions.ExpTransform()
        >>> twice = Composed([exp, torch.distributions.AffineTransform(0.0, 2.0)])
        >>> twice.call_and_ladj(torch.zeros(()))
        (tensor(2.), tensor(0.6931))
    """

    def __init__(self, parts: Iterable[Transform]) -> None:
        self.parts = tuple(
            part if isinstance(part, Bijection) else Wrapped(part) for part in parts
        )
        if not self.parts:
            raise ValueError("Composed expected at least one transform, got none. Pass a list.")
        super().__init__()
        whole = torch.distributions.ComposeTransform(list(self.parts))
        self.domain = whole.domain
        self.codomain = whole.codomain

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        event_dim = self.domain.event_dim
        total: Tensor | float = 0.0
        for part in self.parts:
            x, ladj = part.call_and_ladj(x)
            total = total + _sum_last(ladj, event_dim - part.domain.event_dim)
            event_dim += part.codomain.event_dim - part.domain.event_dim
        return x, torch.as_tensor(total)

    def inverse_and_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        event_dim = self.codomain.event_dim
        total: Tensor | float = 0.0
        for part in reversed(self.parts):
            y, ladj = part.inverse_and_ladj(y)
            total = total + _sum_last(ladj, event_dim - part.codomain.event_dim)
            event_dim += part.domain.event_dim - part.codomain.event_dim
        return y, torch.as_tensor(total)

    def _call(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part._call(x)
        return x

    def _inverse(self, y: Tensor) -> Tensor:
        for part in reversed(self.parts):
            y = part._inverse(y)
        return y

    def forward_shape(self, shape: Iterable[int]) -> Size:
        shape = Size(shape)
        for part in self.parts:
            shape = part.forward_shape(shape)
        return shape

    def inverse_shape(self, shape: Iterable[int]) -> Size:
        shape = Size(shape)
        for part in reversed(self.parts):
            shape = part.inverse_shape(shape)
        return shape


def _sum_last(x: Tensor, dims: int) -> Tensor:
    return x.flatten(-dims).sum(-1) if dims else x
