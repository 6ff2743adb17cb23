"""The latents of a plate: how one vector of numbers per datum becomes their values."""

__all__ = ["Cells", "Site", "data_plate", "describe", "listed", "subsampled"]

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
from pyro.distributions import constraints
from pyro.distributions.util import sum_rightmost
from torch import Size, Tensor
from torch.distributions import (
    ComposeTransform,
    IndependentTransform,
    ReshapeTransform,
    Transform,
    biject_to,
)


@dataclass(frozen=True)
class Cells:
    """A plate inside the data's plate: a fixed number of latents for each datum."""

    name: str
    dim: int
    size: int


@dataclass(frozen=True)
class Site:
    """A local latent: its shape, and how it is constrained.

    Args:
        name: Name of the site.
        cells: Plates inside the data's, from left to right.
        shape: Shape of one unconstrained value.
        transform: From there to the support.
    """

    name: str
    cells: tuple[Cells, ...]
    shape: Size
    transform: Transform

    @property
    def numel(self) -> int:
        """Number of unconstrained latents of one datum."""
        return self._sizes.numel() * self.shape.numel()

    @property
    def _sizes(self) -> Size:
        return Size(plate.size for plate in self.cells)

    def unfold(self, y: Tensor) -> Tensor:
        """Shape ``(*batch, numel)`` to ``(*batch, *cells, *shape)``."""
        return y.reshape(*y.shape[:-1], *self._sizes, *self.shape)

    def place(self, y: Tensor) -> Tensor:
        """Shape ``(*batch, numel)`` to that in the model, where plates are batch dimensions."""
        depth = max((-plate.dim for plate in self.cells), default=0)
        y = y[(None,) * (depth - y.ndim + 1)]
        batch = y.ndim - 1
        y = self.unfold(y)
        for i, plate in enumerate(self.cells):
            y = y.transpose(batch + plate.dim, batch + i)  # swaps with a dimension of size one
        return y.reshape(*y.shape[:batch], *self.shape)

    def factor(self, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        """Law of a value whose unconstrained latents are independent normals."""
        normal = dist.Normal(loc, scale).to_event(len(self.shape))
        return dist.TransformedDistribution(normal, [self.transform]) if self._bends else normal

    def whole(self, law: dist.TorchDistribution) -> dist.TorchDistribution:
        """Law of a value whose unconstrained latents, side by side, follow ``law``."""
        parts: list[Transform] = []
        if len(self.shape) != 1:
            parts.append(ReshapeTransform(law.event_shape, self.shape))
        if self._bends:
            parts.append(self.transform)
        return dist.TransformedDistribution(law, parts) if parts else law

    def point(self, y: Tensor) -> dist.Delta:
        """The value at ``y``, with the factor by which the map to it changes a density."""
        value = self.transform(y)
        ladj = self.transform.log_abs_det_jacobian(y, value)
        batch = y.ndim - len(self.shape)
        return dist.Delta(
            value,
            log_density=-sum_rightmost(ladj, ladj.ndim - batch),
            event_dim=value.ndim - batch,
        )

    @property
    def _bends(self) -> bool:
        """Whether the support is not all reals: a plain Normal has closed-form divergences."""
        transform = self.transform
        while isinstance(transform, IndependentTransform):
            transform = transform.base_transform
        return not isinstance(transform, ComposeTransform) or bool(transform.parts)


def data_plate(latents: Mapping[str, Any], name: str | None, *, owner: str) -> Any:
    """Return the plate whose cells are data: one that holds every latent.

    Of several it is the one that is subsampled, or else the outermost.

    Args:
        latents: Sites of a trace by name.
        name: Name of the plate, if it is known.
        owner: Who asks, for the message.

    Raises:
        NotImplementedError: If a latent lies in no plate, or no plate holds all of them.
        ValueError: If the plate asked for does not hold all of them.
    """
    stacks = {site: msg["cond_indep_stack"] for site, msg in latents.items()}
    for site, stack in stacks.items():
        if not stack:
            raise NotImplementedError(
                f"Site {site!r} lies in no plate, so it has no datum to be read from. Give it "
                "another guide, such as AutoFlow: pyrogen.guides.Mixed puts both together."
            )
    first = next(iter(stacks.values()))
    shared = [plate for plate in first if all(plate in stack for stack in stacks.values())]
    plates = {site: [plate.name for plate in stack] for site, stack in stacks.items()}
    if not shared:
        raise NotImplementedError(
            f"{owner} reads the data of one plate, got sites in several: {plates}. Use one for "
            "each, in a pyro.infer.autoguide.AutoGuideList."
        )
    chosen = [plate for plate in shared if plate.name == name] if name else shared
    if not chosen:
        raise ValueError(
            f"{owner} expected its plate {name!r} to hold every latent, got {plates}. Name "
            f"another, such as {shared[0].name!r}."
        )
    return next(filter(subsampled, chosen), chosen[0])


def describe(site: Any, plate: Any) -> Site:
    """Describe a latent of a trace that lies in ``plate``.

    Raises:
        NotImplementedError: If it is discrete, a plate inside is subsampled, or its support
            depends on the datum.
    """
    fn = site["fn"]
    if fn.support.is_discrete:
        raise NotImplementedError(
            f"Site {site['name']!r} is discrete, and this posterior is not. Hide it by "
            "poutine.block and sum it out by pyro.infer.TraceEnum_ELBO."
        )
    inner = [frame for frame in site["cond_indep_stack"] if frame.name != plate.name]
    for frame in inner:
        if subsampled(frame):
            raise NotImplementedError(
                f"Plate {frame.name!r} holds a subsample inside the data's plate {plate.name!r}, "
                "and the number of a datum's latents must be fixed. Take all of it, or pass its "
                "name as plate= if its cells are the data."
            )
    cells = tuple(Cells(f.name, f.dim, f.size) for f in sorted(inner, key=lambda f: f.dim))
    transform = biject_to(_of_one_cell(fn.support, site))
    return Site(site["name"], cells, transform.inverse_shape(fn.event_shape), transform)


def subsampled(frame: Any) -> bool:
    """Whether a plate shows a part of its data."""
    return frame.full_size is not None and frame.size < frame.full_size


def _of_one_cell(support: constraints.Constraint, site: Any) -> constraints.Constraint:
    """The support without the plates' dimensions, which plates give to its bounds too."""
    if isinstance(support, constraints.independent):
        base = _of_one_cell(support.base_constraint, site)
        return constraints.independent(base, support.reinterpreted_batch_ndims)
    one = copy.copy(support)
    for key, bound in vars(support).items():
        if isinstance(bound, Tensor) and bound.ndim > len(site["fn"].event_shape):
            first = bound[(0,) * (bound.ndim - len(site["fn"].event_shape))]
            if not (bound == first).all():
                raise NotImplementedError(
                    f"The support of site {site['name']!r} differs between data. Sample it on a "
                    "fixed support and transform it by pyro.deterministic."
                )
            setattr(one, key, first)
    return one


def listed(sites: Sequence[Site]) -> str:
    """Sites and their numbers of latents, for a message."""
    return ", ".join(f"{site.name} ({site.numel})" for site in sites)
