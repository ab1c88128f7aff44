"""Declared layouts of JSON files, as plain Python, and the check of a value against one.

str, float, bool          a text, a number, true or false
3                         a whole number of at least 3
[layout]                  a list of such values
{"key": layout, ...}      an object with at least these keys; the value of "key?" may be null or missing
"""

from __future__ import annotations

from typing import Any

MOST = 2**63  # larger whole numbers are damage, and Python prints them slowly
NAMES = {str: "a text", float: "a number", bool: "true or false"}


def check_layout(value: Any, layout: Any, at: str = "it") -> None:
    """Raise ValueError, naming the place and the problem, unless `value` has this layout."""
    if isinstance(layout, dict):
        _expect(isinstance(value, dict), value, "an object", at)
        for key, inner in layout.items():
            name = key.removesuffix("?")
            if name not in value and name == key:
                raise ValueError(f"{at} lacks {key!r}")
            if name == key or value.get(name) is not None:
                check_layout(value[name], inner, f"{at}.{name}" if at != "it" else name)
    elif isinstance(layout, list):
        _expect(isinstance(value, list), value, "a list", at)
        for number, item in enumerate(value):
            check_layout(item, layout[0], f"{at}[{number}]")
    elif layout in NAMES:
        kind = (int, float) if layout is float else layout
        plain = isinstance(value, kind) and (layout is bool or not isinstance(value, bool))
        _expect(plain and not (isinstance(value, int) and abs(value) > MOST), value, NAMES[layout], at)
    else:
        _expect(type(value) is int and layout <= value <= MOST, value, f"a whole number of at least {layout}", at)


def _expect(right: bool, value: Any, expected: str, at: str) -> None:
    if not right:
        plain = value if isinstance(value, str | float | bool | None) else type(value).__name__
        shown = value if type(value) is int and abs(value) <= MOST else plain
        raise ValueError(f"{at} is {shown!r:.60}; expected {expected}")
