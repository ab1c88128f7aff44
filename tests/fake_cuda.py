"""A GPU to test against on machines without one: tensors that hold values in main memory and say they are on cuda:0.

`FakeTensorMode` has no values, and its backward pass ends the process on a CPU build of PyTorch. Here a tensor is on the
"GPU" if its storage is marked so. A dispatch mode sees every operation, those of backward passes and optimisers too: it
refuses operands on different devices, as CUDA does, computes on the CPU and marks what comes out. Python's doors to a device
(`.to`, `device=`, generators, `.numpy()`, autocast) are patched; C++ never hears of CUDA.

What it cannot see: CUDA's kernels and their precision, asynchrony, memory, streams and graphs, autocast's own list of
operations (the CPU's is taken), torch.compile, several GPUs, threads that are started within it, and code that asks C++ for a
tensor's device. With a real GPU `fake_cuda` gives that one.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo  # here: it cannot be imported while torch is patched
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, GPU = torch.device("cpu"), torch.device("cuda:0")
ATEN = torch.ops.aten
COPIES = {ATEN.copy_.default, ATEN._foreach_copy_.default}
INDEXED = {ATEN.index.Tensor, ATEN.index_put_.default, ATEN.index_put.default, ATEN._index_put_impl_.default}
WAITS = {ATEN._local_scalar_dense.default, ATEN.nonzero.default, ATEN.masked_select.default}
FACTORIES = (
    "tensor", "as_tensor", "empty", "zeros", "ones", "full", "rand", "randn", "randint", "randperm", "arange", "linspace",
    "eye", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like",
)  # fmt: skip
METHODS = ("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")
_device_of = torch._C.TensorBase.device.__get__  # pyright: ignore[reportAttributeAccessIssue]


class _Marks:
    """The storages on the GPU. A weak reference prevents an address from being reused, so that no mark goes stale."""

    def __init__(self) -> None:
        self.refs: dict[int, StorageWeakRef] = {}

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.refs

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.refs[storage._cdata] = StorageWeakRef(storage)
        return tensor


class WaitError(RuntimeError):
    """The host would wait for the GPU."""


class _Mode(TorchDispatchMode):
    """Checks devices and carries marks through every operation.

    C++ makes tensors of its own on the way, where it believes its operands to be (`F.one_hot`): they are where they are used.
    Those that Python makes pass its patched doors, which say so by `from_python`.
    """

    waiting = True  # whether the host may wait for the GPU

    def __init__(self, marks: _Marks) -> None:
        super().__init__()
        self.marks, self.anywhere, self.from_python = marks, _Marks(), False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_gpu = [tensor in self.marks for tensor in tensors]
        if any(on_gpu) and func not in COPIES:
            self._check(func, args, tensors, on_gpu)
        if any(on_gpu) and not self.waiting and (func in WAITS or (func in INDEXED and _has_mask(args[1]))):
            raise WaitError(f"the host would wait for the GPU: {func}")
        known = {tensor.untyped_storage()._cdata for tensor in tensors if tensor not in self.anywhere}
        made = func(*args, **kwargs)
        of_its_own = not tensors and not self.from_python
        if any(on_gpu) or of_its_own:
            for leaf in tree_leaves(made):
                if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in known:
                    (self.anywhere if of_its_own else self.marks).add(leaf)
        return made

    def _check(self, func: Any, args: Any, tensors: list[torch.Tensor], on_gpu: list[bool]) -> None:
        if func in INDEXED and args[0] in self.marks:
            return  # indices may be on the CPU
        others = [tensor for tensor, here in zip(tensors, on_gpu, strict=True) if not here]
        strangers = [tensor for tensor in others if tensor.ndim > 0 and tensor not in self.anywhere]
        if strangers:
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {func} got cuda:0 and cpu, shape {tuple(strangers[0].shape)}"
            )


class _Generator(torch.Generator):
    """A CPU generator that remembers the device it was requested for."""

    said: torch.device

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls)
        made.said = GPU if _is_gpu(device) else CPU
        return made

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.said


class _Autocast(torch.autocast):
    """The CPU's autocast, whatever the device."""

    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu", *args, **kwargs)


