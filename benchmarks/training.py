"""Training speed of each phase by policy, against a plain baseline, and the time of each part of a step.

    python -m benchmarks.training                       # EDM's CIFAR-10 network and the paper's losses, random weights
    python -m benchmarks.training --phases adversarial --no-compile

A step includes the student, losses, discriminator, both optimisers and both averages. The baseline is eager, float32 and NCHW.
Parts are timed separately, forward and backward. "second look" is the additional cost if the discriminator's step computed the
features of the generated images again, as in published projected GANs, instead of sharing those of the generator's step.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from beeline.checkpoint import build
from beeline.config import PhaseConfig, StudentConfig
from beeline.denoiser import Denoiser
from beeline.features import FeatureNetwork, Frozen
from beeline.features.backbones import BACKBONES, build_backbone
from beeline.labels import as_one_hot
from beeline.objectives import Batch, Context, adversarial
from beeline.objectives.ema import ema_update
from beeline.objectives.learner import Learner, compile_trunk
from beeline.objectives.lmm import LinesMatching, LinesMatchingConfig
from beeline.recipes import cifar10
from beeline.sampling.inference import DTYPES
from benchmarks.machine import describe, describe_model, timed, write
from benchmarks.sampling import CIFAR10, plain

POLICIES: dict[str, dict[str, Any]] = {
    "plain": {"precision": "fp32", "compiled": False},
    "fp32": {"precision": "fp32", "compiled": False},
    "bf16": {"precision": "bf16", "compiled": False},
    "bf16 compiled": {"precision": "bf16", "compiled": True},
}


class Step:
    """A training step on a fixed batch, like trainers/student.py but without data loading and ranks. `config` sets precision
    and compilation; `as_written` keeps PyTorch's layout, attention and frozen networks."""

    def __init__(
        self,
        model: Denoiser,
        networks: Mapping[str, FeatureNetwork],
        config: StudentConfig,
        phase: PhaseConfig,
        *,
        as_written: bool = False,
    ) -> None:
        self.config, self.as_written, self.networks = config, as_written, networks
        self.device = next(model.parameters()).device
        self.model = copy.deepcopy(plain(model) if as_written else model).train().requires_grad_(True)
        self.averages = [copy.deepcopy(self.model) for _ in config.ema_half_lives]
        if not as_written:
            self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if config.compiled:
            compile_trunk(self.model)
        self.number = 0
        self.begin(phase)

    def begin(self, phase: PhaseConfig) -> None:
        """Build the objective of `phase`, its critic and the optimisers."""
        config, self.phase = self.config, phase
        assert isinstance(phase.objective, LinesMatchingConfig)
        self.lines = phase.objective
        features: dict[str, FeatureNetwork] = {}
        for name in self.lines.needs().features:
            frozen = Frozen(
                self.networks[name], device=self.device, dtype=DTYPES[config.precision], compiled=config.compiled
            )  # fmt: skip
            features[name] = self.networks[name] if self.as_written else frozen
        torch.manual_seed(0)
        self.context = Context(
            image_shape=self.model.image_shape,
            num_classes=self.model.label_dim,
            models={},
            features=features,
            average=self.averages[0],
        )
        self.objective: LinesMatching = self.lines.build(self.context)
        self.student = Learner(self.model, phase.optimizer, precision=config.precision)
        self.critic: Learner | None = None
        if self.objective.critic is not None:
            critic = self.objective.critic.to(self.device)
            self.critic = Learner(critic, self.lines.discriminator.optimizer, precision=config.precision)

    def __call__(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Run one step; return the objective's figures, and whether the step was skipped."""
        figures = self.objective.backward(self.student, self.critic, batch, generator)
        return figures | {"skipped": torch.tensor(self.update())}

    def update(self) -> float:
        """Update weights and averages; return 1 if gradients were not finite."""
        skipped = 0.0
        for learner in (self.student, self.critic):
            if learner is not None:
                skipped = max(skipped, learner.update(self.number, self.phase.iterations)["skipped"])
        self.number += 1
        for average, half_life in zip(self.averages, self.config.ema_half_lives, strict=True):
            ema_update(average, self.model, half_life, self.number, self.config.ema_ramp)
        return skipped

    def state_dict(self) -> dict[str, Any]:
        """Return the state as the trainer's checkpoint holds it."""
        return {
            "number": self.number,
            "student": self.student.state_dict(),
            "averages": [average.state_dict() for average in self.averages],
            "critic": None if self.critic is None else self.critic.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Invert `state_dict`."""
        self.number = state["number"]
        self.student.load_state_dict(state["student"])
        for average, weights in zip(self.averages, state["averages"], strict=True):
            average.load_state_dict(weights)
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])

    def parts(self, batch: Batch, generator: torch.Generator) -> dict[str, Callable[[], Any]]:
        """Return the parts of the step as separate calls, forward and backward."""
        x1, noise, real, labels = batch.x1, batch.noise, batch.real, batch.labels
        assert x1 is not None
        assert noise is not None
        assert real is not None
        sigma = torch.full((len(x1),), 20.0, device=x1.device)

        def student() -> None:
            self.student(x1 + 20 * noise, sigma, labels).square().mean().backward()

        def loss() -> None:
            self.lines.build_distance(self.context)(x1.clone().requires_grad_(), x1).mean().backward()

        parts = {"student": student, "distance": loss, "optimisers and averages": self.update}
        critic, adversary = self.critic, self.objective.adversary
        if critic is None or adversary is None:
            return parts
        own = adversary.discriminator

        def look(images: torch.Tensor) -> list[list[torch.Tensor]]:
            with critic.autocast():
                return own.look(images, generator)

        def discriminator() -> None:
            fake = look(x1.clone().requires_grad_())
            adversarial.hinge_generator(critic.frozen(fake, labels)).backward()
            with torch.no_grad():
                real_looks = look(real)
            fake_logits = critic([[part.detach() for part in parts] for parts in fake], labels)
            adversarial.hinge_discriminator(critic(real_looks, labels), fake_logits).backward()

        def second_look() -> None:
            fake = look(x1.clone().requires_grad_())
            torch.stack([part.float().mean() for parts in fake for part in parts]).sum().backward()

        return parts | {"discriminator": discriminator, "second look": second_look}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Training speed by policy.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--batch-size", type=int, default=0, help="0 means 4 on a CPU, 64 on a GPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--phases", nargs="+", default=["reconstruction", "adversarial"])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file; default: in benchmarks/results")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = arguments.batch_size or (64 if device.type == "cuda" else 4)
    config = cifar10().main
    torch.manual_seed(0)
    model = build(CIFAR10).to(device)
    for parameter in model.parameters():  # the zero initialisation of the output layers would hide errors
        if parameter.ndim > 1:
            nn.init.normal_(parameter, 0, parameter[0].numel() ** -0.5)
    networks = {name: build_backbone(name).to(device) for name in BACKBONES}
    noise, x1, real = (torch.randn(size, *model.image_shape, device=device).clamp(-1, 1) for _ in range(3))
    labels = as_one_hot(torch.arange(size) % model.label_dim, model.label_dim, size, device)
    batch = Batch(size=size, step=0, total=1, noise=noise, x1=x1, labels=labels, real=real, real_labels=labels)
    generator = torch.Generator(device).manual_seed(0)

    phases: dict[str, Any] = {}
    for name in arguments.phases:
        steps = {
            policy: Step(
                model, networks, replace(config, **POLICIES[policy]), config.phases[name], as_written=policy == "plain"
            )
            for policy in POLICIES
            if not (arguments.no_compile and POLICIES[policy]["compiled"])
        }
        seconds = timed({key: lambda s=s: s(batch, generator) for key, s in steps.items()}, device, arguments.rounds)
        rows = {}
        for policy, step in steps.items():
            parts = timed(step.parts(batch, generator), device, arguments.rounds)
            step.student.optimizer.zero_grad(set_to_none=True)
            rows[policy] = {
                "images_per_s": size / seconds[policy],
                "against_plain": seconds["plain"] / seconds[policy],
                "share_of_step": {part: value / seconds[policy] for part, value in parts.items()},
            }
            shares = ", ".join(f"{part} {value:.0%}" for part, value in rows[policy]["share_of_step"].items())
            speed = f"{rows[policy]['images_per_s']:.2f} images/s, {rows[policy]['against_plain']:.2f}x plain"
            print(f"{name}, {policy}: {speed}; {shares}", flush=True)
        phases[name] = rows
    write(
        f"training-{'gpu' if device.type == 'cuda' else 'cpu'}-cifar10",
        {"machine": describe(device), "model": describe_model(model, None), "batch_size": size, "phases": phases},
        arguments.out,
    )


if __name__ == "__main__":
    main()
