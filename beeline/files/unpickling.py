"""Read pickles as data, within limits: a stack machine that knows only the opcodes of plain values and of admitted names.

Python's own unpickler, even if restricted by `find_class`, does what a file asks for. Ten bytes reserve 3 GB (an index of the
memo), forty nested tuples take hours (their hash, if one is a key), and BUILD writes into any object on the stack. Here
every length is compared with the bytes that are left, keys are plain values, and the number of opcodes is limited.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO, Literal

MAX_BYTES = 1 << 32  # of a pickle; EDM's largest release has 1.2 GB
MAX_OPCODES = 500_000  # EDM's largest network takes about 70,000
MAX_LINE = 10_000  # bytes of a number, string or name that ends with its line

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_SET": set}
NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
TEXTS = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
BYTES = {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
OLD_STRINGS = {"STRING", "SHORT_BINSTRING", "BINSTRING"}  # strings of Python 2
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
PUT, GET = {"PUT", "BINPUT", "LONG_BINPUT"}, {"GET", "BINGET", "LONG_BINGET"}
IGNORED = {"PROTO", "FRAME"}
KEYS = (str, bytes, int, float, type(None))  # no tuples: a hash takes time exponential in the depth, if parts are shared


class Bounded:
    """The next `size` bytes of a stream; reserves no memory for bytes that do not exist."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        if size > MAX_BYTES:
            raise ValueError(f"it has {size:,} bytes; expected at most {MAX_BYTES:,}")
        self._stream, self.left = stream, size

    def read(self, count: int) -> bytes:
        """Read exactly `count` bytes. Raises EOFError if fewer are left."""
        data = self._stream.read(count) if 0 <= count <= self.left else b""
        if len(data) != count:
            raise EOFError(f"it announces {count:,} bytes, but only {self.left:,} are left")
        self.left -= count
        return data

    def readline(self) -> bytes:
        """Read the bytes up to and including the next line feed."""
        line = self._stream.readline(min(self.left, MAX_LINE))
        self.left -= len(line)
        return line


def unpickled(
    stream: Bounded,
    find: Callable[[str, str], Callable[..., Any]],
    *,
    strings: Literal["text", "bytes"] = "text",
    persistent: Callable[[Any], Any] | None = None,
    max_opcodes: int = MAX_OPCODES,
) -> Any:
    """Read the object of the pickle that begins here; afterwards the stream is at the byte after it.

    `find(module, name)` returns the stand-in for a name, or raises. Stand-ins are called with arguments from the file, and so
    is `__setstate__` of their results. They must neither copy nor print their arguments: a file of a few bytes can pass a
    large object many times, and nest it so that its text is endless. `strings`: the type for strings of Python 2. `persistent`
    resolves persistent ids.

    Damaged data can raise anything; the caller handles it (beeline.errors.reading).
    """
    machine = _Machine(find, strings, persistent)
    source: Any = stream  # genops needs only `read` and `readline`
    for count, (opcode, argument, _) in enumerate(pickletools.genops(source)):
        if count >= max_opcodes:
            raise ValueError(f"it has more than {max_opcodes:,} opcodes")
        if opcode.name == "STOP":
            break
        machine.step(opcode.name, argument)
    return machine.stack.pop()


class Name:
    """Stand-in for a name of the file. Only these are called."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call


class _Machine:
    """State of unpickling: a stack, the stacks below its marks, and the memo."""

    def __init__(
        self,
        find: Callable[[str, str], Callable[..., Any]],
        strings: Literal["text", "bytes"],
        persistent: Callable[[Any], Any] | None,
    ) -> None:
        self.find, self.strings, self.persistent = find, strings, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Execute one opcode."""
        if name in IGNORED:
            return
        if name in PUT:
            self.memo[int(argument)] = self.stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif name == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"):
            self._change(name)
        elif name in ("POP", "POP_MARK"):
            self._marked() if name == "POP_MARK" or not self.stack else self.stack.pop()
        else:
            value = self._value(name, argument)  # may replace the stack
            self.stack.append(value)

    def _value(self, name: str, argument: Any) -> Any:
        """Return the value that an opcode pushes onto the stack."""
        if name in CONSTANTS:
            return CONSTANTS[name]
        if name in EMPTY:
            return EMPTY[name]()
        if name in NUMBERS or name in TEXTS or name in BYTES:
            return argument
        if name in OLD_STRINGS:
            return argument.encode("latin-1") if self.strings == "bytes" else argument
        if name in GET:
            return self.memo[int(argument)]
        if name in TUPLES:
            return tuple(self._popped(TUPLES[name]))
        if name in ("TUPLE", "LIST"):
            return tuple(self._marked()) if name == "TUPLE" else self._marked()
        if name == "DICT":
            return _fill({}, self._marked())
        if name in ("GLOBAL", "STACK_GLOBAL"):
            module, attribute = argument.split(" ", 1) if name == "GLOBAL" else self._popped(2)
            return Name(self._found(module, attribute))
        if name in ("REDUCE", "NEWOBJ"):
            name_of, arguments = self._popped(2)
            if not isinstance(name_of, Name) or type(arguments) is not tuple:
                raise TypeError(f"it calls a {type(name_of).__name__} with a {type(arguments).__name__}")
            return name_of.call(*arguments)
        if name == "BINPERSID" and self.persistent is not None:
            return self.persistent(self.stack.pop())
        raise ValueError(f"opcode {name} does not belong to plain data")

    def _change(self, name: str) -> None:
        """Change the object below an opcode's arguments on the stack."""
        if name == "BUILD":
            state = self.stack.pop()
            restore = getattr(self.stack[-1], "__setstate__", None)
            if restore is None:
                raise TypeError(f"it sets the state of a {type(self.stack[-1]).__name__}")
            restore(state)
            return
        values = self._popped({"APPEND": 1, "SETITEM": 2}[name]) if name in ("APPEND", "SETITEM") else self._marked()
        target, kind = self.stack[-1], {"APPEND": list, "APPENDS": list, "ADDITEMS": set}.get(name, dict)
        if not isinstance(target, kind):
            raise TypeError(f"{name} is applied to a {type(target).__name__}")
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(_key(value) for value in values)
        else:
            _fill(target, values)

    def _found(self, module: Any, attribute: Any) -> Callable[..., Any]:
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise TypeError(f"it names a {type(module).__name__} and a {type(attribute).__name__}")
        return self.find(module, attribute)

    def _popped(self, count: int) -> list[Any]:
        values = self.stack[-count:]
        if len(values) != count:
            raise IndexError("it pops more values than the stack holds")
        del self.stack[-count:]
        return values

    def _marked(self) -> list[Any]:
        values, self.stack = self.stack, self.below.pop()
        return values


def _fill(target: dict[Any, Any], values: list[Any]) -> dict[Any, Any]:
    for key, value in zip(values[::2], values[1::2], strict=True):
        target[_key(key)] = value
    return target


def _key(value: Any) -> Any:
    if not isinstance(value, KEYS):
        raise TypeError(f"a {type(value).__name__} is a key; expected a text or number")
    return value
