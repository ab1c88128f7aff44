"""What a JSON file must hold before it is used: its layout, declared as plain Python, and a check against it.

str, float, bool          a text, a number, true or false
3                         a whole number from 3 on
[layout]                  a list of such values
{"key": layout, ...}      an object with at least these keys; of "key?", the value may be null or left out
"""

from __future__ import annotations

from typing import Any

MOST = 2**63  # whole numbers beyond are damage, and Python would take its time to print them
NAMES = {str: "a text", float: "a number", bool: "true or false"}


def check_layout(value: Any, layout: Any, at: str = "it") -> None:
    """Raise ValueError, which says where and what, unless `value` has this layout."""
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
        _expect(type(value) is int and layout <= value <= MOST, value, f"a whole number from {layout} on", at)


def _expect(right: bool, value: Any, expected: str, at: str) -> None:
    if not right:
        plain = value if isinstance(value, str | float | bool | None) else type(value).__name__
        found = value if type(value) is int and abs(value) <= MOST else plain
        raise ValueError(f"{at} is {found!r:.60}; expected {expected}")
