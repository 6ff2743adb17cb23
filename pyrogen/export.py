"""Posteriors for ArviZ: plain nested dicts first, ArviZ last."""

__all__ = ["Groups", "groups", "to_arviz"]

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from pyro.distributions import Unit
from pyro.infer import MCMC
from pyro.poutine import Trace
from torch import Tensor

from .evaluation.vectorized import (
    Program,
    is_deterministic,
    latent_sites,
    nesting,
    over_draws,
    refuse_subsampling,
    sites,
    unbatch,
)
from .inference import WeightedPosterior

Posterior = WeightedPosterior | MCMC | Mapping[str, Tensor]

CHUNK = 1000  # draws in memory at once


@dataclass(frozen=True)
class Groups:
    """What ArviZ is given, in plain arrays.

    Args:
        data: Arrays by group and variable. In the groups ``posterior``, ``log_likelihood``,
            ``posterior_predictive`` and ``sample_stats`` they have shape
            ``(chain, draw, *shape)``, in ``observed_data`` shape ``shape``.
        dims: Names of the dimensions after chain and draw, by variable: plates' names, and None
            where ArviZ is to make one up.
        attrs: Numbers that describe the posterior as a whole.
    """

    data: dict[str, dict[str, NDArray]]
    dims: dict[str, list[str | None]] = field(default_factory=dict)
    attrs: dict[str, float] = field(default_factory=dict)


def to_arviz(
    posterior: Posterior,
    model: Program | None = None,
    *args: Any,
    chains: int = 1,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    **kwargs: Any,
) -> Any:
    """Convert a posterior for ArviZ: summaries, plots, leave-one-out, predictive checks.

    With a model, the groups ``log_likelihood``, ``posterior_predictive`` and ``observed_data``
    are computed by running it, and dimensions are named after its plates. Factors are left out.

    A :class:`~pyrogen.inference.WeightedPosterior` is resampled to as many draws of equal weight,
    some of which repeat; its k̂, effective sample size and log evidence are in the attributes of
    the group ``posterior``. Read the effective sample size there: ArviZ takes resampled draws for
    independent ones.

    Args:
        posterior: Weighted posterior; Pyro's ``MCMC`` after a run; or draws by site, each of
            shape ``(chains * draws, *shape)``, such as Pyro's ``Predictive`` makes of a guide.
        model: Pyro program whose posterior this is; it must run over many draws at once.
        args: What the model is called with; that of ``importance`` if none is given.
        chains: Number of chains that draws by site consist of, one after the other.
        coords: Labels by dimension.
        dims: Names of dimensions by variable, instead of the plates'.
        kwargs: Keywords that the model is called with.

    Returns:
        ``arviz.InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with ArviZ 1.x.

    Raises:
        ImportError: If ArviZ is not installed.
        TypeError: If the posterior is none of these.
        ValueError: If draws do not fit one another, the chains or the model, or data are masked
            or scaled.

    Example:
        >>> draws = {"z": torch.randn(100, 3)}
        >>> plain = groups(draws, chains=2)
        >>> plain.data["posterior"]["z"].shape
        (2, 50, 3)
    """
    try:
        import arviz
    except ImportError as error:
        raise ImportError("to_arviz needs ArviZ: pip install arviz.") from error

    plain = groups(posterior, model, *args, chains=chains, **kwargs)
    named = {**plain.dims, **{name: list(names) for name, names in (dims or {}).items()}}
    options: dict[str, Any] = {"dims": named, "coords": dict(coords or {})}
    from_dict: Any = arviz.from_dict
    if int(arviz.__version__.split(".")[0]) >= 1:
        return from_dict(plain.data, attrs={"posterior": plain.attrs}, **options)
    return from_dict(**plain.data, posterior_attrs=plain.attrs, **options)


