"""Minibatches, and the place in a stream of them."""

__all__ = ["Batches", "Feed", "Resumable"]

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from .checkpoint import restore_rng, rng_state


@runtime_checkable
class Resumable(Protocol):
    """Batches that know their own position."""

    def __iter__(self) -> Iterator: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


class Batches:
    """Shuffled minibatches of tensors in memory, in a fresh order at every pass.

    The order comes from torch's global generator. One pass runs at a time: starting another
    ends the first.

    Args:
        *tensors: Data, each of shape ``(n, ...)`` with the same ``n``; a batch is a tuple with
            one part of each.
        batch_size: Number of data in a batch.
        transform: Applied to the parts of each batch, for instance to add fresh uniform noise
            to pixels; returns a tensor or a tuple.
        drop_last: Leave out the smaller batch at the end of a pass. Kept by default, so that
            every datum is seen once per pass.

    Raises:
        TypeError: If something is not a tensor.
        ValueError: If lengths differ, or no batch would come.

    Example:
        >>> batches = Batches(torch.arange(5.0), torch.arange(5), batch_size=2)
        >>> len(batches), [len(x) for x, index in batches]
        (3, [2, 2, 1])
    """

    def __init__(
        self,
        *tensors: Tensor,
        batch_size: int,
        transform: Callable[..., Any] | None = None,
        drop_last: bool = False,
    ) -> None:
        if not tensors:
            raise ValueError("Batches expected at least one tensor, got none. Pass the data.")
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"Batches expected tensors, got {type(tensor).__name__}. Convert the data by "
                    "torch.as_tensor, or use a torch DataLoader."
                )
            if tensor.ndim == 0:
                raise ValueError("Batches expected shape (n, ...), got a scalar. Add a dimension.")
        lengths = [len(tensor) for tensor in tensors]
        if len(set(lengths)) > 1:
            raise ValueError(
                f"Batches expected tensors of equal length, got {lengths}. Row i of each is one "
                "datum."
            )
        if batch_size < 1:
            raise ValueError(f"Batches expected batch_size >= 1, got {batch_size}.")
        least = batch_size if drop_last else 1
        if lengths[0] < least:
            raise ValueError(
                f"Batches expected at least {least} data, got {lengths[0]}: a pass would have no "
                "batch. Lower batch_size, or keep the last batch."
            )
        self.tensors = tensors
        self.batch_size = batch_size
        self.transform = transform
        self.drop_last = drop_last
        self._order = torch.empty(0, dtype=torch.long)
        self._position = 0
        self._loaded = False

    def __len__(self) -> int:
        """Number of batches in a pass."""
        n = len(self.tensors[0])
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[tuple]:
        if self._loaded:
            self._loaded = False
        else:
            self._order = torch.randperm(len(self.tensors[0]))
            self._position = 0
        order = self._order
        while self._position < len(self) * self.batch_size:
            rows = order[self._position : self._position + self.batch_size]
            # Moved before the batch is handed out: a state taken now is about the next one.
            self._position += self.batch_size
            batch = tuple(tensor[rows.to(tensor.device)] for tensor in self.tensors)
            if self.transform is None:
                yield batch
            else:
                changed = self.transform(*batch)
                yield changed if isinstance(changed, tuple) else (changed,)
            if order is not self._order:
                return

    def state_dict(self) -> dict[str, Any]:
        """Order of the pass under way and the position in it."""
        return {"order": self._order, "position": self._position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the pass of ``state`` at the next iteration.

        Raises:
            ValueError: If the state is of data of another length.
        """
        n = len(self.tensors[0])
        if len(state["order"]) not in (0, n):
            raise ValueError(
                f"Batches holds {n} data, the state is of {len(state['order'])}. Pass the same "
                "data."
            )
        self._order = state["order"]
        self._position = state["position"]
        self._loaded = len(self._order) > 0


class Feed:
    """An iterable of batches, read on and on, with a position that can be saved.

    The position of what knows none itself is the state of torch's generators at the start of
    the pass and the number of batches taken; it is found again by taking as many.

    Args:
        batches: Iterable of tensors or tuples.
        again: Start over when a pass ends.
    """

    def __init__(self, batches: Iterable, *, again: bool) -> None:
        self.batches = batches
        self.again = again
        self.taken = 0
        self._start: dict[str, Any] = {}
        self._iterator: Iterator | None = None

    def __len__(self) -> int:
        """Batches in a pass, 0 if unknown."""
        return operator.length_hint(self.batches)

    def next(self) -> tuple | None:
        """Take a batch, or None at the end.

        Raises:
            TypeError: If a batch is neither a tensor nor a tuple.
            ValueError: If the batches run out though more are asked for.
        """
        if self._iterator is None:
            self._open()
        batch = next(self._iterator, None)  # type: ignore[arg-type]
        if batch is None and self.again:
            if isinstance(self.batches, Iterator):
                raise ValueError(
                    f"The batches ended after {self.taken} and are an iterator, which cannot "
                    "start over. Pass Batches, a DataLoader or a list, or ask for fewer steps."
                )
            if self.taken:
                self._open()
                batch = next(self._iterator, None)  # type: ignore[arg-type]
        if batch is None:
            if not self.taken:
                raise ValueError("The batches are empty. Pass at least one batch.")
            return None
        self.taken += 1
        if isinstance(batch, Tensor):
            return (batch,)
        if isinstance(batch, (tuple, list)):
            return tuple(batch)
        raise TypeError(
            f"A batch is a tensor or a tuple of tensors, got {type(batch).__name__}. Yield what "
            "the objective takes, in order."
        )

    def _open(self) -> None:
        self.taken = 0
        self._start = {
            "rng": rng_state(),
            "generators": [g.get_state() for g in _generators(self.batches)],
        }
        self._iterator = iter(self.batches)

    def state_dict(self) -> dict[str, Any]:
        own = self.batches.state_dict() if isinstance(self.batches, Resumable) else None
        return {"taken": self.taken, "start": self._start, "own": own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position of ``state``; leaves torch's generators anywhere.

        Raises:
            ValueError: If the batches are of another kind or fewer.
        """
        if isinstance(self.batches, Resumable) != (state["own"] is not None):
            raise ValueError(
                f"The checkpoint was written with another kind of batches than "
                f"{type(self.batches).__name__}. Pass the same, or choose another path."
            )
        if not state["start"]:
            return
        if isinstance(self.batches, Resumable):
            self.batches.load_state_dict(state["own"])
            self._iterator = iter(self.batches)
        else:
            restore_rng(state["start"]["rng"])
            for generator, s in zip(
                _generators(self.batches), state["start"]["generators"], strict=True
            ):
                generator.set_state(s)
            self._iterator = iter(self.batches)
            for i in range(state["taken"]):
                if next(self._iterator, None) is None:
                    raise ValueError(
                        f"The batches end after {i}, the checkpoint was written after "
                        f"{state['taken']}. Pass the same batches, or choose another path."
                    )
        self.taken = state["taken"]
        self._start = state["start"]


def _generators(batches: Iterable) -> list[torch.Generator]:
    """Generators of a DataLoader's own, which torch's global state does not cover."""
    if not isinstance(batches, DataLoader):
        return []
    samplers = [batches.sampler]
    if isinstance(batches.batch_sampler, BatchSampler):
        samplers.append(batches.batch_sampler.sampler)
    random = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)
    found = [batches.generator, *(s.generator for s in samplers if isinstance(s, random))]
    return list({id(g): g for g in found if g is not None}.values())
