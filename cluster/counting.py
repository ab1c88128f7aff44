"""How many floating-point operations a recipe's networks take: counted by running the code itself on tensors without data.

A multiply-add counts as two. Convolutions, matrix products and attention count; norms, activations and the copying that
compiled code saves do not. Networks are built on the meta device, so that the largest takes a second and no memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from beeline import objectives
from beeline.augment import augment
from beeline.backbones import build_backbone
from beeline.checkpoint import build
from beeline.config import (
    ImagesConfig,
    LmmConfig,
    NetworkConfig,
    OptimizerConfig,
    PhaseConfig,
    ProbeConfig,
    ProbeNetworkConfig,
    TeacherConfig,
)
from beeline.denoiser import edm_loss
from beeline.features import Probe
from beeline.learner import Learner
from beeline.measuring import MEASURING, PROBES, MeasuringProbe, build_measuring
from beeline.objectives import Batch, Setting

BATCH = 2  # images that are counted at once: batch norms want two
FLOAT = 4  # bytes
STUDENT = ""  # among the modules of a phase, which have names
ANY_CLASSES = 10  # of a probe: its last layer hardly counts


@dataclasses.dataclass(frozen=True)
class Phase:
    """A phase of student training: bytes that a checkpoint keeps of the critic, and the steps that alone are trained, if so."""

    critic_bytes: int
    trained_steps: tuple[int, ...] | None
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


def of_phase(network: NetworkConfig, probe: ProbeNetworkConfig, lmm: LmmConfig, phase: PhaseConfig) -> Phase:
    """A step of `phase`, the objective's own code: student, distance and discriminator, frozen networks included."""
    # Without the settings that do not bear on what a step computes, so that like steps are counted once.
    like = replace(
        phase, iterations=1, optimizer=OptimizerConfig(), adversarial_weight=float(phase.adversarial_weight > 0),
        pixel_weight=0.0, steps=None,
    )  # fmt: skip
    plain = LmmConfig(
        objective=lmm.objective,
        num_steps=lmm.num_steps,
        line=lmm.line,
        rule=lmm.rule,
        reconstruction=like,
        adversarial=like,
        discriminator=replace(lmm.discriminator, optimizer=OptimizerConfig()),
    )
    arguments = (replace(network, dropout=0.0), probe, plain, like)
    kept, steps = _phase_parts(*arguments)
    return Phase(kept, phase.steps or steps, functools.partial(_phase_flops, *arguments))


@functools.cache
def _phase_parts(
    network: NetworkConfig, probe: ProbeNetworkConfig, lmm: LmmConfig, phase: PhaseConfig
) -> tuple[int, tuple[int, ...] | None]:
    """Bytes of the critic in a checkpoint, with Adam's two moments, and the objective's own trained steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = _on_meta(lambda: _objective(_modules(network, probe, lmm, phase), lmm, phase))
    critic = made.critic
    kept = 0
    if critic is not None:
        kept = state_bytes(critic) + 2 * FLOAT * sum(part.numel() for part in critic.parameters() if part.requires_grad)
    return kept, made.few_step.trained_steps


@functools.cache
def _phase_flops(network: NetworkConfig, probe: ProbeNetworkConfig, lmm: LmmConfig, phase: PhaseConfig) -> float:
    modules = _on_meta(lambda: _modules(network, probe, lmm, phase))  # outside of what has no data: building reads values
    with _without_data():
        modules = {name: _empty(module) for name, module in modules.items()}
        made, model = _objective(modules, lmm, phase), modules[STUDENT].train()
        critic = None if made.critic is None else Learner(made.critic, lmm.discriminator.optimizer)
        x, labels = _inputs(network)
        batch = Batch(noise=x, x1=x, labels=labels, real=x, real_labels=labels)
        return _counted(lambda: made.backward(_Bare(model, phase.optimizer), critic, batch, torch.Generator()))


def _modules(network: NetworkConfig, probe: ProbeNetworkConfig, lmm: LmmConfig, phase: PhaseConfig) -> dict[str, Any]:
    """The student, and the networks that the phase looks through, by name."""
    names = objectives.load(lmm.objective).needs(lmm, phase).features
    seen = {name: _probe(probe, network.img_channels) if name == "probe" else build_backbone(name) for name in names}
    return {STUDENT: build(network)} | seen


def _objective(modules: dict[str, Any], lmm: LmmConfig, phase: PhaseConfig) -> objectives.Objective:
    kind, model = objectives.load(lmm.objective), modules[STUDENT]
    needs = kind.needs(lmm, phase)
    return kind(
        Setting(
            config=lmm,
            phase=phase,
            image_shape=model.image_shape,
            num_classes=model.label_dim,
            features={name: modules[name].eval().requires_grad_(False) for name in needs.features},
            teacher=model if needs.teacher else None,
            average=model if needs.average else None,
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
