import subprocess
import sys

import pytest
import torch

from pyrogen import plots


def test_a_grid_has_a_panel_a_picture(tmp_path):
    figure = plots.image_grid({"a": torch.rand(3, 8, 8), "b": torch.rand(2, 8, 8)}, columns="xyz")
    assert len(figure.axes) == 5
    figure.savefig(tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 1000


def test_hidden_pixels_stay_hidden():
    x = torch.rand(1, 8, 8)
    x[:, 4:] = torch.nan
    (axis,) = plots.image_grid({"upper": x}).axes
    assert axis.images[0].get_array().mask.sum() == 32


def test_a_curve_shows_raw_and_smoothed_values():
    figure = plots.curves({"loss": torch.linspace(1, 0, 100)}, smooth=10)
    raw, mean = figure.axes[0].lines
    assert len(raw.get_ydata()) == 100
    assert mean.get_ydata()[0] == pytest.approx(torch.linspace(1, 0, 100)[:10].mean().item())
    assert mean.get_xdata()[0] == 9


def test_a_table_holds_every_cell():
    figure = plots.table(["law", "p"], [["Gaussian", "0.01"], ["flow", "0.4"]])
    (cells,) = figure.axes[0].tables
    text = [cell.get_text().get_text() for cell in cells.get_celld().values()]
    assert {"law", "p", "Gaussian", "0.01", "flow", "0.4"} == set(text)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(n, height, width\), got .*\(8, 8\).*Reshape"):
        plots.image_grid({"a": torch.rand(8, 8)})
    with pytest.raises(ValueError, match=r"shape \(steps,\) for 'a'.*history\.losses"):
        plots.curves({"a": torch.rand(0)})


def test_without_matplotlib_the_extra_is_named():
    code = (
        "import sys, torch\n"
        "sys.modules['matplotlib'] = sys.modules['matplotlib.figure'] = None\n"
        "from pyrogen import plots\n"
        "try: plots.table(['a'], [['b']])\n"
        "except ImportError as e: assert 'pip install pyrogen[demo]' in str(e)\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
