"""A guide that reads the data: one encoder in place of one posterior per datum."""

__all__ = ["Amortized"]

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Self, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.runtime import NonlocalExit
from torch import Tensor, nn

from ..inputs import check_batch
from ..nets import Incomplete
from ..parameters import announce
from .families import Diagonal, Family
from .sites import Site, data_plate, describe, listed


class Amortized(AutoGuide):
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
        if family is not None and not isinstance(family, Family):
            raise TypeError(
                f"Amortized expected a family, got {type(family).__name__}. Pass an object such "
                "as Diagonal() or FullCovariance(init_scale=0.1)."
            )
        super().__init__(model, create_plates=create_plates)
        self.encoder = encoder
        self.family = Diagonal() if family is None else family
        self.select = select
        self.given = (given,) if isinstance(given, str) else tuple(given)
        self.plate = plate

    def setup(self, *args: Any, **kwargs: Any) -> Self:
        """Learn the latents' names and shapes from a run of the model; the first call does it."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self

    @property
    def latents(self) -> int:
        """Number of unconstrained latents of one datum."""
        self._refuse_unseen()
        return sum(site.numel for site in self._sites)

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
        if not self._factorises and not self._is_one_event:
            raise NotImplementedError(
                f"{type(self._family).__name__} ties {listed(self._sites)} together, so their "
                "posterior is no product. Use guide.joint(x), or draws: guide(*args)."
            )
        outputs = self._encode(x, context, plate_dim=-1)
        if not self._factorises:
            (site,) = self._sites
            return {site.name: site.whole(self._family(outputs))}
        return self._factors(outputs, Site.unfold)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent inside the model's plates, given the model's arguments."""
        self.setup(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        announce(f"{self._pyro_name}.encoder", self._encoder)
        announce(f"{self._pyro_name}.family", self._family)
        outputs = self._read(plates[self._plate], *args, **kwargs)
        with plates[self._plate]:
            laws = self._laws(outputs)
            values = {}
            for site in self._sites:
                with ExitStack() as inner:
                    for cells in site.cells:
                        inner.enter_context(plates[cells.name])
                    values[site.name] = pyro.sample(site.name, laws[site.name])
        return values

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the posterior median of every site, given the model's arguments."""
        self.setup(*args, **kwargs)
        with poutine.block():
            plates = self._create_plates(*args, **kwargs)
            outputs = self._read(plates[self._plate], *args, **kwargs)
        parts = self._family.median(outputs).split([site.numel for site in self._sites], dim=-1)
        return {
            site.name: site.transform(site.place(part))
            for site, part in zip(self._sites, parts, strict=True)
        }

    @property
    def _encoder(self) -> nn.Module:
        return cast(nn.Module, self._modules["encoder"])  # see parameters.announce

    @property
    def _family(self) -> Family:
        return cast(Family, self._modules["family"])

    @property
    def _factorises(self) -> bool:
        return isinstance(self._family, Diagonal)

    @property
    def _is_one_event(self) -> bool:
        return len(self._sites) == 1 and not self._sites[0].cells

    def _laws(self, outputs: Tensor) -> dict[str, Any]:
        """Laws to sample the sites from; several that depend on one another are points."""
        if self._factorises:
            return self._factors(outputs, Site.place)
        law = self._family(outputs)
        if self._is_one_event:
            return {site.name: site.whole(law) for site in self._sites}
        name = f"_{self._pyro_name}_latent"
        together = pyro.sample(name, law, infer={"is_auxiliary": True})
        parts = together.split([site.numel for site in self._sites], dim=-1)
        return {
            site.name: site.point(site.place(part))
            for site, part in zip(self._sites, parts, strict=True)
        }

    def _factors(
        self, outputs: Tensor, shaped: Callable[[Site, Tensor], Tensor]
    ) -> dict[str, dist.TorchDistribution]:
        normal = self._family(outputs).base_dist
        sizes = [site.numel for site in self._sites]
        locs, scales = normal.loc.split(sizes, dim=-1), normal.scale.split(sizes, dim=-1)
        return {
            site.name: site.factor(shaped(site, loc), shaped(site, scale))
            for site, loc, scale in zip(self._sites, locs, scales, strict=True)
        }

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
        if outputs.shape != expected:
            raise ValueError(
                f"Amortized expected encoder outputs of shape {expected}, got "
                f"{tuple(outputs.shape)}. Give the encoder {self._family.outputs} outputs, as "
                f"{type(self._family).__name__} takes for the latents of {listed(self._sites)}."
            )
        return outputs.reshape(*batch, -1)

    def _refuse_unseen(self) -> None:
        if self.prototype_trace is None:
            raise RuntimeError(
                "Amortized has not seen its model run, so it does not know the sites. Call "
                "guide.setup(*args) with the model's arguments first."
            )

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        trace: Any = self.prototype_trace
        self.prototype_trace = None  # unless all sites pass
        latents = dict(trace.iter_stochastic_nodes())
        if not latents:
            raise ValueError(
                "Amortized found no latent site in its model. Fit the model's parameters by "
                "maximum likelihood, or unhide the sites that the guide is for."
            )
        plate = data_plate(latents, self.plate, owner="Amortized")
        self._sites = [describe(msg, plate) for msg in latents.values()]
        self._plate = plate.name
        like = next(self._encoder.parameters(), next(iter(latents.values()))["value"])
        self._family.setup(sum(site.numel for site in self._sites)).to(like)
        self.prototype_trace = trace

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self.master is not None or self.create_plates is not None:
            return super()._create_plates(*args, **kwargs)
        inner = {cells.name: cells for site in self._sites for cells in site.cells}
        plates = {
            name: pyro.plate(name, cells.size, dim=cells.dim) for name, cells in inner.items()
        }
        self.plates = {self._plate: self._enter_as_model(*args, **kwargs), **plates}
        return self.plates

    @torch.no_grad()
    def _enter_as_model(self, *args: Any, **kwargs: Any) -> Any:
        """Make the data's plate, as the model enters it.

        Size and subsample may change between calls, so they cannot be remembered.
        """
        frames, sites = self._run_to_first_latent(*args, **kwargs)
        frame = next(frame for frame in frames if frame.name == self._plate)
        size, indices = frame.full_size or frame.size, sites[frame.name]["value"]
        if frame.size == size and not torch.equal(indices, torch.arange(size).to(indices)):
            raise NotImplementedError(
                f"Plate {frame.name!r} reorders all its {size} data, and whether the encoder's "
                "data are reordered cannot be told. Leave its subsample out."
            )
        return pyro.plate(frame.name, size, subsample=indices, dim=frame.dim)

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

    def _run_to_first_latent(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        """Return the plates around the model's first latent, and the sites before it."""
        names = {site.name for site in self._sites}
        model = poutine.escape(self.model, escape_fn=lambda msg: msg["name"] in names)
        with poutine.block(), poutine.trace() as run:
            try:
                model(*args, **kwargs)
            except NonlocalExit as stop:
                return stop.site["cond_indep_stack"], dict(run.trace.nodes)
        raise ValueError(
            f"Amortized expected one of the latents {listed(self._sites)}, got a run without any. "
            "The first run decides: set up a guide of its own for this model."
        )


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
