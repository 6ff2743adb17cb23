"""Posterior draws for data that come in batches."""

__all__ = ["posterior_draws"]

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from ..evaluation.vectorized import PLATE, Program, latent_sites, nesting, over_draws
from ..training import Batches
from ..training.batches import Feed


@torch.no_grad()
def posterior_draws(
    guide: Program,
    loader: Iterable,
    *,
    draws: int = 1000,
    chunk: int = 100,
    plate: str | None = None,
) -> dict[str, Tensor]:
    """Draw from a guide for data that come in batches, as if they had come at once.

    Sites in the data's plate are drawn batch by batch and joined along it, in the order of the
    loader. Sites outside are drawn once, with the first batch, and every batch sees the same
    draws of them, so that row ``i`` of all sites is one draw of the joint posterior.

    Cost: one run of the guide per batch and draw, ``chunk`` draws at once. The result is held in
    memory.

    Args:
        guide: Guide that was fitted, called with each batch.
        loader: Batches of data, each a tensor or a tuple of the guide's arguments, in an order
            that is known: ``x.split(500)``, or a ``DataLoader`` that does not shuffle.
        draws: Number of draws.
        chunk: Number of draws in memory at once for a batch; 1 runs the guide as written, in a
            loop.
        plate: Name of the data's plate. If None it is the plate that has as many cells as the
            first batch's first tensor has rows.

    Returns:
        Draws by site, each of shape ``(draws, *shape)``, with the shape that the site would have
        if all data were one batch. They fit :func:`~pyrogen.export.to_arviz`.

    Raises:
        TypeError: If a batch is neither a tensor nor a tuple.
        ValueError: If the loader shuffles or is empty, or the data's plate cannot be told or
            does not hold just the batch.

    Example:
        >>> def guide(x):
        ...     m = pyro.sample("m", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(m + x, 1.0))
        >>> draws = posterior_draws(guide, torch.zeros(10).split(4), draws=7)
        >>> {name: value.shape for name, value in draws.items()}
        {'m': torch.Size([7]), 'z': torch.Size([7, 10])}
    """
    if draws < 1 or chunk < 1:
        raise ValueError(
            f"posterior_draws expected draws >= 1 and chunk >= 1, got {draws} and {chunk}. Pass "
            "positive numbers."
        )
    _refuse_shuffling(loader)
    sizes = [min(chunk, draws - start) for start in range(0, draws, chunk)]
    shared = [Trace() for _ in sizes]  # of each chunk, what all batches see
    plain: Trace | None = None
    found: dict[str, list[Tensor]] = {}
    feed = Feed(loader, again=False)
    while (batch := feed.next()) is not None:
        if plain is None:
            plain = poutine.trace(guide).get_trace(*batch)
            name = _data_plate(plain, batch) if plate is None else plate
        parts = []
        for size, outside in zip(sizes, shared, strict=True):
            run = _run(poutine.replay(guide, trace=outside), batch, size, nesting(plain))
            for site in latent_sites(run).values():
                if not _holding(name, site) and site["name"] not in outside:
                    outside.add_node(site["name"], **site)
            _refuse_other_sites(run, plain)
            parts.append(_values(run, plain, size))
        for site_name in parts[0]:
            found.setdefault(site_name, []).append(torch.cat([p[site_name] for p in parts]))
        _refuse_misfit(run, name, batch, found=plate is None)
    assert plain is not None  # a feed without batches is refused
    return {site: _joined(found[site], latent_sites(plain)[site], name) for site in found}


def _run(guide: Program, batch: tuple, size: int, depth: int) -> Trace:
    """Run the guide for many draws at once; one draw runs it as it is written."""
    program = over_draws(guide, size, nesting=depth) if size > 1 else guide
    try:
        return poutine.trace(program).get_trace(*batch)
    except (RuntimeError, ValueError, IndexError) as error:
        error.add_note("If the guide cannot run many draws at once, pass chunk=1.")
        raise


def _refuse_other_sites(run: Trace, plain: Trace) -> None:
    here, first = set(latent_sites(run)), set(latent_sites(plain))
    if here != first:
        raise ValueError(
            f"posterior_draws expected the same sites in every batch, got {sorted(here)} after "
            f"{sorted(first)}. Draw batches of one kind at a time."
        )


def _values(run: Trace, plain: Trace, size: int) -> dict[str, Tensor]:
    """Draws of every site, shape ``(size, *shape)``; a guide's auxiliary sites are left out."""
    values, depth = {}, nesting(plain)
    for name, site in latent_sites(plain).items():
        if site["infer"].get("is_auxiliary"):
            continue
        value = latent_sites(run)[name]["value"]
        if size == 1:
            values[name] = value.unsqueeze(0)
            continue
        event = site["fn"].event_dim
        value = value[(None,) * (depth + 1 + event - value.ndim)]
        kept = value.shape[value.ndim - site["value"].ndim :]  # drops ones between
        values[name] = value.expand(size, *value.shape[1:]).reshape(size, *kept)
    return values


def _joined(parts: list[Tensor], site: Mapping[str, Any], plate: str) -> Tensor:
    frame = _holding(plate, site)
    if frame is None:
        return parts[0]
    event = site["fn"].event_dim
    return torch.cat(parts, dim=parts[0].ndim - event + frame.dim)


def _holding(plate: str, site: Mapping[str, Any]) -> Any:
    """The site's frame of the data's plate, None if it lies outside."""
    return next((frame for frame in site["cond_indep_stack"] if frame.name == plate), None)


def _plates(trace: Trace) -> dict[str, int]:
    """Number of cells of the plates of a guide's sites."""
    frames = [frame for site in latent_sites(trace).values() for frame in site["cond_indep_stack"]]
    return {frame.name: frame.size for frame in frames if frame.name != PLATE}


def _data_plate(plain: Trace, batch: tuple) -> str:
    plates = _plates(plain)
    fitting = [name for name, size in plates.items() if size == len(batch[0])]
    if len(fitting) != 1:
        raise ValueError(
            f"posterior_draws expected one plate with the {len(batch[0])} cells of the first "
            f"batch, got {plates or 'no plate'}. Pass the name of the data's plate as plate=, and "
            "data of which the guide takes all."
        )
    return fitting[0]


def _refuse_misfit(run: Trace, plate: str, batch: tuple, *, found: bool) -> None:
    plates = _plates(run)
    if plate not in plates:
        raise ValueError(
            f"posterior_draws expected a plate {plate!r}, got {plates or 'no plate'}. Pass the "
            "name of the plate whose cells are data."
        )
    if found and plates[plate] != len(batch[0]):
        raise ValueError(
            f"posterior_draws expected plate {plate!r} to hold the batch of {len(batch[0])}, got "
            f"{plates[plate]} cells. Pass data of which the guide takes all."
        )


def _refuse_shuffling(loader: Iterable) -> None:
    random = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
    shuffled = isinstance(loader, DataLoader) and isinstance(loader.sampler, random)
    if shuffled or isinstance(loader, Batches):
        raise ValueError(
            f"posterior_draws expected batches in a known order, got a {type(loader).__name__} "
            "that shuffles. Pass x.split(batch_size), or a DataLoader with shuffle=False."
        )
