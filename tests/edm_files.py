"""Files in the layout of EDM's releases, with random weights and with source code that must never run."""

from __future__ import annotations

import contextlib
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from beeline.checkpoint import build
from beeline.config import NetworkConfig

SOURCE = "raise SystemExit('the embedded source was run')"
SMALLEST = {"model_channels": 4, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
SMALL = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
NETWORKS = {
    "ddpmpp": ("SongUNet", {"augment_dim": 9}),
    "ncsnpp": (
        "SongUNet",
        {
            "embedding_type": "fourier",
            "channel_mult_noise": 2,
            "encoder_type": "residual",
            "decoder_type": "standard",
            "resample_filter": [1, 3, 3, 1],
            "augment_dim": 9,
        },
    ),
    "adm": ("DhariwalUNet", {"model_channels": 64}),
}


@contextlib.contextmanager
def edm_names() -> Iterator[types.SimpleNamespace]:
    """Make the names in a released pickle importable while a test writes one."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    exec("def _reconstruct_persistent_obj(meta): raise SystemExit('the hook was run')", persistence.__dict__)
    exec("class EasyDict(dict): pass", util.__dict__)
    made = {"torch_utils": types.ModuleType("torch_utils"), "dnnlib": types.ModuleType("dnnlib")}
    made |= {"torch_utils.persistence": persistence, "dnnlib.util": util}
    sys.modules.update(made)
    try:
        yield types.SimpleNamespace(hook=persistence._reconstruct_persistent_obj, EasyDict=util.EasyDict)
    finally:
        for name in made:
            del sys.modules[name]


class Persistent:
    """An object as the persistence hook pickles it."""

    def __init__(self, edm: Any, class_name: str, state: dict[str, Any]) -> None:
        self.edm, self.class_name, self.state = edm, class_name, state

    def __reduce__(self) -> Any:
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": self.class_name, "state": self.state}
        return self.edm.hook, (self.edm.EasyDict(meta),)


def persistent(edm: Any, module: nn.Module, class_name: str, **attributes: Any) -> Any:
    """Convert a module to the released layout; nn.ModuleDict is kept."""
    if isinstance(module, nn.ModuleDict):
        plain = nn.ModuleDict()
        plain.__dict__["_modules"] = OrderedDict(
            (name, persistent(edm, child, type(child).__name__)) for name, child in module.items()
        )
        return plain
    state = {
        "training": False,
        "_parameters": OrderedDict((name, getattr(p, "stand_in", p)) for name, p in module._parameters.items()),
        "_buffers": OrderedDict({"absent": None, **module._buffers}),
        "_modules": OrderedDict(
            (name, None if child is None else persistent(edm, child, type(child).__name__))
            for name, child in module._modules.items()
        ),
        "_non_persistent_buffers_set": set(),
        "_backward_hooks": OrderedDict(),
        **attributes,
    }
    return Persistent(edm, class_name, state)


def network(kind: str, label_dim: int, sizes: dict[str, Any]) -> tuple[Any, Any]:
    """Build a denoiser with random weights, and the keyword arguments that EDM would record for its network."""
    _, extra = NETWORKS[kind]
    recorded = {**sizes, **extra}
    arguments = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in recorded.items()
        if key in NetworkConfig.__dataclass_fields__
    }
    config = NetworkConfig(kind=kind, img_resolution=8, img_channels=3, label_dim=label_dim, **arguments)  # pyright: ignore[reportArgumentType]
    torch.manual_seed(0)
    model = build(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.05)
    return model.eval(), recorded


def released(
    edm: Any,
    kind: str,
    classes: int = 10,
    half: bool = False,
    edit: Callable[[Any], None] | None = None,
    sizes: dict[str, Any] = SMALL,
    **changes: Any,
) -> tuple[bytes, Any]:
    """Return the bytes of a file in the released layout, and the model whose weights it holds. `edit` changes the network
    before it is written; a parameter's attribute `stand_in` is written in its place. `changes` are recorded arguments."""
    model, recorded = network(kind, classes, sizes)
    if edit:
        edit(model.model)
    images = {"img_resolution": 8, "in_channels": 3, "out_channels": 3, "label_dim": classes}
    if half:
        model.half().float()  # what survives in half precision
    recorded = {**images, **recorded, **changes}
    source = model.model.half() if half else model.model
    inner = persistent(edm, source, NETWORKS[kind][0], _init_args=(), _init_kwargs=recorded)
    state = {
        "_parameters": OrderedDict(),
        "_buffers": OrderedDict(),
        "_modules": OrderedDict(model=inner),
        "_init_args": (),
        "_init_kwargs": {
            "img_resolution": 8, "img_channels": 3, "label_dim": recorded["label_dim"], "model_type": NETWORKS[kind][0],
        },
        "sigma_data": np.float64(0.5),
    }  # fmt: skip
    loss = Persistent(edm, "EDMLoss", {"P_mean": -1.2, "P_std": 1.2, "sigma_data": np.float32(0.5)})
    content = {
        "ema": Persistent(edm, "EDMPrecond", state),
        "loss_fn": loss,
        "augment_pipe": None,
        "dataset_kwargs": edm.EasyDict(class_name="training.dataset.ImageFolderDataset", use_labels=True),
    }
    data = pickle.dumps(content)
    model.model.float()
    return data, model


class Call:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def tensor(elements: int, shape: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> Call:
    """Build a tensor of any shape over a storage of `elements` zeros."""
    storage = torch.zeros(elements)._typed_storage()
    return Call(
        torch._utils._rebuild_tensor_v2,  # pyright: ignore[reportAttributeAccessIssue]
        storage,
        offset,
        shape,
        stride,
        False,
        OrderedDict(),
    )
