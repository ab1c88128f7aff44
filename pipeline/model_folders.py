"""Loads models from a workspace's folders, in eval mode. If one is missing, the error names the command that makes it."""

from __future__ import annotations

from collections.abc import Mapping

from beeline import checkpoint
from beeline.checkpoint import CONFIG, WEIGHTS
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.features import FeatureNetwork
from beeline.features.backbones import weights_of, with_pooling_of
from beeline.features.measuring import DinoV2, Inception
from beeline.features.probe import Probe
from beeline.files.names import PROBE
from beeline.weights import load_backbone, load_measuring
from pipeline.stage import command_for
from pipeline.storage import Folder


def require_model(workspace: Folder, name: str, recipe: str) -> tuple[Denoiser, str]:
    """The teacher or student in folder `name`, in eval mode, and its `checkpoint.digest`."""
    model, digest = _load(workspace, name, recipe)
    if not isinstance(model, Denoiser):
        raise BeelineError(f"{workspace / name} holds a probe, not a teacher or student")
    return model, digest


def require_probe(workspace: Folder, which: str, recipe: str) -> tuple[Probe, str]:
    """The probe "losses" or "measure", and its `checkpoint.digest`."""
    model, digest = _load(workspace, f"{PROBE}/{which}", recipe)
    if not isinstance(model, Probe):
        raise BeelineError(f"{workspace / 'probe' / which} holds a denoiser, not a probe")
    return model, digest


def require_features(workspace: Folder, name: str, recipe: str) -> tuple[FeatureNetwork, str]:
    """The feature network "probe" (the losses' probe) or a pretrained backbone, and its `checkpoint.digest`."""
    if name == "probe":
        return require_probe(workspace, "losses", recipe)
    files, where = _weights(workspace, weights_of(name))
    return with_pooling_of(load_backbone(files, where), name), checkpoint.digest(files)


def require_measuring(workspace: Folder, name: str) -> tuple[Inception | DinoV2, str]:
    """The pretrained network to measure in, and its `checkpoint.digest`."""
    files, where = _weights(workspace, name)
    return load_measuring(files, where), checkpoint.digest(files)


def publish_model(folder: Folder, files: Mapping[str, bytes]) -> None:
    """Write a checkpoint's files, config.json last, so that a folder with a config.json is complete."""
    folder.write(WEIGHTS, files[WEIGHTS])
    folder.write(CONFIG, files[CONFIG])


def _weights(workspace: Folder, name: str) -> tuple[dict[str, bytes], str]:
    folder = workspace / "weights" / name
    try:
        return {file: folder.read(file) for file in (WEIGHTS, CONFIG)}, str(folder)
    except FileNotFoundError as error:
        place = f"{workspace}/weights" if folder.is_local else f"FOLDER, and copy FOLDER to {workspace}/weights"
        raise BeelineError(
            f"{folder} holds no weights; fetch them once, on a machine with internet, with: "
            f"python -m beeline.weights fetch {name} --out {place}"
        ) from error


def _load(workspace: Folder, name: str, recipe: str) -> tuple[Denoiser | Probe, str]:
    folder = workspace / name
    try:
        files = {file: folder.read(file) for file in (WEIGHTS, CONFIG)}
    except FileNotFoundError as error:
        command = command_for(workspace, name, recipe)
        raise BeelineError(f"{folder} holds no model; make it with: {command}") from error
    return checkpoint.restore(files, str(folder)), checkpoint.digest(files)
