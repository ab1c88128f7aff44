"""EDM's pickles as records of plain data: modules by the names of their classes, tensors that are read on demand.

EDM's persistence hook wrote every module of a released file as (class name, Python source, state); loading would execute that
source. Here a reader of plain data (beeline.files.unpickling) admits a short list of names, and none of them is the real
object: modules become records of their state, NumPy scalars and tensors are decoded from their bytes. Any other name ends the
reading at once.

Nothing here copies, compares or prints content of a file before it is known to be small: see beeline.files.unpickling.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from beeline.errors import BeelineError
from beeline.files.unpickling import Bounded, Name, unpickled

MAX_MODULES = 20_000  # EDM's largest network has 1,100
MAX_TENSORS = 50_000  # EDM's largest network has 1,500
MAX_DEPTH = 20  # of nested modules and other nested content; EDM's have 5
MAX_AXES = 8  # of a tensor
MAX_NAME = 100  # characters of a module's or tensor's name
MAX_STORAGE_OPCODES = 100  # of the pickles before a tensor's bytes; there are 50


class Record:
    """A pickled module as data: the name of its class and its attributes, without the class itself."""

    def __init__(self, class_name: str = "ModuleDict", state: Mapping[str, Any] | None = None) -> None:
        self.class_name = class_name
        self.state: Mapping[str, Any] = {} if state is None else state

    def __setstate__(self, state: Any) -> None:
        self.class_name, self.state = "ModuleDict", mapping(state)

    def part(self, name: str) -> Mapping[str, Any]:
        """Return one of the state's dicts, such as `_parameters`; empty if it is missing."""
        return mapping(self.state.get(name, {}))


def mapping(value: Any) -> Mapping[str, Any]:
    """Return `value` if it is a dict. Raises BeelineError otherwise."""
    if not isinstance(value, Mapping):
        raise BeelineError(f"the file holds a {type(value).__name__} where EDM's release has a dict")
    return value


class _Attributes(dict):
    """Stand-in for dnnlib.util.EasyDict and OrderedDict: created empty, then filled."""

    def __init__(self) -> None:
        super().__init__()


class _Dtype:
    """A NumPy dtype by its code, such as "f8"; other content (byte order flags) is ignored."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[fiu][1248]|b1", code):
            raise BeelineError(f"the file holds a NumPy scalar of type {shown(code)}; expected a plain number")
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


def _scalar(dtype: _Dtype, data: bytes) -> int | float | bool:
    return np.frombuffer(data, f"<{dtype.code}", count=1)[0].item()


def _persistent(meta: Any) -> Record:
    """Replace the persistence hook: uses name and state, ignores the source."""
    known = isinstance(meta, Mapping) and meta.get("type") == "class" and isinstance(meta.get("class_name"), str)
    if not known or not isinstance(meta.get("state"), Mapping):
        raise BeelineError("the file holds a persistent object of an unknown layout; expected EDM's type 'class', version 6")
    return Record(meta["class_name"], meta["state"])


@dataclasses.dataclass(frozen=True)
class _Storage:
    """Elements of a tensor: `count` of `dtype` from byte `start` of `data`, as torch.save wrote them."""

    data: bytes
    start: int
    dtype: torch.dtype
    count: int


STORAGES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
}


def _storage(data: bytes) -> _Storage:
    """Parse a storage in torch.save's layout before 1.6: four pickles (magic number, version, byte order, the storage's type
    and size), the list of storages, the number of elements as 8 bytes, the elements."""

    def find(module: str, name: str) -> Callable[..., Any]:
        if module != "torch" or name not in STORAGES:
            raise BeelineError(f"a tensor in the file asks for {module}.{name}; expected one of {', '.join(STORAGES)}")
        return lambda: STORAGES[name]

    bounded = Bounded(io.BytesIO(data), len(data))

    def header(**options: Any) -> Any:
        return unpickled(bounded, find, max_opcodes=MAX_STORAGE_OPCODES, **options)

    _, _, order = header(), header(), header()
    kind, count = header(persistent=lambda described: (described[1], described[4]))
    header()
    stored = int.from_bytes(bounded.read(8), "little")
    dtype = kind.call() if isinstance(kind, Name) else None
    if dtype is None or mapping(order).get("little_endian") is not True:
        raise BeelineError(
            "the file holds a storage of an unknown layout; expected little-endian numbers as torch.save wrote them"
        )
    if count != stored or bounded.left != stored * dtype.itemsize:
        raise BeelineError(f"the file holds a storage of {shown(count)} elements in {bounded.left:,} bytes: it is damaged")
    return _Storage(data, len(data) - bounded.left, dtype, stored)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the file that has not been read yet: a view of a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of bytes in the file."""
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def read(self) -> torch.Tensor:
        """Read the tensor as float32, contiguous."""
        width = self.storage.dtype.itemsize
        elements = np.frombuffer(self.storage.data, f"u{width}", self.storage.count, self.storage.start)
        strides = [step * width for step in self.stride]
        view = np.lib.stride_tricks.as_strided(elements[self.offset :], self.shape, strides)
        return torch.from_numpy(view.copy()).view(self.storage.dtype).to(torch.float32)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, _Storage):
        raise BeelineError(f"the file holds a tensor over a {type(storage).__name__}; expected a storage")
    whole = type(shape) is tuple and type(stride) is tuple and len(shape) == len(stride) <= MAX_AXES
    if not whole or not all(type(n) is int and 0 <= n <= storage.count for n in (offset, *shape, *stride)):
        raise BeelineError(f"the file holds a tensor of {shown(shape)} over {storage.count} elements: it is damaged")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if all(shape) else -1
    if last >= storage.count or math.prod(shape) > storage.count:  # a stride of 0 can repeat elements any number of times
        raise BeelineError(f"the file holds a tensor of {shown(shape)} over {storage.count} elements: it is damaged")
    return Tensor(storage, offset, shape, stride)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def shown(value: Any) -> str:
    """Format a plain value, or numbers in a tuple or list. Other values are shown by type, because their text may be
    endless."""
    if isinstance(value, str | bytes | int | float | bool | None):
        return f"{value!r:.80}" if not isinstance(value, int) or abs(value) < 10**30 else "a very large number"
    if isinstance(value, tuple | list) and len(value) <= 20 and all(isinstance(item, int | float) for item in value):
        return f"[{', '.join(map(shown, value))}]"
    return f"a {type(value).__name__}"


ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("dnnlib.util", "EasyDict"): _Attributes,
    ("collections", "OrderedDict"): _Attributes,
    ("torch.nn.modules.container", "ModuleDict"): Record,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}


