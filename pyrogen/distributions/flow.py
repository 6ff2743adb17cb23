"""Normalizing flows: exact densities by change of variables."""

__all__ = ["Flow", "Transformed"]

from collections.abc import Iterable, Sequence
from typing import Self

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn
from torch.distributions import Transform, biject_to, constraints

from ..inputs import check_context
from ..transforms import Composed, ShiftScale, Wrapped
from .standard import standard_units


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

    @property
    def noise(self) -> dist.TorchDistribution:
        """Law of the noise, with the batch shape of this distribution."""
        return self.base_dist

    def from_noise(self, noise: Tensor) -> Tensor:
        """Value that ``noise`` is carried to: deterministic, differentiable, one to one."""
        return self.bijection(noise)

    def to_noise(self, value: Tensor) -> Tensor:
        """Noise behind ``value``: the inverse of :meth:`from_noise`."""
        return self.bijection.inverse_and_ladj(value)[0]

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

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Draw, and score the draw, in one pass.

        Returns:
            Draws, shape ``(*sample, *batch, *event)``, and their log-densities in nats.
        """
        noise = self.noise.rsample(Size(sample_shape))
        value, ladj = self.bijection.call_and_ladj(noise)
        return value, self.noise.log_prob(noise) - self._reduce(ladj)

    def _reduce(self, ladj: Tensor) -> Tensor:
        """Sum over the event dimensions that the bijection treats one by one."""
        extra = self.noise.event_dim - self.bijection.domain.event_dim
        return ladj.flatten(-extra).sum(-1) if extra > 0 else ladj


class Flow(nn.Module):
    """A stack of trainable transforms; call it to get the distribution.

    After the layers come a fixed shift and scale (:meth:`standardize`) and the bijection from
    the reals to the support.

    Args:
        features: Number of features of the noise, and of a draw. On a simplex a draw has one
            more.
        layers: Modules ``context -> Bijection`` (or any transform), in order from noise to data.
        context: Number of features to condition on; 0 for none.
        support: Where draws lie: a constraint for each feature, such as ``positive``,
            ``unit_interval`` or ``interval(a, b)``, or for all, such as ``simplex``.
        noise: Module whose call gives the law of the noise, of event shape ``(features,)``;
            standard normal if None.
        event_shape: Shape of what the layers give, if they do not keep ``(features,)``.

    Shape:
        Context ``(*batch, context)`` gives a distribution of batch shape ``batch``.

    Raises:
        ValueError: If the context does not fit, or the support is not continuous.

    References:
        Papamakarios, Nalisnick, Rezende, Mohamed, Lakshminarayanan. Normalizing Flows for
        Probabilistic Modeling and Inference. JMLR 22(57), 2021. arXiv:1912.02762

    Example:
        >>> from pyrogen.distributions import nsf
        >>> flow = nsf(features=2, context=3)
        >>> p = flow(torch.zeros(5, 3))
        >>> p.batch_shape, p.event_shape
        (torch.Size([5]), torch.Size([2]))
        >>> p.log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])
    """

    zero: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(
        self,
        features: int,
        layers: Iterable[nn.Module],
        context: int = 0,
        *,
        support: constraints.Constraint = constraints.real,
        noise: nn.Module | None = None,
        event_shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"Flow expected at least 1 feature, got {features}.")
        self.constrain = _from_reals(support)
        self.layers = nn.ModuleList(layers)
        self.context = context
        self.support = support
        self.noise = noise
        shape = (features,) if event_shape is None else tuple(event_shape)
        self.register_buffer("zero", torch.zeros(features))  # follows .to(device, dtype)
        self.register_buffer("shift", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))

    def forward(self, context: Tensor | None = None) -> Transformed:
        check_context(context, self.context, owner="Flow", like=self.zero)
        batch_shape = () if context is None else context.shape[:-1]
        layers = [layer(context) for layer in self.layers]
        standard = ShiftScale(self.scale.log(), self.shift)
        return Transformed(self._noise(batch_shape), [*layers, standard, self.constrain])

    def _noise(self, batch_shape: Sequence[int]) -> dist.TorchDistribution:
        if self.noise is not None:
            return self.noise().expand(batch_shape)
        zero = self.zero.expand(*batch_shape, -1)
        one = torch.ones_like(zero)
        return dist.Normal(zero, one, validate_args=False).to_event(1)  # known to be valid

    def standardize(self, x: Tensor) -> Self:
        """Set shift and scale so that the layers see mean 0 and standard deviation 1.

        Data on a constrained support are first mapped to the reals.

        Args:
            x: Data, shape ``(*batch, features)``.

        Returns:
            The flow itself.

        Raises:
            TypeError: If the data are not of floating point.
            ValueError: If the data do not fit, leave the support or lie on its border, are
                fewer than two, or have a constant feature.

        Example:
            >>> from pyrogen.distributions import nsf
            >>> flow = nsf(features=2).standardize(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
            >>> flow.shift
            tensor([1., 3.])
        """
        shift, scale = standard_units(
            x,
            self.constrain.forward_shape(self.shift.shape),
            owner="Flow",
            like=self.zero,
            support=self.support,
            to_real=self.constrain.inv,
        )
        self.shift.copy_(shift)
        self.scale.copy_(scale)
        return self


def _from_reals(support: constraints.Constraint) -> Wrapped:
    try:
        transform = biject_to(support)
    except NotImplementedError as error:
        raise ValueError(
            f"Flow expected a support that the reals map onto, got {support}. A flow is a "
            "density: for integers, add uniform noise in [0, 1) and use interval(low, high)."
        ) from error
    if transform.codomain.event_dim != support.event_dim:
        raise ValueError(
            f"Flow expected a support of {transform.codomain.event_dim} event dimensions, as its "
            f"transform has, got {support} with {support.event_dim}. Choose another support."
        )
    return Wrapped(transform, codomain=support)
