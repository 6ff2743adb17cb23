"""The law of a bijection of noise."""

__all__ = ["Transformed"]

from collections.abc import Iterable, Sequence
from typing import NoReturn, Self

import pyro.distributions as dist
import torch
from torch import Size, Tensor
from torch.distributions import Transform

from ..transforms import Composed


class Transformed(dist.TransformedDistribution):
    r"""Law of :math:`x = f(z)` for noise :math:`z \sim p(z)` and a bijection :math:`f`.

    .. math:: \log p(x) = \log p(z) + \log|\det \partial z / \partial x|, \quad z = f^{-1}(x).

    Value and log-determinant come from one pass, and nothing is cached.

    Args:
        noise: Distribution of :math:`z`.
        transforms: Transforms of torch, Pyro or pyrogen, in order from noise to data.
        validate_args: Whether to check values that are scored; Pyro's setting if None.

    Raises:
        ValueError: If a scored value lies outside the support, when values are validated.
        TypeError: If a scored value is not of floating point.

    Example:
        >>> noise = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> p = Transformed(noise, [torch.distributions.ExpTransform()])
        >>> x, log_prob = p.rsample_and_log_prob((3,))
        >>> torch.allclose(log_prob, p.log_prob(x))
        True
    """

    def __init__(
        self,
        noise: dist.TorchDistribution,
        transforms: Iterable[Transform],
        *,
        validate_args: bool | None = None,
    ) -> None:
        self.bijection = Composed(transforms)
        super().__init__(noise, list(self.bijection.parts), validate_args=validate_args)

    def expand(self, batch_shape: Sequence[int], _instance: Self | None = None) -> Self:
        new = self._get_checked_instance(Transformed, _instance)
        new.bijection = self.bijection
        return super().expand(batch_shape, _instance=new)

    @classmethod
    def infer_shapes(cls, **arg_shapes: Size) -> NoReturn:
        """Refuse: no shape of an argument tells what the transforms do to it.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(
            f"{cls.__name__} has shapes that depend on its transforms. Build it, and read "
            "batch_shape and event_shape."
        )

    @property
    def noise(self) -> dist.TorchDistribution:
        """Law of the noise, with the batch shape of this distribution."""
        return self.base_dist

    def from_noise(self, noise: Tensor) -> Tensor:
        """Value that ``noise`` is carried to: deterministic, differentiable, one to one."""
        return self.bijection(noise)

    def to_noise(self, value: Tensor) -> Tensor:
        """Noise behind ``value``: the inverse of :meth:`from_noise`."""
        return self.bijection.inv(value)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of ``value`` in nats, shape ``(*sample, *batch)``; one pass."""
        if not value.dtype.is_floating_point:
            raise TypeError(
                f"A flow is a density and expected floating-point values, got {value.dtype}. "
                "Convert them by x.float(); for counts, add uniform noise in [0, 1) first."
            )
        if self._validate_args and not torch.compiler.is_compiling():  # would break the graph
            self._validate_sample(value)
        noise, ladj = self.bijection.inverse_and_ladj(value)
        return self.noise.log_prob(noise) + self._reduce(ladj)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        self._refuse_without_gradient()
        return self.bijection(self.noise.rsample(Size(sample_shape)))

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draw, and score the draw, in one pass.

        Returns:
            Draws, shape ``(*sample, *batch, *event)``, and their log-densities in nats.

        Raises:
            NotImplementedError: If the noise has no reparameterized draw.
        """
        self._refuse_without_gradient()
        noise = self.noise.rsample(Size(sample_shape))
        value, ladj = self.bijection.call_and_ladj(noise)
        return value, self.noise.log_prob(noise) - self._reduce(ladj)

    def _refuse_without_gradient(self) -> None:
        if not self.has_rsample:
            raise NotImplementedError(
                f"{type(self.noise).__name__} as noise has no reparameterized draw. Use sample, "
                "or other noise where a gradient through draws is needed."
            )

    def _reduce(self, ladj: Tensor) -> Tensor:
        """Sum over the event dimensions that the bijection treats one by one."""
        extra = self.noise.event_dim - self.bijection.domain.event_dim
        return ladj.flatten(-extra).sum(-1) if extra > 0 else ladj
