"""Settings of a student: phases of training, each with an objective."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from beeline.config.serialization import resource, to_dict
from beeline.config.training import PhaseConfig, TrainingConfig
from beeline.files.names import CHECKPOINTS, CONFIG, LOG, PAIRS, PLAN, STUDENTS, SUCCESS, TEACHER, TENSORBOARD, WEIGHTS
from beeline.settings import MAX_SIZE, HalfLife, ModelPath, Name, Range, ShareBelow1, Some, Steps, Whole, added

# Folders in a student's folder: the best of its validations, the validations' samples, and its other averages.
BEST, SAMPLES, AVERAGE = "best", "samples", "ema-"
RESERVED = (BEST, CHECKPOINTS, PAIRS, SAMPLES, TENSORBOARD, CONFIG, WEIGHTS, PLAN, LOG, SUCCESS)
"""Names that a student's folder already uses. No phase may have one of them."""


def student_folder(name: str, part: str = "") -> str:
    """The workspace folder of student `name`, or of a `part` of it: a phase, BEST or another average."""
    return "/".join([STUDENTS, name, *([part] if part else [])])


SCRATCH = "scratch"
"""`StudentConfig.init` for new weights."""


def average_name(half_life: float) -> str:
    """The folder of the average with this half-life (iterations), within the student's folder."""
    return f"{AVERAGE}{half_life:g}"


def half_life_of(part: str) -> str | None:
    """The half-life in an average's folder name; None for folders of other kinds."""
    return part.removeprefix(AVERAGE) if part.startswith(AVERAGE) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudentConfig(TrainingConfig):
    """A student: consecutive phases of training, from the weights of another model."""

    name: Name
    init: ModelPath = "teacher"
    """Folder of the model whose weights the student starts from: "teacher" or "students/<name>"; "scratch" for new weights of
    the teacher's network."""
    pairs: ModelPath = added("teacher")
    """Folder of the model whose pairs the student trains on: "teacher", or "students/<name>", a rectified flow (reflow)."""
    dropout: ShareBelow1 = added(0.0)
    """Dropout of the network in training."""
    subsets: Steps = added(1)
    """Subsets of consecutive classes, each with a student of its own, students/<name>/<number>. students/<name> then sends each
    sample to the student of its class. One evaluation per sample, and as many trainings as subsets."""
    phases: dict[Name, PhaseConfig]
    """Phases by name, in order. After each phase but the last, the student is published as students/<name>/<phase>."""
    ema_half_lives: Some[HalfLife] = (693.0,)
    """Half-lives of the averages of the weights, in iterations; 693 is the paper's decay of 0.999. The first average is the
    student, the others are published as <name>/ema-<half-life>. Averages continue through all phases."""
    phase_switch: Literal["continue", "restart"] = "continue"
    """Start of a later phase. "continue" keeps the weights and the optimiser's moments, as in CTM's code, where the adversarial
    term joins a running training. "restart" takes the averaged weights and a new optimiser."""
    compiled: bool = False
    """Compile student and frozen networks: worth it on GPUs and in long runs, costs minutes at the start."""
    validate_every: Whole = resource(0)
    """Iterations between validations. Each writes a sheet of samples and measures a distance in the losses' probe, which
    selects students/<name>/best. 0 disables validation."""
    validate_count: Annotated[int, Range(1, MAX_SIZE)] = resource(1024)
    """Samples of a validation."""
    trackers: tuple[Literal["mlflow", "wandb"], ...] = resource(())
    """Trackers that get the log in addition to train.jsonl and TensorBoard."""

    def __post_init__(self) -> None:
        super().__post_init__()
        taken = [name for name in self.phases if name in RESERVED or name.startswith(AVERAGE)]
        names = f"{', '.join(RESERVED)} and {AVERAGE}..."
        self.require(not taken, "phases", f"names other than {names}, which the student's folder uses")
        numbers = [name for name in self.phases if self.subsets > 1 and name.isdecimal()]
        self.require(not numbers, "phases", "names that are not numbers, because a set of students uses them for its parts")
        folders = {average_name(half_life) for half_life in self.ema_half_lives}
        distinct = len(folders) == len(self.ema_half_lives)
        self.require(
            distinct, "ema_half_lives", "values that differ in their first six digits, since folders are named after them"
        )

    @property
    def start(self) -> str:
        """Folder of the model that the student's network comes from, with its weights unless `init` is SCRATCH."""
        return TEACHER if self.init == SCRATCH else self.init

    @property
    def running(self) -> dict[str, PhaseConfig]:
        """The phases with iterations above 0."""
        return {name: phase for name, phase in self.phases.items() if phase.iterations}

    @property
    def trainings(self) -> tuple[str, ...]:
        """Folders of the student's trainings: its own, or one for each of its subsets."""
        return tuple(student_folder(self.name, self.part_name(number)) for number in range(self.subsets))

    def part_name(self, number: int) -> str:
        """The folder of the training of subset `number` within the student's folder; "" if there is one training."""
        return str(number) if self.subsets > 1 else ""

    @property
    def iterations(self) -> int:
        """Total steps of all phases, of one training."""
        return sum(phase.iterations for phase in self.phases.values())

    @property
    def half_lives(self) -> tuple[float, ...]:
        """The same as `ema_half_lives`."""
        return self.ema_half_lives

    def record(self, phase: str) -> dict[str, Any]:
        """Facts about the training, for the config.json of the student after `phase`. "features" are the feature networks that
        the losses so far have used: a distance in them does not measure the student independently."""
        names = list(self.running)
        until = names[: names.index(phase) + 1]
        features = dict.fromkeys(name for part in until for name in self.phases[part].objective.needs().features)
        trained = to_dict(self, resources=False)
        return {
            "method": self.phases[phase].objective.about(),
            "phase": phase,
            "features": sorted(features),
            "trained": trained,
        }

    def models(self) -> dict[str, PhaseConfig]:
        """The published models by folder, each with the phase that made it. The last one is the student itself.

        Other averages and the best validated student are not included.
        """
        running = list(self.running.items())
        last = {student_folder(self.name): running[-1][1]} if running else {}
        return {student_folder(self.name, name): phase for name, phase in running[:-1]} | last
