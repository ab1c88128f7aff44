"""Convert EDM's released checkpoints (pickles) to model folders. They are read as data: no code of the file is ever run.

    python -m beeline.edm_import edm-cifar10-32x32-cond-vp.pkl --out runs/cifar10/teacher

The file is read as records of plain data (beeline.files.edm_pickle). The architecture comes from the recorded constructor
arguments, the weights from the recorded state. The names of both match beeline's own networks.

Files are untrusted. Before a network is built, the names and shapes of its tensors are compared with those in the file, so that
no file takes more memory or time than its own size justifies.
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beeline.checkpoint import CONFIG, WEIGHTS, build, dump, layers_of, misfit, write_model
from beeline.config import NetworkConfig, from_dict
from beeline.denoiser import Denoiser
from beeline.entry import run_main
from beeline.errors import BeelineError, reading
from beeline.files.edm_pickle import Record, named, read, shown, tensors_of
from beeline.files.filetypes import checked_file, torch_names
from beeline.files.names import PLAN
from beeline.files.places import local_path

MAX_LIST = 64  # entries of a constructor's argument, such as channel_mult
EXPECTED = "a network as EDM releases it, such as edm-cifar10-32x32-cond-vp.pkl"
PICKLE = b"\x80"  # start of pickle protocol 2 and later
LICENCE = (
    "EDM's released weights are under CC BY-NC-SA 4.0: non-commercial use only, and so is what is derived from them "
    "(NVIDIA, https://github.com/NVlabs/edm)"
)
# These settings distinguish DDPM++ from NCSN++; EDM released no other combination of them.
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
# The constructor defaults of EDM's networks, for arguments that a file does not record.
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


def _refuse_other_kinds(file: Path) -> None:
    """Raise BeelineError, naming the kind of the file, unless its first bytes are those of a pickle."""
    kind, head = checked_file(file, EXPECTED)
    if not kind and head[:1] == PICKLE:
        return
    names = torch_names(file) if kind in ("a zip archive", "a file of torch.save") else set()
    if {"net", "optimizer_state"} <= names:
        kind, fix = "a state to resume EDM's training from", "use the network-snapshot-*.pkl in the same folder"
    elif any(name.startswith(("input_blocks.", "time_embed.")) for name in names):
        kind = "a state dict in OpenAI's layout (guided diffusion, consistency models)"
        fix = "Beeline does not support networks of that layout"
    elif names:
        kind, fix = "a file of torch.save", "use the .pkl of the release, not a state dict"
    elif kind in ("a web page", "an empty file") or "Git LFS" in kind:
        fix = "download the file again; the server or the browser saved something else"
    elif kind == "a safetensors file":
        fix = "a model of Beeline needs no import: put it into a folder together with its config.json"
    else:
        kind, fix = kind or f"not a pickle (it begins with {head[:8]!r})", "use the .pkl itself"
    raise BeelineError(f"{file} is {kind}; expected {EXPECTED}: {fix}")


def architecture(precond: Record) -> NetworkConfig:
    """Return the network that a checkpoint's constructor arguments describe. Raises BeelineError if it is not supported."""
    network = precond.part("_modules").get("model")
    if precond.class_name == "Precond":
        raise BeelineError(
            "the network is one of EDM2 (Precond); expected EDMPrecond. Beeline does not support EDM2's networks"
        )
    if precond.class_name != "EDMPrecond" or not isinstance(network, Record):
        raise BeelineError(f"the network is a {precond.class_name}; expected EDMPrecond (EDM's own preconditioning)")
    outer = PRECOND | _plain(precond.part("_init_kwargs"))
    if outer["sigma_data"] != Denoiser.sigma_data:
        raise BeelineError(f"the network has sigma_data {shown(outer['sigma_data'])}; expected {Denoiser.sigma_data}")
    defaults = {"SongUNet": SONGUNET, "DhariwalUNet": DHARIWALUNET}.get(network.class_name)
    if defaults is None:
        raise BeelineError(f"the network inside is a {network.class_name}; expected SongUNet or DhariwalUNet")
    inner = _plain(network.part("_init_kwargs"))
    unknown = sorted(set(inner) - set(defaults) - {"img_resolution", "in_channels", "out_channels", "label_dim"})
    if unknown or network.state.get("_init_args") or precond.state.get("_init_args"):
        raise BeelineError(
            f"{network.class_name} was made with arguments unknown to EDM's release: {', '.join(unknown) or 'positional'}"
        )
    arguments = defaults | inner
    kind = "adm"
    if network.class_name == "SongUNet":
        requested = {key: arguments.pop(key) for key in VARIANTS["ddpmpp"]}
        kind = next((name for name, variant in VARIANTS.items() if requested == variant), "")
        if not kind:
            text = ", ".join(f"{key} {shown(value)}" for key, value in requested.items())
            raise BeelineError(f"SongUNet with {text} is neither DDPM++ nor NCSN++ as released")
    channels = arguments.pop("in_channels")
    if channels != arguments.pop("out_channels"):
        raise BeelineError("the network has different input and output channels; expected a denoiser of images")
    arguments.pop("label_dropout")
    described = {"kind": kind, "img_channels": channels, "label_dim": outer["label_dim"]} | arguments | {"dropout": 0.0}
    return from_dict(NetworkConfig, described)


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded arguments if they are numbers, texts and lists of numbers; tuples become lists."""
    plain: dict[str, Any] = {}
    for name, value in arguments.items():
        value = list(value) if isinstance(value, tuple) else value
        items = value if isinstance(value, list) else [value]
        if len(items) > MAX_LIST or not all(isinstance(item, str | int | float | None) for item in items):
            raise BeelineError(
                f"the file holds the argument {shown(name)} as {shown(value)}; expected a number or a few numbers"
            )
        plain[named(name)] = value
    return plain


def convert(file: Path) -> dict[str, bytes]:
    """Convert a released checkpoint to the files of a model folder, name to bytes. Raises BeelineError for any other file."""
    _refuse_other_kinds(file)
    with reading(f"{file} is not {EXPECTED}", "none of its code was run. If it should be one, its download is damaged"):
        try:
            return _converted(file)
        except BeelineError as error:
            raise BeelineError(f"{file}: {error}") from None


def _converted(file: Path) -> dict[str, bytes]:
    precond, sha256 = read(file)
    config, tensors = architecture(precond), tensors_of(precond)
    size = sum(tensor.size for tensor in tensors.values())
    if size > file.stat().st_size:
        raise BeelineError(
            f"the file's tensors have {size:,} bytes, more than the file itself; several tensors share the same bytes"
        )
    wrong = misfit(lambda: build(config), layers_of(config), {name: tensor.shape for name, tensor in tensors.items()})
    if wrong:
        raise BeelineError(f"the weights do not fit the architecture that the file describes: {wrong}")
    model = build(config)
    model.load_state_dict({name: tensor.read() for name, tensor in tensors.items()})
    diverged = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    if diverged:
        raise BeelineError(
            f"the file holds NaN or infinite weights in {len(diverged)} tensors, {diverged[0]} for example; use a network "
            "from before its training diverged"
        )
    return dump(model.eval(), {"imported": {"file": file.name, "sha256": sha256, "licence": LICENCE}})


def edm_import(file: Path, out: Path) -> None:
    """Convert a released EDM checkpoint to the model folder `out`. Raises BeelineError; existing files in `out` are kept."""
    for name in (CONFIG, WEIGHTS, PLAN):
        if os.path.exists(out / name):
            raise BeelineError(f"{out / name} already exists and was not changed; choose another --out or move it away")
    files = convert(file)
    write_model(files, out)
    about = json.loads(files[CONFIG])["about"]["imported"]
    print(f"{out}: {sum(map(len, files.values())) / 2**20:,.1f} MiB from {file}, SHA-256 {about['sha256']}. {LICENCE}")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m beeline.edm_import", description="Convert a released EDM checkpoint.")
    parser.add_argument("file", type=local_path, help="the pickle, as downloaded")
    parser.add_argument("--out", type=local_path, required=True, help="folder for the model, for example runs/cifar10/teacher")
    edm_import(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_main(main)
