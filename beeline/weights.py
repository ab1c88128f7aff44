"""Pretrained networks as model folders: downloaded once, checked, converted to safetensors, and afterwards loaded as data.

    python -m beeline.weights fetch --out weights
    python -m beeline.weights fetch vgg16 --out weights --downloads /media/usb

The originals are pickles. The SHA-256 of each is checked before it is read. It is read with torch's weights_only reader, which
runs no code from the file. In a model folder, the weights are written first and config.json last.
"""

from __future__ import annotations

if __name__ == "__main__":
    from beeline.entry import guard

    guard()

import argparse
import functools
import hashlib
import http.client
import importlib.metadata
import importlib.util
import json
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from beeline.checkpoint import CONFIG, FORMAT, WEIGHTS, write_model
from beeline.entry import run_main
from beeline.errors import BeelineError, reading, reason
from beeline.features.backbones import BACKBONES, VGG16, TimmBackbone, build_backbone
from beeline.features.measuring import MEASURING, DinoV2, Inception, build_measuring
from beeline.files.places import local_path
from beeline.networks.blueprint import Shapes, mismatch, shapes_of

Network = VGG16 | TimmBackbone | Inception | DinoV2


@dataclass(frozen=True, kw_only=True)
class Source:
    """The location of a backbone's original file, and how its tensors are named."""

    url: str
    sha256: str
    """All 64 digits, or the first eight: torch.hub puts those into file names, and some files publish no more than that."""
    licence: str
    prefix: str = ""
    """Prefix that Beeline's tensor names have in addition to the file's."""
    lins_sha256: str = ""
    """SHA-256 of the lpips package's linear layers for this network; "" if there are none."""


TIMEOUT = 60.0  # seconds without an answer from a server
LPIPS_LICENCE = "BSD-2-Clause (R. Zhang et al., https://github.com/richzhang/PerceptualSimilarity)"
SOURCES: dict[str, Source] = {
    "vgg16": Source(
        url="https://download.pytorch.org/models/vgg16-397923af.pth",
        sha256="397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0",
        licence="BSD-3-Clause (torchvision), trained on ImageNet, whose own terms may apply",
        lins_sha256="a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
    ),
    "tf_efficientnet_lite0": Source(
        url="https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-weights/tf_efficientnet_lite0-0aa007d2.pth",
        sha256="0aa007d2",
        licence="Apache-2.0 (Google, ported by timm), trained on ImageNet, whose own terms may apply",
        prefix="network.",
    ),
    "deit_base_distilled_patch16_224": Source(
        url="https://dl.fbaipublicfiles.com/deit/deit_base_distilled_patch16_224-df68dfff.pth",
        sha256="df68dfff",
        licence="Apache-2.0 (Meta), trained on ImageNet, whose own terms may apply",
        prefix="network.model.",
    ),
    "inception": Source(
        url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        licence="Apache-2.0 (Google, ported by torch-fidelity), trained on ImageNet, whose own terms may apply",
        prefix="network.",
    ),
    "dinov2_vitl14": Source(
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
        sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        licence="Apache-2.0 (Meta)",
        prefix="network.",
    ),
    "dinov2_vits14": Source(
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
        sha256="b938bf1bc15cd2ec0feacfe3a1bb553fe8ea9ca46a7e1d8d00217f29aef60cd9",
        licence="Apache-2.0 (Meta)",
        prefix="network.",
    ),
}


def fetch(names: Sequence[str], out: Path, downloads: Path | None = None, sources: Mapping[str, Source] = SOURCES) -> None:
    """Write the model folder `out`/name of each backbone; no names means all. Complete folders are kept. Originals are read
    from `downloads` (by default the cache of torch.hub) or downloaded into it.

    Raises BeelineError for unknown names, failed downloads, and originals with another SHA-256.
    """
    unknown = sorted(set(names) - set(sources))
    if unknown:
        raise BeelineError(f"backbone {unknown[0]!r} is unknown; expected some of: {', '.join(sources)}")
    folder = downloads or Path(torch.hub.get_dir()) / "checkpoints"
    for name in dict.fromkeys(names or sources):
        target = out / name
        if _complete(target):
            print(f"{target}: already complete")
            continue
        files = convert(name, obtain(sources[name], folder), sources[name])
        write_model(files, target)
        print(f"{target}: {sum(map(len, files.values())) / 1e6:,.1f} MB. Licence: {sources[name].licence}")


