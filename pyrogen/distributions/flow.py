"""Normalizing flows: exact densities by change of variables."""

__all__ = ["Flow", "Transformed"]

from collections.abc import Iterable, Sequence
from typing import Self

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..inputs import check_context
from ..transforms import Bijection, Coupling, Elementwise, Permutation, ShiftScale
from .noise import CircularNoise
from .standard import standard_units
from .supports import angles_of, from_reals
from .transformed import Transformed


class Flow(nn.Module):
    """A stack of trainable transforms; call it to get the distribution.

    After the layers come a fixed shift and scale (:meth:`standardize`) and the bijection from
    the reals to the support.

    Args:
        features: Number of features of the noise, and of a draw. On a simplex a draw has one
            more; a matrix has as many rows as its free entries fill.
        layers: Modules ``context -> Bijection`` (or any transform), in order from noise to data.
        context: Number of features to condition on; 0 for none.
        support: Where draws lie: a constraint for each feature, such as ``positive``,
            ``unit_interval`` or ``interval(a, b)``, or for all, such as ``simplex`` or
            ``corr_cholesky``; several side by side by ``stack([...], dim=-1)`` or
            ``cat([...], dim=-1, lengths=[...])``; or the ``support`` of a distribution. Large
            correlation matrices need double precision, or ``corr_cholesky``.
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
    angles: Tensor

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
        self.constrain = from_reals(support, keep_angles=True)
        self.layers = nn.ModuleList(layers)
        self.context = context
        self.support = support
        self.noise = noise
        shape = (features,) if event_shape is None else tuple(event_shape)
        _check_shape(shape, self.constrain, support)
        angles = angles_of(support, shape[-1])
        if angles.any() and not (
            isinstance(noise, CircularNoise) and all(map(_keeps_angles, self.layers))
        ):
            raise ValueError(
                "Flow expected noise and layers on the circle for its circular support. Build the "
                "flow by pyrogen.distributions.ncsf."
            )
        self.register_buffer("zero", torch.zeros(features))  # follows .to(device, dtype)
        self.register_buffer("shift", torch.zeros(shape))
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("angles", angles, persistent=False)

    def forward(self, context: Tensor | None = None) -> Transformed:
        check_context(context, self.context, owner="Flow", like=self.zero)
        batch_shape = () if context is None else context.shape[:-1]
        layers = [layer(context) for layer in self.layers]
        standard = ShiftScale(self.scale.log(), self.shift)
        return Transformed(self._noise(batch_shape), [*layers, standard, self.constrain])

    def _noise(self, batch_shape: Sequence[int]) -> dist.TorchDistribution:
        if self.noise is not None:
            noise = self.noise()
            if noise.event_shape != self.zero.shape:
                raise ValueError(
                    f"Flow expected noise of event shape {tuple(self.zero.shape)}, got "
                    f"{tuple(noise.event_shape)}. Build the noise for as many features."
                )
            return noise.expand(batch_shape)
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
            support=self.constrain.codomain,
            to_real=self.constrain.inv,
        )
        self.shift.copy_(shift.masked_fill(self.angles, 0.0))  # a circle has no mean
        self.scale.copy_(scale.masked_fill(self.angles, 1.0))  # and its own unit
        return self


def _check_shape(
    shape: tuple[int, ...], constrain: Bijection, support: constraints.Constraint
) -> None:
    """Refuse features that cannot fill the support."""
    if len(shape) < constrain.domain.event_dim:
        raise ValueError(
            f"Flow expected events of at least {constrain.domain.event_dim} dimensions for "
            f"{support}, got {shape}. Choose another event_shape, or another support."
        )
    try:
        constrain.forward_shape(shape)
    except ValueError as error:
        raise ValueError(
            f"Flow expected features that fill {support}, got {shape[-1]}. {error}"
        ) from error


def _keeps_angles(layer: nn.Module) -> bool:
    """Whether a layer moves angles as angles, rather than as numbers."""
    if isinstance(layer, Coupling):
        return not isinstance(layer.embedding, nn.Identity)
    return isinstance(layer, Permutation | Elementwise)
