"""One HTML file with everything in it: text, tables, charts and what draws them.

Whatever a run says is escaped here and nowhere else: `text`, `table` and the like take plain text.
The page itself forbids the network, and any script but its own, in case something slips through.
"""

import json
import secrets
from collections.abc import Sequence
from html import escape
from importlib.resources import files

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

Html = str  # escaped, ready for the page


class Page:
    """A page that grows from top to bottom."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts: list[Html] = []
        self._charts: list[str] = []

    def heading(self, words: str, level: int = 2) -> None:
        """Add a heading."""
        self._parts.append(f"<h{level}>{escape(words)}</h{level}>")

    def text(self, words: str, style: str = "") -> None:
        """Add paragraphs, one for each line."""
        for line in words.splitlines():
            self._parts.append(f'<p class="{style}">{escape(line)}</p>')

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Add a row of figures, each with what it is."""
        cells = [f"<div><b>{escape(b)}</b><span>{escape(a)}</span></div>" for a, b in facts]
        self._parts.append(f'<div class="facts">{"".join(cells)}</div>')

    def table(self, lines: Sequence[Sequence[str]], *, marked: Sequence[int] = ()) -> None:
        """Add a table, whose first line is its header.

        Args:
            lines: the rows of cells.
            marked: positions of rows, the header not counted, that stand out.
        """
        header = "".join(f"<th>{escape(cell)}</th>" for cell in lines[0])
        rows = []
        for position, line in enumerate(lines[1:]):
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in line)
            rows.append(f'<tr class="marked">{cells}' if position in marked else f"<tr>{cells}")
        self._parts.append(
            f'<div class="wide"><table><thead><tr>{header}</thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )

    def code(self, lines: str) -> None:
        """Add text as it is typed, or as a file holds it."""
        self._parts.append(f"<pre>{escape(lines)}</pre>")

    def chart(self, figure: go.Figure, label: str, *, width: int = 0) -> None:
        """Add a chart.

        Args:
            figure: what to draw.
            label: what it shows, for who cannot see it.
            width: px that it needs; on a narrower screen it is scrolled.
        """
        style = f' style="min-width:{width}px"' if width else ""
        height = figure.layout.height or 400
        self._parts.append(
            f'<div class="wide"><div class="chart" role="img" aria-label="{escape(label)}"'
            f' data-height="{height:g}"{style}></div></div>'
        )
        self._charts.append(figure.to_json())

    def charts(self, figures: Sequence[tuple[str, go.Figure]]) -> None:
        """Add small charts, as many beside each other as fit."""
        self._parts.append('<div class="grid">')
        for label, figure in figures:
            self.chart(figure, label)
        self._parts.append("</div>")

    def pictures(self, pictures: Sequence[tuple[str, str, str]]) -> None:
        """Add small pictures: a data URI, the words below, and what hovering tells."""
        cells = [
            f'<figure title="{escape(more)}"><img src="{escape(uri)}" alt="{escape(more)}" '
            f"width=56 height=56><figcaption>{escape(words)}</figcaption></figure>"
            for uri, words, more in pictures
        ]
        self._parts.append(f'<div class="pictures">{"".join(cells)}</div>')

    def html(self) -> str:
        """Return the whole page."""
        nonce = secrets.token_urlsafe(16)
        room = files("tune_mnist.analysis") / "page"
        # Parallel coordinates compile their own drawing code.
        policy = (
            f"default-src 'none'; script-src 'nonce-{nonce}' 'unsafe-eval'; "
            "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
        )
        return "\n".join(
            [
                '<!doctype html><html lang="en"><head><meta charset="utf-8">',
                f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                '<meta name="color-scheme" content="light dark">',
                '<link rel="icon" href="data:,">',
                f"<title>{escape(self._title)}</title>",
                f"<style>{(room / 'report.css').read_text(encoding='utf-8')}</style></head>",
                f"<body><main>{''.join(self._parts)}</main>",
                f'<script nonce="{nonce}">{get_plotlyjs()}</script>',
                f'<script nonce="{nonce}">const charts = [{",".join(map(_data, self._charts))}];',
                f"{(room / 'report.js').read_text(encoding='utf-8')}</script></body></html>",
            ]
        )


def _data(chart: str) -> str:
    """Return a figure as JavaScript, without the theme that plotly adds and without a `<`."""
    figure = json.loads(chart)
    figure["layout"].pop("template", None)
    return json.dumps({"data": figure["data"], "layout": figure["layout"]}).replace("<", "\\u003c")
