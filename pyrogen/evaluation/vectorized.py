"""Running a Pyro model and guide over many draws at once, by one outermost plate."""

__all__ = [
    "Program",
    "is_deterministic",
    "latent_sites",
    "log_prob_over",
    "nesting",
    "over_draws",
    "refuse_subsampling",
    "refuse_unmatched_sites",
    "run_pair",
    "sites",
    "unbatch",
]

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, MaskedDistribution
from pyro.poutine import Trace
from pyro.poutine.guide import GuideMessenger
from torch import Size, Tensor

Program = Callable[..., Any]

PLATE = "_pyrogen_draws"


def run_pair(
    model: Program, guide: Program, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Trace, Trace]:
    """Run the guide, replay the model on its draws, and return both traces, unscored."""
    messenger = poutine.unwrap(guide)
    if isinstance(messenger, GuideMessenger):  # runs its own model
        guide(*args, **kwargs)
        return messenger.get_traces()
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    replayed = poutine.replay(model, trace=guide_trace)
    return poutine.trace(replayed).get_trace(*args, **kwargs), guide_trace


def nesting(*traces: Trace) -> int:
    """Number of batch dimensions in use, by plates or by distributions outside any plate."""
    depth = 0
    for site in (s for trace in traces for s in sites(trace).values()):
        frames = [-frame.dim for frame in site["cond_indep_stack"] if frame.vectorized]
        depth = max(depth, len(site["fn"].batch_shape), *frames)
    return depth


def over_draws(program: Program, draws: int, *, nesting: int) -> Program:
    """Wrap a program in a plate of ``draws``, left of all its batch dimensions."""
    return pyro.plate(PLATE, draws, dim=-1 - nesting)(program)


def sites(trace: Trace) -> dict[str, Any]:
    """Sample sites, plates' index sites excluded."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not _is_index(site)
    }


def latent_sites(trace: Trace) -> dict[str, Any]:
    """Sites that are neither observed nor functions of others."""
    return {name: site for name, site in sites(trace).items() if not site["is_observed"]}


def is_deterministic(site: Mapping[str, Any]) -> bool:
    """Whether a site records a value computed from others, as ``pyro.deterministic`` does."""
    fn = site["fn"]
    return (
        site["is_observed"]
        and isinstance(fn, MaskedDistribution)
        and fn._mask is False
        and isinstance(fn.base_dist, Delta)
    )


def refuse_subsampling(*traces: Trace, owner: str) -> None:
    """Refuse plates that show a part of their data: the weights would not be the posterior's.

    Raises:
        ValueError: If a plate is subsampled.
    """
    for trace in traces:
        nodes: dict[str, Any] = dict(trace.nodes)
        for name, site in nodes.items():
            if site["type"] == "sample" and _is_index(site):
                full, part = site["fn"].size, len(site["value"])
                if part != full:
                    raise ValueError(
                        f"{owner} needs all data at once, but plate '{name}' shows {part} of "
                        f"{full}. Remove subsample_size."
                    )


def refuse_unmatched_sites(model_trace: Trace, guide_trace: Trace, *, owner: str) -> None:
    """Refuse a guide whose latent sites are not those of the model, or that is one point.

    Raises:
        ValueError: If a site lacks its counterpart, or nothing in the guide is random.
    """
    model, guide = latent_sites(model_trace), latent_sites(guide_trace)
    missing = [name for name in model if name not in guide]
    if missing:
        raise ValueError(
            f"{owner} found model site '{missing[0]}' without a guide site. Draw it in the "
            "guide, or sum it out of the model."
        )
    extra = [n for n, s in guide.items() if n not in model and not s["infer"].get("is_auxiliary")]
    if extra:
        raise ValueError(
            f"{owner} found guide site '{extra[0]}' without a model site. Remove it, or mark it "
            "by infer={'is_auxiliary': True} if the model's sites are functions of it."
        )
    if guide and all(isinstance(site["fn"], Delta) for site in guide.values()):
        raise ValueError(
            f"{owner} expected a guide that spreads, got one that is a point (Delta). Use "
            "AutoNormal, or another guide with a density."
        )


def log_prob_over(trace: Trace, dims: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Sum the log-probabilities of a scored trace over all batch dimensions but ``dims``.

    Args:
        trace: Trace on which ``compute_log_prob`` was called.
        dims: Negative dimensions to keep, from left to right.
        shape: Their sizes.
    """
    total: Tensor | float = 0.0
    depth = max((-dim for dim in dims), default=0)
    for site in sites(trace).values():
        log_prob = torch.as_tensor(site["log_prob"])
        log_prob = log_prob[(None,) * (depth - log_prob.ndim)]
        rest = [dim for dim in range(-log_prob.ndim, 0) if dim not in dims]
        total = total + (log_prob.sum(rest) if rest else log_prob)
    return torch.as_tensor(total).expand(Size(shape))


def unbatch(value: Tensor, plain: Tensor, size: int, *, name: str) -> Tensor:
    """Reshape a value over draws to ``(draws, *shape)`` with the shape of a single run."""
    if value.numel() == size * plain.numel():
        return value.reshape(size, *plain.shape)
    if value.numel() == plain.numel():  # a constant
        return value.reshape(plain.shape).expand(size, *plain.shape)
    raise ValueError(
        f"Site '{name}' has shape {tuple(value.shape)} over {size} draws, and "
        f"{tuple(plain.shape)} for one. Index from the right, or pass chunk=1."
    )


def _is_index(site: Mapping[str, Any]) -> bool:
    return type(site["fn"]).__name__ == "_Subsample"
