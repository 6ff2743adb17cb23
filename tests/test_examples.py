"""Every model and tutorial runs; at full length each model reaches its TARGET."""

import dataclasses
import importlib
import math
import runpy
from pathlib import Path

import pytest

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
