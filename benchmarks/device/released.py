"""Files in the layout of EDM's released checkpoints, with random weights: pickles that name classes which do not exist."""

from __future__ import annotations

import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

from torch import nn

from beeline.denoiser import Denoiser

NAMES = ("torch_utils", "torch_utils.persistence", "dnnlib", "dnnlib.util")


class _Persistent:
    """An object as the persistence hook pickles it in such files."""

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        self.class_name, self.state = class_name, state

    def __reduce__(self) -> Any:
        meta = {"type": "class", "version": 6, "module_src": "", "class_name": self.class_name, "state": self.state}
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,)


def write_released(model: Denoiser, arguments: dict[str, Any], file: Path) -> None:
    """Write `model`, whose network was built with EDM's `arguments`, to `file`."""
    modules = {name: types.ModuleType(name) for name in NAMES}
    hook = types.FunctionType((lambda meta: meta).__code__, {}, "_reconstruct_persistent_obj")
    hook.__module__, hook.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    modules["torch_utils.persistence"]._reconstruct_persistent_obj = hook  # pyright: ignore[reportAttributeAccessIssue]
    sizes = {"img_resolution": model.img_resolution, "label_dim": model.label_dim}
    channels = {"in_channels": model.img_channels, "out_channels": model.img_channels}
    sys.modules.update(modules)
    try:
        network = _module(model.model, "SongUNet", _init_args=(), _init_kwargs={**sizes, **channels, **arguments})
        state = {
            "_parameters": OrderedDict(),
            "_buffers": OrderedDict(),
            "_modules": OrderedDict(model=network),
            "_init_args": (),
            "_init_kwargs": {**sizes, "img_channels": model.img_channels, "model_type": "SongUNet"},
            "sigma_data": 0.5,
        }
        file.write_bytes(pickle.dumps({"ema": _Persistent("EDMPrecond", state)}))
    finally:
        for name in NAMES:
            del sys.modules[name]


def _module(module: nn.Module, class_name: str, **attributes: Any) -> Any:
    """Convert a module to records; nn.ModuleDict is kept."""
    children = OrderedDict(
        (name, None if child is None else _module(child, type(child).__name__)) for name, child in module._modules.items()
    )
    if isinstance(module, nn.ModuleDict):
        plain = nn.ModuleDict()
        plain.__dict__["_modules"] = children
        return plain
    state = {"_parameters": OrderedDict(module._parameters), "_buffers": OrderedDict(module._buffers), "_modules": children}
    return _Persistent(class_name, {"training": False, **state, **attributes})
