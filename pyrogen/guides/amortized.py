"""A guide that reads the data: one encoder in place of one posterior per datum."""

__all__ = ["Amortized"]

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.runtime import NonlocalExit
from torch import Size, Tensor, nn
from torch.distributions import ComposeTransform, IndependentTransform, Transform, biject_to

from ..inputs import check_batch
from .parameters import announce

WIDEST = 10.0  # bound on |log(scale / init_scale)|, so that no encoder makes it overflow


@dataclass(frozen=True)
class _Site:
    """A local latent: where it goes among the encoder's outputs, and how it is constrained."""

    name: str
    shape: Size  # of one unconstrained value
    transform: Transform

    def __call__(self, loc: Tensor, scale: Tensor) -> dist.TorchDistribution:
        normal = dist.Normal(loc, scale).to_event(len(self.shape))
        transform = self.transform
        while isinstance(transform, IndependentTransform):
            transform = transform.base_transform
        if isinstance(transform, ComposeTransform) and not transform.parts:  # the identity:
            return normal  # a plain Normal has a mean, and closed-form divergences
        return dist.TransformedDistribution(normal, [self.transform])


class Amortized(AutoGuide):
    r"""Posterior of the local latents of a plate, as a function of each datum.

    .. math:: q(z_i \mid x_i) = \mathcal N\big(\mu(x_i),\, \operatorname{diag} s^2(x_i)\big),
        \quad \log s = \log s_0 + b \tanh(r(x_i) / b), \quad b = 10,

    in the unconstrained space of all latents of the plate together; :math:`(\mu, r)` are the
    encoder's outputs. The guide enters the plate as the model does on the same arguments: same
    size, same subsample, so minibatches may be passed, or drawn by the plate.

    Args:
        model: Model whose latents all lie in one plate, once those outside are hidden by
            ``poutine.block``.
        encoder: Module from data, shape ``(batch, *event)``, to shape ``(batch, 2 * latents)``:
            locations, then what bends the log-scales.
        select: Picks the encoder's data, one row per datum, from the arguments of the model.
        init_scale: Posterior standard deviation :math:`s_0` where the encoder says nothing, in
            unconstrained units.
        create_plates: As in Pyro's autoguides.

    Raises:
        NotImplementedError: If a latent is discrete, global, or in several plates.
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
        select: Callable[..., Tensor] = lambda x, *_, **__: x,
        init_scale: float = 0.1,
        create_plates: Callable | None = None,
    ) -> None:
        if not init_scale > 0:
            raise ValueError(
                f"Amortized expected a positive init_scale, got {init_scale}. Pass a standard "
                "deviation, in unconstrained units."
            )
        super().__init__(model, create_plates=create_plates)
        self.encoder = encoder
        self.select = select
        self.init_scale = init_scale

    def setup(self, *args: Any, **kwargs: Any) -> Self:
        """Learn the latents' names and shapes from a run of the model; the first call does it."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        return self

    @property
    def latents(self) -> int:
        """Number of unconstrained latents of one datum: half the width of the encoder."""
        return sum(site.shape.numel() for site in self._sites)

    def posterior(self, x: Tensor) -> dict[str, dist.TorchDistribution]:
        """Return the posterior of every site given data, batch shape ``(len(x),)``.

        Args:
            x: What ``select`` would give, shape ``(batch, *event)``.

        Raises:
            RuntimeError: If the guide has not seen a run of its model.
        """
        if self.prototype_trace is None:
            raise RuntimeError(
                "Amortized has not seen its model run, so it does not know the sites. Call "
                "guide.setup(*args) with the model's arguments first."
            )
        return self._posterior(x, plate_dim=-1)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent inside the model's plate, given the model's arguments."""
        self.setup(*args, **kwargs)
        plate = self._create_plates(*args, **kwargs)[self._plate]
        announce(f"{self._pyro_name}.encoder", self._encoder)
        x = _rows(self.select(*args, **kwargs), plate)
        posterior = self._posterior(x, plate_dim=plate.dim)
        with plate:
            return {name: pyro.sample(name, q) for name, q in posterior.items()}

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the posterior median of every site, given the model's arguments."""
        self.setup(*args, **kwargs)
        loc, _ = self._encode(self.select(*args, **kwargs))
        parts = loc.split([site.shape.numel() for site in self._sites], dim=-1)
        return {
            site.name: site.transform(part.reshape(len(part), *site.shape))
            for site, part in zip(self._sites, parts, strict=True)
        }

    @property
    def _encoder(self) -> nn.Module:
        return cast(nn.Module, self._modules["encoder"])  # see parameters.announce

    def _posterior(self, x: Tensor, *, plate_dim: int) -> dict[str, dist.TorchDistribution]:
        loc, log_scale = self._encode(x)
        posterior, start = {}, 0
        for site in self._sites:
            stop = start + site.shape.numel()
            shape = (len(x), *[1] * (-plate_dim - 1), *site.shape)
            part = (y[:, start:stop].reshape(shape) for y in (loc, log_scale.exp()))
            posterior[site.name] = site(*part)
            start = stop
        return posterior

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = x.shape[1:] if isinstance(x, Tensor) else ()
        check_batch(x, shape, owner="Amortized", like=next(self._encoder.parameters(), None))
        outputs = self._encoder(x)
        if outputs.shape != (len(x), 2 * self.latents):
            sites = ", ".join(f"{site.name} ({site.shape.numel()})" for site in self._sites)
            raise ValueError(
                f"Amortized expected encoder outputs of shape {(len(x), 2 * self.latents)}, got "
                f"{tuple(outputs.shape)}. Give the encoder 2 outputs for each latent of {sites}."
            )
        loc, bend = outputs.chunk(2, dim=-1)
        return loc, math.log(self.init_scale) + WIDEST * (bend / WIDEST).tanh()

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
        plates = {name: _plate_of(site) for name, site in latents.items()}
        if len(set(plates.values())) > 1:
            raise NotImplementedError(
                f"Amortized learns one plate, got sites in several: {plates}. Use one Amortized "
                "for each, in a pyro.infer.autoguide.AutoGuideList."
            )
        self._sites = [_site(msg) for msg in latents.values()]
        self._plate = plates.popitem()[1]
        self.prototype_trace = trace

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self.master is not None or self.create_plates is not None:
            return super()._create_plates(*args, **kwargs)
        self.plates = {self._plate: self._enter_as_model(*args, **kwargs)}
        return self.plates

    @torch.no_grad()
    def _enter_as_model(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model to its first latent, and make the plate that it is in.

        Size and subsample may change between calls, so they cannot be remembered.
        """
        names = {site.name for site in self._sites}
        model = poutine.escape(self.model, escape_fn=lambda msg: msg["name"] in names)
        with poutine.block(), poutine.trace() as run:
            try:
                model(*args, **kwargs)
            except NonlocalExit as stop:
                frames = stop.site["cond_indep_stack"]
        frame = next(frame for frame in frames if frame.name == self._plate)
        size, indices = (
            frame.full_size or frame.size,
            cast(Any, run.trace.nodes[frame.name]["value"]),
        )
        if frame.size == size and not torch.equal(indices, torch.arange(size).to(indices)):
            raise NotImplementedError(
                f"Plate {frame.name!r} reorders all its {size} data, and whether the encoder's "
                "data are reordered cannot be told. Leave its subsample out."
            )
        return pyro.plate(frame.name, size, subsample=indices, dim=frame.dim)


def _plate_of(site: Any) -> str:
    names = [frame.name for frame in site["cond_indep_stack"]]
    if not names:
        raise NotImplementedError(
            f"Site {site['name']!r} lies in no plate, so it has no datum to be read from. Hide it "
            "by poutine.block, and give it another guide, such as AutoFlow, in a "
            "pyro.infer.autoguide.AutoGuideList."
        )
    if len(names) > 1:
        raise NotImplementedError(
            f"Site {site['name']!r} lies in the plates {', '.join(names)}; Amortized reads one. "
            "Make the inner ones event dimensions by to_event."
        )
    return names[0]


def _site(site: Any) -> _Site:
    fn = site["fn"]
    if fn.support.is_discrete:
        raise NotImplementedError(
            f"Site {site['name']!r} is discrete, and a normal posterior is not. Hide it by "
            "poutine.block and sum it out by pyro.infer.TraceEnum_ELBO."
        )
    transform = biject_to(_of_one_datum(fn.support, site))
    shape = transform.inverse_shape(fn.event_shape)
    return _Site(site["name"], shape, transform)


def _of_one_datum(support: constraints.Constraint, site: Any) -> constraints.Constraint:
    """The support without the plate's dimension, which a plate gives to its bounds too."""
    if isinstance(support, constraints.independent):
        base = _of_one_datum(support.base_constraint, site)
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
