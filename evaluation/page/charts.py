"""Charts as inline SVG: sharp at any size, and in the colours of the page, light or dark.

Matplotlib draws with placeholder colours, which become CSS variables in the SVG. Text stays text.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
import zlib
from collections.abc import Sequence
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

COLOURS = 10  # of series: --s0 to --s9 on the page; --s0 is the teacher's
LARGEST = 1e100  # Matplotlib's margins overflow for values near the largest float
INK, GRID = "#5e00ff", "#5e00fe"  # placeholders
GLYPHS = {  # by Matplotlib's marker: the same as an SVG path in a 10 by 10 view box
    "o": "M5 1.6a3.4 3.4 0 1 0 .01 0z",
    "s": "M2 2h6v6H2z",
    "^": "M5 1.4 8.8 8.4H1.2z",
    "D": "M5 .8 9.2 5 5 9.2 .8 5z",
    "v": "M5 8.6 1.2 1.6h7.6z",
}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "beeline",
    "text.parse_math": False,
    "font.size": 9,
    "axes.unicode_minus": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "grid.color": GRID,
    "grid.linewidth": 0.6,
}


def colour(number: int) -> int:
    """The page's colour of model `number`. Colour 0 is reserved for the teacher, model 0."""
    return 0 if number == 0 else 1 + (number - 1) % (COLOURS - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """A named curve; `number` gives it its colour and marker. `error` are its error bars, `left` the left ends of horizontal
    bars, `labels` are texts at its points."""

    name: str
    number: int
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    left: Sequence[float] | None = None
    labels: Sequence[str] | None = None
    marked: bool = True
    joined: bool = True

    @property
    def colour(self) -> int:
        return colour(self.number)

    @property
    def marker(self) -> str:
        return list(GLYPHS)[self.number % len(GLYPHS)]


@dataclasses.dataclass(frozen=True)
class Chart:
    """An SVG, and the series of its legend."""

    svg: Markup
    keys: tuple[Series, ...]


def chart(
    series: Sequence[Series],
    *,
    x: str,
    y: str,
    alt: str,
    log: str = "",
    ticks: Sequence[float] | None = None,
    least: float | None = None,
) -> Chart | None:
    """Curves over `x`. `log` names the logarithmic axes ("x", "y", "xy"), `ticks` are the ticks of x, `least` is the lower end
    of y. Points that are not finite, too large, or not positive on a logarithmic axis are left out. None if none is left."""
    shown = [curve for curve in (_drawable(curve, log) for curve in series) if curve.x]
    if not shown:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for curve in shown:
            _draw(axes, curve, log)
        _scale(axes, shown, log, ticks, least)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(True, axis="y")
        axes.set_axisbelow(True)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Chart(_inline(buffer.getvalue(), alt), tuple(shown))


def _drawable(curve: Series, log: str) -> Series:
    """The curve without the points that the axes cannot show."""

    def fits(x: float, y: float) -> bool:
        return abs(x) < LARGEST and abs(y) < LARGEST and (x > 0 or "x" not in log) and (y > 0 or "y" not in log)

    kept = [k for k, point in enumerate(zip(curve.x, curve.y, strict=True)) if fits(*point)]

    def pick(values: Sequence[Any] | None) -> list[Any] | None:
        return None if values is None else [values[k] for k in kept]

    columns: dict[str, Any] = {name: pick(getattr(curve, name)) for name in ("x", "y", "error", "left", "labels")}
    return dataclasses.replace(curve, **columns)


def _draw(axes: Axes, curve: Series, log: str) -> None:
    style = {
        "color": f"#5e{curve.colour:02x}01",
        "marker": curve.marker if curve.marked else "",
        "markersize": 4.2,
        "linewidth": 1.3,
        "linestyle": ("--" if curve.number == 0 else "-") if curve.joined and len(curve.x) > 1 else "",
    }
    if curve.left is not None:
        axes.hlines(curve.y, curve.left, curve.x, colors=style["color"], linewidth=0.9)
    for x, y, text in zip(curve.x, curve.y, curve.labels or [""] * len(curve.x), strict=True):
        axes.annotate(text, (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7)
    if curve.error is None:
        axes.plot(curve.x, curve.y, **style)
        return
    # On a logarithmic axis an error bar must end above zero.
    down = [min(error, 0.95 * y) if "y" in log else error for error, y in zip(curve.error, curve.y, strict=True)]
    axes.errorbar(curve.x, curve.y, [down, curve.error], capsize=2.5, elinewidth=1, **style)


def _scale(axes: Axes, curves: Sequence[Series], log: str, ticks: Sequence[float] | None, least: float | None) -> None:
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    if least is not None:
        lowest = min(y for curve in curves for y in curve.y)
        axes.set_ylim(bottom=max(least, lowest / 1.5) if "y" in log else least)
    for name in log:
        values = [value for curve in curves for value in (curve.x if name == "x" else curve.y)]
        foot = max(min(values), least or 0) if name == "y" else min(values)
        (axes.set_xscale if name == "x" else axes.set_yscale)("log")
        axis = axes.xaxis if name == "x" else axes.yaxis
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if math.log10(max(values) / foot) < 2.2 else (1,)))
        axis.set_major_formatter(plain)
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    if ticks is not None:
        axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
        axes.xaxis.set_major_formatter(plain)


def _inline(text: str, alt: str) -> Markup:
    """The SVG element alone: with ids that are unique on the page, the page's colours and the fonts of the text around it."""
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>c{zlib.crc32((alt + text).encode()):x}-", text)
    text = re.sub(r">\s+<", "><", re.sub(r'<g id="[^"]*"', "<g", text))
    text = text.replace(INK, "currentColor").replace(GRID, "var(--line)")
    text = re.sub(r"#5e([0-9a-f]{2})01", lambda found: f"var(--s{int(found[1], 16)})", text)
    text = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    head, rest = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    return Markup(
        f'<svg class="chart" role="img" aria-label="{escape(alt)}" xmlns="http://www.w3.org/2000/svg" '
        f'xmlns:xlink="http://www.w3.org/1999/xlink" {box[0]}>{rest}'
    )