@torch.no_grad()
def groups(
    posterior: Posterior,
    model: Program | None = None,
    *args: Any,
    chains: int = 1,
    **kwargs: Any,
) -> Groups:
    """Do what :func:`to_arviz` does, short of ArviZ: arguments and errors are the same."""
    stats: dict[str, NDArray] = {}
    attrs: dict[str, float] = {}
    if isinstance(posterior, WeightedPosterior):
        draws = posterior.resample()
        attrs = {
            "khat": posterior.khat,
            "khat_threshold": posterior.threshold,
            "ess": posterior.ess,
            "log_evidence": posterior.log_evidence,
            "log_evidence_error": posterior.log_evidence_error,
        }
        if not args and not kwargs:
            args, kwargs = posterior.args, dict(posterior.kwargs)
    elif isinstance(posterior, MCMC):
        draws = posterior.get_samples()
        chains = posterior.num_chains
        stats = _diverging(posterior, len(next(iter(draws.values()))) // chains)
    elif isinstance(posterior, Mapping):
        draws = dict(posterior)
    else:
        raise TypeError(
            "to_arviz expected a WeightedPosterior, MCMC or a dict of draws, got "
            f"{type(posterior).__name__}. For a guide, use pyrogen.inference.importance."
        )
    size = _check_draws(draws, chains)

    def by_chain(values: Mapping[str, Tensor]) -> dict[str, NDArray]:
        return {
            name: value.reshape(chains, size // chains, *value.shape[1:]).cpu().numpy()
            for name, value in values.items()
        }

    if model is None:
        return Groups(_present(posterior=by_chain(draws), sample_stats=stats), {}, attrs)

    plain = poutine.trace(model).get_trace(*args, **kwargs)
    refuse_subsampling(plain, owner="to_arviz")
    draws = _fit_to_model(draws, plain, size)
    log_likelihood, predictive, derived = _run(model, plain, draws, args, kwargs, size)
    observed = {name: _value(s) for name, s in sites(plain).items() if _is_data(s)}
    return Groups(
        _present(
            posterior=by_chain({**draws, **derived}),
            sample_stats=stats,
            log_likelihood=by_chain(log_likelihood),
            posterior_predictive=by_chain(predictive),
            observed_data={name: value.cpu().numpy() for name, value in observed.items()},
        ),
        {name: names for name, site in sites(plain).items() if any(names := _dims(site))},
        attrs,
    )


def _check_draws(draws: Mapping[str, Tensor], chains: int) -> int:
    sizes = {name: len(x) if x.ndim else 0 for name, x in draws.items()}
    if not sizes or len(set(sizes.values())) > 1 or 0 in sizes.values():
        raise ValueError(
            f"to_arviz expected the same number of draws at every site, got {sizes}. Pass "
            "tensors of shape (draws, *shape)."
        )
    (size,) = set(sizes.values())
    if chains < 1 or size % chains:
        raise ValueError(
            f"to_arviz expected {size} draws in chains of equal length, got chains={chains}. "
            "Pass a divisor."
        )
    return size


def _fit_to_model(draws: Mapping[str, Tensor], plain: Trace, size: int) -> dict[str, Tensor]:
    """Draws of the model's own sites, in the shapes of a single run."""
    known = sites(plain)
    missing = [name for name in latent_sites(plain) if name not in draws]
    if missing:
        raise ValueError(
            f"to_arviz found no draws of the model's site '{missing[0]}'. Pass draws of every "
            "latent site, or leave the model out."
        )
    # Guides add sites of their own, and Predictive adds dimensions of size one.
    return {
        name: unbatch(value, known[name]["value"], size, name=name)
        for name, value in draws.items()
        if name in known and not _is_data(known[name])
    }


def _run(
    model: Program,
    plain: Trace,
    draws: Mapping[str, Tensor],
    args: tuple,
    kwargs: Mapping[str, Any],
    size: int,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Log-likelihoods, new data and deterministic values for every draw, in chunks."""
    depth, single = nesting(plain), sites(plain)
    latent = {name: draws[name] for name in latent_sites(plain)}
    parts: tuple[list, list, list] = ([], [], [])
    for start in range(0, size, CHUNK):
        n = min(CHUNK, size - start)
        values = {  # the plate of draws stands left of all batch dimensions
            name: x[start : start + n].reshape(
                n, *(1,) * (depth - len(single[name]["fn"].batch_shape)), *x.shape[1:]
            )
            for name, x in latent.items()
        }
        program = over_draws(model, n, nesting=depth)
        trace = poutine.trace(poutine.condition(program, data=values)).get_trace(*args, **kwargs)
        trace.compute_log_prob()
        # Deterministic sites are observed too, and stay: drawn anew they would grow dimensions.
        fixed = {k: site["value"] for k, site in sites(trace).items() if is_deterministic(site)}
        free = poutine.condition(poutine.uncondition(program), data=values | fixed)
        new = sites(poutine.trace(free).get_trace(*args, **kwargs))
        likelihood, predictive, derived = {}, {}, {}
        for name, site in sites(trace).items():
            value = _value(single[name])
            if is_deterministic(site):
                derived[name] = unbatch(site["value"], value, n, name=name)
            elif _is_data(single[name]):
                _refuse_weights(name, site)
                batch = value.new_empty(single[name]["fn"].batch_shape)
                likelihood[name] = unbatch(site["log_prob"], batch, n, name=name)
                predictive[name] = unbatch(new[name]["value"], value, n, name=name)
        for part, found in zip(parts, (likelihood, predictive, derived), strict=True):
            part.append(found)
    whole = [{name: torch.cat([d[name] for d in part]) for name in part[0]} for part in parts]
    return whole[0], whole[1], whole[2]


def _refuse_weights(name: str, site: Mapping[str, Any]) -> None:
    """Leave-one-out counts each datum once, so a masked or scaled one would count wrongly."""
    mask = site["mask"]
    if site["scale"] != 1 or (mask is not None and not torch.as_tensor(mask).all()):
        raise ValueError(
            f"to_arviz expected data that count once each, and site {name!r} is masked or scaled. "
            "Export the posterior without the model, or the model without mask and scale."
        )


def _is_data(site: Mapping[str, Any]) -> bool:
    """Whether a site is observed data; factors and deterministic values are not."""
    return site["is_observed"] and not is_deterministic(site) and not isinstance(site["fn"], Unit)


def _dims(site: Mapping[str, Any]) -> list[str | None]:
    """Plate names over the dimensions of one draw of a site."""
    value = _value(site)
    frames = {frame.dim: frame for frame in site["cond_indep_stack"] if frame.vectorized}
    batch = value.ndim - site["fn"].event_dim
    if is_deterministic(site) and not batch:  # pyro.deterministic calls every dimension event
        fits = all(
            -dim <= value.ndim and value.shape[dim] == frame.size for dim, frame in frames.items()
        )
        batch = value.ndim if fits else 0
    names = [frames[dim].name if dim in frames else None for dim in range(-batch, 0)]
    names = [f"{name}_plate" if name in ("chain", "draw") else name for name in names]
    return [*names, *(None,) * (value.ndim - batch)]


def _value(site: Mapping[str, Any]) -> Tensor:
    """Value of a site; data that a plate repeats, repeated."""
    value: Tensor = site["value"]
    return value.broadcast_to(site["fn"].shape()) if _is_data(site) else value


def _diverging(mcmc: MCMC, draws: int) -> dict[str, NDArray]:
    divergences = mcmc.diagnostics().get("divergences", {})
    diverging = np.zeros((mcmc.num_chains, draws), dtype=bool)
    for row, indices in zip(diverging, divergences.values(), strict=False):
        row[indices] = True
    return {"diverging": diverging} if divergences else {}


def _present(**data: dict[str, NDArray]) -> dict[str, dict[str, NDArray]]:
    return {group: variables for group, variables in data.items() if variables}
