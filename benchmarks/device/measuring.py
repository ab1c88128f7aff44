"""Measuring networks and metrics: features and perceptual distances against the CPU, metrics against known values."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from beeline.features import Frozen
from beeline.features.backbones import BACKBONES
from beeline.features.measuring import DINOV2, Eye, Looks, MeasuringProbe, build_measuring
from beeline.features.probe import Probe, train_probe
from beeline.metrics.frechet import Statistics, frechet_distance, merge
from beeline.metrics.measures import Reference, inception_score, kernel_distance, measures, nearest, neighbourhoods
from beeline.objectives.perceptual import perceptual
from beeline.pixels import quantised
from beeline.recipes import RECIPES
from benchmarks.device.checks import Check, Checks, Outcome, Setting, Skip, at_most, relative, worst
from benchmarks.device.networks import backbone, images, network_config

LIMIT = 1e-3  # relative error of features; TF32 would give about 1e-2
KINKS = 0.05  # relative error of gradients through rectifiers and max pooling, where rounding flips a few
NO_FIDELITY = "torch-fidelity is not installed"


def need_fidelity() -> None:
    """Raise Skip if torch-fidelity is missing, which provides Inception, KID and IS."""
    if importlib.util.find_spec("torch_fidelity") is None:
        raise Skip(NO_FIDELITY)


def measuring_network(name: str) -> Any:
    """Build a measuring network on the CPU, with random weights whose features neither vanish nor explode."""
    torch.manual_seed(3)
    if name == "probe":
        return MeasuringProbe(Probe(RECIPES["cifar10"](0).probe.measure, channels=3, num_classes=10))
    if name == "inception":
        need_fidelity()
    network = build_measuring(name)
    if name == "inception":
        for module in network.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network


def checks(setting: Setting) -> Checks:
    """List the checks of this section."""
    config, cpu = network_config(setting), torch.device("cpu")
    dinos = [name for name in DINOV2 if not (setting.small and name.endswith("vitl14"))]
    for name in ("probe", "inception", *dinos):
        yield Check(f"features of {name}, against the CPU's", functools.partial(_features, setting, name))
    for name in BACKBONES:
        yield Check(f"taps and their gradient of {name} fp32, against the CPU's", lambda n=name: taps(setting, n, "fp32"))
        if setting.gpu:
            yield Check(f"taps and their gradient of {name} bf16, against the CPU's", lambda n=name: taps(setting, n, "bf16"))

    def lpips() -> Outcome:
        side = 32 if setting.small else 64
        distances = []
        for device in (setting.device, cpu):
            a, b = (images(config, 2, seed).to(device) for seed in (0, 1))
            distances.append(perceptual(Frozen(backbone("vgg16"), device=device), a, b, side=side))
        return at_most(relative(distances[:1], distances[1:]), LIMIT)

    def probe_training() -> Outcome:
        torch.manual_seed(0)
        labels = torch.arange(200, device=setting.device) % 2
        shown = torch.where(labels[:, None, None, None] > 0, 0.5, -0.5) + 0.1 * torch.randn(200, 3, 8, 8).to(setting.device)
        probe = Probe(RECIPES["digits"](0).probe.losses, channels=3, num_classes=2).to(setting.device)
        accuracy = train_probe(probe, shown, labels, iterations=30, batch_size=32, lr=4e-3, seed=0)
        return at_most(1 - accuracy, 0.2, accuracy=accuracy)

    yield Check("LPIPS, against the CPU's", lpips)
    yield Check("a probe's training, errors on images held out", probe_training)
    yield Check("figures from features of the device, against those of the CPU", lambda: figures(setting))
    known: dict[str, Callable[[], dict[str, float]]] = {
        "Fréchet distance of two Gaussians": _frechet,
        "statistics in parts": _parts,
        "precision, recall, density, coverage, authenticity": _neighbourhoods,
        "KID of one distribution with itself": _kid,
        "IS of uniform and of sure logits": _score,
    }
    for name, call in known.items():
        yield Check(f"{name}, error against the known value", lambda c=call: _small(c()))


def _small(errors: dict[str, float]) -> Outcome:
    return worst(errors, dict.fromkeys(errors, 0.1))


def _features(setting: Setting, name: str) -> Outcome:
    network = measuring_network(name)
    shown = quantised(images(network_config(setting), 2 if setting.small else 4, 0))
    found, wanted = (Eye(network, device).look(shown) for device in (setting.device, torch.device("cpu")))
    values = {"features": relative([torch.from_numpy(found.features)], [torch.from_numpy(wanted.features)])}
    if found.logits is not None and wanted.logits is not None:
        values["logits"] = relative([torch.from_numpy(found.logits)], [torch.from_numpy(wanted.logits)])
    return worst(values, dict.fromkeys(values, LIMIT))


def taps(setting: Setting, name: str, precision: str) -> Outcome:
    """Compare feature maps of a backbone, and the gradient of their mean square by the images. In bf16, errors may be twice
    those of bf16 on the CPU."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    cpu = torch.device("cpu")
    wanted = _seen(setting, name, torch.float32, cpu)
    values = _differences(_seen(setting, name, dtype, setting.device), wanted)
    limits = {"taps": LIMIT, "gradient": KINKS}
    if precision == "bf16":
        of_cpu = _differences(_seen(setting, name, dtype, cpu), wanted)
        limits = {key: max(2 * error, 0.02) for key, error in of_cpu.items()}
    return worst(values, limits)


