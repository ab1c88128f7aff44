"""Recipe: the settings of every stage."""

from __future__ import annotations

import dataclasses

from beeline.config.data import ImagesConfig, PairsConfig
from beeline.config.evaluation import EvaluateConfig
from beeline.config.student import StudentConfig
from beeline.config.sweep import SweepConfig
from beeline.config.teacher import TeacherConfig
from beeline.config.training import ProbeConfig
from beeline.settings import Name, RecipeName, Settings, Some, StepList, Steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """Settings of every stage for one data set. `students` holds the main student and its ablations."""

    name: RecipeName
    images: ImagesConfig
    probe: ProbeConfig
    teacher: TeacherConfig
    pairs: PairsConfig
    students: dict[Name, StudentConfig]
    """Students by name. The first is the main one, which sweeps vary."""
    few_steps: Some[StepList]
    """Step schedules to measure students at. A student trained on some steps is measured at those that use them alone, here
    and in `evaluate.steps`."""
    reflow_steps: Steps = 8
    """Heun steps of pairs that a student makes for another (`StudentConfig.pairs`). Fewer than the teacher's, because such
    students are flows with straighter paths."""
    sweep: SweepConfig
    evaluate: EvaluateConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(bool(self.students), "students", "at least one student")
        for key, student in self.students.items():
            student.require(student.name == key, "name", f"{key!r}, its name in the recipe")

    @property
    def main(self) -> StudentConfig:
        """The first student."""
        return next(iter(self.students.values()))

    def pairs_of(self, model: str) -> PairsConfig:
        """Settings of the pairs that the model in folder `model` makes, for students that train on them."""
        if model == self.pairs.model:
            return self.pairs
        return dataclasses.replace(self.pairs, model=model, solver="heun", num_steps=self.reflow_steps)
