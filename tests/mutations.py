"""Damaged and hostile files for tests of readers: seeded mutations of good files, and a watch over the effects of reading them.

A reader returns a result or raises BeelineError for any bytes. It runs no code of the file, opens nothing for writing and stays
within its memory limit. BEELINE_FUZZ=20 tries twenty times as many mutations as continuous integration.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import dataclasses
import itertools
import json
import os
import pickletools
import random
import re
import resource
import struct
import sys
import tempfile
import threading
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from beeline.errors import BeelineError

CASES = int(os.environ.get("BEELINE_FUZZ", "1"))
MEMORY = 1 << 28  # bytes that reading a small file may take, above what the process has
NUMBERS = (0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 10**8, 2**63, 10**25, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "x", "../../x",
    "0", "é\n\x1b[31m", [], {}, [[]], [0, "a"], {"a": 1},
)  # fmt: skip
WORDS = (b"null", b"true", b"[]", b"{}", b"-1", b"1e999", b"NaN", b'""', b'"x"', b"[" * 50, b"9" * 50)

# Bytes ------------------------------------------------------------------------------------------------------------------


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return a copy of `data` with one to four changes, each of a kind drawn from below."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(KINDS)(data, rng) if data else rng.randbytes(rng.randrange(16))
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def _byte(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.randbytes(1) + data[at + 1 :]


def _number(data: bytes, rng: random.Random) -> bytes:
    """Replace a length or count, 1 to 8 bytes of either order, by an extreme one."""
    size = rng.choice((1, 2, 4, 8))
    at, value = rng.randrange(len(data)), rng.choice(NUMBERS) % (1 << 8 * size)
    return data[:at] + value.to_bytes(size, rng.choice(("little", "big"))) + data[at + size :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _remove(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.choice((1, 1, 4, 64)) :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start, target, size = rng.randrange(len(data)), rng.randrange(len(data)), rng.choice((1, 4, 16, 256))
    return data[:target] + data[start : start + size] + data[target:]


def _insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + rng.choice((*WORDS, rng.randbytes(4))) + data[at:]


def _digits(data: bytes, rng: random.Random) -> bytes:
    """Replace a number or word in text by another one."""
    words = list(re.finditer(rb"-?\d+|null|true|false|\"[^\"]{0,30}\"", data))
    if not words:
        return _byte(data, rng)
    word, value = rng.choice(words), rng.choice((*WORDS, str(rng.choice(NUMBERS)).encode()))
    return data[: word.start()] + value + data[word.end() :]


KINDS = (_flip, _flip, _byte, _number, _number, _cut, _remove, _repeat, _insert, _digits)

# Structure --------------------------------------------------------------------------------------------------------------


def mutated_value(value: Any, rng: random.Random) -> Any:
    """Copy a JSON value; one entry, drawn at any depth, gets another value or type, or is removed or doubled."""
    value = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in range(len(node)) if isinstance(node, list) else list(node):
            places.append((node, key))
            if isinstance(node[key], list | dict):
                walk(node[key])

    if isinstance(value, list | dict):
        walk(value)
    if not places or rng.random() < 0.02:
        return rng.choice(VALUES)
    node, key = rng.choice(places)
    action = rng.random()
    if action < 0.15:
        del node[key]
    elif action < 0.25 and isinstance(node, list):
        node.insert(key, node[key])
    elif action < 0.35:
        other, at = rng.choice(places)
        with contextlib.suppress(IndexError, KeyError):
            node[key] = json.loads(json.dumps(other[at]))
    else:
        node[key] = rng.choice(VALUES)
    return value


def mutated_json(value: Any, rng: random.Random) -> bytes:
    """Return the text of a mutated value, the mutated text of a value, or a text that is nested too deeply."""
    if rng.random() < 0.01:
        depth = rng.choice((100, 2000, 100_000))
        return b"[" * depth + b"]" * depth
    if rng.random() < 0.2:
        return mutated(json.dumps(value).encode(), rng)
    return json.dumps(mutated_value(value, rng)).encode()


def safetensors(header: Any, data: bytes) -> bytes:
    """Build a safetensors file with this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# Opcodes that a mutated pickle gains: values, changes of the stack, lengths and indices beyond it, names and calls.
OPCODES = (
    *(bytes([code]) for code in b"]})(tldasue0N12Rb\x81\x82\x85\x86\x87\x88\x8f\x90\x91\x93\x94\x97\x98Qo."),
    *(b"h\x00", b"j\x00\x00\x00\x00", b"r\xff\xff\xff\xff", b"q\x05", b"Pid\n", b"\x80\x05", b"\x95" + bytes(8)),
    *(b"K\x05", b"J\xff\xff\xff\x7f", b"I-1\n", b"L" + b"9" * 5000 + b"L\n", b"G\x7f\xf8" + bytes(6)),
    *(b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"\x8b\xff\xff\xff\x7f", b"B\xff\xff\xff\x7f", b"\x8e" + b"\xff" * 7 + b"\x7f"),
    *(b"\x96" + bytes(6) + b"\x10\x00", b"X\x03\x00\x00\x00ema", b"\x8c\x02os\x8c\x06system\x93", b"\x8c\x04exit"),
    *(b"cos\nsystem\n", b"cbuiltins\nexec\n", b"ios\nsystem\n"),
    *(b"]" * 3000, b"\x85" * 3000, b"h\x01h\x01\x86q\x01" * 80),
)


