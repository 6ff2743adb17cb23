"""Every model and tutorial runs; at full length each model reaches its TARGET."""

import dataclasses
import gzip
import importlib
import math
import runpy
from pathlib import Path

import numpy as np
import pytest

from benchmarks import mnist
from models import beta_vae, vae
from models.command_line import parse

ROOT = Path(__file__).parents[1]
SHARED = {"__init__", "__main__", "command_line", "data", "density"}  # what the models stand on
MODELS = sorted(p.stem for p in (ROOT / "models").glob("*.py") if p.stem not in SHARED)
TUTORIALS = sorted((ROOT / "tutorials").glob("*.py"))


@pytest.fixture(params=MODELS)
def model(request):
    return importlib.import_module(f"models.{request.param}")


def test_model_runs(model, capsys):
    assert math.isfinite(model.main(model.Config(steps=2)))
    assert capsys.readouterr().out


def test_every_setting_is_a_flag(model):
    assert parse(model.Config, model.__doc__, []) == model.Config()
    changed = parse(model.Config, model.__doc__, ["--steps", "7", "--seed", "3"])
    assert changed == dataclasses.replace(model.Config(), steps=7, seed=3)


@pytest.mark.parametrize("decoder", sorted(vae.DECODERS))
def test_every_decoder_runs(decoder, capsys):
    c = vae.Config(steps=2, decoder=decoder, particles=5)
    assert math.isfinite(vae.main(c))
    assert f"vae, {decoder}" in capsys.readouterr().out


def test_unknown_decoder_is_refused():
    with pytest.raises(ValueError, match=r"no decoder 'poisson'. Choose one of \['bernoulli'"):
        vae.main(vae.Config(decoder="poisson"))


def test_real_numbers_go_to_a_gaussian_decoder_only(tmp_path, capsys):
    file = tmp_path / "rows.npy"
    np.save(file, np.random.default_rng(0).normal(size=(200, 3)))
    c = vae.Config(steps=2, data=str(file), particles=5)
    assert math.isfinite(vae.main(c))
    assert "nats" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"rows holds real numbers"):
        vae.main(dataclasses.replace(c, decoder="logistic"))


def test_traversals_are_written(tmp_path):
    file = tmp_path / "traversals.png"
    beta_vae.main(beta_vae.Config(steps=2, particles=5, picture=str(file)))
    assert file.stat().st_size > 1000


@pytest.fixture
def random_digits(tmp_path, monkeypatch):
    """A folder like that of MNIST, of few digits of noise."""
    (tmp_path / "mnist").mkdir()
    for part, n in {"train": 120, "t10k": 4}.items():
        grey = np.random.default_rng(0).integers(0, 256, (n, 784), dtype=np.uint8)
        file = tmp_path / "mnist" / f"{part}-images-idx3-ubyte.gz"
        file.write_bytes(gzip.compress(bytes(16) + grey.tobytes()))
    monkeypatch.setenv("PYROGEN_DATA", str(tmp_path))
    return tmp_path


def benchmark(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["mnist", *words, "--batch", "40"])
    mnist.main()


def test_mnist_benchmark_goes_on_where_it_stopped(random_digits, monkeypatch, capsys):
    out = ("--out", str(random_digits / "run.pt"), "--images", "2", "--k", "2")
    benchmark(monkeypatch, "train", "--seconds", "0.2", *out)
    benchmark(monkeypatch, "train", "--seconds", "0.4", *out)
    first, second = capsys.readouterr().out.split("going on after 0 s, ")
    assert "-L_5000" in first
    assert "-L_5000" in second
    with pytest.raises(SystemExit, match=r"is of k=2, batch=40. Choose another --out"):
        benchmark(monkeypatch, "train", *out, "--k", "3")


def test_mnist_benchmark_compares_with_pyro(random_digits, monkeypatch, capsys):
    benchmark(monkeypatch, "compare", "--seconds", "0.1", "--images", "2", "--k", "2")
    table = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[1] for row in table] == ["time"] * 3 + ["steps"] * 3
    steps = [int(row.split(" | ")[2]) for row in table]
    assert steps[0] == steps[3] == steps[4] == steps[5]


def test_mnist_benchmark_asks_for_its_data(tmp_path, monkeypatch):
    monkeypatch.delenv("PYROGEN_DATA", raising=False)
    with pytest.raises(SystemExit, match="PYROGEN_DATA is not set"):
        mnist.mnist("train")
    monkeypatch.setenv("PYROGEN_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match=r"does not exist. PYROGEN_DATA names the folder"):
        mnist.mnist("train")


def test_few_rows_make_one_batch(tmp_path, capsys):
    np.save(tmp_path / "few.npy", np.random.default_rng(0).integers(0, 9, (40, 12)).astype("u1"))
    bbvi = importlib.import_module("models.bbvi")
    assert math.isfinite(bbvi.main(bbvi.Config(steps=2, data=str(tmp_path / "few.npy"))))
    beta_vae = importlib.import_module("models.beta_vae")
    c = beta_vae.Config(steps=2, data=str(tmp_path / "few.npy"), picture="none.png")
    with pytest.raises(ValueError, match="draws grey pictures"):
        beta_vae.main(c)


@pytest.mark.slow
def test_model_reaches_its_target(model):
    assert model.main(model.Config()) <= model.TARGET


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(path, monkeypatch):
    monkeypatch.setenv("PYROGEN_SMOKE", "1")
    runpy.run_path(str(path))


def test_demo_writes_its_report(tmp_path, capsys):
    demo = importlib.import_module("models.__main__")
    demo.main(demo.Config(out=str(tmp_path), scale=0.001))
    page = (tmp_path / "report.html").read_text()
    assert "Eight schools" in page
    assert 'src="http' not in page  # it needs nothing beside it
    assert "href=" not in page
    assert {p.stem for p in tmp_path.glob("*.png")} == {"completions", "draws", "losses", "table"}
    assert "log evidence" in capsys.readouterr().out


@pytest.mark.slow
def test_demo_finds_what_the_readme_says(tmp_path):
    demo = importlib.import_module("models.__main__")
    rows = {row.law: row for row in demo.main(demo.Config(out=str(tmp_path)))}
    assert rows["flow"].bits <= 2.17
    assert rows["diffusion"].bits < rows["Gaussian mixture"].bits
    for name in ("VAE", "flow", "GAN", "diffusion"):
        assert rows[name].classifier.accuracy < rows["Gaussian"].classifier.accuracy
