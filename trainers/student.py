"""The student as a task of the loop: data, averages, phases and validation around an objective, which knows the losses."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from beeline import objectives
from beeline.checkpoint import build, dump, ema_update
from beeline.config import LmmConfig, OptimizerConfig, PhaseConfig, to_dict
from beeline.denoiser import Denoiser, as_one_hot
from beeline.errors import BeelineError
from beeline.features import Frozen
from beeline.inference import DTYPES
from beeline.learner import Learner, compile_trunk
from beeline.noise import stream_seed
from beeline.objectives import Batch, Needs, Setting
from pipeline.reader import to_float
from pipeline.stage import publish_model, require_features, require_model
from pipeline.storage import Folder
from trainers import loop
from trainers.validation import METRIC, Validation

RECONSTRUCTION, BEST = "reconstruction", "best"


class StudentTask:
    """A student in two phases, reconstruction and adversarial (lmm.md), of the objective that `config` names.

    The weights after the first phase are published too, in <name>/reconstruction: the ablation's perceptual student, and
    where sweeps start. `pairs` and `images` are the plans of those folders, None where no phase needs them.
    """

    def __init__(
        self,
        *,
        session: loop.Session,
        workspace: Folder,
        recipe: str,
        config: LmmConfig,
        pairs: dict[str, Any] | None,
        images: dict[str, Any] | None,
    ) -> None:
        self.session, self.config, self.folder = session, config, session.folder
        self.workspace, self.recipe, self.name = workspace, recipe, config.name
        self.phases = (config.reconstruction, config.adversarial)
        self.iterations = sum(phase.iterations for phase in self.phases)
        self.images_per_step = config.batch_size
        self.model = start_from(require_model(workspace, config.init, recipe)[0])
        self.model.to(session.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        # EDM's averages over half-lives: the first is the student.
        self.averages = [copy.deepcopy(self.model).eval().requires_grad_(False) for _ in config.ema_half_lives]
        if config.compiled:
            compile_trunk(self.model)
        needs = all_needs(config)
        self.pairs = self.images = self.validation = None
        if needs.pairs:
            assert pairs is not None
            self.pairs = session.read(workspace / "pairs", pairs["pairs"], config.seed)
        if needs.images:
            assert images is not None
            self.images = session.read(workspace / "images", images["images"], config.seed + 1)
        self.teacher = require_model(workspace, "teacher", recipe)[0].to(session.device) if needs.teacher else None
        if config.validate_every and session.rank == 0:
            assert images is not None
            self.validation = Validation(
                workspace, recipe, images, count=config.validate_count, seed=config.seed, device=session.device
            )
        self.best = float("inf")
        first = 0 if config.reconstruction.iterations else 1
        self.student = self._learner(self.model, self.phases[first].optimizer)
        self._begin_phase(first)

    def _learner(self, model: nn.Module, optimizer: OptimizerConfig) -> Learner:
        return Learner(model, optimizer, parallel=self.session.parallel, precision=self.config.precision)

    def _switch_phase(self) -> None:
        """From the first phase to the second, as `phase_switch` says. Averages go on in any case."""
        optimizer = self.phases[1].optimizer
        if self.config.phase_switch == "continue":
            self.student.continue_with(optimizer)
        else:
            self.model.load_state_dict(self.averages[0].state_dict())
            self.student = self._learner(self.model, optimizer)
        self._begin_phase(1)

    def _begin_phase(self, number: int) -> None:
        """Make the phase's objective and its critic."""
        config, session = self.config, self.session
        self.phase_number, self.phase = number, self.phases[number]
        self.phase_start = self.phases[0].iterations if number else 0
        objective = objectives.load(config.objective)
        features = {}
        for name in objective.needs(config, self.phase).features:
            network = require_features(self.workspace, name, self.recipe)[0]
            features[name] = Frozen(network, device=session.device, dtype=DTYPES[config.precision], compiled=config.compiled)
        torch.manual_seed(stream_seed(config.seed, "discriminator"))
        self.objective = objective(
            Setting(
                config=config,
                phase=self.phase,
                image_shape=self.model.image_shape,
                num_classes=self.model.label_dim,
                features=features,
                teacher=self.teacher,
                average=self.averages[0],
            )
        )
        self.critic: Learner | None = None
        if self.objective.critic is not None:
            self.critic = self._learner(self.objective.critic.to(session.device), config.discriminator.optimizer)

    def step(self, step: int) -> loop.Figures:
        if self.phase_number == 0 and step == self.phases[0].iterations:
            if self.session.rank == 0:
                self._publish(self.folder / RECONSTRUCTION)
            self._switch_phase()
        generator = self.session.generator(self.config.seed, step)
        learners = [learner for learner in (self.student, self.critic) if learner is not None]
        figures: loop.Figures = {"phase": float(self.phase_number)}
        for batch, last in self._batches(step):
            with learners[0].accumulating(last=last), learners[-1].accumulating(last=last):
                found = self.objective.backward(self.student, self.critic, batch, generator)
            for name, value in found.items():
                figures[name] = figures.get(name, 0.0) + batch.weight * value
        local = step - self.phase_start
        figures |= self.student.update(local, self.phase.iterations)
        if self.critic is not None:
            done = self.critic.update(local, self.phase.iterations)
            figures["critic_grad_norm"] = done["grad_norm"]
            figures["skipped"] = max(figures["skipped"], done["skipped"])
        for average, half_life in zip(self.averages, self.config.ema_half_lives, strict=True):
            ema_update(average, self.model, half_life, step + 1, self.config.ema_ramp)
        return figures

    def _batches(self, step: int) -> list[tuple[Batch, bool]]:
        """This rank's rows of the step, in parts; the last one is marked."""
        start, size = self.session.share(self.config.batch_size, step)
        rows: dict[str, np.ndarray] = {}
        if self.pairs is not None:
            batch = self.pairs.batch(start, size)
            rows |= {"noise": batch["noise"], "x1": batch["x1"], "labels": batch["label"]}
        if self.images is not None and self.objective.needs(self.config, self.phase).images:
            batch = self.images.batch(start, size)
            rows |= {"real": batch["image"], "real_labels": batch["label"]}
        made = []
        for part in np.array_split(np.arange(size), self.config.accumulate):
            tensors = {name: self._tensor(name, column[part]) for name, column in rows.items()}
            weight = len(part) * self.session.world_size / self.config.batch_size
            made.append((Batch(**tensors, weight=weight), len(made) + 1 == self.config.accumulate))
        return made

    def _tensor(self, name: str, column: np.ndarray) -> torch.Tensor | None:
        device = self.session.device
        if name.endswith("labels"):
            labels = torch.from_numpy(column) if self.model.label_dim else None
            return as_one_hot(labels, self.model.label_dim, len(column), device)
        return torch.from_numpy(to_float(column) if column.dtype == np.uint8 else column).to(device)

    def validate(self, step: int) -> dict[str, float]:
        """Samples of the student as it stands, on a sheet, and their distance; the best student so far is published."""
        assert self.validation is not None
        figures, sheet = self.validation.judge(self.average())
        self.folder.write(f"samples/step-{step:08d}.png", sheet)
        if figures and figures[METRIC] < self.best:
            self.best = figures[METRIC]
            self._publish(self.folder / BEST, about={"step": step, **figures})
        return figures

    def state_dict(self) -> loop.State:
        return {
            "progress": {"phase": self.phase_number, "best": self.best},
            "student": self.student.state_dict(),
            "averages": [average.state_dict() for average in self.averages],
            "critic": None if self.critic is None else self.critic.state_dict(),
        }

    def load_state_dict(self, state: loop.State) -> None:
        if state["progress"]["phase"] != self.phase_number:
            self._switch_phase()
        self.student.load_state_dict(state["student"])
        for average, weights in zip(self.averages, state["averages"], strict=True):
            average.load_state_dict(weights)
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
        self.best = state["progress"]["best"]

    def publish(self) -> None:
        self._publish(self.folder)
        for average, half_life in list(zip(self.averages, self.config.ema_half_lives, strict=True))[1:]:
            self._publish(self.folder / f"ema-{half_life:g}", average)

    def average(self, average: Denoiser | None = None) -> Denoiser:
        """The averaged student as it stands, or another of its averages, knowing how it may be sampled."""
        model = average or self.averages[0]
        model.few_step = self.objective.few_step
        return model

    def _publish(self, folder: Folder, average: Denoiser | None = None, about: dict[str, Any] | None = None) -> None:
        trained = {"trained": to_dict(self.config, resources=False), **(about or {})}
        publish_model(folder, dump(self.average(average), trained))


