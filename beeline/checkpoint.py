"""A model is a folder of two files: model.safetensors (weights) and config.json (how to build it, where it came from).

config.json: {"format": 1, "kind": "denoiser" | "probe", "network": {...}, "few_step": {...} | null, "about": {...}}.
Weights carry the names of EDM's state dicts (`model.enc...`) and load in plain PyTorch. Nothing here ever unpickles.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from beeline.adams import check_levels
from beeline.config import NetworkConfig, ProbeNetworkConfig, from_dict, to_dict
from beeline.denoiser import Denoiser
from beeline.errors import BeelineError
from beeline.features import Probe
from beeline.networks.dhariwal import DhariwalUNet
from beeline.networks.songunet import SongUNet
from beeline.samplers import FewStep

FORMAT = 1
WEIGHTS, CONFIG, SOLVER = "model.safetensors", "config.json", "solver.json"


def build(config: NetworkConfig) -> Denoiser:
    """A denoiser with fresh weights."""
    arguments = to_dict(config)
    kind = arguments.pop("kind")
    channels = arguments.pop("img_channels")
    arguments |= {"in_channels": channels, "out_channels": channels}
    if kind not in ("ddpmpp", "ncsnpp", "adm"):
        raise ValueError(f"network kind is {kind!r}; expected 'ddpmpp', 'ncsnpp' or 'adm'")
    if kind == "adm":
        network: nn.Module = DhariwalUNet(**arguments)
    else:
        ncsnpp = {
            "embedding_type": "fourier",
            "encoder_type": "residual",
            "channel_mult_noise": 2,
            "resample_filter": (1, 3, 3, 1),
        }
        network = SongUNet(**arguments, **(ncsnpp if kind == "ncsnpp" else {}))
    model = Denoiser(network, img_resolution=config.img_resolution, img_channels=channels, label_dim=config.label_dim)
    model.network_config = config
    return model


def dump(model: Denoiser | Probe, about: Mapping[str, Any]) -> dict[str, bytes]:
    """The checkpoint's files, name to bytes; the same model gives the same bytes. `about` is free-form provenance.

    Raises BeelineError for weights that are not finite.
    """
    if isinstance(model, Denoiser):
        few_step = None if model.few_step is None else to_dict(model.few_step)
        config = {"kind": "denoiser", "network": to_dict(model.network_config), "few_step": few_step}
    else:
        network = to_dict(model.config) | {"channels": model.channels, "num_classes": model.num_classes}
        config = {"kind": "probe", "network": network}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    if bad := not_finite(tensors):
        raise BeelineError(f"the model is not published: {bad}; train it again at a lower learning rate, or in fp32")
    text = json.dumps({"format": FORMAT, **config, "about": about}, indent=2)
    return {WEIGHTS: safetensors.torch.save(tensors), CONFIG: text.encode()}


def restore(files: Mapping[str, bytes], where: str) -> Denoiser | Probe:
    """The model in eval mode, frozen, from its files; `where` is named in errors.

    Raises BeelineError for a format or kind this version does not know, damaged files, weights of another shape, and weights
    that are not finite.
    """
    try:
        config = json.loads(files[CONFIG])
        tensors = safetensors.torch.load(files[WEIGHTS])
    except (json.JSONDecodeError, UnicodeDecodeError, safetensors.SafetensorError) as error:
        raise BeelineError(f"{where} is not a readable checkpoint ({error}); make or copy it again") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT or config.get("kind") not in ("denoiser", "probe"):
        found = {key: config.get(key) for key in ("format", "kind")} if isinstance(config, dict) else type(config).__name__
        raise BeelineError(f"{where}/{CONFIG} holds {found}; this version reads format {FORMAT}, kind 'denoiser' or 'probe'")
    try:
        model = _build_from(config)
    except (KeyError, TypeError, ValueError) as error:
        raise BeelineError(f"{where}/{CONFIG} does not describe a network: {type(error).__name__} {error}") from error
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise BeelineError(f"{where}: the weights do not fit the network that {CONFIG} describes: {error}") from error
    if bad := not_finite(tensors):
        raise BeelineError(f"{where}/{WEIGHTS} is not used: {bad}; make or copy it again")
    return model.eval().requires_grad_(False)


def not_finite(tensors: Mapping[str, torch.Tensor]) -> str:
    """What is wrong with weights that hold NaN or infinity; "" for none."""
    bad = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    return f"{len(bad)} of its tensors hold NaN or infinity, {bad[0]} for example" if bad else ""


def _build_from(config: Mapping[str, Any]) -> Denoiser | Probe:
    network = dict(config["network"])
    if config["kind"] == "probe":
        channels, num_classes = network.pop("channels"), network.pop("num_classes")
        return Probe(from_dict(ProbeNetworkConfig, network), channels=channels, num_classes=num_classes)
    model = build(from_dict(NetworkConfig, network))
    if config["few_step"]:
        few_step = dict(config["few_step"])
        few_step.setdefault("line", "ve" if few_step.get("rule") == "same_noise" else "lerp")  # files from before it was kept
        model.few_step = from_dict(FewStep, few_step)
    return model


def load(folder: str | Path) -> Denoiser:
    """The teacher or student in a local folder, in eval mode. Raises BeelineError where there is none."""
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
    """The levels in a solver.json. Raises BeelineError if it is damaged, or was calibrated for other weights."""
    try:
        found = json.loads(data)
        levels = check_levels(found["levels"])
        calibrated_for = found["model_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise BeelineError(
            f"{where}/{SOLVER} is damaged ({error}); make it again: python -m beeline.calibrate {where}"
        ) from error
    if calibrated_for != weights_sha256:
        raise BeelineError(
            f"{where}/{SOLVER} was calibrated for other weights (SHA-256 {calibrated_for[:12]}..., these are "
            f"{weights_sha256[:12]}...); make it again: python -m beeline.calibrate {where}"
        )
    return levels


def digest(files: Mapping[str, bytes]) -> str:
    """SHA-256 of weights, network and, for students, the way of sampling: what plans record of the model they used. Where it
    came from ("about") is no part of it. Raises ValueError if config.json is not JSON."""
    config = json.loads(files[CONFIG])
    parts = {key: config.get(key) for key in ("format", "kind", "network", "few_step")}
    described = json.dumps({**parts, WEIGHTS: digest_of(files[WEIGHTS])}, sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()


def digest_of(weights: bytes) -> str:
    """SHA-256 of a model.safetensors."""
    return hashlib.sha256(weights).hexdigest()


@torch.no_grad()
def ema_update(average: nn.Module, model: nn.Module, half_life: float, step: int, ramp: float) -> None:
    """Move the exponential moving average `average` one step towards `model`; buffers are copied.

    `half_life` is in steps. With `ramp` above 0 it is at most `ramp` of the `step` steps seen so far, so that the average
    forgets its start (Karras et al. 2022, appendix F.2); with 0 the decay is constant.
    """
    limited = min(half_life, step * ramp) if ramp else half_life
    beta = 0.5 ** (1 / max(limited, 1e-8))
    for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
        ours.lerp_(theirs, 1 - beta)
    for ours, theirs in zip(average.buffers(), model.buffers(), strict=True):
        ours.copy_(theirs)
