"""Charts, drawn by Matplotlib; in a page, their colours follow its style sheet, light and dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEDALS = {"gold": "#b7791f", "silver": "#718096", "bronze": "#975a16"}
"""Their colours."""

GREY, GRID = "#57606a", "#b0b0b0"

OFFSETS = [(x * reach, y * reach) for reach in (7, 13, 20, 28) for x, y in ((1, 0.5), (-1.6, 0.5), (0, 1), (0, -1.6), (1, -1))]
"""Where a point's name may stand, in points from it; the first free place is taken."""


def new_chart(x_label: str, y_label: str) -> Axes:
    """The axes of a chart for a page; draw on them in the colours `C0` to `C7`, `GREY` and those of `MEDALS`."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(4.6, 3), layout="constrained").subplots()
    style_axes(axes, x_label, y_label)
    return axes


def style_axes(axes: Axes, x_label: str, y_label: str) -> None:
    """A quiet frame: a grid of thin lines, one axis, grey text."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GREY)
    axes.grid(color=GRID, alpha=0.3, linewidth=0.7)
    axes.tick_params(labelsize=9, labelcolor=GREY, color=GREY, length=0)
    axes.set_xlabel(x_label, color=GREY)
    axes.set_ylabel(y_label, color=GREY)


def name_points(axes: Axes, points: Iterable[tuple[float, float, str]]) -> None:
    """Write each point's name beside it, where no other text is. Call it last: it looks where things are."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(axes.get_figure(root=True)).draw()
    taken = [text.get_window_extent() for text in axes.texts]
    for x, y, name in points:
        for offset in OFFSETS:
            text = axes.annotate(name, (x, y), xytext=offset, textcoords="offset points", fontsize=8)
            box = text.get_window_extent()
            if not any(box.overlaps(other) for other in taken):
                break
            if offset != OFFSETS[-1]:
                text.remove()
        taken.append(box)


def svg(axes: Axes, about: str) -> Markup:
    """A chart as part of a page; `about` tells it to those who cannot see it."""
    import matplotlib
    from matplotlib.colors import to_hex

    figure, buffer = axes.get_figure(root=True), io.StringIO()
    assert figure
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "melfold", "text.parse_math": False}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
    text = buffer.getvalue()
    text = re.sub(r'<metadata>.*?</metadata>|<style.*?</style>|font-family: [^;"]*;?|(?<=<g) id="[^"]*"', "", text, flags=re.S)
    names = {GREY: "muted", GRID: "muted"} | {colour: medal for medal, colour in MEDALS.items()}
    names |= {to_hex(f"C{number}"): f"c{number}" for number in range(8)}
    for colour, name in names.items():
        text = text.replace(colour, f"var(--{name})")
    start = f'<svg class="chart" role="img" aria-label="{escape(about)}" '
    return Markup(start + text[text.index("viewBox") :])
