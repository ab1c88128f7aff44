"""How many floating-point operations a recipe's networks take: counted by running the code itself on tensors without data.

A multiply-add counts as two. Convolutions, matrix products and attention count; norms, activations and the copying that
compiled code saves do not. Networks are built on the meta device, so that the largest takes a second and no memory.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
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

from beeline.augmentation import augment
from beeline.checkpoint import build
from beeline.config import (
    ImagesConfig,
    NetworkConfig,
    OptimizerConfig,
    ProbeConfig,
    ProbeNetworkConfig,
    TeacherConfig,
)
from beeline.features.backbones import build_backbone
from beeline.features.measuring import MEASURING, PROBES, MeasuringProbe, build_measuring
from beeline.features.probe import Probe
from beeline.objectives import Batch, Context, Objective, ObjectiveConfig
from beeline.objectives.edm import edm_loss
from beeline.objectives.learner import Learner

BATCH = 2  # images that are counted at once: batch norms want two
CYCLE = 60  # steps over which the turns of student and critic are averaged
FLOAT = 4  # bytes
STUDENT = ""  # among the modules of a phase, which have names
ANY_CLASSES = 10  # of a probe: its last layer hardly counts


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of student training: bytes that a checkpoint keeps of the critic and of the objective's own state."""

    critic_bytes: int
    state_bytes: int
    count: Callable[[], float]

    @property
    def flops(self) -> float:
        """Of a step, per image. Counting them takes seconds."""
        return self.count()


class _Bare(Learner):
    """A learner whose denoiser does without preconditioning, which looks at noise levels; they have no values here."""

    def __call__(self, *inputs: Any) -> Any:
        x, sigma, *labels = inputs
        return self.model.model(x, sigma, *labels)  # pyright: ignore[reportCallIssue]


@functools.cache
def evaluation(network: NetworkConfig) -> float:
    """FLOPs of one evaluation of one image."""
    bare = _on_meta(lambda: build(network)).model
    with _without_data(), torch.inference_mode():
        model, (x, labels) = _empty(bare), _inputs(network)
        return _counted(lambda: model(x, torch.ones(BATCH), labels))


@functools.cache
def weight_bytes(network: NetworkConfig) -> int:
    """Bytes of the network's weights, float32."""
    return state_bytes(_on_meta(lambda: build(network)))


@functools.cache
def teacher_step(network: NetworkConfig, augmented: bool) -> float:
    """FLOPs per image of a training step of a teacher: forward and backward, and the images' augmentation."""
    bare = _on_meta(lambda: build(network))
    with _without_data():
        learner = _Bare(_empty(bare).train(), OptimizerConfig())
        x, labels = _inputs(network)
        generator = torch.Generator()

        def step() -> None:
            images, found = augment(x, 0.1, generator) if augmented else (x, None)
            edm_loss(learner, images, labels, generator, found).backward()

        return _counted(step)


def of_teacher(teacher: TeacherConfig) -> float:
    """FLOPs per image of a training step."""
    return teacher_step(teacher.network, teacher.augment > 0)


def of_phase(network: NetworkConfig, probe: ProbeNetworkConfig, objective: ObjectiveConfig) -> Phase:
    """A step of `objective`, its own code: student, losses and critic, frozen networks included."""
    arguments = (replace(network, dropout=0.0), probe, objective.representative())
    return Phase(*_kept_bytes(*arguments), functools.partial(_phase_flops, *arguments))


