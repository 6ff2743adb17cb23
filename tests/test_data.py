"""The models' loader: formats, split, grey levels."""

import gzip
import struct

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from models.data import Data, digits, load


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def test_digits_are_split_once_and_for_all():
    a, b = digits(), digits()
    assert torch.equal(a.test, b.test)
    assert (len(a.train), len(a.validation), len(a.test)) == (1300, 138, 359)
    rows = torch.cat([a.train, a.validation, a.test])
    assert rows.sum() == load_digits().data.sum()
    assert [len(y) for y in a.labels] == [1300, 138, 359]


def test_rounding_undoes_dequantisation():
    data = digits()
    x = data.dequantize(data.test)
    assert ((x >= 0) & (x < 1)).all()
    assert torch.equal(data.quantize(x), data.test)


def test_a_uniform_density_costs_log2_of_the_levels():
    data = digits()
    assert torch.allclose(data.score(torch.zeros(3)), torch.full((3,), np.log2(17.0)).float())


def test_levels_are_shown_as_they_are_and_cost_their_probability():
    data = digits().as_levels()
    assert torch.equal(data.dequantize(data.test), data.test)
    assert torch.equal(data.quantize(data.test), data.test)
    assert data.support.check(data.test).all()
    uniform = torch.full((3,), -64 * np.log(17.0)).float()
    assert torch.allclose(data.score(uniform), digits().score(torch.zeros(3)))
    real = Data("real", data.test, data.test, data.test, shape=(64,))
    with pytest.raises(ValueError, match=r"real holds real numbers.*choose a Gaussian decoder"):
        real.as_levels()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".csv", ".idx", "-ubyte.gz"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    pictures = np.random.default_rng(0).integers(0, 5, (50, 4, 3)).astype(np.uint8)
    file = tmp_path / f"pictures{suffix}"
    match suffix:
        case ".npy":
            np.save(file, pictures)
        case ".npz":
            np.savez(file, pictures)
        case ".csv":
            np.savetxt(file, pictures.reshape(50, 12), delimiter=",", header="a,b,c", comments="")
        case ".idx":
            file.write_bytes(idx(pictures))
        case _:
            file.write_bytes(gzip.compress(idx(pictures)))
    data = load(str(file))
    assert data.features == 12
    rows = torch.cat([data.train, data.validation, data.test]).sort(0).values
    assert torch.equal(rows, torch.from_numpy(pictures.reshape(50, 12)).float().sort(0).values)
    assert data.levels == (0 if suffix == ".csv" else 5)
    assert data.shape == ((12,) if suffix == ".csv" else (4, 3))


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"does not exist. Pass 'digits' or a file"):
        load(str(tmp_path / "none.npy"))
    np.save(tmp_path / "flat.npy", np.zeros(20))
    with pytest.raises(ValueError, match=r"shape \(20,\). Expected at least 25 rows"):
        load(str(tmp_path / "flat.npy"))
    nan = np.zeros((30, 2))
    nan[3] = np.nan
    np.save(tmp_path / "nan.npy", nan)
    with pytest.raises(ValueError, match=r"holds NaN or infinite values"):
        load(str(tmp_path / "nan.npy"))
    (tmp_path / "words").write_bytes(b"not an array at all")
    with pytest.raises(ValueError, match=r"is not an IDX file"):
        load(str(tmp_path / "words"))


def test_dequantised_values_stay_off_the_border():
    white = torch.full((2000, 1000), 255.0)  # where rounding would reach 1 some 16 times
    data = Data("white", white, white, white, shape=(1000,), levels=256)
    assert data.dequantize(white).max() < 1
    assert data.dequantize(torch.zeros_like(white)).min() > 0


def test_bits_are_the_upper_half_of_the_levels():
    data = digits().as_bits()
    assert data.levels == 2
    assert torch.equal(data.train, (digits().train > 8).float())  # levels 0 to 16
    assert torch.equal(data.dequantize(data.test), data.test)


def test_truth_values_are_bits(tmp_path):
    np.save(tmp_path / "bits.npy", np.random.default_rng(0).random((40, 6)) > 0.5)
    assert load(str(tmp_path / "bits.npy")).levels == 2


def test_a_file_cut_short_is_refused(tmp_path):
    (tmp_path / "cut").write_bytes(struct.pack(">HBB", 0, 8, 3))
    with pytest.raises(ValueError, match="ends within its header"):
        load(str(tmp_path / "cut"))
