"""Allowed values of settings, declared in their types and checked when a config is built.

    class PairsConfig(Settings):
        count: Count            # Annotated[int, Range(1, MANY)]
        solver: Literal["heun", "calibrated"]
        levels: Some[Positive]  # a tuple with at least one entry

Conditions on several settings at once follow in the config's `__post_init__`. Every error has the same form: the setting, its
value, what is allowed. NaN and infinity do not count as numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NoReturn, Protocol, TypeVar, Union

from beeline.errors import SettingError

MANY = 10**9  # images, pairs, samples, iterations: more than any data set or run, and still quick to count
LARGEST = 1e38  # about the largest float32
MAX_SIDE = 4096  # pixels
MAX_SIZE = 2**20  # rows of a batch or of a shard
MAX_SHARDS = 100_000  # in one store: a listing and the driver can handle these in seconds
MAX_SHOWN = 10_000  # images on a sheet
MAX_TRIALS = 10_000
MAX_PROCESSES = 10_000  # actors or ranks
MAX_THREADS = 1024
MAX_CLASSES = 100_000
MAX_CHANNELS = 8192  # of one layer
MAX_SEED = 2**63 - 1
MAX_STEPS = 10_000  # levels of a schedule
MAX_HALF_LIFE = 999_999  # iterations; a larger one would appear with an exponent in the folder's name, ema-<half-life>
MAX_NAME = 100  # characters
SHOWN = 80  # characters of a value shown in a message

T = TypeVar("T")


class Condition(Protocol):
    """Metadata of a type that restricts its values. `str()` describes the restriction; the text follows that of the type."""

    def allows(self, value: Any) -> bool: ...


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included, except an end named in `without`."""

    low: float
    high: float
    without: Literal["", "low", "high"] = ""

    def allows(self, value: float) -> bool:
        inside = self.low <= value <= self.high  # False for NaN
        return inside and not (self.without and value == getattr(self, self.without))

    def __str__(self) -> str:
        low, high = f"{self.low:,}", f"{self.high:,}"
        return {"": f"from {low} to {high}", "low": f"above {low}, at most {high}", "high": f"from {low}, below {high}"}[
            self.without
        ]


@dataclasses.dataclass(frozen=True)
class Divisible:
    """Multiples of `by`."""

    by: int

    def allows(self, value: int) -> bool:
        return value % self.by == 0

    def __str__(self) -> str:
        return f"divisible by {self.by}"


@dataclasses.dataclass(frozen=True)
class OneOf:
    """A few allowed numbers."""

    values: tuple[int, ...]

    def allows(self, value: int) -> bool:
        return value in self.values

    def __str__(self) -> str:
        return f"that is {' or '.join(map(str, self.values))}"


class RayShare:
    """Amounts that Ray can reserve: whole devices, or a share of one."""

    def allows(self, value: float) -> bool:
        return value == 0 or 0.0001 <= value <= 1 or value == int(value)

    def __str__(self) -> str:
        return "whole or at most 1"


class NotEmpty:
    """Tuples and texts with at least one element."""

    def allows(self, value: Any) -> bool:
        return len(value) > 0

    def __str__(self) -> str:
        return "(not empty)"


