"""The training of a denoiser, teacher or student: data, averages, phases and validation around an objective."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from beeline.checkpoint import dump
from beeline.config import OptimizerConfig, StudentConfig, TeacherConfig
from beeline.config.student import BEST, SAMPLES, average_name
from beeline.denoiser import Denoiser
from beeline.features import Frozen
from beeline.files.names import IMAGES, TEACHER, pairs_folder
from beeline.labels import Subset, as_one_hot, pair_labels
from beeline.metrics.measures import VALIDATION
from beeline.noise import stream_seed, unit_noise
from beeline.objectives import Batch, Context
from beeline.objectives.ema import ema_update
from beeline.objectives.learner import GRAD_NORM, SKIPPED, Learner, compile_trunk
from beeline.pixels import to_float
from beeline.sampling.inference import DTYPES, prepare
from pipeline.model_folders import publish_model, require_features, require_model
from pipeline.reader import ShardReader
from pipeline.storage import Folder
from pipeline.training_log import CRITIC_GRAD_NORM, PHASE
from trainers import loop
from trainers.validation import Validation

READ = 512  # real images read at once for statistics


class Training:
    """Trains a model phase by phase. Publishes the model after each phase but the last in <folder>/<phase>.

    `start` builds the model with its first weights, the same on all ranks. `pairs` and `images` are the plans of those
    stages, None if no phase needs them. `validation(device=...)` builds the `Validation` of rank 0. With a `subset`, labels,
    pairs and real images are of its classes alone.
    """

    def __init__(
        self,
        *,
        session: loop.Session,
        workspace: Folder,
        recipe: str,
        config: StudentConfig | TeacherConfig,
        start: Callable[[], Denoiser],
        pairs: dict[str, Any] | None = None,
        images: dict[str, Any] | None = None,
        validation: Callable[..., Validation] | None = None,
        subset: Subset | None = None,
    ) -> None:
        self.session, self.config, self.folder = session, config, session.folder
        self.workspace, self.recipe, self.subset = workspace, recipe, subset
        self.name = config.name if subset is None else f"{config.name}/{subset.number}"
        self.phases = list(config.running.items())
        self.phase_ends = list(itertools.accumulate(phase.iterations for _, phase in self.phases))
        self.iterations, self.images_per_step = self.phase_ends[-1], config.batch_size
        needs = config.needs()
        self.model = start().to(session.device)
        self.averages = [copy.deepcopy(self.model).eval().requires_grad_(False) for _ in config.half_lives]
        if config.compiled:
            compile_trunk(self.model)
            if self.model.guess is not None:
                compile_trunk(self.model.guess)
        self.pairs = self.images = self.validation = None
        self.images_plan, self.classes = images, None if subset is None else subset.classes
        if needs.pairs:
            assert pairs is not None
            made_by = config.pairs if isinstance(config, StudentConfig) else TEACHER
            self.pairs = session.read(workspace / pairs_folder(made_by), pairs["pairs"], config.seed, self.classes)
        if needs.images:
            assert images is not None
            self.images = session.read(workspace / IMAGES, images["images"], config.seed + needs.pairs, self.classes)
        if validation is not None and session.rank == 0:
            self.validation = validation(device=session.device)
        self.best = float("inf")
        self.student = self._learner(self.model, self.phases[0][1].optimizer)
        self._begin_phase(0)

    def _learner(self, model: nn.Module, optimizer: OptimizerConfig) -> Learner:
        return Learner(model, optimizer, parallel=self.session.parallel, precision=self.config.precision)

    def _switch_to(self, number: int) -> None:
        """Begin a later phase, as `phase_switch` says. Averages always continue."""
        optimizer = self.phases[number][1].optimizer
        if self.config.phase_switch == "continue":
            self.student.continue_with(optimizer)
        else:
            self.model.load_state_dict(self.averages[0].state_dict())
            self.student = self._learner(self.model, optimizer)
        self._begin_phase(number)

    def _begin_phase(self, number: int) -> None:
        """Build the phase's objective, its critic, and the learner of the objective's own parameters."""
        config, device = self.config, self.session.device
        self.number, self.phase = number, self.phases[number][1]
        self.phase_start = self.phase_ends[number] - self.phase.iterations
        self.needs = self.phase.objective.needs()
        features = {
            name: Frozen(
                require_features(self.workspace, name, self.recipe)[0],
                device=device,
                dtype=DTYPES[config.precision],
                compiled=config.compiled,
            )
            for name in self.needs.features
        }
        models = {
            name: prepare(require_model(self.workspace, name, self.recipe)[0].to(device), precision=config.precision)
            for name in self.needs.models
        }
        torch.manual_seed(stream_seed(config.seed, "discriminator"))
        self.objective = self.phase.objective.build(
            Context(
                image_shape=self.model.image_shape,
                num_classes=self.model.label_dim,
                models=models,
                features=features,
                average=self.averages[0],
                images=self._real_images,
            )
        )
        self.critic: Learner | None = None
        if self.objective.critic is not None:
            assert self.objective.critic_optimizer is not None
            self.critic = self._learner(self.objective.critic.to(device), self.objective.critic_optimizer)
        self.state, self.weighting = self.objective.state(), None
        if self.state is not None:
            self.state.to(device)
            if any(parameter.requires_grad for parameter in self.state.parameters()):
                self.weighting = Learner(self.state, self.phase.optimizer)

    def step(self, step: int) -> loop.Figures:
        """Train on this rank's share of batch `step`. Switches to the next phase where it begins."""
        if step == self.phase_ends[self.number]:
            if self.session.rank == 0:
                self._publish(self.folder / self.phases[self.number][0])
            self._switch_to(self.number + 1)
        generator = self.session.generator(self.config.seed, step)
        local = step - self.phase_start
        turns = self.objective.turns(local)
        learners = [learner for learner in (self.student, self.critic) if learner is not None]
        figures: loop.Figures = {PHASE: float(self.number)}
        for batch, last in self._batches(step, local):
            with learners[0].accumulating(last=last), learners[-1].accumulating(last=last):
                batch_figures = self.objective.backward(self.student, self.critic, batch, generator)
            for name, value in batch_figures.items():
                figures[name] = figures.get(name, 0.0) + batch.weight * value
        figures[SKIPPED] = 0.0
        if turns.student:
            figures |= self.student.update(local, self.phase.iterations)
            if self.weighting is not None:
                self.session.average_gradients(self.weighting.parameters)
                figures[SKIPPED] = max(figures[SKIPPED], self.weighting.update(local, self.phase.iterations)[SKIPPED])
        if self.critic is not None and turns.critic:
            critic_figures = self.critic.update(local, self.phase.iterations)
            figures[CRITIC_GRAD_NORM] = critic_figures[GRAD_NORM]
            figures[SKIPPED] = max(figures[SKIPPED], critic_figures[SKIPPED])
        if turns.student:
            for average, half_life in zip(self.averages, self.config.half_lives, strict=True):
                ema_update(average, self.model, half_life, step + 1, self.config.ema_ramp)
            self.objective.after_step(self.model)
        return figures

    def _batches(self, step: int, local: int) -> list[tuple[Batch, bool]]:
        """This rank's micro-batches of global step `step`, step `local` of the phase; True marks the last one."""
        start, size = self.session.share(self.config.batch_size, step)
        rows: dict[str, np.ndarray] = {}
        if self.pairs is not None and self.needs.pairs:
            batch = self.pairs.batch(start, size)
            rows |= {"noise": batch["noise"], "x1": batch["x1"], "labels": batch["label"]}
        elif self.needs.noise:
            rows |= self._fresh(range(start, start + size))
        if self.images is not None and self.needs.images:
            batch = self.images.batch(start, size)
            rows |= {"real": batch["image"], "real_labels": batch["label"]}
        batches: list[tuple[Batch, bool]] = []
        for part in np.array_split(np.arange(size), self.config.accumulate):
            tensors = {name: self._tensor(name, column[part]) for name, column in rows.items()}
            weight = len(part) * self.session.world_size / self.config.batch_size
            micro_batch = Batch(size=len(part), step=local, total=self.phase.iterations, weight=weight, **tensors)
            batches.append((micro_batch, len(batches) + 1 == self.config.accumulate))
        return batches

    def _real_images(self) -> Iterator[torch.Tensor]:
        """This rank's share of all real images (of the classes), in batches of at most READ images: `Context.images`."""
        assert self.needs.all_images
        assert self.images_plan is not None
        reader = ShardReader(self.workspace / IMAGES, self.images_plan["images"], self.config.seed, self.classes)
        start, size = self.session.share(reader.count, 0)
        for first in range(start, start + size, READ):
            rows = reader.batch(first, min(READ, start + size - first))
            yield torch.from_numpy(to_float(rows["image"])).to(self.session.device)

    def _fresh(self, indices: range) -> dict[str, np.ndarray]:
        """Noise that no pair uses, a function of (seed, position in the stream of rows), with labels chosen as for pairs."""
        noise = unit_noise(stream_seed(self.config.seed, "training noise"), indices, self.model.image_shape)
        classes = self.classes or range(self.model.label_dim)
        return {"noise": noise, "labels": classes.start + pair_labels(indices, len(classes))}

    def _tensor(self, name: str, column: np.ndarray) -> torch.Tensor | None:
        device = self.session.device
        if name.endswith("labels"):
            labels = torch.from_numpy(column) if self.model.label_dim else None
            return as_one_hot(labels, self.model.label_dim, len(column), device)
        return torch.from_numpy(to_float(column) if column.dtype == np.uint8 else column).to(device)

    def validate(self, step: int) -> dict[str, float]:
        """Write a sheet of samples, and publish the model if it is the best so far. Returns the distance."""
        assert self.validation is not None
        figures, sheet = self.validation.judge(self.average())
        self.folder.write(f"{SAMPLES}/step-{step:08d}.png", sheet)
        if figures and figures[VALIDATION] < self.best:
            self.best = figures[VALIDATION]
            self._publish(self.folder / BEST, about={"step": step, **figures})
        return figures

    def state_dict(self) -> loop.State:
        """The phase and the best distance so far, the learning networks, the objective's state, and the averages."""
        trained = {"student": self.student, "critic": self.critic, "weighting": self.weighting}
        state = {name: None if learner is None else learner.state_dict() for name, learner in trained.items()}
        kept = None if self.state is None or self.weighting is not None else self.state.state_dict()
        return {
            "progress": {"phase": self.number, "best": self.best},
            **state,
            "objective": kept,
            "averages": [average.state_dict() for average in self.averages],
        }

    def load_state_dict(self, state: loop.State) -> None:
        """Continue from a checkpoint of any phase."""
        for number in range(self.number + 1, state["progress"]["phase"] + 1):
            self._switch_to(number)
        for average, weights in zip(self.averages, state["averages"], strict=True):
            average.load_state_dict(weights)
        for name, learner in (("student", self.student), ("critic", self.critic), ("weighting", self.weighting)):
            if learner is not None:
                learner.load_state_dict(state[name])
        if self.state is not None and self.weighting is None:
            self.state.load_state_dict(state["objective"])
        self.best = state["progress"]["best"]

    def publish(self) -> None:
        """Write the model (the first average), and the other averages into ema-<half-life>."""
        self._publish(self.folder)
        for average, half_life in list(zip(self.averages, self.config.half_lives, strict=True))[1:]:
            self._publish(self.folder / average_name(half_life), average)

    def average(self, average: Denoiser | None = None) -> Denoiser:
        """The first average, or `average`, marked with how it may be sampled."""
        model = average or self.averages[0]
        model.few_step = self.phase.objective.sampling()
        return model

    def _publish(self, folder: Folder, average: Denoiser | None = None, about: dict[str, Any] | None = None) -> None:
        record = self.config.record(self.phases[self.number][0]) | (about or {})
        if self.classes is not None:
            record |= {"classes": [self.classes[0], self.classes[-1]]}
        publish_model(folder, dump(self.average(average), record))
