"""Two guides in one: a joint posterior for what all data share, an encoder for what each has."""

__all__ = ["Mixed"]

from collections.abc import Callable, Iterable
from typing import Any, Self

from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from .sites import subsampled

Part = Callable[[Callable], nn.Module]


class Mixed(nn.Module):
    r"""A guide of two parts: for the latents outside the data's plate, and for those inside.

    .. math:: q(\theta, z \mid x) = q(\theta) \prod_i q(z_i \mid x_i, \theta)

    Which latent is which is found from a run of the model. Each part is made by a function of the
    model that shows it the latents of its own; to the second, the first part's draws are data,
    which an :class:`~pyrogen.guides.Amortized` can read (``given``). Minibatches may be passed, or
    drawn by the plate.

    Args:
        model: Model with latents inside and outside the plate whose cells are data.
        globals: Function from a model to the guide for the latents outside.
        locals: Function from a model to the guide for those inside.
        plate: Name of the data's plate. If None it is looked for: plates that are subsampled
            come first, then those with observed sites.

    Raises:
        TypeError: If a part is a guide, and not a function that makes one.
        ValueError: If latents lie on one side only, or the data's plate cannot be told.

    References:
        Hoffman, Blei, Wang, Paisley. Stochastic Variational Inference. JMLR 2013. arXiv:1206.7051
        Agrawal, Domke. Amortized Variational Inference for Simple Hierarchical Models.
        NeurIPS 2021. arXiv:2111.03144

    Example:
        >>> from pyrogen.distributions import maf
        >>> from pyrogen.guides import Amortized, AutoFlow
        >>> def model(x):
        ...     m = pyro.sample("m", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", 100, subsample_size=len(x)):
        ...         z = pyro.sample("z", dist.Normal(m, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x[:, 0])
        >>> guide = Mixed(
        ...     model,
        ...     globals=lambda m: AutoFlow(m, maf),
        ...     locals=lambda m: Amortized(m, nn.Linear(1, 2)),
        ... )
        >>> {name: value.shape for name, value in guide(torch.zeros(5, 1)).items()}
        {'m': torch.Size([]), 'z': torch.Size([5])}
    """

    def __init__(
        self, model: Callable, *, globals: Part, locals: Part, plate: str | None = None
    ) -> None:
        super().__init__()
        self._model = (model,)  # not a submodule
        self._plate = plate
        self._global: set[str] = set()
        self._local: set[str] = set()
        self._drawn: dict[str, Tensor] = {}
        outside = poutine.block(model, hide_fn=self._is_local)  # a method is copied with its guide
        self.globals = _made(globals, outside, "globals")
        self.locals = _made(locals, poutine.condition(model, data=self._drawn), "locals")

    def setup(self, *args: Any, **kwargs: Any) -> Self:
        """Learn from a run which latents are where, and let both parts build what they need.

        The first call does it too, but an optimizer often has to be made before.
        """
        with poutine.block():
            self(*args, **kwargs)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample the latents outside the plate, then those inside, given the arguments."""
        if not self._local:
            self._split(*args, **kwargs)
        with poutine.trace() as run:
            self.globals(*args, **kwargs)
        drawn: dict[str, Any] = {name: site["value"] for name, site in run.trace.nodes.items()}
        return self._then_locals(
            {name: drawn[name] for name in drawn if name in self._global},
            self.locals,
            *args,
            **kwargs,
        )

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of every site; the second part's given the medians of the first."""
        if not self._local:
            self.setup(*args, **kwargs)
        outside = self.globals.median(*args, **kwargs)  # type: ignore[operator]
        return self._then_locals(outside, self.locals.median, *args, **kwargs)  # type: ignore

    def _is_local(self, site: Any) -> bool:
        return site["name"] in self._local

    def _then_locals(
        self, drawn: dict[str, Tensor], part: Callable, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        self._drawn.update(drawn)
        try:
            return {**drawn, **(part(*args, **kwargs) or {})}
        finally:
            self._drawn.clear()  # nothing of a run outlives it

    def _split(self, *args: Any, **kwargs: Any) -> None:
        (model,) = self._model
        with poutine.block():
            trace: Any = poutine.trace(model).get_trace(*args, **kwargs)
        stacks = {name: site["cond_indep_stack"] for name, site in _latents(trace).items()}
        latents = {name: [frame.name for frame in stack] for name, stack in stacks.items()}
        plate = self._plate or _data_plate(trace)
        local = {name for name, plates in latents.items() if plate in plates}
        if not local:
            raise ValueError(
                f"Mixed expected latents in the data's plate, got {latents}. Use AutoFlow alone, "
                "or pass the plate's name as plate=."
            )
        if local == latents.keys():
            raise ValueError(
                f"Mixed expected latents outside the data's plate {plate!r}, got {latents}. Use "
                "Amortized alone."
            )
        self._local |= local
        self._global |= latents.keys() - local


def _made(part: Part, model: Callable, name: str) -> nn.Module:
    if isinstance(part, nn.Module) or not callable(part):
        raise TypeError(
            f"Mixed expected {name}= to make a guide, got {type(part).__name__}. Pass a function "
            "of the model: lambda m: AutoFlow(m, nsf)."
        )
    guide = part(model)
    if not isinstance(guide, nn.Module):
        raise TypeError(
            f"Mixed expected {name}= to return a guide that is a module, got "
            f"{type(guide).__name__}. Return an AutoFlow, an Amortized or a Pyro autoguide."
        )
    return guide


def _data_plate(trace: Any) -> str | None:
    """Name of the plate whose cells look like data, None if no latent lies in any plate."""
    latents = [site["cond_indep_stack"] for site in _latents(trace).values()]
    observed = [
        site["cond_indep_stack"]
        for site in trace.nodes.values()
        if site["type"] == "sample" and site["is_observed"]
    ]
    found = list(dict.fromkeys(frame for stack in latents for frame in stack))
    found = _preferred(found, filter(subsampled, found))
    found = _preferred(found, (frame for stack in observed for frame in stack))
    inside = [stack for stack in latents if set(stack) & set(found)]
    whole = [frame for frame in found if all(frame in stack for stack in inside)]
    if found and not whole:
        names = ", ".join(frame.name for frame in found)
        raise ValueError(
            f"Mixed expected one plate to hold the data, got latents in {names}. Pass the name of "
            "the data's plate as plate=."
        )
    return whole[0].name if whole else None


def _latents(trace: Any) -> dict[str, Any]:
    """Latent sites, without those by which plates draw their subsamples."""
    return {
        name: site for name, site in trace.iter_stochastic_nodes() if not site_is_subsample(site)
    }


def _preferred(plates: list, wanted: Iterable) -> list:
    """Those of the plates that are wanted, or all of them if none is."""
    asked = set(wanted)
    return [plate for plate in plates if plate in asked] or plates
