"""Words and numbers that several sections of the page write in the same way."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

NONE = "—"  # where a table has no figure
LONG = 14  # characters from which a name may break into lines


def plural(count: int, noun: str) -> str:
    """As "1 evaluation" or "1,000 evaluations"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def seconds(value: float) -> str:
    """Seconds with about three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def breaking(name: str) -> Markup:
    """A long name that may break into lines after its underscores and slashes."""
    return Markup(re.sub("([_/])", r"\1<wbr>", str(escape(name)))) if len(name) > LONG else escape(name)
