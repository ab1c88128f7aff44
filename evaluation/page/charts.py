"""Charts as inline SVG: sharp at any size, and in the colours of the page, light or dark.

Matplotlib draws with colours that stand for others; in the SVG they become CSS variables. Text stays text.
"""

from __future__ import annotations

import dataclasses
import io
import math
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

COLOURS = 10  # of series, --s0 to --s9 on the page; the teacher's is the first
INK, GRID = "#5e00ff", "#5e00fe"
MARKERS = "os^Dv"
GLYPHS = {
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
    """Of the page's colours that of model `number`; the first is the teacher's alone."""
    return 0 if number == 0 else 1 + (number - 1) % (COLOURS - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
    """A named curve with error bars where `error` is given; `number` gives it its colour and marker."""

    name: str
    number: int
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float] | None = None
    marked: bool = True
    joined: bool = True

    @property
    def colour(self) -> int:
        return colour(self.number)

    @property
    def marker(self) -> str:
        return MARKERS[self.number % len(MARKERS)]

    @property
    def glyph(self) -> str:
        """The marker as an SVG path in a field of 10 by 10."""
        return GLYPHS[self.marker]


@dataclasses.dataclass(frozen=True)
class Chart:
    """An SVG, and the series its legend names."""

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
    """Curves over `x`; `log` names the logarithmic axes ("x", "y", "xy"), `ticks` those of x, `least` the foot of y. What is
    not finite, or cannot stand on a logarithmic axis, is left out. None where nothing is left."""
    kept = [found for one in series if (found := _drawable(one, log)).x]
    if not kept:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for one in kept:
            _draw(axes, one, log)
        _scale(axes, kept, log, ticks, least)
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(True, axis="y")
        axes.set_axisbelow(True)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return Chart(_inline(buffer.getvalue(), alt), tuple(kept))


def _drawable(one: Series, log: str) -> Series:
    def fits(x: float, y: float) -> bool:
        return math.isfinite(x) and math.isfinite(y) and (x > 0 or "x" not in log) and (y > 0 or "y" not in log)

    kept = [k for k, point in enumerate(zip(one.x, one.y, strict=True)) if fits(*point)]
    pick: Callable[[Sequence[float]], list[float]] = lambda values: [values[k] for k in kept]  # noqa: E731
    return dataclasses.replace(one, x=pick(one.x), y=pick(one.y), error=None if one.error is None else pick(one.error))


def _draw(axes: Axes, one: Series, log: str) -> None:
    style = {
        "color": f"#5e{one.colour:02x}01",
        "marker": one.marker if one.marked else "",
        "markersize": 4.2,
        "linewidth": 1.3,
        "linestyle": ("--" if one.number == 0 else "-") if one.joined and len(one.x) > 1 else "",
    }
    if one.error is None:
        axes.plot(one.x, one.y, **style)
        return
    # On a logarithmic axis a bar that reaches below zero ends just above it.
    down = [min(e, 0.95 * value) if "y" in log else e for e, value in zip(one.error, one.y, strict=True)]
    axes.errorbar(one.x, one.y, [down, one.error], capsize=2.5, elinewidth=1, **style)


def _scale(axes: Axes, series: Sequence[Series], log: str, ticks: Sequence[float] | None, least: float | None) -> None:
    if least is not None:
        lowest = min(value for one in series for value in one.y)
        axes.set_ylim(bottom=max(least, lowest / 1.5) if "y" in log else least)
    for name, axis, values in (("x", axes.xaxis, "x"), ("y", axes.yaxis, "y")):
        if name not in log:
            continue
        (axes.set_xscale if name == "x" else axes.set_yscale)("log")
        seen = [v for one in series for v in getattr(one, values)]
        decades = math.log10(max(seen) / max(min(seen), least or 0))
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.2 else (1,)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    if ticks is not None:
        axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _inline(text: str, alt: str) -> Markup:
    """The SVG element alone: its names its own, colours those of the page, fonts those of the text around it."""
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