def pickle_parts(data: bytes) -> list[bytes]:
    """List the opcodes of a pickle, each with its argument."""
    starts = [int(position or 0) for _, _, position in pickletools.genops(data)]
    return [data[start:end] for start, end in itertools.pairwise([*starts, len(data)])]


def mutated_parts(parts: list[bytes], rng: random.Random) -> bytes:
    """Return a pickle with one to three opcodes removed, doubled, exchanged, changed or replaced."""
    parts = list(parts)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        action = rng.randrange(6)
        if action == 0:
            parts[at : at + 1] = []
        elif action == 1:
            parts[at:at] = parts[other : other + rng.choice((1, 1, 5, 50))]
        elif action == 2:
            parts[at], parts[other] = parts[other], parts[at]
        elif action == 3:
            parts[at] = mutated(parts[at], rng)
        elif action == 4:
            parts[at] = rng.choice(OPCODES)
        else:
            parts.insert(at, rng.choice(OPCODES))
        parts = parts or [b"."]
    return b"".join(parts)


# Watching -----------------------------------------------------------------------------------------------------------------

FORBIDDEN = {
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "os.startfile", "subprocess.Popen",
    "pty.spawn", "pickle.find_class", "socket.connect", "socket.bind",
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.link", "os.symlink", "shutil.rmtree", "ctypes.dlopen",
}  # fmt: skip
OWN = (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__), str(Path(__file__).parent.parent))
WRITING = {"os.remove", "os.rename", "os.rmdir", "os.mkdir"}  # what commands do that write a result
_seen: list[str] | None = None  # what the hook has noticed; None while nobody watches
_thread = 0  # the thread that reads; other threads of the tests' process (Ray's, a server's) may do what they like
_hooked = False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None or threading.get_ident() != _thread:
        return
    if event in FORBIDDEN:
        _seen.append(f"{event} {arguments!r:.200}")
    elif event == "open":
        name, mode, flags = arguments
        if (isinstance(mode, str) and set(mode) & set("wax+")) or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            _seen.append(f"open {name!r} {mode}")
    elif event in ("exec", "compile", "import"):
        _code(event, arguments)


def _code(event: str, arguments: tuple[Any, ...]) -> None:
    """Return whether code may run: modules of this environment may be imported late, code from elsewhere may not."""
    assert _seen is not None
    if sys._getframe(2).f_code.co_filename in (typing.__file__, dataclasses.__file__, ast.__file__):
        return  # annotations are evaluated, literals parsed
    if event == "import":
        module = str(arguments[0]).partition(".")[0]
        unexpected = module not in sys.modules and module not in sys.stdlib_module_names
        name = module
    else:
        name = str(getattr(arguments[0], "co_filename", "") if event == "exec" else arguments[1])
        unexpected = not name.startswith((*OWN, "<frozen"))
    if unexpected:
        _seen.append(f"{event} {name}")


@contextlib.contextmanager
def watched(writes: bool = False) -> Iterator[None]:
    """Fail if the block runs code, starts processes, connects or, unless it `writes`, opens a file for writing."""
    global _seen, _thread, _hooked
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True
    _seen, _thread = [], threading.get_ident()
    try:
        yield
        seen = [one for one in _seen if not (writes and one.split()[0] in ("open", *WRITING))]
        assert not seen, seen
    finally:
        _seen = None


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


@contextlib.contextmanager
def bounded(memory: int = MEMORY) -> Iterator[None]:
    """Limit the process to `memory` bytes more than it has reserved; without Linux's /proc, do nothing."""
    if not os.path.exists("/proc/self/status"):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    limit = _status("VmSize") + memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _ran_out(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def outcomes(
    read: Callable[[bytes], Any], cases: Iterable[bytes], *, memory: int = MEMORY, writes: bool = False
) -> collections.Counter[str]:
    """Count how often `read` returned a result, and how often it raised BeelineError. Fails on anything else: another
    exception, a message of several lines, code that ran, more than `memory` bytes."""
    counts: collections.Counter[str] = collections.Counter()
    with bounded(memory):
        for data in cases:
            caught = None
            with watched(writes):
                try:
                    read(data)
                except Exception as error:
                    caught = error
            if caught is None:
                counts["result"] += 1
                continue
            message = f"{type(caught).__name__}: {caught}"
            assert isinstance(caught, BeelineError), f"{message}. {described(data)}"
            assert not _ran_out(caught), f"{message}: it asked for too much memory. {described(data)}"
            assert str(caught).isprintable(), f"{message!r}. {described(data)}"
            counts["BeelineError"] += 1
    return counts


def described(data: bytes) -> str:
    """Describe a failing case so that it can be repeated: its bytes if they are few, otherwise a file that holds them."""
    if len(data) <= 400:
        return f"The file: {data!r}"
    path = Path(tempfile.gettempdir()) / f"beeline-fuzz-{os.getpid()}.bin"
    path.write_bytes(data)
    return f"The file: {path}"