def all_needs(config: LmmConfig) -> Needs:
    """What the phases of a student need together. Raises BeelineError for settings that do not go together."""
    kinds = [phase.optimizer.kind for phase in running(config)]
    if config.phase_switch == "continue" and len(set(kinds)) > 1:
        raise BeelineError(
            f"the phases use the optimisers {' and '.join(kinds)}, and phase_switch is 'continue': the second cannot continue "
            "with the moments of the first. Use the same kind, or set phase_switch to 'restart'"
        )
    objective = objectives.load(config.objective)
    needs = [objective.needs(config, phase) for phase in running(config)]
    return Needs(
        pairs=any(need.pairs for need in needs),
        images=any(need.images for need in needs),
        teacher=any(need.teacher for need in needs),
        average=any(need.average for need in needs),
        features=tuple(dict.fromkeys(name for need in needs for name in need.features)),
    )


def running(config: LmmConfig) -> list[PhaseConfig]:
    """The phases that are not left out."""
    return [phase for phase in (config.reconstruction, config.adversarial) if phase.iterations]


def start_from(init: Denoiser) -> Denoiser:
    """A student with the weights of `init`, ready to train, without dropout and without the augmentation input.

    A student never gets augmentation labels: the weights of that input would have no gradient, which DDP refuses.
    """
    assert init.network_config is not None
    student = build(dataclasses.replace(init.network_config, dropout=0.0, augment_dim=0))
    kept = student.state_dict().keys()
    student.load_state_dict({name: weight for name, weight in init.state_dict().items() if name in kept})
    return student.train()
