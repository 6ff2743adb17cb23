"""Checkpoints: tensors and plain values in one file, replaced whole or not at all."""

__all__ = ["load", "restore_rng", "rng_state", "save"]

import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = 1
PLAIN = {str, int, float, bool, bytes, type(None)}


def save(state: dict[str, Any], path: str | os.PathLike) -> None:
    """Write ``state`` to ``path`` so that a crash leaves the old file or the new one.

    The state goes to a temporary file in the same folder, reaches the disk, and then takes the
    place of the old file in one step. Cost: one pass over the tensors and two ``fsync``.

    Args:
        state: Nested dicts and lists of tensors, numbers and strings.
        path: File to write; its folder must exist.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save({"x": torch.ones(2)}, f"{folder}/run.pt")
        ...     load(f"{folder}/run.pt")
        {'x': tensor([1., 1.])}
    """
    _refuse_what_load_refuses(state)
    target = Path(path)
    # One fixed name: what a killed process leaves behind is overwritten by the next.
    partial = target.with_name(f".{target.name}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save({"format": FORMAT, "state": state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    if os.name == "posix":  # the new name itself must survive a power cut
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(path: str | os.PathLike) -> dict[str, Any]:
    """Read a state written by :func:`save`, on the CPU; no code in the file is run.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, not a checkpoint, or of another format.
    """
    target = Path(path)
    if not target.is_file():
        raise FileNotFoundError(f"There is no checkpoint {str(target)!r}. Check the path.")
    try:
        whole = torch.load(target, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(target)!r} is not a readable checkpoint: it holds something other than tensors "
            "and plain values, or was not written by pyrogen.training. Choose another path."
        ) from error
    except PermissionError:
        raise
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{str(target)!r} is not a readable checkpoint: it is truncated, or not written by "
            "pyrogen.training. Delete it to start afresh."
        ) from error
    if not isinstance(whole, dict) or whole.keys() != {"format", "state"}:
        raise ValueError(
            f"{str(target)!r} holds something else than a checkpoint of pyrogen.training. "
            "Choose another path."
        )
    if whole["format"] != FORMAT:
        raise ValueError(
            f"{str(target)!r} has checkpoint format {whole['format']}, this version reads "
            f"{FORMAT}. Load it with the version that wrote it."
        )
    return whole["state"]


def _refuse_what_load_refuses(state: Any, place: str = "state") -> None:
    if isinstance(state, dict):
        for key, value in state.items():
            _refuse_what_load_refuses(value, f"{place}[{key!r}]")
    elif isinstance(state, list | tuple):
        for i, value in enumerate(state):
            _refuse_what_load_refuses(value, f"{place}[{i}]")
    elif not isinstance(state, Tensor) and type(state) not in PLAIN:
        kind = f"{type(state).__module__}.{type(state).__name__}"
        raise TypeError(
            f"A checkpoint holds tensors and plain values, and {place} is a {kind}. Convert it: "
            "float(lr), for instance, where the optimizer was given a NumPy number."
        )


def rng_state() -> dict[str, Any]:
    """Return the state of torch's global generators, CPU and CUDA."""
    # Asking wakes every device, so ask only where CUDA is in use.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_rng(state: dict[str, Any]) -> None:
    """Put back what :func:`rng_state` returned, as far as the devices are still there."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