def _admitted(module: str, name: str) -> Callable[..., Any]:
    try:
        return ADMITTED[module, name]
    except KeyError:
        raise BeelineError(
            f"the file asks for {module}.{name}, which no released EDM checkpoint does; it was refused and no code was run"
        ) from None


class _Hashed:
    """A stream that computes the SHA-256 of the bytes read from it."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.sha256 = stream, hashlib.sha256()

    def read(self, count: int) -> bytes:
        data = self._stream.read(count)
        self.sha256.update(data)
        return data

    def readline(self, limit: int) -> bytes:
        line = self._stream.readline(limit)
        self.sha256.update(line)
        return line


def read(file: Path) -> tuple[Record, str]:
    """Read the `ema` of a released checkpoint as records, and the SHA-256 of the file, computed from the same bytes.

    Raises BeelineError for any other file, without naming it.
    """
    with open(file, "rb") as stream:
        hashed: Any = _Hashed(stream)
        try:
            content = unpickled(Bounded(hashed, file.stat().st_size), _admitted)
        except EOFError as error:
            raise BeelineError(f"the file is cut off ({error}); download it again") from None
        while hashed.read(1 << 20):
            pass
    network = content.get("ema") if isinstance(content, Mapping) else None
    if not isinstance(network, Record):
        keys = ", ".join(shown(key) for key in list(content)[:10]) if isinstance(content, Mapping) else type(content).__name__
        raise BeelineError(f"the file holds {keys}; expected a dict whose 'ema' is a network, as EDM releases them")
    return network, hashed.sha256.hexdigest()


def tensors_of(network: Record) -> dict[str, Tensor]:
    """Collect the tensors of a network's records by the names of EDM's own `state_dict()`. Raises BeelineError if there are too
    many."""
    collected: dict[str, Tensor] = {}
    waiting = [("", network, 0)]
    for _ in range(MAX_MODULES):
        if not waiting:
            return collected
        prefix, module, depth = waiting.pop()
        tensors = [item for kind in ("_parameters", "_buffers") for item in module.part(kind).items()]
        collected |= {f"{prefix}{named(name)}": tensor for name, tensor in tensors if isinstance(tensor, Tensor)}
        children = [(name, child) for name, child in module.part("_modules").items() if isinstance(child, Record)]
        if len(collected) > MAX_TENSORS or (depth == MAX_DEPTH and children):
            break
        waiting += [(f"{prefix}{named(name)}.", child, depth + 1) for name, child in children]
    raise BeelineError(
        f"the file's network has more than {MAX_MODULES:,} modules or {MAX_TENSORS:,} tensors, or is nested more than "
        f"{MAX_DEPTH} deep; expected one of EDM's"
    )


def named(name: Any) -> str:
    """Return `name` if it is a short text. Raises BeelineError otherwise."""
    if not isinstance(name, str) or len(name) > MAX_NAME:
        raise BeelineError(f"the file holds a module or tensor named {shown(name)}; expected a short text")
    return name
