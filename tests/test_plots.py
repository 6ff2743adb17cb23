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


def test_traversals_move_one_unit_a_row():
    seen = []

    def decode(z):
        seen.append(z)
        return z.reshape(-1, 1, 3)

    z = torch.tensor([0.5, 1.0, -1.0])
    figure = plots.traversals(decode, z, units=[2, 0], span=2, steps=5, low=-2, high=2)
    (codes,) = seen
    assert torch.equal(codes[:5, 2], torch.linspace(-2, 2, 5))
    assert torch.equal(codes[:5, :2], z[:2].expand(5, 2))
    assert torch.equal(codes[5:, 0], torch.linspace(-2, 2, 5))
    assert torch.equal(codes[5:, 1:], z[1:].expand(5, 2))
    assert len(figure.axes) == 10
    assert [figure.axes[i].get_ylabel() for i in (0, 5)] == ["unit 2", "unit 0"]
    assert [axis.get_title() for axis in figure.axes[:5]] == ["-2", "-1", "0", "1", "2"]
    assert torch.equal(torch.tensor(figure.axes[6].images[0].get_array()), codes[6, None])
    assert len(plots.traversals(decode, z, steps=2).axes) == 6


def test_bad_traversals_are_refused():
    def decode(z):
        return z.reshape(-1, 1, 2)

    with pytest.raises(ValueError, match=r"one code of shape \(latents,\), got \(1, 2\)"):
        plots.traversals(decode, torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"units from 0 to 1, got \[2\]"):
        plots.traversals(decode, torch.zeros(2), units=[2])
    with pytest.raises(ValueError, match="steps >= 2, got 1"):
        plots.traversals(decode, torch.zeros(2), steps=1)
    with pytest.raises(ValueError, match=r"18 pictures of shape.*got \(18, 2\)"):
        plots.traversals(lambda z: z, torch.zeros(2))


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


def test_traversals_take_the_units_that_argsort_gives():
    def decode(z):
        return z[:, :1, None].expand(-1, 2, 2)

    units = torch.tensor([0.1, 3.0, 2.0]).argsort(descending=True)[:2]
    figure = plots.traversals(decode, torch.zeros(3), units=units, steps=3)
    assert len(figure.axes) == 6
    with pytest.raises(ValueError, match="different units from 0 to 2"):
        plots.traversals(decode, torch.zeros(3), units=[1, 1])
