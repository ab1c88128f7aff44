"""What one step of student training is: the seam between the loop and the method.

An objective owns the networks that learn and says what a step does with a batch; the loop around it (loop.py) knows
nothing of losses. Lines matching is here; knowledge distillation is the same with SOT steps (0,) and the L2 distance.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import nn

from beeline import adversarial, lines, perceptual
from beeline.checkpoint import build, dump, ema_update
from beeline.config import LmmConfig, PhaseConfig, to_dict
from beeline.denoiser import Denoiser, as_one_hot
from beeline.discriminator import ProjectedDiscriminator
from beeline.features import Probe
from beeline.noise import stream_seed
from beeline.samplers import FewStep
from pipeline.reader import to_float
from pipeline.stage import publish_model, require_model, require_probe
from pipeline.storage import Folder
from trainers import loop

RECONSTRUCTION = "reconstruction"


class LmmTask:
    """Lines matching in two phases: reconstruction, then reconstruction with an adversarial term (lmm.md).

    The weights after the first phase are published too, in <name>/reconstruction: the ablation's perceptual student, and
    where sweeps start.
    """

    def __init__(
        self,
        *,
        session: loop.Session,
        workspace: Folder,
        recipe: str,
        config: LmmConfig,
        pairs: dict[str, Any],
        images: dict[str, Any] | None,
    ) -> None:
        self.session, self.config, self.folder = session, config, session.folder
        self.name = config.name
        self.phases = (config.reconstruction, config.adversarial)
        self.iterations = sum(phase.iterations for phase in self.phases)
        self.images_per_step = config.batch_size
        device = session.device
        self.model = start_from(require_model(workspace, config.init, recipe)[0]).to(device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.pairs = session.read(workspace / "pairs", pairs["pairs"], config.seed)
        self.probe: Probe | None = None
        if any(needs_probe(phase) for phase in self.phases):
            self.probe = require_probe(workspace, "losses", recipe)[0].to(device)
        self.discriminator: ProjectedDiscriminator | None = None
        if any(phase.iterations and phase.adversarial_weight for phase in self.phases):
            assert images is not None
            assert self.probe is not None
            torch.manual_seed(stream_seed(config.seed, "discriminator"))
            self.discriminator = ProjectedDiscriminator(
                self.probe, width=config.discriminator.width, num_classes=self.model.label_dim
            ).to(device)
            self.parallel_discriminator = session.parallel(self.discriminator)
            self.critic_optimizer = loop.make_optimizer(self.discriminator.parameters(), config.discriminator.optimizer)
            self.images = session.read(workspace / "images", images["images"], config.seed + 1)
        self._begin_phase(0 if config.reconstruction.iterations else 1)

    def _begin_phase(self, number: int) -> None:
        """The next phase starts from the averaged weights of the one before, with a fresh optimiser."""
        self.phase_number = number
        self.phase: PhaseConfig = self.phases[number]
        self.phase_start = self.phases[0].iterations if number else 0
        self.model.load_state_dict(self.ema.state_dict())
        self.parallel = self.session.parallel(self.model)
        self.optimizer = loop.make_optimizer(self.model.parameters(), self.phase.optimizer)

    def step(self, step: int) -> dict[str, float]:
        if self.phase_number == 0 and step == self.phases[0].iterations:
            if self.session.rank == 0:
                self._publish(self.folder / RECONSTRUCTION, self.phase)
            self._begin_phase(1)
        phase, device = self.phase, self.session.device
        generator = self.session.generator(self.config.seed, step)
        batch = self.pairs.batch(*self.session.share(self.config.batch_size, step))
        x1, noise = (torch.from_numpy(batch[name]).to(device) for name in ("x1", "noise"))
        labels = as_one_hot(
            torch.from_numpy(batch["label"]) if self.model.label_dim else None, self.model.label_dim, len(x1), device
        )
        sigma = lines.draw_levels(
            len(x1), num_steps=self.config.num_steps, law=phase.levels, steps=phase.steps, generator=generator
        )
        student = self.parallel(lines.point(x1, noise, sigma, self.config.line), sigma, labels)
        loss = self._distance(student, x1).mean()
        figures = {"phase": float(self.phase_number), "lines": float(loss.detach())}
        if phase.adversarial_weight:
            assert self.discriminator is not None
            self.discriminator.requires_grad_(False)
            fake = adversarial.diff_augment(student, self.config.discriminator.augment, generator)
            fooling = adversarial.hinge_generator(self.discriminator(fake, labels))
            gradient, balance = adversarial.balanced_gradient(
                student, loss, fooling, last_layer(self.model), phase.adversarial_weight
            )
            student.backward(gradient)
            figures |= {"adversarial": float(fooling.detach()), "lambda": float(balance)}
        else:
            loss.backward()
        local = step - self.phase_start
        figures |= loop.update(self.optimizer, phase.optimizer, local, phase.iterations)
        ema_update(self.ema, self.model, self.config.ema_half_life, local + 1)
        if phase.adversarial_weight:
            figures |= self._critic_step(step, student.detach(), labels, generator)
        return figures

    def _distance(self, student: torch.Tensor, x1: torch.Tensor) -> torch.Tensor:
        if self.phase.distance == "l2":
            return perceptual.l2(student, x1)
        assert self.probe is not None
        return perceptual.perceptual(self.probe, student, x1, self.phase.pixel_weight)

    def _critic_step(
        self, step: int, fake: torch.Tensor, fake_labels: torch.Tensor | None, generator: torch.Generator
    ) -> dict[str, float]:
        """One step of the discriminator: the student's images against real ones, in one pass."""
        assert self.discriminator is not None
        batch = self.images.batch(*self.session.share(self.config.batch_size, step))
        real = torch.from_numpy(to_float(batch["image"])).to(fake.device)
        labels = None
        if fake_labels is not None:
            real_labels = torch.from_numpy(batch["label"])
            one_hot = as_one_hot(real_labels, self.model.label_dim, len(real), fake.device)
            assert one_hot is not None
            labels = torch.cat([one_hot, fake_labels])
        self.discriminator.requires_grad_(True)
        both = adversarial.diff_augment(torch.cat([real, fake]), self.config.discriminator.augment, generator)
        of_real, of_fake = self.parallel_discriminator(both, labels).chunk(2)
        loss = adversarial.hinge_discriminator(of_real, of_fake)
        loss.backward()
        local = step - self.phase_start
        done = loop.update(self.critic_optimizer, self.config.discriminator.optimizer, local, self.phase.iterations)
        signs = {"real_positive": of_real, "fake_positive": of_fake}
        return {"critic": float(loss.detach()), "critic_grad_norm": done["grad_norm"]} | {
            name: float((logits > 0).float().mean()) for name, logits in signs.items()
        }

    def state_dict(self, step: int) -> loop.State:
        state = {
            "phase": self.phase_number,
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        if self.discriminator is not None:
            state["discriminator"] = self.discriminator.state_dict()
            state["critic_optimizer"] = self.critic_optimizer.state_dict()
        return state

    def load_state_dict(self, state: loop.State) -> None:
        self._begin_phase(state["phase"])
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.discriminator is not None:
            self.discriminator.load_state_dict(state["discriminator"])
            self.critic_optimizer.load_state_dict(state["critic_optimizer"])

    def publish(self) -> None:
        self._publish(self.folder, self.phase)

    def student(self) -> Denoiser:
        """The averaged student as it stands, knowing how it may be sampled."""
        self.ema.few_step = self._few_step(self.phase)
        return self.ema

    def _few_step(self, phase: PhaseConfig) -> FewStep:
        return FewStep(num_steps=self.config.num_steps, rule=self.config.rule, trained_steps=phase.steps)

    def _publish(self, folder: Folder, phase: PhaseConfig) -> None:
        self.ema.few_step = self._few_step(phase)
        publish_model(folder, dump(self.ema, {"trained": to_dict(self.config, resources=False)}))


def needs_probe(phase: PhaseConfig) -> bool:
    """Whether a phase looks through the losses' probe."""
    return bool(phase.iterations) and (phase.distance == "perceptual" or phase.adversarial_weight > 0)


def start_from(init: Denoiser) -> Denoiser:
    """A student with the weights of `init`, ready to train; dropout, where the teacher had any, is gone."""
    assert init.network_config is not None
    student = build(dataclasses.replace(init.network_config, dropout=0.0))
    student.load_state_dict(init.state_dict())
    return student.train()


def last_layer(model: Denoiser) -> nn.Parameter:
    """The weight of the denoiser's output convolution."""
    weight = model.model.last_layer
    assert isinstance(weight, nn.Parameter)
    return weight
