"""The one loop around all optimisation: ``fit``."""

__all__ = ["Fitting"]

import copy
import math
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint as files
from .batches import Feed
from .history import History, Record

CHECK = 100  # steps between looks at the losses; each look waits for the device


class Fitting(ABC):
    """Something that takes steps, and can therefore be fitted.

    Subclasses say what a step is, which modules and weights it changes and which of them to use
    afterwards, and give their state; ``fit`` does the rest.

    While ``fit`` runs, the modules hold the weights that the steps change. When it returns they
    hold the weights to use: the best validated, else the averaged, else the last. The others
    are kept, and put back when training continues; changes made to the modules' weights in
    between are lost.
    """

    _kept: dict[str, Tensor] | None = None  # weights of training while the modules hold others

    @abstractmethod
    def step(self, *batch: Tensor) -> Tensor:
        """Take one step and return the losses before it, detached and still on their device."""

    @property
    @abstractmethod
    def objectives(self) -> tuple[nn.Module, ...]:
        """What is minimised, in the order of the losses."""

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """Tensors that steps change, as they are in the modules."""

    @abstractmethod
    def average_weights(self) -> dict[str, Tensor]:
        """Values to use in place of :meth:`weights`, for those that are averaged."""

    @abstractmethod
    def moments(self) -> Iterator[Tensor]:
        """Tensors that the optimizers keep."""

    @abstractmethod
    def _state(self) -> dict[str, Any]:
        """State, with the weights of training in the modules."""

    @abstractmethod
    def _load_state(self, state: Mapping[str, Any]) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, except the batch and the random numbers."""
        if self._kept is None:
            return self._state()
        used = _clone(self.weights())
        _copy(self._kept, self.weights())
        state = copy.deepcopy(self._state())
        _copy(used, self.weights())
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of another trainer of the same make.

        Raises:
            ValueError: If the state is of a trainer with other parts.
        """
        self._kept = None
        self._load_state(state)

    def continue_training(self) -> None:
        """Put the weights of training back into the modules; ``step`` and ``fit`` do it."""
        if self._kept is not None:
            _copy(self._kept, self.weights())
            self._kept = None

    def fit(
        self,
        batches: Iterable,
        *,
        steps: int | None = None,
        validation: Callable[[], float] | None = None,
        every: int = 100,
        patience: int | None = None,
        checkpoint: str | os.PathLike | None = None,
        progress: bool = True,
    ) -> History:
        """Take steps over ``batches`` and leave the weights to use in the modules.

        With ``checkpoint``, a call that finds the file goes on where the file ends, exactly: it
        holds weights, optimizers, schedules, averages, torch's random state, the place in the
        batches and the history. A finished fit returns at once; with more ``steps`` it goes on.
        To start afresh, delete the file. Random numbers of NumPy or Python, and what a
        generator of batches remembers of earlier draws, are not recorded.

        Ctrl-C waits for the end of the step, writes the checkpoint, leaves the weights to use in
        the modules, and raises ``KeyboardInterrupt``; a second one stops at once, and then the
        checkpoint on disk is the last of the regular ones. Any other exception leaves the
        last regular checkpoint too.

        The modules train in the mode they are in.

        Args:
            batches: Iterable of tensors or tuples of tensors, what the objective takes. It is
                read again from its start until ``steps`` are taken. An iterator cannot be: it
                must last.
            steps: Steps in all; None for one pass over the batches.
            validation: Returns a number, the lower the better. It sees the averaged weights, in
                evaluation mode and without gradients, and its random numbers do not change
                those of training.
            every: Steps between validations, and between checkpoints; both also at the end.
            patience: Validations without improvement after which to stop; None to go on.
            checkpoint: File to write and to resume from.
            progress: Show a bar with the loss.

        Raises:
            FloatingPointError: If a loss or a weight is not finite. Losses are looked at every
                100 steps, or ``every`` if fewer, and before anything is written, so a
                checkpoint never holds NaN.
            ValueError: If the arguments, the batches or the checkpoint do not fit together.
            FileNotFoundError: If the folder of ``checkpoint`` does not exist.
        """
        _check_arguments(steps, every, patience, validation)
        path = None if checkpoint is None else Path(checkpoint)
        if path is not None and not path.parent.is_dir():
            raise FileNotFoundError(f"There is no folder {str(path.parent)!r}. Create it first.")
        feed = Feed(batches, again=steps is not None)
        record = Record()
        self.continue_training()
        if path is not None and path.exists():
            self._resume(path, feed, record)
            record.stopped = _still_stopped(record, steps, patience)

        total = steps or len(feed) or None
        bar = tqdm(total=total, initial=record.step, disable=not progress, unit="step")
        clock, before = time.perf_counter(), record.seconds
        with bar, _interrupt_later() as interrupted:
            stop = False
            while record.stopped is None and not stop:
                batch = feed.next()
                if batch is None:
                    record.stopped = "end"
                else:
                    record.add(self.step(*batch))
                    bar.update()
                    if record.step == steps:
                        record.stopped = "steps"
                stop = bool(interrupted)  # read once: what comes later waits for the next step
                due = batch is not None and record.step % every == 0
                last = record.stopped is not None
                if due or last or stop or len(record.fresh) >= CHECK:
                    self._check_losses(record, path, bar)
                if due or last or stop:
                    self._check_weights(record, path)
                    if validation is not None and (due or last):
                        self._validate(validation, record, patience)
                    record.seconds = before + time.perf_counter() - clock
                    if path is not None:
                        files.save(self._snapshot(feed, record), path)
        self._use(record.best or self.average_weights())
        if interrupted:
            raise KeyboardInterrupt
        return record.history()

    def _snapshot(self, feed: Feed, record: Record) -> dict[str, Any]:
        return {
            "trainer": type(self).__name__,
            "state": self.state_dict(),
            "record": record.state_dict(),
            "feed": feed.state_dict(),
            "rng": files.rng_state(),
        }

    def _resume(self, path: Path, feed: Feed, record: Record) -> None:
        snapshot = files.load(path)
        if snapshot.get("trainer") != type(self).__name__:
            raise ValueError(
                f"{str(path)!r} was written by {snapshot.get('trainer')}, not by "
                f"{type(self).__name__}. Choose another path."
            )
        try:
            self.load_state_dict(snapshot["state"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise ValueError(
                f"{str(path)!r} does not fit this trainer: {error}. Build the trainer as it was, "
                "delete the file, or choose another path."
            ) from error
        record.load_state_dict(snapshot["record"], self.weights())
        feed.load_state_dict(snapshot["feed"])
        files.restore_rng(snapshot["rng"])  # last: finding the place in the batches draws

    def _check_losses(self, record: Record, path: Path | None, bar: tqdm) -> None:
        first = record.step - len(record.fresh)
        losses = record.gather()
        if not len(losses):
            return
        bad = ~losses.isfinite().reshape(len(losses), -1)
        if bad.any():
            row = int(bad.any(1).nonzero()[0])
            column = int(bad[row].nonzero()[0])
            value = losses[row].reshape(-1)[column].item()
            self._diverged(f"{self._name(column)} is {value} at step {first + row + 1}", path)
        last = losses[-1].reshape(-1).tolist()
        bar.set_postfix_str(" ".join(f"{value:.4g}" for value in last), refresh=False)

    def _check_weights(self, record: Record, path: Path | None) -> None:
        named = {"weight " + repr(name): w for name, w in self.weights().items()}
        named |= {"average of " + repr(name): w for name, w in self.average_weights().items()}
        named |= {f"moment {i} of the optimizers": m for i, m in enumerate(self.moments())}
        with torch.no_grad():
            finite = [w.isfinite().all().cpu() for w in named.values()]
        if not all(finite):
            first = next(name for name, fine in zip(named, finite, strict=True) if not fine)
            what = "/".join(type(objective).__name__ for objective in self.objectives)
            self._diverged(f"{what} gave a {first} that is not finite by step {record.step}", path)

    def _name(self, i: int) -> str:
        return type(self.objectives[i]).__name__

    def _diverged(self, what: str, path: Path | None) -> None:
        kept = ""
        if path is not None and path.exists():
            kept = f" The last good checkpoint is kept in {str(path)!r}."
        raise FloatingPointError(
            f"{what}. Lower the learning rate, set clip, or look for NaN in the batch.{kept}"
        )

    def _validate(
        self, validation: Callable[[], float], record: Record, patience: int | None
    ) -> None:
        if record.validation_steps and record.validation_steps[-1] == record.step:
            return  # at the end, when it was just done
        training = {m: m.training for objective in self.objectives for m in objective.modules()}
        rng = files.rng_state()
        self._use(self.average_weights())
        try:
            for objective in self.objectives:
                objective.eval()
            with torch.no_grad(), pyro.get_param_store().scope():
                value = float(validation())
            if math.isnan(value):
                raise FloatingPointError(
                    f"The validation is nan after step {record.step}. Look for NaN in its data."
                )
            record.validated(value, self.weights())
        finally:
            self.continue_training()
            files.restore_rng(rng)
            for module, mode in training.items():
                module.training = mode
        if patience is not None and record.waited >= patience and record.stopped is None:
            record.stopped = "patience"

    def _use(self, weights: dict[str, Tensor]) -> None:
        """Put other weights into the modules and keep those of training."""
        if weights:
            present = self.weights()
            self._kept = _clone(present)
            _copy(weights, present)


def _clone(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: w.detach().clone() for name, w in weights.items()}


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, w in source.items():
        target[name].copy_(w)


def _check_arguments(
    steps: int | None, every: int, patience: int | None, validation: Callable | None
) -> None:
    for name, value in {"steps": steps, "every": every, "patience": patience}.items():
        if value is not None and value < 1:
            raise ValueError(f"fit expected {name} >= 1, got {value}.")
    if patience is not None and validation is None:
        raise ValueError(
            "fit got patience but no validation. Pass a function that returns a loss."
        )


def _still_stopped(record: Record, steps: int | None, patience: int | None) -> Any:
    """The reason why a loaded record is at its end, or None if there is more to do."""
    if record.stopped == "patience" and patience is not None and record.waited >= patience:
        return "patience"
    if steps is None:
        return record.stopped if record.stopped == "end" else None
    return "steps" if record.step >= steps else None


@contextmanager
def _interrupt_later() -> Iterator[list[int]]:
    """Collect the first Ctrl-C in the list it yields; a second one acts as before.

    Only where Ctrl-C has its ordinary meaning: in the main thread, under Python's own handler.
    """
    caught: list[int] = []
    usual = signal.default_int_handler
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not usual:
        yield caught
        return

    def wait(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, wait)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, usual)
