"""Pictures of draws, losses and tables, as matplotlib figures.

Figures are made without pyplot, so that no window, backend or global style is touched; keep one
by ``figure.savefig("draws.png")``. Needs matplotlib: ``pip install pyrogen[demo]``.
"""

__all__ = ["curves", "image_grid", "table", "traversals"]

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLORS = ["#3b6fb6", "#d1495b", "#2e8b57", "#e09f3e", "#7a5195", "#4c5760"]


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pyrogen.plots needs matplotlib: pip install pyrogen[demo].") from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def image_grid(
    rows: Mapping[str, Tensor], *, columns: Sequence[str] = (), low: float = 0.0, high: float = 1.0
) -> "Figure":
    """Draw rows of grey pictures, one labelled row an entry.

    Args:
        rows: Label to pictures, shape ``(n, height, width)``; NaN pixels show as hatched blue.
        columns: Titles above the first pictures of the first row.
        low: Value shown as white.
        high: Value shown as black.

    Raises:
        ValueError: If there are no rows or a row is not a stack of pictures.

    Example:
        >>> figure = image_grid({"noise": torch.rand(5, 8, 8)})
        >>> len(figure.axes)
        5
    """
    if not rows or any(pictures.ndim != 3 for pictures in rows.values()):
        shapes = {label: tuple(pictures.shape) for label, pictures in rows.items()}
        raise ValueError(
            f"image_grid expected rows of shape (n, height, width), got {shapes}. "
            "Reshape each row's pictures."
        )
    width = max(len(pictures) for pictures in rows.values())
    figure = _figure(0.62 * width + 1.3, 0.66 * len(rows) + (0.3 if columns else 0.1))
    grid = figure.subplots(len(rows), width, squeeze=False)
    for i, (label, pictures) in enumerate(rows.items()):
        for j, axis in enumerate(grid[i]):
            axis.set(xticks=[], yticks=[])
            if j >= len(pictures):
                axis.remove()
                continue
            axis.set_facecolor("#dbe6f4")  # seen through NaN pixels
            axis.imshow(pictures[j].detach().cpu().numpy(), cmap="gray_r", vmin=low, vmax=high)
            for spine in axis.spines.values():
                spine.set(linewidth=0.4, color="#aab2bd")
            if i == 0 and j < len(columns):
                axis.set_title(columns[j], fontsize=7)
        grid[i][0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8, labelpad=6)
    return figure


@torch.no_grad()
def traversals(
    decode: Callable[[Tensor], Tensor],
    z: Tensor,
    *,
    units: Sequence[int] = (),
    span: float = 3.0,
    steps: int = 9,
    low: float = 0.0,
    high: float = 1.0,
) -> "Figure":
    """Draw what each latent unit does to a picture: a row a unit, a column a value of it.

    Args:
        decode: Map from codes, shape ``(n, latents)``, to pictures, ``(n, height, width)``.
        z: Code to start from, shape ``(latents,)``.
        units: Latent units to move, one row each; all if empty.
        span: Units move from ``-span`` to ``span``.
        steps: Number of values.
        low: Value shown as white.
        high: Value shown as black.

    Raises:
        ValueError: If ``z`` is not one code, a unit is not in it, there are fewer than two steps,
            or ``decode`` gives no pictures.

    Example:
        >>> figure = traversals(lambda z: z.sigmoid().reshape(-1, 2, 2), torch.zeros(4), steps=5)
        >>> len(figure.axes)
        20
    """
    if z.ndim != 1:
        raise ValueError(
            f"traversals expected one code of shape (latents,), got {tuple(z.shape)}. Pass z[i]."
        )
    units = [int(unit) for unit in units] or list(range(len(z)))
    if not all(0 <= unit < len(z) for unit in units) or len(set(units)) < len(units):
        raise ValueError(
            f"traversals expected different units from 0 to {len(z) - 1}, got {units}. Pass "
            "indices of z."
        )
    if steps < 2:
        raise ValueError(f"traversals expected steps >= 2, got {steps}.")
    values = torch.linspace(-span, span, steps).to(z)
    codes = z.repeat(len(units), steps, 1)
    for row, unit in enumerate(units):
        codes[row, :, unit] = values
    pictures = decode(codes.reshape(-1, len(z)))
    if pictures.ndim != 3 or len(pictures) != len(units) * steps:
        raise ValueError(
            f"traversals expected decode to give {len(units) * steps} pictures of shape (height, "
            f"width), got {tuple(pictures.shape)}. Reshape its result."
        )
    rows = pictures.reshape(len(units), steps, *pictures.shape[1:])
    labels = {f"unit {unit}": row for unit, row in zip(units, rows, strict=True)}
    return image_grid(labels, columns=[f"{v:.3g}" for v in values.tolist()], low=low, high=high)


