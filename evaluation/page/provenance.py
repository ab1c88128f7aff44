"""Where the figures come from: weights, devices and libraries of every measurement, and the plans of all stages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from beeline.errors import reading
from beeline.files.layout import check_layout
from beeline.files.names import CONFIG, EVALUATION, IMAGES, PAIRS, PROBE, SWEEPS, TEACHER
from evaluation.models import Model, student_folders
from evaluation.page.tables import MODEL, Cell, Column, Row, Table, texts
from evaluation.page.words import NONE
from evaluation.results import METRICS, again
from pipeline.records import plan_in
from pipeline.storage import Folder

LAYOUT = {
    "model_sha256?": str,
    "devices?": [str],
    "evaluate?": {"precision?": str},
    "libraries?": {},
    "networks_sha256?": {},
    "resize?": {},
    "noise_seeds?": [0],
    "count?": 0,
    "images?": str,
    "reference_sha256?": str,
    "quantised?": str,
}
"""What the page reads of the provenance in metrics.json."""
DIGITS = 16  # of a SHA-256 in the table


def measurements(place: Folder, models: Sequence[Model]) -> Table:
    """The weights, devices, precision and PyTorch of each model's measurement."""
    rows = []
    for model in models:
        found = _checked(place, model)
        digest = found.get("model_sha256") or ""
        shown = f"{digest[: DIGITS - 1]}…" if len(digest) > DIGITS else digest or NONE
        devices = ", ".join(found.get("devices") or [NONE])
        precision = (found.get("evaluate") or {}).get("precision") or NONE
        torch = str((found.get("libraries") or {}).get("torch") or NONE)
        cells = (Cell(text=shown, tip=digest, code=True), *texts(devices, precision, torch))
        rows.append(Row(head=model.title, number=model.number, cells=cells))
    titles = ("SHA-256 of its weights", "measured on", "precision", "PyTorch")
    return Table(label="Provenance", columns=(MODEL, *(Column(title=title, kind="") for title in titles)), rows=tuple(rows))


def facts(place: Folder, model: Model) -> list[tuple[str, Markup]]:
    """How `model` was measured, as (what, text)."""
    found = _checked(place, model)
    resize = found.get("resize") or {}
    networks = [
        Markup("{} <code>{}</code>{}").format(name, digest, f" (resized: {resize[name]})" if resize.get(name) else "")
        for name, digest in (found.get("networks_sha256") or {}).items()
    ]
    given = found.get("reference_sha256")
    reference = Markup("from a file, <code>{}</code>").format(given) if given else Markup("of the workspace's real images")
    libraries = ", ".join(f"{name} {version}" for name, version in (found.get("libraries") or {}).items())
    return [
        ("Samples per draw", _text(found.get("count"))),
        ("Noise seeds", _text(", ".join(map(str, found.get("noise_seeds") or [])))),
        ("Measuring networks", Markup("<br>").join(networks) or _text("")),
        ("Real images", Markup("<code>{}</code> (fingerprint of their plan)").format(found.get("images") or NONE)),
        ("Reference statistics", reference),
        ("8-bit images", _text(found.get("quantised"))),
        ("Libraries", _text(libraries)),
    ]


def plans(place: Folder, models: Sequence[Model]) -> list[tuple[str, str]]:
    """The settings of every stage and measurement, as (folder, JSON)."""
    students = student_folders(place)
    students += [f"{student}/{PAIRS}" for student in students]
    swept = [f"{SWEEPS}/{name}" for name in (place / SWEEPS).folders()]
    found: list[tuple[str, Mapping[str, Any] | None]] = [
        (folder, plan_in(place / folder, {})) for folder in (IMAGES, PROBE, TEACHER, PAIRS, *students, *swept)
    ]
    with reading(f"{place / TEACHER}/{CONFIG} does not say where the teacher is from", "make or copy the model again"):
        config = (place / TEACHER).read_json(CONFIG) or {}
        check_layout(config, {"about?": {}})
        found.append(("teacher, imported", (config.get("about") or {}).get("imported")))
    found += [(f"{EVALUATION}/{model.name}", model.provenance) for model in models]
    return [(folder, json.dumps(plan, indent=1)) for folder, plan in found if plan]


def _checked(place: Folder, model: Model) -> Mapping[str, Any]:
    folder = place / EVALUATION / model.name
    with reading(f"{folder}/{METRICS} is not as expected", again(folder)):
        check_layout(model.provenance, LAYOUT, "provenance")
        return model.provenance


def _text(value: object) -> Markup:
    return Markup("{}").format(value or NONE)
