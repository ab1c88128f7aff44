"""EDM's released checkpoints (pickles) into a model folder, read as data: no code of the file is ever run.

    python -m beeline.edm_import edm-cifar10-32x32-cond-vp.pkl --out runs/cifar10/teacher

A released file is a pickle of a dict whose `ema` is the preconditioned network. Every module in it was written by a
persistence hook as (class name, Python source, state), to be rebuilt by executing that source. Here the unpickler admits
a short list of names, none of which is the real thing where the real thing could act: modules become plain records of
their state, NumPy scalars are decoded from their bytes, and storages go through torch's weights_only reader. Any other
name ends the import before anything else is read. The architecture comes from the recorded constructor arguments, the
weights from the recorded state; the names of both are those of beeline's own networks.
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import argparse
import collections
import dataclasses
import hashlib
import io
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from beeline.checkpoint import CONFIG, WEIGHTS, build, dump
from beeline.config import NetworkConfig, from_dict
from beeline.denoiser import Denoiser
from beeline.entry import run_main
from beeline.errors import BeelineError, plain
from beeline.places import local_path

LICENCE = (
    "EDM's released weights are under CC BY-NC-SA 4.0: non-commercial use only, and so is what is derived from them "
    "(NVIDIA, https://github.com/NVlabs/edm)"
)
# What tells DDPM++ and NCSN++ apart; any other mixture of these is an architecture that nobody released.
VARIANTS = {
    "ddpmpp": {
        "embedding_type": "positional",
        "channel_mult_noise": 1,
        "encoder_type": "standard",
        "decoder_type": "standard",
        "resample_filter": [1, 1],
    },
    "ncsnpp": {
        "embedding_type": "fourier",
        "channel_mult_noise": 2,
        "encoder_type": "residual",
        "decoder_type": "standard",
        "resample_filter": [1, 3, 3, 1],
    },
}
# The constructor defaults of EDM's networks: what a file's recorded arguments leave out.
SONGUNET = {
    "augment_dim": 0,
    "model_channels": 128,
    "channel_mult": [1, 2, 2, 2],
    "channel_mult_emb": 4,
    "num_blocks": 4,
    "attn_resolutions": [16],
    "dropout": 0.10,
    "label_dropout": 0,
    **VARIANTS["ddpmpp"],
}
DHARIWALUNET = {
    "augment_dim": 0,
    "model_channels": 192,
    "channel_mult": [1, 2, 3, 4],
    "channel_mult_emb": 4,
    "num_blocks": 3,
    "attn_resolutions": [32, 16, 8],
    "dropout": 0.10,
    "label_dropout": 0,
}
PRECOND = {"label_dim": 0, "use_fp16": False, "sigma_min": 0, "sigma_max": float("inf"), "sigma_data": 0.5}


class Record:
    """A pickled object as data: the name of its class and the attributes it had. Nothing of the class itself."""

    def __init__(self, class_name: str = "ModuleDict", state: Mapping[str, Any] | None = None) -> None:
        self.class_name = class_name
        self.state = dict(state or {})

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.class_name, self.state = "ModuleDict", dict(state)


class _Attributes(dict):
    """Stands in for dnnlib.util.EasyDict."""

    def __setstate__(self, state: Any) -> None:
        self.update(state)


class _Dtype:
    """A NumPy dtype by its code, "f8" say; what else the file says of it (byte order flags) is ignored."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r"[fiu][1248]|b1", code):
            raise BeelineError(f"the file holds a NumPy scalar of type {code!r}; expected a plain number")
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


def _scalar(dtype: _Dtype, data: bytes) -> int | float | bool:
    return np.frombuffer(data, f"<{dtype.code}", count=1)[0].item()


def _persistent(meta: Mapping[str, Any]) -> Record:
    """The persistence hook: takes name and state, leaves the source where it is."""
    if not isinstance(meta, Mapping) or meta.get("type") != "class" or not isinstance(meta.get("state"), Mapping):
        raise BeelineError("the file holds a persistent object of an unknown layout; expected EDM's type 'class', version 6")
    return Record(str(meta["class_name"]), meta["state"])


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> torch.Tensor:
    if not isinstance(storage, torch.TypedStorage):
        raise BeelineError(f"the file holds a tensor over a {type(storage).__name__}; expected a storage")
    count = storage._size()
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else -1
    if min((offset, *size, *stride)) < 0 or last >= count:
        raise BeelineError(f"the file holds a tensor of {size} over a storage of {count} elements: it is damaged")
    return torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage, offset, size, stride)


def _parameter(data: torch.Tensor, *_: Any) -> torch.Tensor:
    return data


ADMITTED: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("dnnlib.util", "EasyDict"): _Attributes,
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch.nn.modules.container", "ModuleDict"): Record,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch.storage", "_load_from_bytes"): _storage,
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        try:
            return ADMITTED[module, name]
        except KeyError:
            raise BeelineError(
                f"the file asks for {module}.{name}, which no released EDM checkpoint does; it was refused and nothing was run"
            ) from None


