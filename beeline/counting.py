"""Floating-point operations and bytes of a recipe's networks, counted by running its code on tensors without data.

A multiply-add counts as two operations. Convolutions, matrix products and attention count; norms and activations do not.
Networks are built on the meta device. The largest takes a second and no memory. FLOPs are per image.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from beeline.checkpoint import build
from beeline.config import ImagesConfig, NetworkConfig, OptimizerConfig, ProbeConfig, ProbeNetworkConfig
from beeline.denoiser import Denoiser
from beeline.features.backbones import build_backbone
from beeline.features.measuring import MEASURING, PROBES, MeasuringProbe, build_measuring
from beeline.features.probe import Probe
from beeline.objectives import Batch, Context, Needs, Objective, ObjectiveConfig
from beeline.objectives.derivative import Derivative
from beeline.objectives.learner import Learner

BATCH = 2  # images per counted call: batch norms need two
CYCLE = 60  # steps to average over, because student and critic take turns
STUDENT, FROZEN = "", "frozen model"  # keys of denoisers among a phase's modules; feature networks have their names
FLOAT = 4  # bytes
ANY_CLASSES = 10  # classes of a probe: its last layer adds few FLOPs


class _Counting(Learner):
    """A learner whose derivatives work on tensors without data, which have no forward-mode differentiation."""

    def rate(self, *inputs: Any, derivative: Derivative = "difference", **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Replace "jvp" by "difference", which costs the same three evaluations if it is not given the value."""
        if derivative == "jvp":
            options.pop("value", None)
        return super().rate(*inputs, **options)


def denoiser(network: NetworkConfig) -> Denoiser:
    """Build the network on the meta device: shapes without data."""
    return _on_meta(lambda: build(network))


@functools.cache
def evaluation(network: NetworkConfig) -> float:
    """FLOPs of one network evaluation."""
    bare = denoiser(network).model
    with _without_data(), torch.inference_mode():
        model, (x, labels) = _empty(bare), _inputs(network)
        return _counted(lambda: model(x, torch.ones(BATCH), labels))


def phase_flops(network: NetworkConfig, probe: ProbeNetworkConfig, objective: ObjectiveConfig) -> float:
    """FLOPs of a training step of `objective`, counted by running it: student, losses, critic and frozen networks, averaged
    over the turns of student and critic. `probe` is the losses' probe. Takes seconds."""
    return _phase_flops(replace(network, dropout=0.0), probe, objective.representative())


def step_evaluations(network: NetworkConfig, probe: ProbeNetworkConfig, objective: ObjectiveConfig) -> float:
    """Cost of a training step of `objective` in evaluations of the student's network, per image: `phase_flops` in units of one
    evaluation. A forward pass of the student counts 1 and its backward pass 2; everything else counts by its FLOPs."""
    return phase_flops(network, probe, objective) / evaluation(replace(network, dropout=0.0, **objective.needs().inputs))


def phase_bytes(network: NetworkConfig, probe: ProbeNetworkConfig, objective: ObjectiveConfig) -> tuple[int, int]:
    """Bytes of the critic, and of the objective's own state, in a checkpoint. footprint.py counts those in memory."""
    return _phase_bytes(replace(network, dropout=0.0), probe, objective.representative())


@functools.cache
def _phase_bytes(network: NetworkConfig, probe: ProbeNetworkConfig, config: ObjectiveConfig) -> tuple[int, int]:
    _, objective = built(network, probe, config)
    return learner_bytes(objective.critic), learner_bytes(objective.state())


@functools.cache
def built(network: NetworkConfig, probe: ProbeNetworkConfig, config: ObjectiveConfig) -> tuple[dict[str, Any], Objective]:
    """The networks of a phase by name (STUDENT, FROZEN, feature networks), and its objective, all on the meta device."""

    def make() -> tuple[dict[str, Any], Objective]:
        modules = _modules(network, probe, config)
        return modules, _objective(modules, config)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _on_meta(make)


@functools.cache
def _phase_flops(network: NetworkConfig, probe: ProbeNetworkConfig, config: ObjectiveConfig) -> float:
    modules = _on_meta(lambda: _modules(network, probe, config))  # outside `_without_data`, because building reads values
    with _without_data():
        modules = {name: _empty(module) for name, module in modules.items()}
        objective = _objective(modules, config)
        student = _Counting(modules[STUDENT].train(), OptimizerConfig())
        critic = (
            None if objective.critic is None else Learner(objective.critic, objective.critic_optimizer or OptimizerConfig())
        )

        def step(number: int) -> float:
            batch = _batch(network, config, number)
            return _counted(lambda: objective.backward(student, critic, batch, torch.Generator()))

        examples = {objective.turns(number): number for number in range(CYCLE)}
        flops = {turns: step(number) for turns, number in examples.items()}
        shares = Counter(objective.turns(number) for number in range(CYCLE))
    return sum(count * flops[turns] for turns, count in shares.items()) / CYCLE


