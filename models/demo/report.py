"""One HTML page that needs nothing beside it: prose, tables and pictures."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1d2633; max-width: 60rem; margin: 3rem auto;
       padding: 0 1.2rem; }
h1 { font-size: 1.9rem; margin-bottom: .2rem; } h2 { margin-top: 2.6rem; font-size: 1.3rem; }
p.lead { color: #53617a; font-size: 1.08rem; margin-top: 0; }
table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th { background: #2f3e55; color: white; } th, td { padding: .38rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr:nth-child(odd) td { background: #f5f7fa; }
img { max-width: 100%; margin: .4rem 0; } pre { background: #f5f7fa; padding: .9rem;
      overflow-x: auto; font-size: .82rem; line-height: 1.35; }
footer { color: #7a8699; font-size: .85rem; margin: 3rem 0 1rem; }
"""


class Report:
    """Collects sections and writes them as one page, and every figure as a PNG beside it."""

    def __init__(self, title: str, lead: str, folder: Path) -> None:
        self.title, self.folder = title, folder
        self.parts = [f"<h1>{html.escape(title)}</h1>", f'<p class="lead">{html.escape(lead)}</p>']
        folder.mkdir(parents=True, exist_ok=True)

    def section(self, heading: str, *paragraphs: str) -> None:
        self.parts.append(f"<h2>{html.escape(heading)}</h2>")
        self.parts += [f"<p>{html.escape(text)}</p>" for text in paragraphs]

    def figure(self, name: str, figure: "Figure") -> None:
        picture = io.BytesIO()
        figure.savefig(picture, format="png")
        (self.folder / f"{name}.png").write_bytes(picture.getvalue())
        data = base64.b64encode(picture.getvalue()).decode()
        self.parts.append(f'<img alt="{name}" src="data:image/png;base64,{data}">')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        def line(tag: str, cells: Sequence[str]) -> str:
            return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)

        body = "".join(f"<tr>{line('td', row)}</tr>" for row in rows)
        self.parts.append(f"<table><tr>{line('th', header)}</tr>{body}</table>")

    def text(self, text: str) -> None:
        self.parts.append(f"<pre>{html.escape(text)}</pre>")

    def write(self, footer: str) -> Path:
        page = (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{self.title}</title>'
            f"<style>{STYLE}</style>{''.join(self.parts)}"
            f"<footer>{html.escape(footer)}</footer></html>"
        )
        path = self.folder / "report.html"
        path.write_text(page, encoding="utf-8")
        return path
