"""What the training of a student costs, in evaluations of its network for one image.

A forward pass of the student's network counts 1, a backward pass 2. Everything else that a step runs (teacher, targets, critic,
feature networks, derivatives) counts by its FLOPs, in units of one evaluation. The record in a student's _SUCCESS:

    training     evaluations of all phases; null if one is unknown
    phases       the same by phase
    pairs        evaluations for the pairs that it trained on, 0 if it needs none; null if unknown
    inherited    the same two numbers of each student that it started from, learned from or has pairs of, and of theirs

A set of students costs the sum of its trainings, one for each subset of the classes. Sums count everything once: at most one
entry counts the teacher's pairs. Training the teacher is not included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from beeline import counting
from beeline.config import NetworkConfig, PhaseConfig, ProbeNetworkConfig, StudentConfig
from beeline.files.names import STUDENTS, TEACHER, pairs_folder
from pipeline.model_folders import require_probe
from pipeline.records import PAIRS_DONE, cost_in, evaluations_of, success_in
from pipeline.storage import Folder

T = TypeVar("T")
UNKNOWN = {"training": None, "pairs": None}
NO_PROBE = ProbeNetworkConfig(widths=(4,), strides=(1,))


def training_cost(place: Folder, recipe: str, student: StudentConfig, network: NetworkConfig | None) -> dict[str, Any]:
    """The record of a student whose training has ended. `network` is that of the model it started from. Takes seconds for each
    objective. A phase that cannot be counted is null: methods of one's own may run code that needs data."""

    def of_phase(phase: PhaseConfig) -> int:
        assert network is not None
        probed = "probe" in phase.objective.needs().features
        probe = require_probe(place, "losses", recipe)[0].config if probed else NO_PROBE
        images = phase.iterations * student.batch_size * student.subsets
        return round(counting.step_evaluations(network, probe, phase.objective) * images)

    def of_pairs() -> int:
        done = success_in(place / pairs_folder(student.pairs), PAIRS_DONE)
        assert done is not None
        return int(done["evaluations"])

    def known(what: str, count: Callable[..., T], *arguments: Any) -> T | None:
        return _unless_it_fails(f"students/{student.name}: the cost of {what}", count, *arguments)

    phases = {name: known(f"phase {name!r}", of_phase, phase) for name, phase in student.running.items()}
    needs, counts = student.needs(), list(phases.values())
    inherited: dict[str, dict[str, Any]] = {}
    makers = (student.pairs,) if needs.pairs else ()
    for model in dict.fromkeys((student.start, *makers, *needs.models)):
        if model.startswith(f"{STUDENTS}/"):
            _add(inherited, model, known(made_by(model), cost_in, place / made_by(model)))
    _count_pairs_once(inherited, counted=needs.pairs and student.pairs == TEACHER)
    return {
        "training": None if None in counts else sum(count for count in counts if count is not None),
        "phases": phases,
        "pairs": known("pairs", of_pairs) if needs.pairs else 0,
        "inherited": inherited,
    }


def _unless_it_fails(what: str, count: Callable[..., T], *arguments: Any) -> T | None:
    """The count; None, and a line that says why, if it fails: by now the training has succeeded."""
    try:
        return count(*arguments)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        print(f"{what} is not counted: {reason:.200}", flush=True)
        return None


def _add(entries: dict[str, dict[str, Any]], model: str, cost: Mapping[str, Any] | None) -> None:
    """Add a student's model, whose record is `cost`, and what it inherited. Of two parts of one student the longer counts."""
    own = UNKNOWN if cost is None else {"training": evaluations_of(cost, model.rpartition("/")[2]), "pairs": cost["pairs"]}
    for name, entry in ({made_by(model): own} | (cost["inherited"] if cost else {})).items():
        before = entries.get(name, entry)
        entries[name] = {key: None if None in (before[key], entry[key]) else max(before[key], entry[key]) for key in UNKNOWN}


def _count_pairs_once(entries: Mapping[str, dict[str, Any]], *, counted: bool) -> None:
    """Set the pairs to 0 in all entries but the first that has any; in all if they are already `counted`."""
    for entry in entries.values():
        entry["pairs"] = 0 if counted and entry["pairs"] else entry["pairs"]
        counted = counted or bool(entry["pairs"])


def made_by(model: str) -> str:
    """The student's folder of a model: students/<name> for students/<name>/<phase>."""
    return "/".join(model.split("/")[:2])