def curves(
    series: Mapping[str, Tensor],
    *,
    xlabel: str = "step",
    ylabel: str = "loss",
    smooth: int = 1,
) -> "Figure":
    """Draw each series in a panel of its own, since losses have units of their own.

    Args:
        series: Label to values, shape ``(steps,)``.
        xlabel: Label below every panel.
        ylabel: Label left of the first panel.
        smooth: Width in steps of a running mean drawn over the raw values.

    Raises:
        ValueError: If a series is empty or not one-dimensional.

    Example:
        >>> figure = curves({"vae": torch.rand(100), "gan": torch.rand(50)}, smooth=10)
        >>> len(figure.axes)
        2
    """
    for label, values in series.items():
        if values.ndim != 1 or len(values) == 0:
            raise ValueError(
                f"curves expected values of shape (steps,) for {label!r}, got "
                f"{tuple(values.shape)}. Pass history.losses."
            )
    figure = _figure(3.0 * len(series), 2.4)
    panels = figure.subplots(1, len(series), squeeze=False)[0]
    for axis, color, (label, raw) in zip(panels, _cycle(len(series)), series.items(), strict=True):
        values = raw.detach().double().cpu()
        width = min(smooth, len(values))
        mean = torch.nn.functional.avg_pool1d(values[None, None], width, stride=1)[0, 0]
        axis.plot(values.numpy(), color=color, alpha=0.25, linewidth=0.6)
        axis.plot(range(width - 1, len(values)), mean.numpy(), color=color, linewidth=1.4)
        low, high = mean.quantile(0.0).item(), mean[len(mean) // 50 :].max().item()
        if high > low:
            axis.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
        axis.set_title(label, fontsize=9)
        axis.set_xlabel(xlabel, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(ylabel, fontsize=8)
    return figure


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> "Figure":
    """Draw a table of strings, first column to the left and the others centred.

    Example:
        >>> figure = table(["law", "bits/dim"], [["Gaussian", "2.95"]])
        >>> len(figure.axes)
        1
    """
    widths = [max(len(row[j]) for row in [header, *rows]) + 3 for j in range(len(header))]
    figure = _figure(0.085 * sum(widths), 0.27 * (len(rows) + 1) + 0.1)
    from matplotlib.transforms import Bbox

    axis = figure.subplots()
    axis.axis("off")
    cells = axis.table(
        [list(row) for row in rows],
        colLabels=list(header),
        colWidths=[w / sum(widths) for w in widths],
        bbox=Bbox.unit(),
        cellLoc="center",
    )
    cells.auto_set_font_size(False)  # noqa: FBT003
    cells.set_fontsize(8)
    for (i, j), cell in cells.get_celld().items():
        cell.set(edgecolor="#d5dae1", linewidth=0.5)
        if i == 0:
            cell.set(facecolor="#2f3e55")
            cell.set_text_props(color="white", weight="bold")
        elif i % 2 == 0:
            cell.set_facecolor("#f5f7fa")
        if j == 0:
            cell.set_text_props(ha="left")
    return figure


def _cycle(n: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(n)]