def _batch(network: NetworkConfig, config: ObjectiveConfig, step: int) -> Batch:
    """A batch with the inputs that the objective needs, without data."""
    needs, (x, labels) = config.needs(), _inputs(network)
    rows: dict[str, Any] = {}
    if needs.pairs or needs.noise:
        rows |= {"noise": x, "labels": labels} | ({"x1": x} if needs.pairs else {})
    if needs.images:
        rows |= {"real": x, "real_labels": labels}
    return Batch(size=BATCH, step=step, total=CYCLE, **rows)


def _modules(network: NetworkConfig, probe: ProbeNetworkConfig, config: ObjectiveConfig) -> dict[str, Any]:
    """The student, a frozen model (the teacher's network) and the feature networks of the phase, by name."""
    names = config.needs().features
    features = {name: _probe(probe, network.img_channels) if name == "probe" else build_backbone(name) for name in names}
    student = build(replace(network, **config.needs().inputs))
    return {STUDENT: student, FROZEN: build(replace(network, **Needs().inputs))} | features


def _objective(modules: dict[str, Any], config: ObjectiveConfig) -> Objective:
    model, needs = modules[STUDENT], config.needs()
    frozen = modules[FROZEN].eval().requires_grad_(False)
    return config.build(
        Context(
            image_shape=model.image_shape,
            num_classes=model.label_dim,
            features={name: modules[name].eval().requires_grad_(False) for name in needs.features},
            models={name: frozen for name in needs.models},
            average=copy.deepcopy(model).eval().requires_grad_(False),
        )
    )


@functools.cache
def measuring(name: str, probe: ProbeConfig, images: ImagesConfig) -> tuple[float, int, int]:
    """FLOPs of the measuring network `name`, and its numbers of features and logits (0 without logits)."""
    config = getattr(probe, PROBES.get(name, "measure"))
    bare = _on_meta(lambda: MeasuringProbe(_probe(config, images.channels)) if name in PROBES else build_measuring(name))
    with _without_data(), torch.inference_mode():
        network: Any = _empty(bare)
        batch = torch.zeros(BATCH, images.channels, images.resolution, images.resolution, dtype=torch.uint8)
        _, logits = network.look(batch)
        return _counted(lambda: network.look(batch)), network.dimensions, 0 if logits is None else logits.shape[1]


@functools.cache
def probe_flops(probe: ProbeNetworkConfig, images: ImagesConfig) -> float:
    """FLOPs of a training step of a probe."""
    bare = _on_meta(lambda: _probe(probe, images.channels))
    with _without_data():
        network = _empty(bare)
        x = torch.zeros(BATCH, images.channels, images.resolution, images.resolution)
        return _counted(lambda: network(x).sum().backward())


@functools.cache
def network_bytes(name: str | NetworkConfig | ProbeNetworkConfig, channels: int = 3) -> int:
    """Bytes of the weights of a pretrained network (by name), a denoiser (float32) or a probe for images with `channels`."""

    def make() -> nn.Module:
        if isinstance(name, NetworkConfig):
            return build(name)
        if isinstance(name, ProbeNetworkConfig):
            return _probe(name, channels)
        return build_measuring(name) if name in MEASURING else build_backbone(name)

    return state_bytes(_on_meta(make))


def _probe(config: ProbeNetworkConfig, channels: int) -> Probe:
    return Probe(config, channels=channels, num_classes=ANY_CLASSES)


def _on_meta(make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return make()


def _empty(module: Any) -> Any:
    """Move a module from the meta device to the CPU. Within `_without_data` its tensors have no data."""
    return module.to_empty(device="cpu")


@contextlib.contextmanager
def _without_data() -> Iterator[None]:
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")
        yield


def _inputs(network: NetworkConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Images and one-hot labels."""
    x = torch.zeros(BATCH, network.img_channels, network.img_resolution, network.img_resolution)
    return x, torch.zeros(BATCH, network.label_dim) if network.label_dim else None


class _NoTracker(contextlib.nullcontext[None]):
    """Replaces the tracker of modules, which fails for gradients with respect to inputs. Only the total matters here."""

    parents = frozenset({"Global"})


def _counted(call: Callable[[], Any]) -> float:
    """FLOPs of a call, per image."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoTracker()  # pyright: ignore[reportAttributeAccessIssue]
    with counter:
        call()
    return counter.get_total_flops() / BATCH


def state_bytes(module: nn.Module) -> int:
    """Bytes of a module's state: parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())


def student_bytes(network: NetworkConfig) -> int:
    """Bytes in a checkpoint of a student's network as it learns. A frozen network that makes its guess has no moments."""
    return learner_bytes(denoiser(network))


def learner_bytes(module: nn.Module | None) -> int:
    """Bytes in a checkpoint of a network that learns: its state, and Adam's two moments of each trained parameter. 0 for
    None."""
    if module is None:
        return 0
    return state_bytes(module) + 2 * FLOAT * sum(part.numel() for part in module.parameters() if part.requires_grad)