def _has_mask(indices: Any) -> bool:
    """Whether one of the indices is a mask, whose number of entries the host must know."""
    return any(isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in indices)


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _moves(arguments: Any, options: dict[str, Any]) -> Any:
    """Return the device among the arguments of Tensor.to, or None."""
    candidates = [*arguments, options.get("device"), options.get("other")]
    for one in candidates:
        if isinstance(one, torch.Tensor):
            return one.device
        if isinstance(one, torch.device | str):
            return torch.device(one)
    return None


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """Within `fake_cuda`, raise WaitError where the host would wait for results of the GPU: `item`, `if tensor`, `cpu`, masks
    as indices. Copies from the CPU to the GPU are allowed. No effect on a real GPU."""
    _Mode.waiting = False
    try:
        yield
    finally:
        _Mode.waiting = True


@contextlib.contextmanager
def fake_cuda() -> Iterator[torch.device]:
    """Provide a GPU for the block: the machine's own, or a fake one."""
    if torch.cuda.is_available():
        yield GPU
        return
    marks, patch = _Marks(), pytest.MonkeyPatch()
    mode = _Mode(marks)

    def place(tensor: torch.Tensor, device: Any) -> torch.Tensor:
        """Copy to the device, connected to `tensor` for gradients."""
        made = tensor.clone(memory_format=torch.preserve_format)  # a copy of a GPU's tensor is on the GPU, so:
        marks.refs.pop(made.untyped_storage()._cdata, None)
        return marks.add(made) if _is_gpu(device) else made

    def factory(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            source = args[0] if args and isinstance(args[0], torch.Tensor) else None
            device = kwargs.get("device")
            if device is None:
                device = source.device if source is not None else CPU
            generator = kwargs.get("generator")
            if generator is not None and generator.device.type != torch.device(device).type:
                raise RuntimeError(f"Expected a {device!r} device type for generator but found {generator.device.type!r}")
            if "device" in kwargs:
                kwargs["device"] = CPU
            mode.from_python = True
            try:
                made = original(*args, **kwargs)
            finally:
                mode.from_python = False
            if _is_gpu(device) != (made in marks):
                made = place(made.detach(), device).requires_grad_(made.requires_grad)
            return made

        return functools.wraps(original)(make)

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        target = _moves(args, kwargs)
        stays = target is None or target.type == self.device.type
        if stays and len(args) + len(kwargs) == 1 and target is not None:
            return self
        if not (stays or mode.waiting or _is_gpu(target)):
            raise WaitError("the host would wait for the GPU: a copy to the CPU")
        args = tuple(CPU if isinstance(one, torch.device | str) else one for one in args)
        if "device" in kwargs:
            kwargs["device"] = CPU
        return move(self if stays else place(self, target), *args, **kwargs)

    def device(self: torch.Tensor) -> torch.device:
        own = _device_of(self)
        return GPU if own.type == "cpu" and self in marks else own

    def only_on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self in marks:
                raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
            return original(self, *args, **kwargs)

        return call

    move = torch.Tensor.to
    for name in FACTORIES:
        patch.setattr(torch, name, factory(getattr(torch, name)))
    for name in METHODS:
        patch.setattr(torch.Tensor, name, factory(getattr(torch.Tensor, name)))
    for name in ("numpy", "__array__"):
        patch.setattr(torch.Tensor, name, only_on_cpu(getattr(torch.Tensor, name)))
    patch.setattr(torch.Tensor, "to", to)
    patch.setattr(torch.Tensor, "cpu", lambda self: to(self, CPU))
    patch.setattr(torch.Tensor, "cuda", lambda self: to(self, GPU))
    patch.setattr(torch.Tensor, "device", property(device), raising=False)
    patch.setattr(torch.Tensor, "is_cuda", property(lambda self: device(self) == GPU), raising=False)
    patch.setattr(torch, "Generator", _Generator)
    patch.setattr(torch, "autocast", _Autocast)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "get_device_name", lambda *_: "fake")
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    patch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 2**20)
    try:
        with mode:
            yield GPU
    finally:
        patch.undo()