@functools.cache
def _kept_bytes(network: NetworkConfig, probe: ProbeNetworkConfig, config: ObjectiveConfig) -> tuple[int, int]:
    """Bytes in a checkpoint of the critic and of the objective's state, each with Adam's two moments of what learns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = _on_meta(lambda: _objective(_modules(network, probe, config), config))
    return _with_moments(made.critic), _with_moments(made.state())


def _with_moments(module: nn.Module | None) -> int:
    if module is None:
        return 0
    return state_bytes(module) + 2 * FLOAT * sum(part.numel() for part in module.parameters() if part.requires_grad)


@functools.cache
def _phase_flops(network: NetworkConfig, probe: ProbeNetworkConfig, config: ObjectiveConfig) -> float:
    modules = _on_meta(lambda: _modules(network, probe, config))  # outside of what has no data: building reads values
    with _without_data():
        modules = {name: _empty(module) for name, module in modules.items()}
        made, model = _objective(modules, config), modules[STUDENT].train()
        student = _Bare(model, OptimizerConfig())
        critic = None if made.critic is None else Learner(made.critic, made.critic_optimizer or OptimizerConfig())
        steps = {made.turns(step): step for step in range(CYCLE)}
        shares = Counter(made.turns(step) for step in range(CYCLE))
        counted = {
            turns: _counted(lambda step=step: made.backward(student, critic, _batch(network, config, step), torch.Generator()))
            for turns, step in steps.items()
        }
    return sum(count * counted[turns] for turns, count in shares.items()) / CYCLE


def _batch(network: NetworkConfig, config: ObjectiveConfig, step: int) -> Batch:
    """What the objective asks for, without data."""
    needs, (x, labels) = config.needs(), _inputs(network)
    rows: dict[str, Any] = {}
    if needs.pairs or needs.noise:
        rows |= {"noise": x, "labels": labels} | ({"x1": x} if needs.pairs else {})
    if needs.images:
        rows |= {"real": x, "real_labels": labels}
    return Batch(size=BATCH, step=step, total=CYCLE, **rows)


def _modules(network: NetworkConfig, probe: ProbeNetworkConfig, config: ObjectiveConfig) -> dict[str, Any]:
    """The student, and the networks that the phase looks through, by name."""
    names = config.needs().features
    seen = {name: _probe(probe, network.img_channels) if name == "probe" else build_backbone(name) for name in names}
    return {STUDENT: build(replace(network, second_level=config.needs().second_level))} | seen


def _objective(modules: dict[str, Any], config: ObjectiveConfig) -> Objective:
    model, needs = modules[STUDENT], config.needs()
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    return config.build(
        Context(
            image_shape=model.image_shape,
            num_classes=model.label_dim,
            features={name: modules[name].eval().requires_grad_(False) for name in needs.features},
            models={name: frozen for name in needs.models},
            average=frozen,
        )
    )


@functools.cache
def look(name: str, probe: ProbeNetworkConfig, channels: int, resolution: int) -> tuple[float, int]:
    """FLOPs per image of a measuring network, and its features; `probe` is the one it is, where it is a probe."""
    bare = _on_meta(lambda: MeasuringProbe(_probe(probe, channels)) if name in PROBES else build_measuring(name))
    with _without_data(), torch.inference_mode():
        network: Any = _empty(bare)
        images = torch.zeros(BATCH, channels, resolution, resolution, dtype=torch.uint8)
        return _counted(lambda: network.look(images)), network.dimensions


def look_at(name: str, probe: ProbeConfig, images: ImagesConfig) -> tuple[float, int]:
    """FLOPs per image of a recipe's measuring network `name`, and its features."""
    return look(name, getattr(probe, PROBES.get(name, "measure")), images.channels, images.resolution)


@functools.cache
def probe_step(probe: ProbeNetworkConfig, channels: int, resolution: int) -> float:
    """FLOPs per image of a training step of a probe."""
    bare = _on_meta(lambda: _probe(probe, channels))
    with _without_data():
        network = _empty(bare)
        return _counted(lambda: network(torch.zeros(BATCH, channels, resolution, resolution)).sum().backward())


def probe_bytes(probe: ProbeNetworkConfig, channels: int) -> int:
    """Bytes of a probe's weights."""
    return state_bytes(_on_meta(lambda: _probe(probe, channels)))


@functools.cache
def pretrained_bytes(name: str) -> int:
    """Bytes of the weights of a pretrained network."""
    return state_bytes(_on_meta(lambda: build_measuring(name) if name in MEASURING else build_backbone(name)))


def state_bytes(network: nn.Module) -> int:
    """Bytes of what a checkpoint keeps of a module."""
    return sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values())


def _probe(config: ProbeNetworkConfig, channels: int) -> Probe:
    return Probe(config, channels=channels, num_classes=ANY_CLASSES)


def _on_meta(make: Callable[[], Any]) -> Any:
    with torch.device("meta"):
        return make()


def _empty(module: Any) -> Any:
    """The module of the meta device as one of the CPU whose tensors have no data."""
    return module.to_empty(device="cpu")


@contextlib.contextmanager
def _without_data() -> Iterator[None]:
    with warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")
        yield


def _inputs(network: NetworkConfig) -> tuple[torch.Tensor, torch.Tensor | None]:
    x = torch.zeros(BATCH, network.img_channels, network.img_resolution, network.img_resolution)
    return x, torch.zeros(BATCH, network.label_dim) if network.label_dim else None


def _counted(call: Callable[[], Any]) -> float:
    """FLOPs of a call, per image."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / BATCH
