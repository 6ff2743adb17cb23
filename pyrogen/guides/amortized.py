"""A guide that reads the data: one encoder in place of one posterior per datum."""

__all__ = ["Amortized"]

from collections.abc import Callable, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..inputs import check_batch
from ..nets import Incomplete
from .families import Family
from .per_datum import PerDatum
from .sites import listed


class Amortized(PerDatum):
    r"""Posterior of the local latents of a plate, as a function of each datum.

    .. math:: q(z_i \mid x_i) = q_{e(x_i)}(z_i),

    with :math:`e` the encoder and :math:`q_\lambda` a family of laws for all unconstrained latents
    of a datum together, those in plates inside the data's plate included. The guide enters the
    plates as the model does on the same arguments: same size, same subsample, so minibatches may
    be passed, or drawn by the plate.

    The family :class:`~pyrogen.guides.Diagonal` makes every site a factor of its own, with
    closed-form divergences; others draw all sites of a datum at one auxiliary site.

    Args:
        model: Model whose latents all lie in one plate, once those outside are hidden by
            ``poutine.block``; :class:`~pyrogen.guides.Mixed` does that.
        encoder: Module from data, shape ``(batch, *event)``, to the numbers that the family takes,
            shape ``(batch, family.outputs)``. If it contains :class:`~pyrogen.nets.Incomplete`,
            NaN is let through to it.
        family: Laws to choose from; :class:`~pyrogen.guides.Diagonal` if None. If it has
            parameters of its own, call :meth:`setup` before an optimizer is made.
        select: Picks the encoder's data, one row per datum, from the arguments of the model.
        given: Names of sites before the first latent whose values the encoder reads too: it is
            called as ``encoder(x, context)``, with the values side by side, shape
            ``(batch, context)``. They are observed sites, or within
            :class:`~pyrogen.guides.Mixed` those of the other part.
        plate: Name of the data's plate. If None, of those that hold every latent, the one that is
            subsampled, or else the outermost.
        create_plates: As in Pyro's autoguides.

    Raises:
        NotImplementedError: If a latent is discrete or global, or no plate holds all latents.
        ValueError: If no latent is found, or the data or the encoder's output do not fit.

    References:
        Kingma, Welling. Auto-Encoding Variational Bayes. ICLR 2014. arXiv:1312.6114

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x[:, 0])
        >>> guide = Amortized(model, nn.Linear(1, 4))
        >>> guide(torch.zeros(5, 1))["z"].shape
        torch.Size([5, 2])
        >>> guide.posterior(torch.zeros(3, 1))["z"].mean.shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        model: Callable,
        encoder: nn.Module,
        *,
        family: Family | None = None,
        select: Callable[..., Tensor] = lambda x, *_, **__: x,
        given: Sequence[str] = (),
        plate: str | None = None,
        create_plates: Callable | None = None,
    ) -> None:
        super().__init__(model, encoder, family=family, plate=plate, create_plates=create_plates)
        self.select = select
        self.given = (given,) if isinstance(given, str) else tuple(given)

    def joint(self, x: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """Return the law of a datum's unconstrained latents, side by side in the model's order.

        Args:
            x: What ``select`` would give, shape ``(batch, *event)``.
            context: Values of the sites ``given``, shape ``(context,)`` or ``(batch, context)``.

        Returns:
            Distribution of batch shape ``(len(x),)`` and event shape ``(latents,)``.

        Raises:
            RuntimeError: If the guide has not seen a run of its model.
            ValueError: If data or context do not fit.
        """
        self._refuse_unseen()
        return self._family(self._encode(x, context, plate_dim=-1))

    def posterior(
        self, x: Tensor, context: Tensor | None = None
    ) -> dict[str, dist.TorchDistribution]:
        """Return the posterior of every site given data, batch shape ``(len(x), *inner)``.

        Args:
            x: What ``select`` would give, shape ``(batch, *event)``.
            context: Values of the sites ``given``, shape ``(context,)`` or ``(batch, context)``.

        Raises:
            RuntimeError: If the guide has not seen a run of its model.
            NotImplementedError: If the family ties several sites, or the cells of a plate.
            ValueError: If data or context do not fit.
        """
        self._refuse_unseen()
        return self._posterior(self._encode(x, context, plate_dim=-1))

    def _read(self, plate: Any, *args: Any, **kwargs: Any) -> Tensor:
        x = _rows(self.select(*args, **kwargs), plate)
        context = self._context(*args, **kwargs) if self.given else None
        return self._encode(x, context, plate_dim=plate.dim)

    def _encode(self, x: Tensor, context: Tensor | None, *, plate_dim: int) -> Tensor:
        """Numbers for each datum, shape ``(*batch, outputs)``, data at ``plate_dim`` of batch."""
        encoder = self._encoder
        shape = x.shape[1:] if isinstance(x, Tensor) else ()
        missing = any(isinstance(module, Incomplete) for module in encoder.modules())
        known = x.masked_fill(x.isnan(), 0.0) if missing and isinstance(x, Tensor) else x
        check_batch(known, shape, owner="Amortized", like=next(encoder.parameters(), None))
        if (context is None) == bool(self.given):
            raise ValueError(
                f"Amortized expected {'a' if self.given else 'no'} context, of the sites given="
                f"{self.given}. Pass their values side by side, or rebuild the guide."
            )
        batch = torch.Size((len(x), *[1] * (-plate_dim - 1)))
        if context is None:
            outputs = encoder(x)
        else:  # each run of many at once has a context of its own
            rows = x.reshape(*batch, *shape)
            batch = torch.broadcast_shapes(context.shape[:-1], batch)
            rows = rows.expand(*batch, *shape).reshape(batch.numel(), *shape)
            outputs = encoder(rows, context.expand(*batch, -1).reshape(batch.numel(), -1))
        expected = (batch.numel(), self._family.outputs)
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        if got != expected:
            raise ValueError(
                f"Amortized expected encoder outputs of shape {expected}, got "
                f"{got}. Give the encoder {self._family.outputs} outputs, as "
                f"{type(self._family).__name__} takes for the latents of {listed(self._sites)}."
            )
        return outputs.reshape(*batch, -1)

    def _context(self, *args: Any, **kwargs: Any) -> Tensor:
        """Values of the sites given, side by side, shape ``(*batch, context)``."""
        _, sites = self._run_to_first_latent(*args, **kwargs)
        parts = []
        for name in self.given:
            if name not in sites or not sites[name]["is_observed"]:
                raise ValueError(
                    f"Amortized expected the value of {name!r}, got a model that has not observed "
                    f"it before its first latent. Observe it there, or use Mixed to draw it."
                )
            parts.append(_features(sites[name], self._plate))
        batch = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(*batch, -1) for part in parts], dim=-1)


def _features(site: Any, data: str) -> Tensor:
    """The numbers of a site as one dimension on the right, all plates' but the data's in it."""
    value = site["value"]
    batch = value.ndim - site["fn"].event_dim
    value = value.flatten(batch) if batch < value.ndim else value.unsqueeze(-1)
    for frame in site["cond_indep_stack"]:
        if frame.name != data and batch + frame.dim >= 0:
            value = value.unsqueeze(-1).transpose(batch + frame.dim, -1).flatten(-2)
    return value


def _rows(x: Tensor, plate: Any) -> Tensor:
    """The data of a plate's subsample: ``x`` holds either just these, or all."""
    held, size = plate.subsample_size, plate.size
    if not isinstance(x, Tensor) or x.ndim == 0 or len(x) == held:
        return x
    if len(x) == size:
        return x[plate.indices]
    raise ValueError(
        f"Plate {plate.name!r} holds {held} of {size} data, and the encoder got {len(x)}. Pass "
        "select=, a function of the model's arguments that gives one row per datum."
    )
