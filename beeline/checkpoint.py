"""Model folders. A model is two files: model.safetensors (weights) and config.json (architecture and provenance).

config.json: {"format": 1, "kind": "denoiser" | "probe", "network": {...}, "few_step": {...} | null, "about": {...}}.
Weights carry the names of EDM's state dicts (`model.enc...`) and load in plain PyTorch. Nothing here unpickles.

A model of several networks, each for a subset of the classes, also has "parts": their number. `network` describes each of them,
and names of weights begin with `model.parts.<number>.`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from beeline.config import NetworkConfig, ProbeNetworkConfig, from_dict, to_dict
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError, plain, reading
from beeline.features.probe import Probe
from beeline.files.names import CONFIG, SOLVER, WEIGHTS
from beeline.networks.blueprint import Shapes, mismatch, shapes_of
from beeline.networks.dhariwal import DhariwalUNet
from beeline.networks.routed import Routed
from beeline.networks.songunet import SongUNet
from beeline.objectives import Needs
from beeline.sampling.adams import check_levels
from beeline.sampling.few_step import FewStep

FORMAT = 1
MAX_LEVELS = 10_000  # of a student's schedule
PARTS = "parts"  # key of config.json


def build(config: NetworkConfig, parts: int = 1) -> Denoiser:
    """Build a denoiser with freshly initialised weights, of one network or of several `parts`."""
    network = _network(config) if parts == 1 else Routed(_network(config) for _ in range(parts))
    model = Denoiser(
        network, img_resolution=config.img_resolution, img_channels=config.img_channels, label_dim=config.label_dim
    )
    model.network_config, model.parts = config, parts
    if config.guess:
        model.guess = build(replace(config, dropout=0.0, **Needs().inputs)).requires_grad_(False)
    return model


def joined(parts: Sequence[Denoiser]) -> Denoiser:
    """Join models of equal networks to one that sends each row to the part of its class, in eval mode. They share the network
    that makes a first guess, if they have one: it is that of the model they started from."""
    first = parts[0]
    assert first.network_config is not None
    model = build(first.network_config, len(parts))
    weights = {name: tensor for name, tensor in first.state_dict().items() if not name.startswith("model.")}
    for number, part in enumerate(parts):
        weights |= {f"model.parts.{number}.{name}": tensor for name, tensor in part.model.state_dict().items()}
    model.load_state_dict(weights)
    model.few_step = first.few_step
    return model.eval().requires_grad_(False)


def _network(config: NetworkConfig) -> nn.Module:
    arguments = to_dict(config)
    kind = arguments.pop("kind")
    channels = arguments.pop("img_channels")
    arguments |= {"in_channels": channels, "out_channels": channels}
    if kind not in ("ddpmpp", "ncsnpp", "adm"):
        raise ValueError(f"network kind is {kind!r}; expected 'ddpmpp', 'ncsnpp' or 'adm'")
    if kind == "adm":
        return DhariwalUNet(**arguments)
    ncsnpp = {
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "channel_mult_noise": 2,
        "resample_filter": (1, 3, 3, 1),
    }
    return SongUNet(**arguments, **(ncsnpp if kind == "ncsnpp" else {}))


def dump(model: Denoiser | Probe, about: Mapping[str, Any]) -> dict[str, bytes]:
    """Encode a model as files, name to bytes; the same model gives the same bytes. `about` is free-form provenance.

    Raises BeelineError for weights that are not finite.
    """
    if isinstance(model, Denoiser):
        few_step = None if model.few_step is None else to_dict(model.few_step)
        config = {"kind": "denoiser", "network": to_dict(model.network_config), "few_step": few_step}
        config |= {PARTS: model.parts} if model.parts > 1 else {}
    else:
        network = to_dict(model.config) | {"channels": model.channels, "num_classes": model.num_classes}
        config = {"kind": "probe", "network": network}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if bad := not_finite(tensors):
        raise BeelineError(f"the model is not published: {bad}; train it again at a lower learning rate, or in fp32")
    text = json.dumps({"format": FORMAT, **config, "about": about}, indent=2)
    return {WEIGHTS: safetensors.torch.save(tensors), CONFIG: text.encode()}


def write_model(files: Mapping[str, bytes], folder: Path) -> None:
    """Write a model folder, config.json last; each file appears whole or not at all. Raises BeelineError on failure."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, CONFIG):
            temporary = folder / f"{name}.{os.getpid()}.tmp"
            try:
                temporary.write_bytes(files[name])
                temporary.replace(folder / name)
            finally:
                temporary.unlink(missing_ok=True)
    except OSError as error:
        raise BeelineError(f"{folder} cannot be written ({plain(error)}); choose another --out") from error


