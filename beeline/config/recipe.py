"""Recipe: the settings of every stage."""

from __future__ import annotations

import dataclasses

from beeline.config.data import ImagesConfig, PairsConfig
from beeline.config.evaluation import EvaluateConfig
from beeline.config.student import StudentConfig
from beeline.config.sweep import SweepConfig
from beeline.config.teacher import TeacherConfig
from beeline.config.training import ProbeConfig
from beeline.settings import Name, RecipeName, Settings, Some, StepList


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(Settings):
    """All settings for one data set, stage by stage. `students` are the main one and its ablations."""

    name: RecipeName
    images: ImagesConfig
    probe: ProbeConfig
    teacher: TeacherConfig
    pairs: PairsConfig
    students: dict[Name, StudentConfig]
    """The first is the main one, used by sweeps."""
    few_steps: Some[StepList]
    """Step schedules at which to measure students that accept any level."""
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
