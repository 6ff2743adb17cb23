"""The data that the models learn: the digits that scikit-learn ships, or a file of yours."""

import gzip
import io
import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.distributions import constraints

from pyrogen.evaluation import bits_per_dim
from pyrogen.training import Batches

IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


@dataclass(frozen=True)
class Data:
    """Rows to learn from, to stop by and to judge on.

    Grey levels stay whole numbers 0, ..., levels - 1 here. A model sees them dequantised, as
    (x + u) / levels with u uniform on [0, 1), so that a density on the unit cube says how many
    bits a pixel costs; or, by ``as_levels``, as they are, if it gives every level a probability.
    """

    name: str
    train: Tensor  # (n, features)
    validation: Tensor
    test: Tensor
    shape: tuple[int, ...]  # of one datum, (8, 8) for the digits
    levels: int = 0  # 0: real numbers
    labels: tuple[Tensor, Tensor, Tensor] | None = None  # train, validation, test
    whole: bool = False  # models see the grey levels themselves

    @property
    def features(self) -> int:
        return self.train.shape[1]

    def as_levels(self) -> "Data":
        """The same rows for models with a probability for every grey level."""
        if not self.levels:
            raise ValueError(
                f"{self.name} holds real numbers, and this decoder gives probabilities to whole "
                "ones. Pass grey levels, or choose a Gaussian decoder."
            )
        return replace(self, whole=True)

    def as_bits(self) -> "Data":
        """Black and white rows: 1 where a grey level lies in the upper half."""
        data, half = self.as_levels(), (self.levels - 1) / 2
        parts = {n: (getattr(self, n) > half).float() for n in ("train", "validation", "test")}
        return replace(data, levels=2, **parts)

    @property
    def support(self) -> constraints.Constraint:
        if self.whole:
            return constraints.integer_interval(0, self.levels - 1)
        return constraints.unit_interval if self.levels else constraints.real

    @property
    def unit(self) -> str:
        return "bits/dim" if self.levels else "nats"

    def dequantize(self, x: Tensor) -> Tensor:
        """Show rows as a model sees them."""
        if self.whole or not self.levels:
            return x
        edge = torch.finfo(x.dtype).eps / 2  # rounding reaches the border, where logits end
        return ((x + torch.rand_like(x)) / self.levels).clamp(edge, 1 - edge)

    def quantize(self, x: Tensor) -> Tensor:
        """Round what a model draws to grey levels; what lies outside goes to the border."""
        if self.whole:
            return x
        return (x * self.levels).floor().clamp(0, self.levels - 1) if self.levels else x

    def batches(self, batch: int) -> Batches:
        return Batches(
            self.train,
            batch_size=batch,
            transform=self.dequantize,
            drop_last=len(self.train) > batch,
        )

    def score(self, log_prob: Tensor) -> Tensor:
        """Cost of each datum: bits per pixel for grey levels, nats for real numbers."""
        if not self.levels:
            return -log_prob
        return bits_per_dim(log_prob, self.features, cell=1.0 if self.whole else 1 / self.levels)


def digits() -> Data:
    """Load 1,797 handwritten digits of 8 x 8 pixels and 17 grey levels, split once and for all."""
    bunch = load_digits()
    return _split("digits", bunch.data, (8, 8), levels=17, labels=bunch.target)


def load(path: str) -> Data:
    """Load ``digits``, or a .npy, .npz, .csv or IDX file (gzip allowed) of rows or of pictures.

    Arrays of integers from 0 up are taken for grey levels, anything else, and every .csv, for
    real numbers.
    """
    if path == "digits":
        return digits()
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{path} does not exist. Pass 'digits' or a file.")
    array = _read(file)
    if array.ndim < 2 or len(array) < 25:
        raise ValueError(
            f"{path} holds an array of shape {array.shape}. Expected at least 25 rows: "
            "(n, features), or (n, height, width) for pictures."
        )
    if array.dtype == bool:
        array = array.astype(np.uint8)
    whole = np.issubdtype(array.dtype, np.integer) and array.min() >= 0
    return _split(
        file.stem,
        array.reshape(len(array), -1),
        array.shape[1:],
        levels=int(array.max()) + 1 if whole else 0,
    )


def _read(file: Path) -> np.ndarray:
    raw = file.read_bytes()
    if file.suffix == ".gz":
        raw = gzip.decompress(raw)
    suffix = "".join(s for s in file.suffixes if s != ".gz")
    if suffix.endswith(".npy"):
        return np.load(io.BytesIO(raw), allow_pickle=False)
    if suffix.endswith(".npz"):
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            return arrays[arrays.files[0]]
    if suffix.endswith(".csv"):
        text = raw.decode().splitlines()
        names = not _is_number(text[0].split(",")[0])
        return np.loadtxt(text, delimiter=",", skiprows=int(names), ndmin=2)
    zero, kind, ndim = struct.unpack_from(">HBB", raw.ljust(4))
    if zero != 0 or kind not in IDX_TYPES:
        raise ValueError(f"{file} is not an IDX file. Expected .npy, .npz, .csv or IDX.")
    if len(raw) < 4 + 4 * ndim:
        raise ValueError(f"{file} ends within its header. Copy it again.")
    shape = struct.unpack_from(f">{ndim}I", raw, 4)
    return np.frombuffer(raw, IDX_TYPES[kind], offset=4 + 4 * ndim).reshape(shape)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _split(
    name: str,
    rows: np.ndarray,
    shape: tuple[int, ...],
    *,
    levels: int,
    labels: np.ndarray | None = None,
) -> Data:
    x = torch.as_tensor(np.ascontiguousarray(rows, dtype=np.float32))
    if not x.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite values. Drop or impute those rows.")
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    test, validation = len(x) // 5, len(x) // 13
    parts = order.split([len(x) - test - validation, validation, test])
    y = None if labels is None else torch.as_tensor(labels)
    return Data(
        name,
        *(x[part] for part in parts),
        shape=shape,
        levels=levels,
        labels=None if y is None else tuple(y[part] for part in parts),
    )