def _complete(folder: Path) -> bool:
    """Return whether a model folder exists with the weights that its config.json was written for. Prints damage."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        return False
    try:
        config = json.loads((folder / CONFIG).read_bytes())
        expected = config.get("weights_sha256")
        if expected is None or expected == _sha256(folder / WEIGHTS):  # folders of earlier versions lack it
            return True
        problem = "the SHA-256 of its weights does not match"
    except Exception as error:  # damage can raise anything
        problem = reason(error)
    print(f"{folder}: damaged ({problem}); it will be made again", flush=True)
    return False


def obtain(source: Source, downloads: Path) -> Path:
    """Return the original file in the downloads folder, with its SHA-256 checked; download it if it is missing.

    Raises BeelineError if the download fails or the file is another one. A failed download leaves nothing behind.
    """
    file = downloads / source.url.rsplit("/", 1)[-1]
    if file.is_file():
        _check(file, source.sha256, f"delete {file} and run again to download it")
        return file
    by_hand = f"or put the right file there by hand as {file}"
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torch.hub sets none: a server that stalls would be waited for forever
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        print(source.url, flush=True)
        torch.hub.download_url_to_file(source.url, str(file), hash_prefix=source.sha256, progress=sys.stderr.isatty())
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = str(error) or type(error).__name__
        raise BeelineError(f"{source.url} could not be downloaded ({reason}); try again, {by_hand}") from None
    finally:
        socket.setdefaulttimeout(before)
    return file


def _check(file: Path, expected: str, fix: str) -> None:
    digest = _sha256(file)
    if not digest.startswith(expected):
        more = "" if len(expected) == len(digest) else "..."
        raise BeelineError(f"{file} has SHA-256 {digest}, expected {expected}{more}; it was not read: {fix}")


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read(file: Path) -> dict[str, Any]:
    """Read a file that torch.save wrote: tensors by name, or a dict that holds them as 'model'. No code from the file is run.
    Raises BeelineError for any other file."""
    try:
        # Training scripts store their arguments with the weights; a Namespace holds only attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything
        requested = re.search(r"GLOBAL (\S+)", str(error))
        why = f"it asks for {requested[1]}" if requested else reason(error)
        raise BeelineError(f"{file} is not a file of tensors ({why}); it was refused and no code was run") from None
    tensors = content.get("model", content) if isinstance(content, Mapping) else None
    if not isinstance(tensors, Mapping):
        raise BeelineError(f"{file} holds a {type(content).__name__}; expected tensors by name")
    return dict(tensors)


def convert(name: str, original: Path, source: Source) -> dict[str, bytes]:
    """Convert a backbone's original file (see `obtain`) to the files of its model folder, name to bytes."""
    tensors = {f"{source.prefix}{key}": tensor for key, tensor in read(original).items()}
    about: dict[str, Any] = {"source": source.url, "sha256": _sha256(original), "licence": source.licence}
    if source.lins_sha256:
        lins, file = lpips_layers(source.lins_sha256)
        tensors |= lins
        version = importlib.metadata.version("lpips")
        about["lins"] = {"source": f"lpips {version}, {file}", "sha256": source.lins_sha256, "licence": LPIPS_LICENCE}
    with reading(f"{original} does not hold the weights of {name}", "fetch it again"):
        expected = _shapes(name)
        used = {key: tensor for key, tensor in tensors.items() if key in expected and isinstance(tensor, torch.Tensor)}
        counters = {key for key in expected if key.endswith("num_batches_tracked")}  # older files lack these
        required = {key: shape for key, shape in expected.items() if key in used or key not in counters}
        wrong = mismatch({key: tuple(tensor.shape) for key, tensor in used.items()}, required)
        if wrong:
            raise BeelineError(f"{original} does not hold the weights of {name}: {wrong}")
        return dump_backbone(_filled(name, used), about)


def lpips_layers(sha256: str) -> tuple[dict[str, torch.Tensor], str]:
    """Read LPIPS's channel weights as `lins.0` ..., (C_l,), and return them with the name of their file in the lpips package.

    Raises BeelineError if lpips is not installed or its file has another SHA-256. Does not import lpips.
    """
    spec = importlib.util.find_spec("lpips")
    name = "weights/v0.1/vgg.pth"
    file = Path(spec.origin).parent / name if spec is not None and spec.origin is not None else None
    if file is None or not file.is_file():
        raise BeelineError("LPIPS's linear layers come with the lpips package, which is not installed: pip install lpips")
    _check(file, sha256, "install lpips 0.1.4 again")
    layers = read(file)
    return {f"lins.{k}": layers[f"lin{k}.model.1.weight"].reshape(-1) for k in range(len(VGG16.tap_channels))}, name