def read(file: Path) -> Record:
    """The `ema` of a released checkpoint, as records. Raises BeelineError for anything but such a file."""
    try:
        with open(file, "rb") as stream:
            content = _Reader(stream).load()
    except BeelineError as error:
        raise BeelineError(f"{file}: {error}") from None
    except OSError as error:
        raise BeelineError(f"{file} cannot be read: {error}") from None
    except Exception as error:  # unpickling damaged data raises whatever the damage leads to
        raise BeelineError(f"{file} is not a whole pickle ({type(error).__name__}: {error}); download it again") from None
    found = content.get("ema") if isinstance(content, Mapping) else None
    if not isinstance(found, Record):
        keys = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
        raise BeelineError(f"{file} holds {keys}; expected a dict whose 'ema' is a network, as EDM releases them")
    return found


def tensors_of(module: Record, prefix: str = "") -> dict[str, torch.Tensor]:
    """The state dict of a module's records: names as in EDM's own `state_dict()`, float32."""
    found: dict[str, torch.Tensor] = {}
    for kind in ("_parameters", "_buffers"):
        for name, tensor in module.state.get(kind, {}).items():
            if isinstance(tensor, torch.Tensor):
                found[f"{prefix}{name}"] = tensor.to(torch.float32)
    for name, child in module.state.get("_modules", {}).items():
        if isinstance(child, Record):
            found |= tensors_of(child, f"{prefix}{name}.")
    return found


def architecture(precond: Record) -> NetworkConfig:
    """The network that a checkpoint's constructor arguments describe. Raises BeelineError for one we do not have."""
    network = precond.state.get("_modules", {}).get("model")
    if precond.class_name != "EDMPrecond" or not isinstance(network, Record):
        raise BeelineError(f"the network is a {precond.class_name}; expected EDMPrecond (EDM's own preconditioning)")
    outer = PRECOND | precond.state.get("_init_kwargs", {})
    if outer["sigma_data"] != Denoiser.sigma_data:
        raise BeelineError(f"the network has sigma_data {outer['sigma_data']}; expected {Denoiser.sigma_data}")
    defaults = {"SongUNet": SONGUNET, "DhariwalUNet": DHARIWALUNET}.get(network.class_name)
    if defaults is None:
        raise BeelineError(f"the network inside is a {network.class_name}; expected SongUNet or DhariwalUNet")
    inner = dict(network.state.get("_init_kwargs", {}))
    unknown = sorted(set(inner) - set(defaults) - {"img_resolution", "in_channels", "out_channels", "label_dim"})
    if unknown or network.state.get("_init_args") or precond.state.get("_init_args"):
        raise BeelineError(
            f"{network.class_name} was made with arguments unknown to EDM's release: {', '.join(unknown) or 'positional'}"
        )
    arguments = defaults | inner
    kind = "adm"
    if network.class_name == "SongUNet":
        asked = {key: _listed(arguments.pop(key)) for key in VARIANTS["ddpmpp"]}
        kind = next((name for name, variant in VARIANTS.items() if asked == variant), "")
        if not kind:
            raise BeelineError(f"SongUNet with {asked} is neither DDPM++ nor NCSN++ as released")
    channels = arguments.pop("in_channels")
    if channels != arguments.pop("out_channels"):
        raise BeelineError("the network has different input and output channels; expected a denoiser of images")
    arguments.pop("label_dropout")
    return from_dict(NetworkConfig, {"kind": kind, "img_channels": channels, "label_dim": outer["label_dim"]} | arguments)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def convert(file: Path) -> dict[str, bytes]:
    """The files of a model folder, name to bytes, from a released checkpoint."""
    precond = read(file)
    try:
        config = dataclasses.replace(architecture(precond), dropout=0.0)
        model = build(config)
        model.load_state_dict(tensors_of(precond))
    except BeelineError as error:
        raise BeelineError(f"{file}: {error}") from None
    except (RuntimeError, TypeError, ValueError, KeyError) as error:
        raise BeelineError(f"{file}: the weights do not fit the architecture that the file describes: {error}") from None
    source = {"file": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "licence": LICENCE}
    return dump(model.eval(), {"imported": source})


def edm_import(file: Path, out: Path) -> None:
    """Convert a released EDM checkpoint into the model folder `out`. Raises BeelineError; what is in `out` is left alone."""
    for name in (CONFIG, WEIGHTS, "plan.json"):
        if (out / name).exists():
            raise BeelineError(f"{out / name} exists already and is left alone; choose another --out or move it away")
    files = convert(file)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, CONFIG):
            temporary = out / f"{name}.tmp"
            temporary.write_bytes(files[name])
            temporary.replace(out / name)
    except OSError as error:
        raise BeelineError(f"{out} cannot be written ({plain(error)}); choose another --out") from error
    print(f"{out}: {sum(map(len, files.values())) / 2**20:,.1f} MiB. {LICENCE}")


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m beeline.edm_import", description="Convert a released EDM checkpoint.")
    parser.add_argument("file", type=local_path, help="the pickle, as downloaded")
    parser.add_argument("--out", type=local_path, required=True, help="folder for the model, for example runs/cifar10/teacher")
    edm_import(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_main(main)