def _seen(setting: Setting, name: str, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """Compute the taps of two images, and the gradient."""
    side = (32 if name == "vgg16" else 128) if setting.small else 224
    shown = torch.nn.functional.interpolate(images(network_config(setting), 2, 0), (side, side), mode="bilinear")
    shown = shown.to(device).requires_grad_()
    seen = Frozen(backbone(name), device=device, dtype=dtype).taps(shown)
    torch.stack([tap.float().square().mean() for tap in seen]).sum().backward()
    assert shown.grad is not None
    return [*(tap.detach() for tap in seen), shown.grad]


def _differences(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> dict[str, float]:
    return {"taps": relative(found[:-1], wanted[:-1]), "gradient": relative(found[-1:], wanted[-1:])}


def figures(setting: Setting) -> Outcome:
    """Compare all metrics in the probe's features."""
    network, config = measuring_network("probe"), network_config(setting)
    shown = {seed: quantised(images(config, 64, seed)) for seed in (0, 1)}
    values_by_device = []
    for device in (setting.device, torch.device("cpu")):
        eye = Eye(network, device)
        real = eye.look(shown[1]).features
        reference = Reference(Statistics.of(real), real, np.arange(len(real)))
        values_by_device.append(measures(Looks(eye.look(shown[0]).features), reference, "probe", neighbours=64))
    on_device, on_cpu = values_by_device
    values = {name: abs(on_device[name] - value) / max(abs(value), 0.05) for name, value in on_cpu.items()}
    return worst(values, dict.fromkeys(values, 0.05))


def _normal(count: int, dimensions: int, seed: int, mean: float = 0.0, spread: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, spread, (count, dimensions)).astype(np.float32)


def _frechet() -> dict[str, float]:
    """Compare with the known distance of N(0, 1) and N(1, 4) in 8 dimensions: 8 (1 + (2 - 1)^2)."""
    a, b = Statistics.of(_normal(100_000, 8, 0)), Statistics.of(_normal(100_000, 8, 1, 1.0, 2.0))
    return {"relative error": abs(frechet_distance(a, b) / 16 - 1), "with itself": abs(frechet_distance(a, a))}


def _parts() -> dict[str, float]:
    features = _normal(1000, 16, 2)
    whole, parts = Statistics.of(features), merge(Statistics.of(part) for part in np.split(features, 10))
    again = Statistics.from_npz(parts.to_npz())
    return {
        "covariance": float(np.abs(whole.covariance - parts.covariance).max()),
        "through a file": float(np.abs(again.m2 - parts.m2).max()),
    }


def _neighbourhoods() -> dict[str, float]:
    """Compare with known values. For a set with itself all are 1 except authenticity, 0; for distant sets the reverse."""
    a, far = _normal(500, 16, 3), _normal(500, 16, 4, 100.0)
    same, other = neighbourhoods(a, a), neighbourhoods(far, a)
    values = {f"{name} of the same": abs(same[name] - 1) for name in ("precision", "recall", "coverage")}
    values |= {f"{name} of far ones": abs(other[name]) for name in ("precision", "recall", "density", "coverage")}
    values |= {"authenticity of the same": same["authenticity"], "authenticity of far ones": 1 - other["authenticity"]}
    return values | {"nearest": float(np.abs(nearest(a, a) - np.arange(len(a))).max())}


def _kid() -> dict[str, float]:
    need_fidelity()
    return {"KID": abs(kernel_distance(_normal(1000, 16, 5), _normal(1000, 16, 6)))}


def _score() -> dict[str, float]:
    need_fidelity()
    sure = 50 * np.eye(10, dtype=np.float32)[np.arange(1000) % 10]
    uniform = np.zeros((1000, 10), np.float32)
    return {"uniform": abs(inception_score(uniform) - 1), "sure": abs(math.log(inception_score(sure) / 10))}