def dump_backbone(backbone: Network, about: Mapping[str, Any]) -> dict[str, bytes]:
    """Encode the backbone as files, name to bytes; the same model gives the same bytes. `about` is free-form provenance."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.state_dict().items()}
    weights = safetensors.torch.save(tensors)
    config = {"format": FORMAT, "kind": "backbone", "network": {"name": backbone.name}}
    config |= {"weights_sha256": hashlib.sha256(weights).hexdigest(), "about": about}
    return {WEIGHTS: weights, CONFIG: json.dumps(config, indent=2).encode()}


def load_backbone(files: Mapping[str, bytes], where: str) -> VGG16 | TimmBackbone:
    """Load a frozen backbone, float32 and in eval mode, from its files; `where` is named in errors. Draws no random numbers.

    Raises BeelineError for an unknown format or kind, damaged files, and weights of other shapes.
    """
    network = _restored(files, where, BACKBONES)
    assert isinstance(network, VGG16 | TimmBackbone)
    return network


def load_measuring(files: Mapping[str, bytes], where: str) -> Inception | DinoV2:
    """Load a network of beeline.features.measuring, like `load_backbone`."""
    network = _restored(files, where, MEASURING)
    assert isinstance(network, Inception | DinoV2)
    return network


def _restored(files: Mapping[str, bytes], where: str, names: Sequence[str]) -> Network:
    fix = "make it again: python -m beeline.weights fetch"
    with reading(f"{where} is not a readable backbone", fix):
        config = json.loads(files[CONFIG])
        tensors = safetensors.torch.load(files[WEIGHTS])
        if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("kind") != "backbone":
            content = (
                {key: config.get(key) for key in ("format", "kind")} if isinstance(config, dict) else type(config).__name__
            )
            raise BeelineError(f"{where}/{CONFIG} holds {content}; this version reads format {FORMAT}, kind 'backbone'")
        network = config.get("network")
        name: Any = network.get("name") if isinstance(network, dict) else None
        if not isinstance(name, str) or name not in names:
            raise BeelineError(f"{where}/{CONFIG} names backbone {name!r}; this version has: {', '.join(names)}")
        digest = config.get("weights_sha256")  # folders of earlier versions lack it
        if digest is not None and digest != hashlib.sha256(files[WEIGHTS]).hexdigest():
            raise BeelineError(f"{where}/{WEIGHTS} does not belong to {CONFIG} (its SHA-256 does not match); {fix}")
    wrong = mismatch({key: tuple(tensor.shape) for key, tensor in tensors.items()}, _shapes(name))
    if wrong:
        raise BeelineError(f"{where}: the weights do not fit {name}, which {CONFIG} names ({wrong}); {fix}")
    return _filled(name, tensors)


def _build(name: str) -> Network:
    return build_measuring(name) if name in MEASURING else build_backbone(name)


@functools.cache
def _shapes(name: str) -> Shapes:
    return shapes_of(lambda: _build(name))


def _filled(name: str, tensors: Mapping[str, torch.Tensor]) -> Network:
    """Build the network and load these weights, whose names and shapes are known to match."""
    with torch.random.fork_rng(devices=()):  # building draws initial weights; the caller's random state must not change
        backbone = _build(name)
    backbone.load_state_dict(tensors)
    return backbone


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m beeline.weights", description="Pretrained backbones as model folders.")
    fetching = parser.add_subparsers(required=True, metavar="fetch").add_parser(
        "fetch", help="download, check and convert", description=f"Backbones: {', '.join(SOURCES)}."
    )
    fetching.add_argument("names", nargs="*", metavar="NAME", help="backbones to fetch (default: all)")
    fetching.add_argument("--out", type=local_path, required=True, help="folder for the model folders, for example weights")
    fetching.add_argument(
        "--downloads",
        type=local_path,
        help="folder of the original files; existing files are not downloaded again (default: torch.hub's)",
    )
    fetch(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_main(main)
