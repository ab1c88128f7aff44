"""The cost of a workspace: seconds of its stages, and the number of images after which the pairs are paid back.

The page distinguishes wall-clock seconds, actor-seconds and device-seconds. It states device-seconds only if the record names
the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from beeline.files.names import EVALUATION, IMAGES, PAIRS, PROBE, SWEEPS, TEACHER, pairs_folder
from evaluation.bench import HELD_OUT
from evaluation.models import Model, student_folders
from evaluation.page.tables import Column, Row, Table, texts
from evaluation.page.words import plural, seconds
from evaluation.reference import REFERENCE
from pipeline.manifest import read_manifest, sampling_seconds
from pipeline.records import COST, FILES, PAIRS_DONE, plan_in, success_in
from pipeline.storage import Folder

CPU = "CPU"  # the device of an actor without a GPU
LEFT_OUT = (*FILES, "device_seconds", COST)  # facts of a stage that have a column or a sentence of their own


def stages(place: Folder, models: Sequence[Model]) -> Table | None:
    """Every complete stage, in the order of the data."""
    folders = [IMAGES, PROBE, TEACHER, PAIRS]
    students = student_folders(place)
    folders += students + [f"{parent}/{name}" for parent in (SWEEPS, REFERENCE) for name in (place / parent).folders()]
    folders += [pairs_folder(student) for student in students]
    folders += [HELD_OUT, *(f"{EVALUATION}/{model.name}" for model in models)]
    rows = []
    for folder in folders:
        done = success_in(place / folder)
        if done:
            facts = {name: value for name, value in done.items() if name not in LEFT_OUT}
            text = ", ".join(f"{name.replace('_', ' ')} {_fact(value)}" for name, value in facts.items())
            rows.append(Row(head=folder, cells=texts(f"{done['seconds']:,.0f}", text)))
    columns = (Column(title="stage", kind=""), Column(title="seconds"), Column(title="results", kind="long dim"))
    return Table(label="Stages", columns=columns, rows=tuple(rows)) if rows else None


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return "/".join(_fact(item) for item in value.values())
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsCost:
    """The cost of the pairs, in evaluations of the teacher and in seconds."""

    pairs: int
    evaluations: int
    each: int
    """Evaluations of the teacher per pair."""
    seconds: float
    """0 if they are not known."""
    kind: str
    """The kind of the seconds: "GPU-seconds", "CPU-seconds" or "actor-seconds"."""
    device: str
    """The GPUs, as " (NVIDIA H200)", or ""."""
    note: str
    """A sentence about missing records; "" if nothing is missing."""

    def paid_back(self, nfe: int) -> int | None:
        """Images after which a student of `nfe` evaluations has saved as many as the pairs took; None if it saves none."""
        saved = self.each - nfe
        return -(-self.evaluations // saved) if saved > 0 else None

    def sentences(self, nfe: int) -> list[str]:
        """Sentences on the cost of the pairs, and on the evaluations that a student of `nfe` evaluations saves."""
        took = f", in {seconds(self.seconds)} {self.kind}{self.device}" if self.seconds else ""
        said = [f"{self.pairs:,} pairs of {self.each} evaluations: {self.evaluations:,} evaluations of the teacher{took}."]
        saved = self.each - nfe
        if saved > 0:
            sampling = f" and {seconds(self.seconds / saved)} {self.kind} of sampling" if self.seconds else ""
            said.append(
                f"A student of {plural(nfe, 'evaluation')} saves {saved} of {self.each} evaluations per image. This costs "
                f"{self.pairs / saved:,.1f} pairs{sampling} for each evaluation saved per image. The pairs are paid back after "
                f"{self.paid_back(nfe):,} images, counted in evaluations. Training is not counted."
            )
        return [*said, self.note] if self.note else said


def pairs_cost(place: Folder) -> PairsCost | None:
    """The cost of pairs/; None if it is not complete."""
    done, plan = success_in(place / PAIRS, PAIRS_DONE), plan_in(place / PAIRS, {"evaluations": 1})
    if not done or not plan:
        return None
    devices: Mapping[str, float] = done.get("device_seconds") or {}
    known = sampling_seconds(read_manifest(place / PAIRS))
    notes = []
    if devices:
        total, (kind, device) = sum(devices.values()), _kind(list(devices))
    else:
        total, kind, device = sum(known), "actor-seconds", ""
        if total:
            notes.append("The devices of the actors are not on record, so these seconds are neither CPU- nor GPU-seconds.")
        if known and len(known) < int(done["shards"]):
            notes.append(f"The seconds are those of {len(known)} of {done['shards']} shards; of the others no time is known.")
    return PairsCost(
        pairs=int(done["pairs"]),
        evaluations=int(done["evaluations"]),
        each=int(plan["evaluations"]),
        seconds=total,
        kind=kind,
        device=device,
        note=" ".join(notes),
    )


def _kind(devices: Sequence[str]) -> tuple[str, str]:
    """The kind of the seconds of these devices, and the GPUs among them in brackets."""
    gpus = [name for name in devices if name != CPU]
    if not gpus:
        return "CPU-seconds", ""
    kind = "GPU-seconds" if len(gpus) == len(devices) else "GPU- and CPU-seconds"
    return kind, f" ({', '.join(gpus)})"
