"""Guides that hold one posterior for every datum of a plate."""

__all__ = ["PerDatum"]

from abc import abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Self, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.runtime import NonlocalExit
from torch import Tensor, nn

from ..parameters import announce
from .families import Diagonal, Family
from .sites import Site, data_plate, describe, listed


class PerDatum(AutoGuide):
    r"""Posterior of the local latents of a plate, one law of a family for each datum.

    .. math:: q(z_i) = q_{\lambda_i}(z_i)

    A subclass says where the numbers :math:`\lambda_i` come from, by ``_read``. All unconstrained
    latents of a datum are together, those in plates inside the data's plate included. The guide
    enters the plates as the model does on the same arguments: same size, same subsample.

    Args:
        model: Model whose latents all lie in one plate, once those outside are hidden.
        encoder: Module that holds the parameters of the numbers.
        family: Laws to choose from; :class:`~pyrogen.guides.Diagonal` if None.
        plate: Name of the data's plate. If None, of those that hold every latent, the one that is
            subsampled, or else the outermost.
        create_plates: As in Pyro's autoguides.

    Raises:
        TypeError: If ``family`` is none.
        NotImplementedError: If a latent is discrete or global, or no plate holds all latents.
        ValueError: If no latent is found.
    """

    def __init__(
        self,
        model: Callable,
        encoder: nn.Module,
        *,
        family: Family | None,
        plate: str | None,
        create_plates: Callable | None,
    ) -> None:
        if family is not None and not isinstance(family, Family):
            raise TypeError(
                f"{type(self).__name__} expected a family, got {type(family).__name__}. Pass an "
                "object such as Diagonal() or FullCovariance(init_scale=0.1)."
            )
        super().__init__(model, create_plates=create_plates)
        self.encoder = encoder
        self.family = Diagonal() if family is None else family
        self.plate = plate
        self._sites: list[Site] = []

    def __getstate__(self) -> dict[str, Any]:
        """Keep the model, which Pyro would forget, and no tensor of its first run."""
        state = super(AutoGuide, self).__getstate__()
        return {**state, "master": None, "prototype_trace": None}

    @abstractmethod
    def _read(self, plate: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the numbers of the data that ``plate`` shows, given the model's arguments.

        Shape ``(*batch, family.outputs)``, with the data at ``plate.dim`` of ``batch``.
        """
        raise NotImplementedError

    def _build(self, like: Tensor, *args: Any, **kwargs: Any) -> None:
        """Build what can be built only when the sites are known, of the dtype of ``like``."""

    def setup(self, *args: Any, **kwargs: Any) -> Self:
        """Learn the latents' names and shapes from a run of the model; the first call does it."""
        if not self._sites:
            self._setup_prototype(*args, **kwargs)
        return self

    @property
    def latents(self) -> int:
        """Number of unconstrained latents of one datum."""
        self._refuse_unseen()
        return sum(site.numel for site in self._sites)

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

    def _posterior(self, outputs: Tensor) -> dict[str, dist.TorchDistribution]:
        """Law of every site for a plain batch of data, given their numbers."""
        if self._factorises:
            return self._factors(outputs, Site.unfold)
        if self._is_one_event:
            (site,) = self._sites
            return {site.name: site.whole(self._family(outputs))}
        raise NotImplementedError(
            f"{type(self._family).__name__} ties {listed(self._sites)} together, so their "
            "posterior is no product. Use guide.joint, or draws: guide(*args)."
        )

    def _refuse_unseen(self) -> None:
        if not self._sites:
            raise RuntimeError(
                f"{type(self).__name__} has not seen its model run, so it does not know the "
                "sites. Call guide.setup(*args) with the model's arguments first."
            )

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        trace: Any = self.prototype_trace
        owner = type(self).__name__
        latents = dict(trace.iter_stochastic_nodes())
        if not latents:
            raise ValueError(
                f"{owner} found no latent site in its model. Fit the model's parameters by "
                "maximum likelihood, or unhide the sites that the guide is for."
            )
        plate = data_plate(latents, self.plate, owner=owner)
        sites = [describe(msg, plate) for msg in latents.values()]
        like = next(self._encoder.parameters(), next(iter(latents.values()))["value"])
        self._family.setup(sum(site.numel for site in sites)).to(like)
        self._sites, self._plate = sites, plate.name
        try:
            self._build(like, *args, **kwargs)
        except Exception:
            self._sites = []  # not set up
            raise

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
            f"{type(self).__name__} expected one of the latents {listed(self._sites)}, got a run "
            "without any. The first run decides: set up a guide of its own for this model."
        )