@dataclasses.dataclass(frozen=True)
class Matching:
    """Texts that match `pattern` as a whole."""

    pattern: str
    words: str

    def allows(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def __str__(self) -> str:
        return self.words


STEPS = r"{n}(,{n})*".format(n=r"[0-9]{1,9}(\.[0-9]{1,9})?")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Step schedules as texts: indices or, with `levels`, also noise levels (with a decimal point), in the order of falling
    noise."""

    levels: bool = True

    def allows(self, value: str) -> bool:
        if not re.fullmatch(STEPS, value):
            return False
        parts = value.split(",")
        indices = [int(part) for part in parts if "." not in part]
        levels = [float(part) for part in parts if "." in part]
        rising = all(a < b for a, b in itertools.pairwise(indices)) and all(i < MAX_STEPS for i in indices)
        falling = all(a > b for a, b in itertools.pairwise([*levels, 0.0]))
        return rising and falling and ("." in parts[0] or indices[0] == 0) and (self.levels or not levels)

    def __str__(self) -> str:
        levels = "; a number with a decimal point is a noise level, for example 0,0.821" if self.levels else ""
        return f"with increasing indices from 0, separated by commas, for example 0 or 0,8{levels}"


# A component of a path: nothing that a shell, a URI or a folder listing would treat specially.
COMPONENT = rf"[A-Za-z0-9_][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}"
OWN_RECIPE = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"  # package.module:function
NAMED = f"of letters, digits, '.', '_' and '-', not beginning with '.' or '-', at most {MAX_NAME} characters"
A_FOLDER = f"naming a folder, for example teacher or students/lmm: names {NAMED}, joined by '/'"

Whole = Annotated[int, Range(0, MANY)]
Count = Annotated[int, Range(1, MANY)]
Size = Annotated[int, Range(1, MAX_SIZE)]
Side = Annotated[int, Range(1, MAX_SIDE)]
Channels = Annotated[int, Range(1, MAX_CHANNELS)]
Classes = Annotated[int, Range(0, MAX_CLASSES)]
Steps = Annotated[int, Range(1, MAX_STEPS)]
Index = Annotated[int, Range(0, MAX_STEPS - 1)]
Seed = Annotated[int, Range(0, MAX_SEED)]
Processes = Annotated[int, Range(1, MAX_PROCESSES)]
Threads = Annotated[int, Range(1, MAX_THREADS)]
Restarts = Annotated[int, Range(-1, 10**6)]
Amount = Annotated[float, Range(0, LARGEST)]
Positive = Annotated[float, Range(0, LARGEST, without="low")]
Share = Annotated[float, Range(0, 1)]
ShareBelow1 = Annotated[float, Range(0, 1, without="high")]
HalfLife = Annotated[float, Range(0, MAX_HALF_LIFE)]
Gpus = Annotated[float, Range(0, 1024), RayShare()]
Cpus = Annotated[float, Range(0, 1024)]
Name = Annotated[str, Matching(COMPONENT, NAMED)]
NameOrNone = Annotated[str, Matching(f"({COMPONENT})?", f"{NAMED}, or empty")]
RecipeName = Annotated[str, Matching(f"{COMPONENT}|{OWN_RECIPE}", f"{NAMED}; or package.module:function")]
ModelPath = Annotated[str, Matching(f"{COMPONENT}(/{COMPONENT})*", A_FOLDER)]
StepList = Annotated[str, Schedule()]
IndexList = Annotated[str, Schedule(levels=False)]
Text = Annotated[str, NotEmpty()]
Some = Annotated[tuple[T, ...], NotEmpty()]


def added(default: Any) -> Any:
    """Declare a field that its config gained after workspaces existed. Identities leave it out while it has its default, so
    that artifacts of earlier versions are not refused."""
    return dataclasses.field(default=default, metadata={"added": True})


class Settings:
    """Base class of configs (frozen dataclasses). Building one checks each field against its type."""

    def __post_init__(self) -> None:
        """Raise SettingError for the first field whose value its type does not allow."""
        for name, hint in _hints(type(self)).items():
            if not allowed(getattr(self, name), hint):
                self.refuse(name, described(hint))

    def refuse(self, name: str, expected: str) -> NoReturn:
        """Raise SettingError for field `name`; `expected` says what is allowed."""
        _refuse(f"{type(self).__name__}.{name}", getattr(self, name), expected)

    def require(self, condition: bool, name: str, expected: str) -> None:
        """Raise SettingError as `refuse` does, unless `condition` holds."""
        if not condition:
            self.refuse(name, expected)


def check(name: str, value: Any, hint: Any) -> None:
    """Raise SettingError unless `hint`, one of the types above, allows `value`; `name` appears in the message."""
    if not allowed(value, hint):
        _refuse(name, value, described(hint))


@contextlib.contextmanager
def naming_options(words: Sequence[str]) -> Iterator[None]:
    """Make a SettingError name the option among `words`, a command line, instead of the config's field."""
    try:
        yield
    except SettingError as error:
        raise SettingError(as_option(error, words)) from None


def as_option(error: SettingError, words: Sequence[str]) -> str:
    """Return the error's message with the config's field replaced by the option among `words` that gave the value."""
    setting, _, rest = str(error).partition(" is ")
    shown, field = rest.partition("; expected")[0], setting.rpartition(".")[2]
    given = []
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        option, equals, value = word.partition("=")
        if word.startswith("--") and option.lstrip("-").rpartition(".")[2].replace("-", "_") == field:
            given.append((option, value if equals else following))
    options = [option for option, value in given if _is_shown(value, shown)] or [option for option, _ in given]
    return f"{' or '.join(dict.fromkeys(options)) or setting} is {rest}"


def _is_shown(word: str, shown: str) -> bool:
    try:
        return word == shown or float(word) == float(shown)
    except ValueError:
        return repr(word) == shown


def _refuse(name: str, value: Any, expected: str) -> NoReturn:
    text = repr(value)
    shown = text if len(text) <= SHOWN else text[:SHOWN] + "..."
    raise SettingError(f"{name} is {shown}; expected {expected}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def allowed(value: Any, hint: Any) -> bool:
    """Return whether `value` has the type `hint` and meets the conditions in its metadata. Unknown types pass."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return allowed(value, parts[0]) and all(part.allows(value) for part in parts[1:] if hasattr(part, "allows"))
    if origin in (Union, types.UnionType):
        return any(allowed(value, part) for part in parts)
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        entries = parts[:1] * len(value) if parts[-1] is ... else parts
        return len(value) == len(entries) and all(map(allowed, value, entries))
    if origin is dict:
        return isinstance(value, Mapping) and all(allowed(k, parts[0]) and allowed(v, parts[1]) for k, v in value.items())
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint) if isinstance(hint, type) else True


def described(hint: Any) -> str:
    """Describe the type in words, for the message."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return " ".join([described(parts[0]), *(str(part) for part in parts[1:] if hasattr(part, "allows"))])
    if origin in (Union, types.UnionType):
        return " or ".join(described(part) for part in parts)
    if origin is Literal:
        return " or ".join(map(repr, parts))
    if origin is tuple:
        count = "" if parts[-1] is ... else f"{len(parts)} "
        return f"{count}values, each {described(parts[0])}"
    if origin is dict:
        return f"names with {described(parts[1])} each"
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"}
    return words.get(hint, f"a {getattr(hint, '__name__', hint)}")