def restore(files: Mapping[str, bytes], where: str) -> Denoiser | Probe:
    """Build a frozen model in eval mode from its files; `where` is named in errors.

    Raises BeelineError for an unknown format or kind, damaged files, weights of other shapes, and weights that are not finite.
    """
    with reading(f"{where} is not a readable checkpoint", "make or copy it again"):
        config = json.loads(files[CONFIG])
        tensors = safetensors.torch.load(files[WEIGHTS])
        if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("kind") not in ("denoiser", "probe"):
            content = (
                {key: config.get(key) for key in ("format", "kind")} if isinstance(config, dict) else type(config).__name__
            )
            raise BeelineError(
                f"{where}/{CONFIG} holds {content}; this version reads format {FORMAT}, kind 'denoiser' or 'probe'"
            )
    with reading(f"{where}/{CONFIG} does not describe a network", "make or copy the model again"):
        try:
            make, layers = _maker(config)
        except BeelineError as error:  # a setting is out of range
            raise BeelineError(f"{where}/{CONFIG} does not describe a network: {error}") from None
        wrong = misfit(make, layers, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
        if wrong:
            raise BeelineError(f"{where}: the weights do not fit the network that {CONFIG} describes: {wrong}")
        model = make()
        model.load_state_dict(tensors)
    if bad := not_finite(tensors):
        raise BeelineError(f"{where}/{WEIGHTS} is refused: {bad}; make or copy it again")
    return model.eval().requires_grad_(False)


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str:
    """Describe weights that hold NaN or infinity; "" if there are none."""
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    return f"{len(bad)} of its tensors hold NaN or infinity, {bad[0]} for example" if bad else ""


def misfit(make: Callable[[], nn.Module], layers: int, found: Shapes) -> str:
    """Describe how tensors of these names and shapes differ from those of the network that `make` builds; "" if they match.

    The network has at least `layers` layers. With fewer tensors than that, not even its blueprint is built, because a file
    may ask for any number of layers.
    """
    if layers > len(found):
        return f"{len(found):,} tensors for at least {layers:,} layers"
    return mismatch(found, shapes_of(make))


def _maker(config: Mapping[str, Any]) -> tuple[Callable[[], Denoiser | Probe], int]:
    """Return a function that builds the model of a config.json, and a lower bound on its number of layers."""
    network = dict(config["network"])
    if config["kind"] == "probe":
        channels, num_classes = network.pop("channels"), network.pop("num_classes")
        described = from_dict(ProbeNetworkConfig, network)
        return lambda: Probe(described, channels=channels, num_classes=num_classes), len(described.widths)
    denoiser, parts, how = from_dict(NetworkConfig, network), config.get(PARTS, 1), None
    if type(parts) is not int or not 1 <= parts <= max(1, denoiser.label_dim):
        raise BeelineError(f"{PARTS} is {parts!r:.30}; expected 1 to {max(1, denoiser.label_dim)}, one for each class at most")
    if config["few_step"]:
        few_step = dict(config["few_step"])
        few_step.setdefault("line", "ve" if few_step.get("rule") == "same_noise" else "lerp")  # old files lack this key
        how = from_dict(FewStep, few_step)
        if type(how.num_steps) is not int or not 1 <= how.num_steps <= MAX_LEVELS:
            raise BeelineError(f"few_step.num_steps is {how.num_steps!r:.30}; expected 1 to {MAX_LEVELS:,}")

    def make() -> Denoiser:
        model = build(denoiser, parts)
        model.few_step = how
        return model

    return make, layers_of(denoiser) * parts


def layers_of(config: NetworkConfig) -> int:
    """Return a lower bound on the number of layers of a denoiser, without building it."""
    return config.num_blocks * len(config.channel_mult)


def load(folder: str | Path) -> Denoiser:
    """Load the teacher or student in a local folder, in eval mode. Raises BeelineError if there is none."""
    path = Path(folder)
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise BeelineError(f"{path} is not a model folder: expected {WEIGHTS} and {CONFIG} in it")
    model = restore({name: (path / name).read_bytes() for name in (WEIGHTS, CONFIG)}, str(path))
    if not isinstance(model, Denoiser):
        raise BeelineError(f"{path} holds a probe, not a teacher or student")
    if (path / SOLVER).is_file():
        model.levels = solver_levels((path / SOLVER).read_bytes(), digest_of((path / WEIGHTS).read_bytes()), str(path))
    return model


def solver_levels(data: bytes, weights_sha256: str, where: str) -> tuple[float, ...]:
    """Read the levels in a solver.json. Raises BeelineError if it is damaged, or was calibrated for other weights."""
    with reading(f"{where}/{SOLVER} is damaged", f"make it again: python -m beeline.calibrate {where}"):
        content = json.loads(data)
        levels = check_levels(content["levels"])
        calibrated_for = str(content["model_sha256"])
    if calibrated_for != weights_sha256:
        raise BeelineError(
            f"{where}/{SOLVER} was calibrated for other weights (SHA-256 {calibrated_for[:12]}..., these are "
            f"{weights_sha256[:12]}...); make it again: python -m beeline.calibrate {where}"
        )
    return levels


def digest(files: Mapping[str, bytes]) -> str:
    """Compute the SHA-256 that plans record for a model: weights, network and, for students, the sampling configuration.

    Provenance ("about") is not included. Raises ValueError if config.json is not JSON.
    """
    config = json.loads(files[CONFIG])
    keys = ("format", "kind", "network", "few_step", *([PARTS] if PARTS in config else []))
    described = json.dumps({**{key: config.get(key) for key in keys}, WEIGHTS: digest_of(files[WEIGHTS])}, sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def digest_of(weights: bytes) -> str:
    """Compute the SHA-256 of a model.safetensors."""
    return hashlib.sha256(weights).hexdigest()
